"""Draws masks of classes: each has a color and a pattern, and a line surrounds each region."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onebyone.report.pictures import as_data_uri

Integers = NDArray[np.int64]
Pixels = NDArray[np.uint8]

# Okabe and Ito's colors, which are told apart with any color vision.
_COLORS = np.array(
    [
        (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
        (204, 121, 167),
    ],
    dtype=np.uint8,
)  # fmt: skip
_GRAY = np.array((128, 128, 128), dtype=np.uint8)
_PATTERNS = 6
_PERIOD, _LINE = 10, 3  # of a pattern, in pixels of the drawn mask
_FILL, _EDGE = 120, 235  # opacities of 255, of a region and of lines

# Styles of classes are 0 … STYLES - 1: more could not be told apart.
STYLES = 20
OTHERS = STYLES  # of all other classes
IGNORED = STYLES + 1  # of pixels that are not counted
CLEAR = -1  # not drawn
SIDE = 240  # the longer side of a drawn mask in pixels
_SAMPLE = 24


def draw_mask(styles: Integers) -> str:
    """Return a mask as the ``data:`` address of a picture that lies over its image.

    Args:
        styles: Number of each pixel's style, shape ``(height, width)``; ``CLEAR`` is transparent.
    """
    return _address(_drawn(_fitted(styles)))


def draw_sample(style: int) -> str:
    """Return a sample of a style for a legend, as a ``data:`` address."""
    return _address(_drawn(np.full((_SAMPLE, _SAMPLE), style)))


def _fitted(styles: Integers) -> Integers:
    """Return a mask scaled to ``SIDE``, without mixing styles."""
    height, width = styles.shape
    scale = SIDE / max(height, width)
    size = [max(1, round(each * scale)) for each in (height, width)]
    rows, columns = (
        np.minimum((np.arange(new) + 0.5) * old / new, old - 1).astype(np.int64)
        for new, old in zip(size, (height, width), strict=True)
    )
    fitted: Integers = styles[rows][:, columns]
    return fitted


def _drawn(styles: Integers) -> Pixels:
    """Return colors and opacities, shape ``(height, width, 4)``."""
    named = styles < STYLES
    colors = np.where(named[..., None], _COLORS[styles % len(_COLORS)], _GRAY)
    opacity = np.where(_lines(styles), _EDGE, _FILL)
    drawn = np.concatenate([colors, opacity[..., None]], axis=2).astype(np.uint8)
    drawn[styles == CLEAR] = 0
    drawn[_borders(styles)] = (0, 0, 0, _EDGE)
    return drawn


def _lines(styles: Integers) -> NDArray[np.bool_]:
    """Return where each pixel's pattern has a line or a dot."""
    rows, columns = np.indices(styles.shape)
    along = np.stack([rows + columns, rows - columns, rows, columns])
    rising, falling, level, upright = along % _PERIOD < _LINE
    none = np.zeros_like(level)
    patterns = np.stack([none, rising, falling, level, upright, level & upright])
    kind = np.where(styles < STYLES, styles % _PATTERNS, 0)
    lines: NDArray[np.bool_] = np.take_along_axis(patterns, kind[None], axis=0)[0]
    lines |= (styles == OTHERS) & (rising | falling)
    lines |= (styles == IGNORED) & (level | upright)
    return lines


def _borders(styles: Integers) -> NDArray[np.bool_]:
    """Return the pixels whose right or lower neighbor has another style."""
    border = np.zeros(styles.shape, dtype=bool)
    border[:, :-1] = styles[:, :-1] != styles[:, 1:]
    border[:-1] |= styles[:-1] != styles[1:]
    return border


def _address(drawn: Pixels) -> str:
    stream = io.BytesIO()
    Image.fromarray(drawn).save(stream, format="webp", lossless=True, quality=100)
    return as_data_uri(stream.getvalue(), "webp")
