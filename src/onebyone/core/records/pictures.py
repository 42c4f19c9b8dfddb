"""The record of test examples with the outputs of both networks, as pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onebyone.core.errors import RecordError
from onebyone.core.fields import Amount, Count, Share, Whole
from onebyone.core.records.base import Record, in_order


@dataclass(frozen=True, kw_only=True)
class PicturedBox(Record):
    """A box in an image.

    Attributes:
        left: Its left edge as a share of the image's width.
        top: Its top edge as a share of the image's height.
        right: Its right edge as a share of the image's width.
        bottom: Its bottom edge as a share of the image's height.
        label: Number of its class.
        confidence: Of the network that found it; ``None`` for a true box.
    """

    left: Share
    top: Share
    right: Share
    bottom: Share
    label: Count
    confidence: Share | None = None

    def check(self) -> None:
        """Check that the edges are in order."""
        in_order("left", self.left, "right", self.right)
        in_order("top", self.top, "bottom", self.bottom)


@dataclass(frozen=True, kw_only=True)
class PicturedOutput(Record):
    """What a network gave for an example, or its true answer.

    Attributes:
        picture: A ``data:`` address: a mask that lies over the example's image, or a patch.
        boxes: Boxes in the example's image, the most confident first.
        score: Of this example alone, by the metric; ``None`` for the truth, or without labels.
    """

    picture: str = ""
    boxes: tuple[PicturedBox, ...] = ()
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class PicturedExample(Record):
    """A test example with the outputs of both networks.

    Attributes:
        index: Position in the test data.
        chosen: Whether it is among those that differ ``most``, or was drawn at ``random``.
        divergence: Of the rewritten network's outputs from the original's.
        before: The original's output.
        after: The rewritten network's output.
        truth: The true answer; ``None`` without labels.
        image: The input, or its patch, as a ``data:`` address; empty where it is no picture.
        difference: The difference of the two patches, amplified, as a ``data:`` address.
        amplified: The factor of that.
        changed: Share of the pixels that the two networks put into different classes.
    """

    index: Count
    chosen: Literal["most", "random"]
    divergence: Amount
    before: PicturedOutput
    after: PicturedOutput
    truth: PicturedOutput | None = None
    image: str = ""
    difference: str = ""
    amplified: Whole = 1
    changed: Share | None = None


@dataclass(frozen=True, kw_only=True)
class LegendEntry(Record):
    """How a class is drawn in masks.

    Attributes:
        name: Of the class.
        sample: Of its color and pattern, as a ``data:`` address; empty if it is not drawn.
    """

    name: str
    sample: str = ""


@dataclass(frozen=True, kw_only=True)
class OutputPictures(Record):
    """Test examples with the outputs of both networks, as pictures.

    Attributes:
        kind: ``masks`` of segmenters, ``boxes`` of detectors, or ``patches`` of images.
        examples: First those that differ most, the most different first.
        scored: How many test examples they were chosen from.
        seed: Random seed of those drawn at random.
        metric: Name of the scores; empty without labels.
        legend: How the classes of masks are drawn.
        least_confidence: Boxes with less confidence are not kept; ``None`` without boxes.
        hidden: How many boxes above it are not kept, since their image has too many.
    """

    kind: Literal["masks", "boxes", "patches"]
    examples: tuple[PicturedExample, ...]
    scored: Count
    seed: int
    metric: str = ""
    legend: tuple[LegendEntry, ...] = ()
    least_confidence: Share | None = None
    hidden: Count = 0

    def check(self) -> None:
        """Check that there are not more examples than were scored."""
        if len(self.examples) > self.scored:
            raise RecordError(
                f"`examples` must be at most the {self.scored} that were scored, got "
                f"{len(self.examples)}."
            )
