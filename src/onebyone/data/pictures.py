"""Opens picture files within memory limits, and scales and crops them to a network's size."""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from onebyone.core.errors import DataError
from onebyone.core.memory import free_bytes
from onebyone.core.read_files import printable, reason_of, why_no_file
from onebyone.core.shared_state import warnings_ignored
from onebyone.core.torchrun import processes_here
from onebyone.core.units import format_bytes

Box = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]

# Formats that only hold pixels. Pillow reads more, but for EPS it starts Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Pillow's own limit: a file of a few kilobytes can then take at most 0.7 GB.
MOST_PIXELS = 178_956_970
# Larger pictures are decoded one at a time, so that threads do not multiply the memory.
LARGE_PIXELS = 16_000_000
# Pillow uses four bytes a pixel for each of: decoded, rotated, in RGB.
BYTES_A_PIXEL = 12
# If scaling would give more than this many times the pixels needed, cropping comes first.
LONG = 16
MEMORY_SHARE = 0.6  # of the free memory; the network and its activations need the rest
LISTED = 5  # files that a message names; the rest are counted

_large = threading.Lock()


class Pictures(Protocol):
    """Picture files, which are decoded when they are opened; also by several threads at once."""

    def __len__(self) -> int: ...

    def open(self, row: int, size: int | None) -> Image.Image:
        """Return a picture in RGB; see :func:`open_picture`."""
        ...


class FilePictures:
    """Pictures in files.

    Args:
        paths: Of the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        # An array takes a fraction of the memory of a list of paths.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self._paths)

    def open(self, row: int, size: int | None) -> Image.Image:
        """Return a picture in RGB."""
        return _opened(Path(os.fsdecode(self._paths[row])), size)


@dataclass(frozen=True)
class Fitted:
    """A picture scaled and cropped to a size.

    Attributes:
        picture: The picture in that size.
        box: Left, top, right and bottom of the crop, in pixels of the opened picture.
    """

    picture: Image.Image
    box: Box


def open_picture(path: Path, size: int | None = None) -> Image.Image:
    """Return a picture file in RGB, rotated by its EXIF data; only the first of several frames.

    Transparency is dropped without changing the color of pixels.

    Args:
        path: A file in one of :data:`FORMATS`.
        size: The shorter side that it will be scaled to, in pixels. A large JPEG then decodes
            faster, at twice that size or more.

    Raises:
        DataError: If it is missing, damaged, not a picture, or has more than :data:`MOST_PIXELS`
            pixels; says which, and what to do.
    """
    with _quietly():
        return _opened(path, size)


def decode_picture(content: bytes, name: Callable[[], str], size: int | None) -> Image.Image:
    """Return the picture of a file whose bytes are given; see :func:`open_picture`.

    Args:
        content: Of the file.
        name: Returns what an error calls it, such as ``1.jpg in train-0.tar``.
        size: The shorter side that it will be scaled to, in pixels.
    """
    return _read(io.BytesIO(content), name, size)


def read_picture(
    pictures: Pictures, row: int, size: tuple[int, int], *, crop: float, into: Pixels
) -> None:
    """Decode a picture, scale and crop it to a size, and write it into an array.

    Args:
        pictures: Where it is.
        row: Its place there.
        size: Height and width in pixels.
        crop: As for :func:`fit_picture`.
        into: Shape ``(height, width, 3)``.

    Raises:
        DataError: If it cannot be read.
    """
    opened = pictures.open(row, max(size))
    into[...] = np.asarray(fit_picture(opened, size, crop=crop).picture)


def read_pictures(
    pictures: Pictures, rows: Sequence[int], size: tuple[int, int], *, crop: float, into: Pixels
) -> None:
    """Decode pictures, scale and crop them to a size, and write them into an array.

    Args:
        pictures: Where they are.
        rows: Their places there.
        size: Height and width in pixels.
        crop: As for :func:`fit_picture`.
        into: Shape ``(n, height, width, 3)``.

    Raises:
        DataError: If pictures cannot be read: names the first few and counts the others.
    """

    def read(place: int) -> DataError | None:
        try:
            read_picture(pictures, rows[place], size, crop=crop, into=into[place])
        except DataError as error:
            return error
        return None

    # Pillow releases Python's global lock while it decodes and resizes.
    with _quietly(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        failed = [error for error in pool.map(read, range(len(rows))) if error is not None]
    if len(failed) == 1:
        raise failed[0]
    if failed:
        more = f" … and {len(failed) - LISTED:,} more." if len(failed) > LISTED else ""
        listed = " ".join(str(error) for error in failed[:LISTED])
        raise DataError(
            f"{len(failed):,} of the {len(rows):,} pictures cannot be read. {listed}{more}"
        ) from failed[0]


def check_picture_memory(count: int, size: int, *, channels: int = 3) -> None:
    """Check that pictures of a height and width fit into memory, at one byte per value.

    Raises:
        DataError: If they would take more than :data:`MEMORY_SHARE` of the free memory.
    """
    why = why_not_in_memory(count, size, channels=channels)
    if why is not None:
        raise DataError(f"{why}. Give a smaller `image_size` or a `limit`.")


def why_not_in_memory(count: int, size: int, *, channels: int = 3) -> str | None:
    """Return why pictures do not fit into the memory of this machine; ``None`` if they do.

    Under ``torchrun`` each process holds them all.
    """
    copies = processes_here()
    needed, free = copies * count * channels * size * size, free_bytes()
    if free is None or needed <= MEMORY_SHARE * free:
        return None
    held = f" in {copies} processes" if copies > 1 else ""
    return (
        f"{count:,} pictures of {size}×{size} need {format_bytes(needed)} of memory{held}, more "
        f"than {MEMORY_SHARE:.0%} of the {format_bytes(free)} that are free"
    )


def fit_picture(
    picture: Image.Image, size: tuple[int, int], *, crop: float, bicubic: bool = False
) -> Fitted:
    """Return the center of a picture, scaled to a size without changing its proportions.

    The work is limited by the two sizes, even for extreme proportions.

    Args:
        picture: Not modified.
        size: Height and width in pixels.
        crop: Share of the scaled picture's shorter side that the crop keeps.
        bicubic: Whether to scale with bicubic instead of bilinear interpolation.
    """
    height, width = size
    across, down = picture.size
    new = _scaled((across, down), scaled_side(width, crop), scaled_side(height, crop))
    left, top = round((new[0] - width) / 2), round((new[1] - height) / 2)  # as in torchvision
    x, y = across / new[0], down / new[1]
    box = (left * x, top * y, min((left + width) * x, across), min((top + height) * y, down))
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    if new[0] * new[1] > LONG * height * width:
        # The same pixels, but Pillow rounds the box, so the last bits differ from torchvision.
        return Fitted(picture.resize((width, height), resample, box=box), box)
    cut = picture.resize(new, resample).crop((left, top, left + width, top + height))
    return Fitted(cut, box)


def scaled_side(size: int, crop: float) -> int:
    """Return the side in pixels before the crop, so that ``size`` pixels are left after it."""
    return max(size, round(size / crop))


def _scaled(picture: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Return the smallest size in which a picture covers a width and height, as in torchvision."""
    across, down = picture
    if height * across >= width * down:
        return height * across // down, height
    return width, width * down // across


def as_rgb(picture: Image.Image) -> Image.Image:
    """Return an opened picture in any mode as a new one in RGB.

    Raises:
        DataError: If it cannot be decoded or has no pixels.
    """
    try:
        _check_size(picture)
        return _in_rgb(picture)
    except DataError as error:
        raise DataError(f"The picture that was given {error}") from error
    except Exception as error:  # Pillow reads the file late, and it may be damaged in any way
        raise DataError(
            f"The picture that was given cannot be decoded: {reason_of(error)}. Open it again."
        ) from error


# ---------------------------------------------------------------- opening


def _opened(path: Path, size: int | None) -> Image.Image:
    why = why_no_file(path)
    if why is not None:
        raise DataError(
            f"The picture {printable(path)} {why}. Check the path. If the file was there before, "
            "it was moved or removed: start again."
        )
    return _read(path, lambda: printable(path), size)


def _read(file: Path | io.BytesIO, name: Callable[[], str], size: int | None) -> Image.Image:
    try:
        with Image.open(file, formats=_formats()) as opened:
            if size is not None:
                shorter = scaled_side(size, 7 / 8)
                # Decoding a JPEG at a half, a quarter or an eighth of its size is much faster.
                opened.draft("RGB", (2 * shorter, 2 * shorter))
            _check_size(opened)
            if opened.width * opened.height <= LARGE_PIXELS:
                return _decoded(opened)
            with _large:
                _check_memory(opened)
                return _decoded(opened)
    except Exception as error:  # a damaged file may raise anything in Pillow
        raise DataError(f"The picture {name()} {_why(file, error)}") from error


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _decoded(opened: Image.Image) -> Image.Image:
    opened.load()
    return _in_rgb(_upright(opened))


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # noqa: BLE001  # ignore EXIF data that cannot be read
        return picture


def _check_size(picture: Image.Image) -> None:
    pixels = picture.width * picture.height
    if pixels < 1:
        raise DataError(f"has no pixels ({picture.width}×{picture.height}). Remove it.")
    if pixels > MOST_PIXELS:
        raise DataError(_too_large(f"{picture.width}×{picture.height} pixels"))


def _too_large(came: str) -> str:
    return (
        f"is too large: it must have at most {MOST_PIXELS:,} pixels, got {came}. Scale it down, "
        "or remove it."
    )


def _check_memory(picture: Image.Image) -> None:
    needed, free = picture.width * picture.height * BYTES_A_PIXEL, free_bytes()
    if free is not None and needed > free:
        raise DataError(
            f"needs {format_bytes(needed)} of memory to decode its {picture.width}×"
            f"{picture.height} pixels, and {format_bytes(free)} are free. Scale it down."
        )


def _why(file: Path | io.BytesIO, error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    for kinds, words in _REASONS:
        if isinstance(error, kinds):
            return words(error)
    if _is_empty(file):
        return "is empty (0 bytes). Copy or download it again, or remove it."
    if isinstance(error, UnidentifiedImageError):
        return (
            f"is not a picture in a supported format ({', '.join(_formats())}), or its beginning "
            "is damaged. Convert it to PNG or JPEG, or remove it."
        )
    return f"is damaged: {reason_of(error)}. Copy or download it again, or remove it."


_REASONS: tuple[tuple[type[Exception], Callable[[Exception], str]], ...] = (
    (FileNotFoundError, lambda _: "was removed before it could be read. Start again."),
    (
        PermissionError,
        lambda _: "may not be read by this user. Change its permissions, or remove it.",
    ),
    (Image.DecompressionBombError, lambda _: _too_large("more")),
    (MemoryError, lambda _: "does not fit into the free memory. Scale it down."),
)


def _is_empty(file: Path | io.BytesIO) -> bool:
    if isinstance(file, io.BytesIO):
        return not file.getvalue()
    try:
        return file.stat().st_size == 0
    except OSError:
        return False


@contextmanager
def _quietly() -> Iterator[None]:
    """Ignore Pillow's warnings about large pictures and unreadable metadata."""
    with warnings_ignored():
        yield


# ---------------------------------------------------------------- modes


def _in_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in {"P", "PA", "RGBa", "La"}:
        # A palette may hold transparency, and colors may be premultiplied by it.
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture)  # Pillow would clip values above 255
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    highest = float(values.max(initial=0))
    if not math.isfinite(highest) or float(values.min(initial=0)) < 0:
        raise ValueError("its gray values must be finite and not negative")
    # 16 bits a pixel, or floats up to 1; else 8 bits in a wider type.
    wide = highest > 255 or picture.mode.startswith("I;16")
    white = 65535 if wide else 1 if picture.mode == "F" and highest <= 1 else 255
    gray = np.empty(values.shape, np.uint8)
    rows = max(1, 1_000_000 // max(values.shape[1], 1))
    for start in range(0, len(values), rows):  # all at once in float64 would take 8 times as much
        part = values[start : start + rows].astype(np.float64) * (255 / white)
        gray[start : start + rows] = part.round().clip(0, 255)
    return Image.fromarray(gray)
