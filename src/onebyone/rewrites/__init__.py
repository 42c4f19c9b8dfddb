"""The ways to change a site, and a plan carried out on a copy of a network."""

from __future__ import annotations

from onebyone.core.rewrite_rows import REWRITES
from onebyone.rewrites.apply import apply, restructure

__all__ = ["REWRITES", "apply", "restructure"]
