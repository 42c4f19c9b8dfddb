"""The page of an explanation: each image with its class maps, and how they were computed."""

from __future__ import annotations

import shlex
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from onebyone.core.tables import Table
from onebyone.explaining.drawing import Drawn, Grid
from onebyone.explaining.record import Explanation, ImageExplanation, LayerMaps, share
from onebyone.report.components import code, environment, page, section, table
from onebyone.report.pictures import color_map, data_uri

_METHODS = {
    "exact": "The network's score for a class is the mean of that class's map: the map shows each "
    "position's part of the score. Over an image, color is where a class has more than the "
    "average class.",
    "grad-cam": "The network has no map of each class. Grad-CAM weights its last feature maps by "
    "the gradient of the score: an approximation that shows where, but not how much.",
}


def render_explanation(record: Explanation, drawn: Drawn) -> str:
    """Return the page of an explanation: one HTML file.

    Args:
        record: The record of the explanation.
        drawn: Pictures and class maps by the file names in the record.
    """
    names = [PurePath(image.path).name for image in record.images]
    size = f"{record.preparation.height}×{record.preparation.width}"
    sections = [
        section(f"image-{number}", name, _image(image, name, size, drawn))
        for number, (image, name) in enumerate(zip(record.images, names, strict=True), start=1)
    ]
    links = [(f"image-{number}", name) for number, name in enumerate(names[:12], start=1)]
    subtitle = f"What the network sees in {_images(len(names))}"
    return page(
        record.source.name,
        Markup("\n").join([_intro(record), *sections, _how(record)]),
        subtitle=subtitle,
        kicker="explanation",
        description=f"{subtitle}. {record.how}" if record.method else subtitle,
        contents=[*(links if len(names) > 1 else []), ("how", "How it was made")],
        footer=f"Made by onebyone {record.onebyone} at {record.created}.",
        style="explain.css",
    )


def _images(count: int) -> str:
    return "an image" if count == 1 else f"{count} images"


def _intro(record: Explanation) -> Markup:
    if not record.method:
        return Markup("")
    return Markup(
        '<div class="intro"><p class="lead">{}</p>\n<p class="scale"><span>no evidence</span>'
        "<i></i><span>most in the image</span></p></div>"
    ).format(_METHODS[record.method])


def _image(image: ImageExplanation, name: str, size: str, drawn: Drawn) -> Markup:
    def source(file: str) -> str:
        return data_uri(drawn.pictures[file], small=True)

    overlays = [
        {
            "source": source(each.file),
            "name": each.name,
            "probability": each.probability,
            "percent": None if each.probability is None else f"{100 * each.probability:.2f}",
            "shown": None if each.probability is None else share(each.probability),
            "score": each.score,
            "score_shown": _number(each.score),
            "nowhere": each.peak <= 0,
        }
        for each in image.classes
    ]
    item: dict[str, Any] = {
        "name": name,
        "size": size,
        "seen": source(image.seen_file),
        "overlays": overlays,
        "layer": None if image.layer is None else _layer(image.layer, drawn),
        "grid": None,
    }
    if image.grid_file:
        item |= _grid(drawn.grids[image.grid_file])
    macro: Any = environment().get_template("explanation.html").module
    return Markup(macro.image(item))  # noqa: S704  # an autoescaped macro's output


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _grid(grid: Grid) -> dict[str, Any]:
    low, high = grid.ends
    best = grid.scores.index(max(grid.scores))
    cells = [
        {
            "source": data_uri(color_map(single, low=low, high=high)),
            "name": name,
            "score": score,
            "shown": _number(score),
            "first": place == best,
        }
        for place, (single, name, score) in enumerate(
            zip(grid.maps, grid.names, grid.scores, strict=True)
        )
    ]
    heading = (
        "The maps of all classes" if grid.whole else f"The maps of the top {len(cells)} classes"
    )
    return {
        "grid": cells,
        "grid_heading": heading,
        "wide": len(cells) > 30,
        "low": _number(low),
        "high": _number(high),
    }


def _layer(layer: LayerMaps, drawn: Drawn) -> dict[str, Any]:
    files = [("Before its rewrite", layer.before_file), ("After", layer.file)]
    if not layer.before_file:
        files = [("Its maps", layer.file)]
    channels, height, width = layer.shape
    some = len(layer.shown) < channels
    which = f"the {len(layer.shown)} of {channels} that vary most" if some else f"{channels}"
    words = f"Channels, row by row: {which}; each map is {height}×{width}."
    if layer.error is not None:
        words += (
            " In each channel, before and after have the same scale. Squared error relative to the "
            f"original's maps: {layer.error:.4f}."
        )
    return {
        "name": layer.layer,
        "sides": [{"what": what, "source": data_uri(drawn.pictures[file])} for what, file in files],
        "words": f"{words} {layer.note}".strip(),
    }


def _how(record: Explanation) -> Markup:
    rows = [["Network", record.source.spec or f"{record.source.name}, made in memory"]]
    if record.source.weights:
        rows.append(["Weights", record.source.weights])
    if record.method:
        rows.append(["Maps", record.how])
    rows.append(["Pictures", str(record.preparation)])
    facts = table(Table(columns=("What", "Value"), rows=rows))
    parts = [Markup('<div class="facts-table">{}</div>').format(facts)]
    if record.command:
        command = shlex.join([PurePath(record.command[0]).name, *record.command[1:]])
        parts += [Markup("<h3>Make this page again</h3>"), code(command, wrap=True)]
    return section("how", "How it was made", *parts)
