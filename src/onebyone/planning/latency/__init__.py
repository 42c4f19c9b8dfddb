"""Plans whose budget is a measured time."""
