"""What an explanation says, apart from its pictures: prints as a table, saves and loads again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from onebyone.activation import Method
from onebyone.records import ModelSource, Record
from onebyone.tables import Table
from onebyone.units import format_percent

FORMAT = 1


def share(probability: float) -> str:
    """Return a probability as text that is never 0 or 1 unless it is."""
    if 0 < probability < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= probability < 1:
        return "> 99.9 %"
    return format_percent(probability)


@dataclass(frozen=True, kw_only=True)
class Preparation(Record):
    """How a picture becomes an input: as the network's data did.

    Attributes:
        height: Of the input, in pixels.
        width: Of the input, in pixels.
        channels: 1 for gray, 3 for RGB.
        mean: Subtracted from each channel of a picture scaled to 0…1.
        std: What each channel is then divided by.
        crop: Share of the scaled picture's shorter side that is kept when its center is cut out.
        resampling: How pictures are scaled: ``bilinear`` or ``bicubic``.
        source: Where all this is known from, in words.
    """

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    resampling: str = "bilinear"
    source: str = ""

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
        name: Of the class; its number where names are not known.
        probability: Softmax of the scores; ``None`` where there is one score only.
        peak: Greatest value of the class's map: where it is not above 0, no place speaks for it.
        file: The class's map over the image, in the output folder; empty if nothing was written.
    """

    index: int
    name: str
    score: float
    probability: float | None
    peak: float
    file: str = ""


@dataclass(frozen=True, kw_only=True)
class LayerMaps(Record):
    """What a layer gives for an image, and what the original's layer of that name gave.

    Attributes:
        shape: Channels, height and width.
        shown: Numbers of the channels in the pictures, row by row: those that vary most.
        error: Squared error relative to the original's maps; ``None`` without an original.
        file: Picture of the maps.
        before_file: Picture of the original's maps.
        note: Why there is nothing of the original.
    """

    layer: str
    shape: tuple[int, ...]
    shown: tuple[int, ...]
    error: float | None = None
    file: str = ""
    before_file: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageExplanation(Record):
    """An image, its top classes, and the files that show why.

    Attributes:
        path: As it was given.
        seen_file: What the network saw of it.
        grid_file: The maps of all classes side by side, where they are exact.
    """

    path: str
    classes: tuple[ClassScore, ...]
    seen_file: str = ""
    grid_file: str = ""
    layer: LayerMaps | None = None


@dataclass(frozen=True, kw_only=True)
class Explanation(Record):
    """Class activation maps of images, and how they were obtained.

    Attributes:
        method: ``exact`` or ``grad-cam``; empty where only a layer's maps were shown.
        layer: The module whose maps were used.
        map_shape: Height and width of a class's map.
    """

    onebyone: str
    created: str
    source: ModelSource
    method: Method | str
    layer: str
    map_shape: tuple[int, ...]
    preparation: Preparation
    images: tuple[ImageExplanation, ...]
    command: tuple[str, ...] = ()
    format: int = FORMAT

    @property
    def how(self) -> str:
        """How the maps were obtained, in a sentence."""
        where = f"layer {self.layer!r}" if self.layer else "the network's own map of scores"
        size = "×".join(map(str, self.map_shape))
        if self.method == "exact":
            return (
                f"Exact class maps, {size}, of {where}: the mean of a class's map is its score "
                "(Lin et al. 2013, Zhou et al. 2016)."
            )
        return (
            f"Grad-CAM, {size}, on {where} (Selvaraju et al. 2017): an approximation from "
            "gradients, in no unit."
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
            notes=[self.how, str(self.preparation)] if self.method else [str(self.preparation)],
        )

    def layer_table(self) -> Table | None:
        """Return what a layer's maps were, or ``None`` where none was asked for."""
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
