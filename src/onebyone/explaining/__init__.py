"""Explanations of a network's predictions on images: class activation maps and feature maps."""

from onebyone.explaining.images import Explained, explain
from onebyone.explaining.record import Explanation

__all__ = ["Explained", "Explanation", "explain"]
