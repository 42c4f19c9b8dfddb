"""Output for people: tables and progress in the console, and self-contained HTML pages."""
