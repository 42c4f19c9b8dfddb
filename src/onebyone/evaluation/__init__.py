"""Scores, their statistics, and comparisons of networks on the same examples."""
