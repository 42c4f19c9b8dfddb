"""Turns arrays into pictures: feature maps in gray or color, activation maps over an image."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from onebyone.core.errors import OptionError

Array = npt.NDArray[np.generic]
Pixels = npt.NDArray[np.uint8]
ColorMap = Literal["viridis", "gray"]

# Seventeen evenly spaced colors of viridis (CC0). Interpolation between them is off by at most 6
# of 255.
_VIRIDIS = np.array(
    [
        (68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141),
        (44, 114, 142), (38, 130, 142), (33, 145, 140), (31, 159, 136), (39, 173, 129),
        (61, 188, 116), (92, 200, 99), (129, 211, 77), (170, 220, 50), (213, 226, 26),
        (253, 231, 37),
    ],
    dtype=np.float64,
)  # fmt: skip
_GRAY = np.array([(0, 0, 0), (255, 255, 255)], dtype=np.float64)
_ANCHORS = {"viridis": _VIRIDIS, "gray": _GRAY}


def data_uri(image: bytes | Array, *, small: bool = False) -> str:
    """Return a picture as a ``data:`` URL.

    Args:
        image: The bytes of a PNG file, or pixels of shape ``(height, width)`` or
            ``(height, width, 3)``, 0 to 255.
        small: Whether pixels become a lossy WebP, for photographs; a tenth of a PNG's size.
    """
    kind = "webp" if small and not isinstance(image, bytes) else "png"
    content = image if isinstance(image, bytes) else _encode(image, kind)
    return as_data_uri(content, kind)


def as_data_uri(content: bytes, kind: str) -> str:
    """Return the bytes of a picture file of a kind, such as ``png``, as a ``data:`` URL."""
    return f"data:image/{kind};base64," + base64.b64encode(content).decode("ascii")


def encode_png(pixels: Array) -> bytes:
    """Return pixels, ``(height, width)`` or ``(height, width, 3)``, 0 to 255, as a PNG file."""
    return _encode(pixels, "png")


def _encode(pixels: Array, kind: str) -> bytes:
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise OptionError(
            f"`pixels` must have shape (height, width) or (height, width, 3), got {pixels.shape}."
        )
    stream = io.BytesIO()
    clipped = np.clip(np.nan_to_num(pixels.astype(np.float64)), 0, 255).round().astype(np.uint8)
    options = {"quality": 86} if kind == "webp" else {"optimize": True}
    Image.fromarray(clipped).save(stream, format=kind, **options)
    return stream.getvalue()


def color_map(
    values: Array,
    *,
    colors: ColorMap = "viridis",
    low: float | None = None,
    high: float | None = None,
) -> Pixels:
    """Return a map's values as colors, dark to bright.

    Args:
        values: Shape ``(height, width)``, or any other.
        colors: ``viridis``, which is perceptually uniform, or ``gray``.
        low: Value of the darkest color. The default is the smallest value.
        high: Value of the brightest color. The default is the largest value.

    Returns:
        Pixels of shape ``(*values.shape, 3)``. Constant maps, and values that are not finite, get
        the darkest color.
    """
    share = _unit(values, low, high)
    anchors = _ANCHORS[colors]
    places = np.linspace(0, 1, len(anchors))
    channels = [np.interp(share, places, anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def image_pixels(image: Array) -> Pixels:
    """Return an input ``(channels, height, width)`` of any scale as pixels ``(height, width, 3)``.

    A single channel is shown in gray; of more than three, the first three are shown.
    """
    if image.ndim != 3:
        raise OptionError(f"`image` must have shape (channels, height, width), got {image.shape}.")
    three = image[:3] if image.shape[0] >= 3 else np.repeat(image[:1], 3, axis=0)
    pixels = (255 * _unit(three, None, None)).round().astype(np.uint8)
    return np.moveaxis(pixels, 0, -1)


def overlay(image: Array, activation: Array, *, strength: float = 0.55) -> Pixels:
    """Return a class activation map drawn over its image.

    Args:
        image: Shape ``(channels, height, width)``, of any scale.
        activation: Shape ``(height, width)``, usually smaller than the image; it is enlarged
            smoothly. Negative values, which are evidence against the class, are shown as 0.
        strength: Opacity of the brightest color, 0 to 1.
    """
    return overlay_pixels(image_pixels(image), activation, strength=strength)


def overlay_pixels(picture: Pixels, activation: Array, *, strength: float = 0.55) -> Pixels:
    """Return a class activation map over a picture, ``(height, width, 3)``; see :func:`overlay`."""
    pixels = picture.astype(np.float64)
    positive = np.maximum(np.nan_to_num(activation.astype(np.float64)), 0)
    share = np.clip(_enlarge(_unit(positive, 0.0, None), (pixels.shape[0], pixels.shape[1])), 0, 1)
    colored = color_map(share, low=0.0, high=1.0).astype(np.float64)
    cover = (strength * np.sqrt(share))[..., None]
    gray = pixels.mean(axis=2, keepdims=True)
    mixed: Pixels = ((1 - cover) * gray + cover * colored).round().astype(np.uint8)
    return mixed


def map_grid(
    maps: Array,
    *,
    columns: int | None = None,
    colors: ColorMap = "viridis",
    gap: int = 1,
    ends: Sequence[tuple[float, float]] | None = None,
) -> Pixels:
    """Return feature maps side by side.

    Args:
        maps: Shape ``(maps, height, width)``.
        columns: Maps in a row. By default about as many as rows.
        colors: As for :func:`color_map`.
        gap: Pixels between two maps, in middle gray.
        ends: Values of the darkest and the brightest color of each map. By default each map is
            scaled by itself.
    """
    if maps.ndim != 3 or maps.shape[0] == 0:
        raise OptionError(
            f"`maps` must have shape (maps, height, width) with at least 1 map, got {maps.shape}."
        )
    count, height, width = maps.shape
    across = min(columns or math.ceil(math.sqrt(count)), count)
    down = math.ceil(count / across)
    size = (down * (height + gap) - gap, across * (width + gap) - gap, 3)
    grid = np.full(size, 128, dtype=np.uint8)
    for index, single in enumerate(maps):
        top, left = (index // across) * (height + gap), (index % across) * (width + gap)
        low, high = (None, None) if ends is None else ends[index]
        grid[top : top + height, left : left + width] = color_map(
            single, colors=colors, low=low, high=high
        )
    return grid


def enlarge_pixels(pixels: Pixels, factor: int) -> Pixels:
    """Return the picture with each pixel as a square of ``factor`` × ``factor``."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _unit(values: Array, low: float | None, high: float | None) -> npt.NDArray[np.float64]:
    """Scale values to 0 … 1; constants and values that are not finite become 0."""
    numbers = values.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    if finite.size == 0:
        return np.zeros_like(numbers)
    bottom = float(finite.min()) if low is None else low
    top = float(finite.max()) if high is None else high
    if top <= bottom:
        return np.zeros_like(numbers)
    share = (np.nan_to_num(numbers, nan=bottom, posinf=top, neginf=bottom) - bottom) / (
        top - bottom
    )
    return np.clip(share, 0, 1)


def _enlarge(values: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    picture = Image.fromarray(values.astype(np.float32), mode=None)
    resized = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float64)
