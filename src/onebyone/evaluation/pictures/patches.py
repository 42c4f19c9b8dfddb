"""Patches of the images that two networks restore, where these differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from onebyone.core.records import OutputPictures, PicturedExample, PicturedOutput
from onebyone.evaluation.pictures.examples import Seen
from onebyone.report.pictures import data_uri

Pixels = NDArray[np.uint8]

SIDE = 64  # most pixels a side of a patch: these are kept without loss
MOST_AMPLIFIED = 1024
# Values between these ends are shown as if 0 is black and 1 is white.
_UNIT = (-0.1, 1.1)


@dataclass(frozen=True)
class _Window:
    """A patch's position, as shares of the image's height and width."""

    top: float
    left: float
    height: float
    width: float

    def of(self, image: Tensor) -> Tensor:
        """Return that patch of an image ``(channels, height, width)`` of any size."""
        down, across = image.shape[1:]
        top, left = round(self.top * down), round(self.left * across)
        height, width = (
            max(1, round(share * size))
            for share, size in ((self.height, down), (self.width, across))
        )
        return image[:, top : top + height, left : left + width]


def patch_pictures(begun: OutputPictures, seen: Sequence[Seen]) -> OutputPictures | None:
    """Return patches of the input, of both outputs and of the true image.

    Args:
        begun: The record without examples.
        seen: Examples; the networks' outputs are images ``(1, channels, height, width)``.

    Returns:
        The record; ``None`` if inputs or outputs are no gray or RGB images.
    """
    images = [tensor for each in seen for tensor in (each.inputs, each.before, each.after)]
    if any(image.ndim != 4 or image.shape[1] not in {1, 3} for image in images):
        return None
    return replace(begun, examples=tuple(_pictured(each) for each in seen))


def _pictured(seen: Seen) -> PicturedExample:
    before, after = seen.before[0], seen.after[0]
    window = _most_different(before, after)
    truth = None
    if seen.target is not None and seen.target.shape == seen.before.shape:
        truth = window.of(seen.target[0].float())
    first, second = window.of(before), window.of(after)
    # One scale for all, or a difference of brightness would not be seen.
    low, high = _ends(first if truth is None else truth)
    factor = _amplification(second - first, high - low)
    middle = (low + high) / 2
    source = window.of(seen.inputs[0])
    if seen.image is not None:
        # The data knows how inputs were normalized.
        source = window.of(torch.from_numpy(seen.image).permute(2, 0, 1)).float() / 255
    return seen.pictured(
        PicturedOutput(picture=_address(first, low, high)),
        PicturedOutput(picture=_address(second, low, high)),
        None if truth is None else PicturedOutput(picture=_address(truth, low, high)),
        image=_address(source, *_ends(source)),
        difference=_address(middle + factor * (second - first), low, high),
        amplified=factor,
    )


def _most_different(before: Tensor, after: Tensor) -> _Window:
    """Return the patch with the largest squared difference."""
    apart = (after - before).double().square().sum(dim=0)
    height, width = (min(SIDE, size) for size in apart.shape)
    sums = F.avg_pool2d(apart[None, None], (height, width), stride=1)[0, 0]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    down, across = apart.shape
    return _Window(top / down, left / across, height / down, width / across)


def _ends(patch: Tensor) -> tuple[float, float]:
    """Return the values that are shown black and white."""
    low, high = float(patch.min()), float(patch.max())
    if _UNIT[0] <= low and high <= _UNIT[1]:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def _amplification(difference: Tensor, span: float) -> int:
    """Return the largest power of two that keeps a difference within the scale."""
    largest = float(difference.abs().max())
    factor = 1
    while factor < MOST_AMPLIFIED and 0 < 2 * factor * largest <= span / 2:
        factor *= 2
    return factor


def _address(patch: Tensor, low: float, high: float) -> str:
    pixels = ((patch.double() - low) / (high - low) * 255).numpy()
    return data_uri(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
