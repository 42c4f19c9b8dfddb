"""The record of an explanation without its pictures: it prints as a table, saves and loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from onebyone.core.errors import RecordError
from onebyone.core.fields import Amount, Count, Share, Sizes, Whole
from onebyone.core.records import ModelSource, Record, TaskInfo
from onebyone.core.tables import Table
from onebyone.core.units import format_percent
from onebyone.evaluation.class_maps import Method

FORMAT = 1


def share(probability: float) -> str:
    """Return a probability as text; rounding never turns it into 0 or 1."""
    if 0 < probability < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= probability < 1:
        return "> 99.9 %"
    return format_percent(probability)


@dataclass(frozen=True, kw_only=True)
class Preparation(Record):
    """How a picture becomes an input of the network.

    Attributes:
        height: Height of the input, in pixels.
        width: Width of the input, in pixels.
        channels: 1 for gray, 3 for RGB.
        mean: Subtracted from each channel of a picture scaled to 0…1.
        std: What each channel is then divided by.
        crop: Share of the scaled picture's shorter side that the center crop keeps.
        resampling: How pictures are scaled: ``bilinear`` or ``bicubic``.
        source: Where these values come from, as text.
    """

    height: Whole
    width: Whole
    channels: Whole
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: Share = 1.0
    resampling: str = "bilinear"
    source: str = ""

    def check(self) -> None:
        """Check that each channel has a mean and a deviation above 0, and that ``crop`` is above 0.

        Raises:
            RecordError: If not.
        """
        if not len(self.mean) == len(self.std) == self.channels:
            raise RecordError(
                f"`mean` and `std` must have a value for each of {self.channels} channels, got "
                f"{len(self.mean)} and {len(self.std)}."
            )
        if min(self.std) <= 0 or self.crop == 0:
            raise RecordError(f"`std` and `crop` must be above 0, got {self.std} and {self.crop}.")

    def __str__(self) -> str:
        color = "gray" if self.channels == 1 else "RGB"
        cut = f", {format_percent(self.crop)} of the scaled picture" if self.crop < 1 else ""
        mean, std = (", ".join(f"{value:.4g}" for value in each) for each in (self.mean, self.std))
        return (
            f"The center in the input's proportions{cut}, {self.resampling} to "
            f"{self.height}×{self.width} in {color}, less {mean}, divided by {std} "
            f"({self.source})."
        )


@dataclass(frozen=True, kw_only=True)
class ClassScore(Record):
    """One of the top classes of an image.

    Attributes:
        index: Number of the class.
        name: Name of the class; its number if names are not known.
        probability: Probability of the class or label; ``None`` if the task has none.
        peak: Greatest value of the class's map. If it is not above 0, no position is evidence for
            the class.
        file: File of the class's map over the image; empty if nothing was written.
    """

    index: Count
    name: str
    score: float
    probability: Share | None
    peak: float
    file: str = ""


@dataclass(frozen=True, kw_only=True)
class LayerMaps(Record):
    """A layer's maps of an image, compared with those of the original's layer of the same name.

    Attributes:
        shape: Channels, height and width.
        shown: Numbers of the channels in the pictures, row by row: those that vary most.
        error: Squared error relative to the original's maps; ``None`` without an original.
        file: Picture of the maps.
        before_file: Picture of the original's maps.
        note: Why there are no maps of the original.
    """

    layer: str
    shape: Sizes
    shown: tuple[Count, ...]
    error: Amount | None = None
    file: str = ""
    before_file: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageExplanation(Record):
    """An image with its top classes, and the files of its maps.

    Attributes:
        path: The path as given.
        seen_file: File of the pixels that the network saw.
        grid_file: File of the maps of all classes side by side, if they are exact.
    """

    path: str
    classes: tuple[ClassScore, ...]
    seen_file: str = ""
    grid_file: str = ""
    layer: LayerMaps | None = None


@dataclass(frozen=True, kw_only=True)
class Explanation(Record):
    """Class activation maps of images, and how they were computed.

    Attributes:
        method: ``exact`` or ``grad-cam``; empty if only a layer's maps were shown.
        layer: Name of the module whose maps were used.
        map_shape: Height and width of a class's map.
        task: The task of the outputs.
    """

    onebyone: str
    created: str
    source: ModelSource
    method: Method | str
    layer: str
    map_shape: Sizes
    preparation: Preparation
    images: tuple[ImageExplanation, ...]
    command: tuple[str, ...] = ()
    task: TaskInfo | None = None
    format: int = FORMAT

    @property
    def how(self) -> str:
        """How the maps were computed, in a sentence."""
        where = f"layer {self.layer!r}" if self.layer else "the network's own map of scores"
        size = "×".join(map(str, self.map_shape))
        if self.method == "exact":
            return (
                f"Exact class maps, {size}, of {where}: the mean of a class's map is its score "
                "(Lin et al. 2013, Zhou et al. 2016)."
            )
        return (
            f"Grad-CAM, {size}, on {where} (Selvaraju et al. 2017): an approximation from "
            "gradients, without a unit."
        )

    def table(self) -> Table:
        """Return the top classes of each image."""
        rows = []
        for image in self.images:
            name = PurePath(image.path).name
            for place, each in enumerate(image.classes):
                probability = "–" if each.probability is None else share(each.probability)
                rows.append(
                    [name if place == 0 else "", each.name, probability, f"{each.score:.3f}"]
                )
        return Table(
            columns=("image", "class", ">probability", ">score"),
            rows=rows,
            title=self.source.name,
            notes=[
                *([self.how] if self.method else []),
                *([] if self.task is None else [str(self.task)]),
                str(self.preparation),
            ],
        )

    def layer_table(self) -> Table | None:
        """Return a table of a layer's maps, or ``None`` if no layer was given."""
        rows = [
            [
                PurePath(image.path).name,
                "×".join(map(str, image.layer.shape)),
                "–" if image.layer.error is None else f"{image.layer.error:.4f}",
            ]
            for image in self.images
            if image.layer is not None
        ]
        first = next((image.layer for image in self.images if image.layer is not None), None)
        if first is None:
            return None
        note = first.note or "Error: squared, relative to the original's maps of that layer."
        return Table(
            columns=("image", "maps", ">error"),
            rows=rows,
            title=f"Layer {first.layer}",
            notes=[note],
        )

    def __str__(self) -> str:
        tables = [self.table(), self.layer_table()]
        return "\n\n".join(str(table) for table in tables if table is not None)
