"""Layers through fewer channels: factors and separable sums, fitted to data."""
