"""Generated scenes: shapes of four classes on pictures, with their boxes and their pixels' classes.

Backgrounds are four CIFAR-10 pictures, enlarged, side by side; without that data they are generated
textures. Scenes to test on have backgrounds of CIFAR-10's test images. The same seed gives the same
scenes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from networks import data_directory

CLASSES = ("circle", "triangle", "square", "star")
MOST_SHAPES = 5
SMALLEST, LARGEST = 0.06, 0.22  # a shape's radius, as a share of the scene's side
MOST_OVERLAP = 0.15  # of two boxes: intersection over the smaller one's area
TRIES = 12
FINER = 3  # shapes are drawn this many times larger, then averaged


@dataclass(frozen=True)
class Scenes:
    """Scenes in memory.

    Attributes:
        images: uint8, shape ``(n, 3, side, side)``.
        boxes: Left, top, right, bottom in pixels and the class, from 1; shape ``(n, most, 5)``.
            Rows of class -1 fill up the shapes that a scene lacks.
        pixels: The class of each pixel, 0 for the background; int64, ``(n, side, side)``.
    """

    images: Tensor
    boxes: Tensor
    pixels: Tensor


class Backgrounds:
    """Pictures that shapes are drawn on.

    Args:
        test: Whether these are for scenes to test on.
    """

    def __init__(self, *, test: bool = False) -> None:
        self._pictures: Tensor | None = None
        if (data_directory() / "cifar10").is_dir():
            import onebyone as obo
            from onebyone.data import TensorSplit

            data = obo.load_data("cifar10")
            part = data.test if test else data.train
            assert isinstance(part, TensorSplit)
            pictures, rows = part.stored()
            self._pictures = pictures if rows is None else pictures[rows]

    @property
    def name(self) -> str:
        """What they are, in words."""
        return "generated textures" if self._pictures is None else "CIFAR-10 pictures"

    def draw(self, side: int, rng: np.random.Generator) -> Image.Image:
        """Return one background, ``side`` pixels wide and high."""
        whole = Image.new("RGB", (side, side))
        half = side // 2
        for place in range(4):
            picture = self._one(rng).resize((side - half, side - half), Image.Resampling.BICUBIC)
            whole.paste(picture, (half * (place % 2), half * (place // 2)))
        return whole

    def _one(self, rng: np.random.Generator) -> Image.Image:
        if self._pictures is not None:
            chosen = self._pictures[int(rng.integers(len(self._pictures)))]
            return Image.fromarray(chosen.permute(1, 2, 0).contiguous().numpy())
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        fine = rng.normal(0, 20, (32, 32, 3))
        smooth = Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)
        return Image.fromarray((np.asarray(smooth) + fine).clip(0, 255).astype(np.uint8))


def corners(kind: int, radius: float, angle: float) -> list[tuple[float, float]]:
    """Return the corners of a shape around the origin; a circle has many."""
    count = (40, 3, 4, 10)[kind]
    lengths = [radius * (0.45 if kind == 3 and place % 2 else 1.0) for place in range(count)]
    angles = [angle + 2 * math.pi * place / count for place in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(lengths, angles, strict=True)]


def shape_mask(points: list[tuple[float, float]], window: tuple[int, int, int, int]) -> np.ndarray:
    """Return the share of each pixel of a window that a polygon covers, from 0 to 1."""
    left, top, right, bottom = window
    fine = Image.new("L", (FINER * (right - left), FINER * (bottom - top)))
    moved = [(FINER * (x - left), FINER * (y - top)) for x, y in points]
    ImageDraw.Draw(fine).polygon(moved, fill=255)
    return np.asarray(fine.reduce(FINER), dtype=np.float32) / 255


def scene(
    side: int, backgrounds: Backgrounds, rng: np.random.Generator
) -> tuple[np.ndarray, list[list[float]], np.ndarray]:
    """Return a picture ``(side, side, 3)``, its shapes' boxes with classes, and pixels' classes."""
    picture = np.array(backgrounds.draw(side, rng), dtype=np.float32)
    pixels = np.zeros((side, side), dtype=np.int64)
    boxes: list[list[float]] = []
    wanted = int(rng.integers(1, MOST_SHAPES + 1))
    for _ in range(wanted * TRIES):
        if len(boxes) == wanted:
            break
        kind, radius = int(rng.integers(4)), side * float(rng.uniform(SMALLEST, LARGEST))
        x, y = (float(each) for each in rng.uniform(radius, side - radius, 2))
        turned = float(rng.uniform(0, 2 * math.pi))
        points = [(x + dx, y + dy) for dx, dy in corners(kind, radius, turned)]
        xs, ys = zip(*points, strict=True)
        box = [min(xs), min(ys), max(xs), max(ys)]
        if any(overlap(box, other) > MOST_OVERLAP for other in boxes):
            continue
        left, top, right, bottom = (int(each) for each in box)
        window = (left, top, min(right + 1, side), min(bottom + 1, side))
        cover = shape_mask(points, window)
        color = rng.uniform(0, 255, 3).astype(np.float32)
        opaque = (cover * float(rng.uniform(0.45, 1.0)))[..., None]
        inside = (slice(top, window[3]), slice(left, window[2]))
        picture[inside] += (color - picture[inside]) * opaque
        pixels[inside][cover > 0.5] = kind + 1
        boxes.append([*box, kind + 1])
    noisy = picture + 6 * rng.standard_normal(picture.shape, dtype=np.float32)
    return noisy.clip(0, 255).astype(np.uint8), boxes, pixels


def overlap(one: list[float], other: list[float]) -> float:
    """Return the intersection of two boxes as a share of the smaller one's area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return max(width, 0) * max(height, 0) / min(areas)


def scenes(count: int, *, side: int, backgrounds: Backgrounds, seed: int, start: int = 0) -> Scenes:
    """Return scenes.

    Args:
        count: How many.
        side: Width and height in pixels.
        backgrounds: What the shapes are drawn on.
        seed: Random seed of the series of scenes.
        start: Place of the first scene in the series.
    """
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    found = torch.full((count, MOST_SHAPES, 5), -1.0)
    pixels = torch.zeros(count, side, side, dtype=torch.int64)
    for place in range(count):
        rng = np.random.default_rng([seed, start + place])
        picture, boxes, classes = scene(side, backgrounds, rng)
        images[place] = torch.from_numpy(picture).permute(2, 0, 1)
        found[place, : len(boxes)] = torch.tensor(boxes)
        pixels[place] = torch.from_numpy(classes)
    return Scenes(images, found, pixels)
