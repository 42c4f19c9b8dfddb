"""The ways to change a site, and a plan carried out on a copy of a network."""

from __future__ import annotations

from onebyone.rewrites.apply import apply, restructure

__all__ = ["REWRITES", "apply", "restructure"]

REWRITES = {
    "factorize": "a convolution or linear layer becomes a chain through fewer channels",
    "head": "flatten + linear becomes convolutions: exact, or 1×1 + global average pooling",
}
