"""Draws an explanation: maps over images, class maps in a grid, and a layer's maps."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from onebyone.evaluation.class_maps import Activation
from onebyone.explaining.preparation import DISPLAY, Prepared
from onebyone.explaining.record import ClassScore
from onebyone.report.pictures import Pixels, enlarge_pixels, map_grid, overlay_pixels

MOST_CLASS_MAPS = 100  # in a grid; with more classes only the top ones are shown
TOP_CLASS_MAPS = 25
MOST_CHANNELS = 64


@dataclass(frozen=True)
class Grid:
    """Exact class maps of an image, to be drawn side by side.

    Attributes:
        maps: Shape ``(classes, height, width)``.
        scores: The means of the maps.
        whole: Whether all classes are included.
    """

    maps: NDArray[np.floating[Any]]
    names: tuple[str, ...]
    scores: tuple[float, ...]
    whole: bool

    @property
    def ends(self) -> tuple[float, float]:
        """The least and greatest value of all maps, which share one scale."""
        return float(self.maps.min()), float(self.maps.max())


@dataclass(frozen=True)
class Drawn:
    """The drawn pictures by file name."""

    pictures: dict[str, Pixels] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)


def file_name(number: int, text: str) -> str:
    """Return a file name that is safe on every system: ``01-cat``."""
    kept = safe(PurePath(text).stem)
    return f"{number:02d}-{kept}" if kept else f"{number:02d}"


def safe(text: str) -> str:
    """Return a text with hyphens in place of all but letters and digits; it may be empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    words = "".join(c if c.isalnum() else "-" for c in plain.lower())
    return "-".join(word for word in words[:40].split("-") if word)


def grid_classes(scores: Tensor) -> list[int]:
    """Return the classes whose maps are shown side by side: all, or only the top ones."""
    if len(scores) <= MOST_CLASS_MAPS:
        return list(range(len(scores)))
    return [int(index) for index in scores.topk(TOP_CLASS_MAPS).indices]


@dataclass(frozen=True)
class Evidence:
    """The class scores and class maps of one image.

    Attributes:
        scores: Scores of all classes.
        classes: Numbers of the classes that have a map.
        maps: Maps of these classes, shape ``(k, height, width)``.
        exact: Maps of all classes, if they are exact.
        names: Names of all classes.
        shares: Turns scores into probabilities, if the task has them.
    """

    scores: Tensor
    classes: Tensor
    maps: Tensor
    exact: Tensor | None
    names: tuple[str, ...]
    shares: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls,
        activation: Activation,
        place: int,
        known: tuple[str, ...],
        shares: Callable[[Tensor], Tensor] | None = None,
    ) -> Evidence:
        """Return the evidence of one image of a batch."""
        count = activation.scores.shape[1]
        exact = activation.exact
        return cls(
            scores=activation.scores[place].float().cpu(),
            classes=activation.classes[place].cpu(),
            maps=activation.maps[place].float().cpu(),
            exact=None if exact is None else exact.maps[place].float().cpu(),
            # Another number of names means that they belong to another head.
            names=known if len(known) == count else tuple(map(str, range(count))),
            shares=shares,
        )

    def top(self) -> tuple[ClassScore, ...]:
        """Return the classes that have a map, with their scores."""
        shares = None if self.shares is None else self.shares(self.scores)
        return tuple(
            ClassScore(
                index=index,
                name=self.names[index],
                score=float(self.scores[index]),
                probability=None if shares is None else float(shares[index]),
                peak=float(single.max()),
            )
            for index, single in zip(self.classes.tolist(), self.maps, strict=True)
        )


def draw_classes(
    picture: Prepared, name: str, evidence: Evidence, drawn: Drawn
) -> tuple[tuple[ClassScore, ...], str]:
    """Draw the maps of an image's top classes over it, and exact maps of all classes in a grid.

    Args:
        picture: The image.
        name: Start of its files' names.
        evidence: Its maps.
        drawn: Collects the pictures.

    Returns:
        The top classes with their files' names, and the grid's file name (may be empty).
    """
    named = []
    for rank, (score, each) in enumerate(zip(evidence.top(), evidence.maps, strict=True), start=1):
        file = f"{name}-{rank}-{safe(score.name) or score.index}.png"
        drawn.pictures[file] = overlay_pixels(picture.shown, each.numpy())
        named.append(replace(score, file=file))
    if evidence.exact is None:
        return tuple(named), ""
    chosen = grid_classes(evidence.scores)
    grid = Grid(
        maps=evidence.exact.numpy()[chosen],
        names=tuple(evidence.names[index] for index in chosen),
        scores=tuple(float(evidence.scores[index]) for index in chosen),
        whole=len(chosen) == len(evidence.scores),
    )
    file = f"{name}-classes.png"
    # One scale for all classes, so that they can be compared, as in the paper's figure 4.
    side_by_side = map_grid(grid.maps, columns=min(len(chosen), 10), ends=[grid.ends] * len(chosen))
    drawn.pictures[file], drawn.grids[file] = _enlarged(side_by_side, 2 * DISPLAY), grid
    return tuple(named), file


def shown_channels(maps: Tensor) -> tuple[int, ...]:
    """Return the channels of maps ``(channels, height, width)`` that vary most, sorted."""
    spread = maps.flatten(1).std(dim=1, correction=0)
    chosen = spread.topk(min(MOST_CHANNELS, len(spread))).indices
    return tuple(sorted(int(channel) for channel in chosen))


def draw_layer(
    after: Tensor, before: Tensor | None, shown: tuple[int, ...], name: str, drawn: Drawn
) -> tuple[str, str]:
    """Draw a layer's maps, and the original's; each channel has the same scale in both.

    Returns:
        The files' names; the second is empty without an original.
    """
    sides = [each.numpy()[list(shown)] for each in (after, before) if each is not None]
    lows = np.min([side.min(axis=(1, 2)) for side in sides], axis=0)
    highs = np.max([side.max(axis=(1, 2)) for side in sides], axis=0)
    ends = [(float(low), float(high)) for low, high in zip(lows, highs, strict=True)]
    files = [f"{name}-layer.png", f"{name}-layer-before.png"][: len(sides)]
    for file, side in zip(files, sides, strict=True):
        drawn.pictures[file] = _enlarged(
            map_grid(side, columns=_columns(len(side)), ends=ends), DISPLAY
        )
    return files[0], files[1] if len(files) > 1 else ""


def _columns(count: int) -> int:
    """Return the number of columns: one that fills the last row, or about the number of rows."""
    square = math.ceil(math.sqrt(count))
    return next((n for n in range(square, 2 * square + 1) if count % n == 0), square)


def _enlarged(pixels: Pixels, width: int) -> Pixels:
    return enlarge_pixels(pixels, max(1, round(width / pixels.shape[1])))
