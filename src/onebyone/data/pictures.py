"""Picture files: opened, scaled, and cut to the size that a network takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from onebyone.errors import DataError

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Fitted:
    """A picture cut to size.

    Attributes:
        picture: Of the size asked for.
        box: Left, top, right and bottom of what was cut out, in pixels of the opened picture.
    """

    picture: Image.Image
    box: Box


def open_picture(path: Path, size: int | None = None) -> Image.Image:
    """Return a picture file in RGB, turned as its camera was held; the first of several frames.

    Args:
        path: Any file that Pillow reads.
        size: The shorter side that it will be scaled to, in pixels: a large JPEG then decodes
            faster, at twice that size or more.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            if size is not None:
                shorter = scaled_side(size, 7 / 8)
                # A JPEG decodes two, four or eight times smaller for a fraction of the work.
                opened.draft("RGB", (2 * shorter, 2 * shorter))
            return _in_rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"The picture {path} cannot be read: {error}. Remove it or mend it."
        ) from error


def fit_picture(
    picture: Image.Image, size: tuple[int, int], *, crop: float, bicubic: bool = False
) -> Fitted:
    """Return the center of a picture, scaled to a size; its proportions are kept.

    Args:
        picture: Not modified.
        size: Height and width in pixels.
        crop: Share of the scaled picture's shorter side that is kept.
        bicubic: Whether it is scaled bicubically, not bilinearly.
    """
    height, width = size
    across, down = picture.size
    scale = max(scaled_side(height, crop) / down, scaled_side(width, crop) / across)
    new = (max(width, round(across * scale)), max(height, round(down * scale)))
    scaled = picture.resize(new, Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR)
    left, top = round((new[0] - width) / 2), round((new[1] - height) / 2)  # as torchvision rounds
    cut = scaled.crop((left, top, left + width, top + height))
    x, y = across / new[0], down / new[1]
    return Fitted(cut, (left * x, top * y, (left + width) * x, (top + height) * y))


def scaled_side(size: int, crop: float) -> int:
    """Return the pixels of a side before so much of it is cut away that ``size`` are left."""
    return max(size, round(size / crop))


def _in_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # a palette may hold transparency
    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture)  # Pillow would cut all above 255
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture, dtype=np.float64)
    highest = float(values.max(initial=0))
    if not math.isfinite(highest) or float(values.min(initial=0)) < 0:
        raise ValueError("its gray values must be finite and not negative")
    # 16 bits a pixel, or fractions of white; else 8 bits in a wider type.
    wide = highest > 255 or picture.mode.startswith("I;16")
    white = 65535 if wide else 1 if picture.mode == "F" and highest <= 1 else 255
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
