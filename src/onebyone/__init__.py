"""onebyone makes a convolutional network smaller and faster with 1×1 convolutions."""

__version__ = "0.1.0"
