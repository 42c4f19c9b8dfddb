"""Data augmentation for batches in memory: random shifts and flips, and CutMix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from onebyone.core.errors import OptionError, UnknownNameError

Border = Literal["black", "reflect"]
AUGMENTATIONS = ("none", "flip", "shift", "crop-flip")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes to training images.

    Attributes:
        shift: Largest translation in each direction, in pixels.
        flip: Whether to mirror each image left to right with probability 1/2.
        border: What fills the border after a shift: ``black`` (the value 0) or ``reflect`` (the
            image's reflection).
    """

    shift: int = 0
    flip: bool = False
    border: Border = "black"

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise OptionError(
                f"`shift` must be a number of pixels from 0 up, got {self.shift}. "
                "Give 0 to not shift images."
            )

    def __bool__(self) -> bool:
        return self.shift > 0 or self.flip

    def __str__(self) -> str:
        parts = ["flip"] if self.flip else []
        if self.shift:
            parts.append(f"shift {self.shift} px ({self.border})")
        return " + ".join(parts) or "none"

    @classmethod
    def named(cls, name: str, *, shift: int = 4) -> Augmentation:
        """Return one of the usual augmentations.

        Args:
            name: ``none``, ``flip``, ``shift`` (black border), or ``crop-flip`` (reflected border:
                a random crop of the padded image, then a random flip).
            shift: Largest translation for the last two, in pixels.

        Raises:
            UnknownNameError: If there is none of that name.
        """
        if name not in AUGMENTATIONS:
            raise UnknownNameError("augmentation", name, AUGMENTATIONS)
        if name == "none":
            return cls()
        if name == "flip":
            return cls(flip=True)
        if name == "shift":
            return cls(shift=shift)
        return cls(shift=shift, flip=True, border="reflect")


@dataclass(frozen=True)
class Draws:
    """The random draws for each image: offsets of shape ``(n, 2)``, flips of shape ``(n,)``."""

    offsets: Tensor
    flips: Tensor

    def part(self, start: int, stop: int) -> Draws:
        """Return the draws of some of the images."""
        return Draws(self.offsets[start:stop], self.flips[start:stop])

    def at(self, places: Tensor) -> Draws:
        """Return the draws of the images at some places, int64 of shape ``(n,)``."""
        return Draws(self.offsets[places], self.flips[places])

    def to(self, device: torch.device | str) -> Draws:
        """Return the draws on a device."""
        return Draws(self.offsets.to(device), self.flips.to(device))


def draw(augmentation: Augmentation, n: int, generator: torch.Generator) -> Draws:
    """Draw the shift and flip of each of ``n`` images.

    This always uses the CPU, so a seed gives the same draws on every device.
    """
    reach = augmentation.shift
    offsets = torch.randint(-reach, reach + 1, (n, 2), generator=generator)
    flips = torch.rand(n, generator=generator) < 0.5
    return Draws(offsets, flips if augmentation.flip else torch.zeros(n, dtype=torch.bool))


def augment(images: Tensor, augmentation: Augmentation, draws: Draws) -> Tensor:
    """Return the images shifted and flipped as drawn.

    A single gather does both: its indices contain the border and the mirroring, so each image is
    read once and written once.

    Args:
        images: Shape ``(batch, channels, height, width)``, any type. Not modified.
        augmentation: Gives the border.
        draws: The draws for these images, on the same device.

    Returns:
        Images of the same shape, type and device.

    Raises:
        OptionError: If a reflected shift is not smaller than the image.
    """
    if not augmentation:
        return images
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + draws.offsets[:, :1]
    columns = torch.arange(width, device=images.device).expand(batch, width)
    columns = torch.where(draws.flips[:, None], width - 1 - columns, columns)
    columns = columns + draws.offsets[:, 1:]
    reach = augmentation.shift
    if reach and augmentation.border == "reflect":
        if reach >= min(height, width):
            raise OptionError(
                f"`shift` must be smaller than the {height}×{width} images, got {reach}. "
                "Give a smaller shift, or a black border."
            )
        rows, columns = _reflect(rows, height), _reflect(columns, width)
    elif reach:
        images = F.pad(images, (reach, reach, reach, reach))
        rows, columns = rows + reach, columns + reach
    index = rows[:, :, None] * images.shape[3] + columns[:, None, :]
    index = index.view(batch, 1, height * width).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(batch, channels, height, width)


def cut_mixed(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return images of which some have a rectangle replaced by that of another image.

    Args:
        images: Shape ``(batch, channels, height, width)``. Not modified.
        share: Probability that an image gets a rectangle.
        generator: On the CPU, so a seed gives the same draws on every device.

    References:
        Yun et al., "CutMix", ICCV 2019: the rectangle's share of the area and its center are
        uniform.
    """
    batch, _, height, width = images.shape
    partner = torch.randperm(batch, generator=generator).to(images.device, non_blocking=True)
    drawn = torch.rand(4, batch, generator=generator).to(images.device, non_blocking=True)
    side = torch.where(drawn[0] < share, drawn[1].sqrt(), 0.0)
    inside = [
        (torch.arange(size, device=images.device) - size * center[:, None]).abs()
        < size * side[:, None] / 2
        for size, center in zip((height, width), drawn[2:], strict=True)
    ]
    cut = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(cut, images[partner], images)


def _reflect(position: Tensor, size: int) -> Tensor:
    # …2 1 | 0 1 2 … n-1 | n-2 n-3…: the edge itself is not repeated.
    return (size - 1) - ((size - 1) - position.abs()).abs()
