"""What a network sees in images: class activation maps and feature maps, drawn and recorded."""

from onebyone.explaining.images import Explained, explain
from onebyone.explaining.record import Explanation

__all__ = ["Explained", "Explanation", "explain"]
