"""The table of all rewrites, which plans, reports, help and docs read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["layer", "group", "head", "graph"]


@dataclass(frozen=True)
class RewriteRow:
    """A rewrite's name and description.

    Attributes:
        name: Its name in plans.
        kind: What it changes: a single layer, a group of layers that share channels, a network's
            head, or layers that it finds from the data flow.
        module: The module with its functions, below the package ``onebyone``.
        label: What was done to a site, for a report.
        summary: What it does, in a sentence.
    """

    name: str
    kind: Kind
    module: str
    label: str
    summary: str


# In the order of a report's legend.
REWRITES: dict[str, RewriteRow] = {
    row.name: row
    for row in (
        RewriteRow(
            "factorize",
            "layer",
            "rewrites.low_rank.factorize",
            "factorized",
            "a convolution or linear layer becomes a chain through fewer channels",
        ),
        RewriteRow(
            "narrow",
            "group",
            "rewrites.narrow.rewrite",
            "narrowed",
            "hidden channels are removed, and the layers that read them are refitted",
        ),
        RewriteRow(
            "head",
            "head",
            "rewrites.head.rewrite",
            "new head",
            "flatten + linear becomes convolutions: exact, or 1×1 + global average pooling",
        ),
        RewriteRow(
            "deepen",
            "graph",
            "rewrites.deepen",
            "deepened",
            "a 1×1 convolution and an activation are added that start as the identity",
        ),
        RewriteRow(
            "separable",
            "layer",
            "rewrites.low_rank.separable",
            "made separable",
            "a k×k convolution becomes a sum of depthwise k×k and 1×1 convolutions",
        ),
        RewriteRow(
            "fold",
            "graph",
            "rewrites.fold.fold",
            "folded",
            "adjacent layers with nothing between them become one of the same function",
        ),
    )
}


def label_of(rewrite: str) -> str:
    """Return a rewrite's label; for a rewrite of another package its name."""
    return REWRITES[rewrite].label if rewrite in REWRITES else rewrite
