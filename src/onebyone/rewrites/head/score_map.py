"""A head of convolutions only, which gives a map of scores for a larger image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

from onebyone.core.errors import ModelError


def _one_score(scores: Tensor) -> Tensor:
    """Return scores of one place as a vector, and a map of scores as it is."""
    return scores.flatten(1) if scores.shape[-2:] == (1, 1) else scores


# The condition stays closed when the network is traced.
fx.wrap("_one_score")


class ScoreMapHead(nn.Sequential):
    """A classifier of convolutions only: scores of one window, or a map of scores of many.

    Args:
        steps: Convolutions, activations and dropout.
        by_place: Whether a map of scores is of use to what follows; if not, it is refused.

    Shapes:
        A map that the first kernel covers once gives ``(batch, classes)``; a larger one gives
        ``(batch, classes, height, width)``, a score for each place of the kernel.

    Raises:
        ModelError: On a larger map, if ``by_place`` is false.
    """

    def __init__(self, *steps: nn.Module, by_place: bool = True) -> None:
        super().__init__(*steps)
        self.by_place = by_place

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, or the map of scores."""
        scores: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return _one_score(scores) if self.by_place else _only_score(scores)


def _only_score(scores: Tensor) -> Tensor:
    if scores.shape[-2:] != (1, 1):
        height, width = scores.shape[-2:]
        raise ModelError(
            f"The image must be of the size that the head was made for, but it has {height}×{width}"
            f" windows, and what the network does with its scores is for one. Crop it."
        )
    return scores.flatten(1)


fx.wrap("_only_score")


class PlaceNorm(nn.LayerNorm):
    """A layer norm of the channels at each place of a map.

    Shapes:
        ``(batch, channels, height, width)`` to the same.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.LayerNorm
        """Return the normalized map."""
        last = input.movedim(1, -1)
        normed = F.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.movedim(-1, 1)
