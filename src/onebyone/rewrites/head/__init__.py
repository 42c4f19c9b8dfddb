"""Flatten and linear layers as convolutions."""
