"""Chosen examples of a split, and their pictures in a form that keeps a record small."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from onebyone.core.records import PicturedExample, PicturedOutput
from onebyone.core.tensor_trees import batch_size, sliced
from onebyone.data import Split
from onebyone.evaluation.batch_scores import is_unlabelled
from onebyone.report.pictures import as_data_uri, data_uri

Pixels = NDArray[np.uint8]

# Most pixels a side of a picture that is kept without loss.
EXACT = 64


@dataclass(frozen=True)
class Seen:
    """A chosen example, with what both networks give for it.

    Attributes:
        index: Position in the test data.
        chosen: Whether it is among those that differ most, or was drawn at random.
        divergence: Of the rewritten network's outputs from the original's.
        scores: Of the original and of the rewritten network; ``None`` without labels.
        image: The input as a picture; ``None`` if it is none.
        inputs: The input itself, as a batch of one.
        target: Its target, as a batch of one; ``None`` without labels.
        before: What the original gives for the batch of one.
        after: What the rewritten network gives for it.
    """

    index: int
    chosen: Literal["most", "random"]
    divergence: float
    scores: tuple[float | None, float | None]
    image: Pixels | None
    inputs: Tensor
    target: Tensor | None
    before: Any
    after: Any

    def pictured(
        self,
        before: PicturedOutput,
        after: PicturedOutput,
        truth: PicturedOutput | None,
        **more: Any,
    ) -> PicturedExample:
        """Return its record, with what was drawn."""
        first, second = self.scores
        return PicturedExample(
            index=self.index,
            chosen=self.chosen,
            divergence=self.divergence,
            before=replace(before, score=first),
            after=replace(after, score=second),
            truth=truth,
            **more,
        )


def examples_at(split: Split, rows: Sequence[int]) -> list[tuple[Any, Tensor | None]]:
    """Return the examples at some positions, in that order.

    Returns:
        The inputs of each, as a batch of one, and its target, also with the batch; ``None``
        without labels.
    """
    wanted = set(rows)
    found: dict[int, tuple[Any, Tensor | None]] = {}
    start = 0
    for inputs, targets in split.batches(250):
        stop = start + batch_size(inputs)
        for row in wanted & set(range(start, stop)):
            place = slice(row - start, row - start + 1)
            target = None if is_unlabelled(targets) else targets[place]
            found[row] = (sliced(inputs, place.start, place.stop), target)
        if len(found) == len(wanted):
            break
        start = stop
    return [found[row] for row in rows]


def reduced(picture: Pixels | None, largest: int) -> Pixels | None:
    """Return a picture scaled down to so many pixels a side, with its proportions kept."""
    if picture is None or max(picture.shape[:2]) <= largest:
        return picture
    image = Image.fromarray(picture)
    image.thumbnail((largest, largest))
    return np.asarray(image)


def address(picture: Pixels | None) -> str:
    """Return a ``data:`` URL: PNG for a small picture, JPEG for a large one; empty for none."""
    if picture is None:
        return ""
    if max(picture.shape[:2]) <= EXACT:
        return data_uri(picture)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=85, optimize=True)
    return as_data_uri(stream.getvalue(), "jpeg")
