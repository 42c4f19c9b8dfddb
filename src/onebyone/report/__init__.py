"""What people look at: the console's tables and progress, and pages that are one file."""
