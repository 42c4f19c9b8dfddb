"""The version of onebyone."""

__version__ = "0.1.0"
