"""The ways to change a site, and a plan carried out on a copy of a network."""

from __future__ import annotations

from onebyone.rewrites.apply import apply, restructure

__all__ = ["REWRITES", "apply", "restructure"]

REWRITES = {
    "factorize": "a convolution or linear layer becomes a chain through fewer channels",
    "separable": "a k×k convolution becomes a sum of depthwise k×k and 1×1 convolutions",
    "head": "flatten + linear becomes convolutions: exact, or 1×1 + global average pooling",
    "deepen": "a 1×1 convolution and an activation are added that start as the identity",
    "fold": "layers that follow one another become one of the same function",
}
