"""Exact layer fusion: folds batch norms and merges adjacent linear layers."""
