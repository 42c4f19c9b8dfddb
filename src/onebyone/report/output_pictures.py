"""What both networks give for a few test examples, side by side: masks, boxes or patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from onebyone.core.records import (
    LegendEntry,
    OutputPictures,
    PicturedBox,
    PicturedExample,
    PicturedOutput,
    RunRecord,
)
from onebyone.core.records.measured import SHARES
from onebyone.core.units import format_percent
from onebyone.report.components import environment
from onebyone.report.example_gallery import (
    LEFT_OUT,
    MOST_CHARACTERS,
    Example,
    Fact,
    Panel,
    class_name,
    example_gallery,
)
from onebyone.report.section_verdict import examples_word

_LONGEST = 14  # characters of a class's name beside its box
_LABEL = (0.3, 0.08)  # about its width and height, as shares of the picture's

# By class: color and dashes of a box's outline. The colors are Okabe and Ito's.
_COLORS = ("#f0e442", "#56b4e9", "#e69f00", "#00c389", "#ff8fd0", "#ffffff")
_DASHES = ("", "7 3", "2 3", "9 3 2 3")

_Panels = Callable[[RunRecord, OutputPictures, PicturedExample], list[Panel]]


def output_pictures(record: RunRecord) -> list[str | Markup]:
    """Return the examples with the outputs of both networks; nothing where there are none."""
    found = record.pictures
    if found is None or not found.examples:
        return []
    panels: Mapping[str, _Panels] = {
        "masks": _mask_panels, "boxes": _box_panels, "patches": _patch_panels,
    }  # fmt: skip
    examples: dict[str, list[Example]] = {"most": [], "random": []}
    for each in found.examples:
        shown = Example(
            index=each.index,
            panels=panels[found.kind](record, found, each),
            facts=_facts(found, each),
        )
        examples[each.chosen].append(shown)
    headings = {"most": "The most different", "random": "Drawn at random"}
    parts = [_part(headings[why], chosen) for why, chosen in examples.items() if chosen]
    words = _words(record, found, len(examples["most"]))
    if any(left_out for _, left_out in parts):
        words += LEFT_OUT
    return [words, _legend(found), *(part for part, _ in parts)]


def _part(heading: str, examples: Sequence[Example]) -> tuple[Markup, bool]:
    gallery, left_out = example_gallery(examples, wide=True, most=MOST_CHARACTERS // 2)
    return Markup("<h3>{}</h3>{}").format(heading, gallery), left_out


def _words(record: RunRecord, found: OutputPictures, most: int) -> str:
    unit = examples_word(record)
    by = "" if record.task is None else f" (by {record.task.divergence})"
    if found.kind == "masks":
        by = " (by the share of pixels in another class)"
    drawn = len(found.examples) - most
    others = f", and {drawn} drawn at random from the others (seed {found.seed})" if drawn else ""
    return (
        f"Shown are the {most} of {found.scored:,} test {unit} on which the two networks differ "
        f"most{by}{others}. {_KINDS[found.kind](found)}"
    )


def _patch_words(found: OutputPictures) -> str:
    del found
    return (
        "Each patch is where the outputs of the two networks differ most. All pictures of an "
        "example but its input share one scale of brightness. The difference is after minus "
        "before, amplified; where they are equal it is gray."
    )


def _box_words(found: OutputPictures) -> str:
    least = found.least_confidence or 0
    few = " It is below 0.5 because the original is seldom that sure." if least < 0.5 else ""
    hidden = f" {_boxes(found.hidden)} in full images are left out." if found.hidden else ""
    return f"Boxes with a confidence of at least {least:g} are shown.{few}{hidden}"


_KINDS: Mapping[str, Callable[[OutputPictures], str]] = {
    "masks": lambda _: "Each class has a color and a pattern of its own.",
    "boxes": _box_words,
    "patches": _patch_words,
}


def _facts(found: OutputPictures, example: PicturedExample) -> list[Fact]:
    facts = []
    if example.changed is not None:
        facts.append(Fact(name="In another class", text=f"{_share(example.changed)} of the pixels"))
    else:
        facts.append(Fact(name="Divergence", text=f"{example.divergence:.3g}"))
    scores = (example.before.score, example.after.score)
    if found.metric and None not in scores:
        before, after = (_score(found.metric, each) for each in scores if each is not None)
        facts.append(Fact(name=f"Its {found.metric}", text=f"{before} → {after}"))
    return facts


def _share(share: float) -> str:
    return "less than 0.1 %" if 0 < share < 0.001 else format_percent(share)


def _score(metric: str, score: float) -> str:
    if metric in SHARES:
        return format_percent(score)
    return f"{score:.2f} dB" if metric.lower() == "psnr" else f"{score:.4g}".replace("-", "−")


def _outputs(example: PicturedExample) -> list[tuple[str, PicturedOutput]]:
    """Return what there is to compare, with its caption; before and after are neighbors."""
    found = [("Before", example.before), ("After", example.after)]
    return found if example.truth is None else [*found, ("True answer", example.truth)]


# ---------------------------------------------------------------- masks


def _mask_panels(record: RunRecord, found: OutputPictures, example: PicturedExample) -> list[Panel]:
    del record, found
    panels = [
        Panel(what=f"mask, {name.lower()}", source=example.image, over=each.picture, caption=name)
        for name, each in _outputs(example)
    ]
    return [*panels, Panel(what="image", source=example.image, caption="Image")]


def _legend(found: OutputPictures) -> Markup:
    """Return how classes are drawn; empty for boxes, which have their names beside them."""
    entries = Markup("").join(_legend_entry(each) for each in found.legend)
    return Markup('<ul class="legend samples">{}</ul>').format(entries) if entries else entries


def _legend_entry(entry: LegendEntry) -> Markup:
    if not entry.sample.startswith("data:image/"):
        return Markup("<li>{} (not colored)</li>").format(entry.name)
    return Markup('<li><img src="{}" alt="">{}</li>').format(entry.sample, entry.name)


# ---------------------------------------------------------------- boxes


def _labels(found: OutputPictures) -> list[int]:
    """Return the classes of all boxes, in order; the position of each decides its style."""
    outputs = [each for example in found.examples for _, each in _outputs(example)]
    return sorted({box.label for each in outputs for box in each.boxes})


def _style(place: int) -> tuple[str, str]:
    return _COLORS[place % len(_COLORS)], _DASHES[place % len(_DASHES)]


def _box_panels(record: RunRecord, found: OutputPictures, example: PicturedExample) -> list[Panel]:
    labels = _labels(found)
    classes = record.data.classes if record.data else ()
    panels = []
    for name, each in _outputs(example):
        rows = [
            {"box": box, "style": _style(labels.index(box.label)), "label": _tag(box, classes)}
            for box in each.boxes
        ]
        for row, below in zip(rows, _labels_below(each.boxes), strict=True):
            row["below"] = below
        # The most confident box is drawn last, so that it lies on top.
        drawn = environment().get_template("boxes.html").render(rows=rows[::-1])
        listed = ", ".join(_tag(box, classes, whole=True) for box in each.boxes) or "none"
        panels.append(
            Panel(
                what=f"boxes, {name.lower()}: {listed}",
                source=example.image,
                drawn=Markup(drawn),  # noqa: S704  # an autoescaped template's output
                caption=f"{name}: {_boxes(len(each.boxes))}",
            )
        )
    return panels


def _labels_below(boxes: Sequence[PicturedBox]) -> list[bool]:
    """Return which labels stand at the lower edge: their place at the top is taken."""
    taken: list[tuple[float, float]] = []
    below = []
    for box in boxes:
        across, down = _LABEL
        near = any(abs(box.left - x) < across and abs(box.top - y) < down for x, y in taken)
        taken.append((box.left, box.bottom - down if near else box.top))
        below.append(near)
    return below


def _tag(box: PicturedBox, classes: Sequence[str], *, whole: bool = False) -> str:
    name = class_name(classes, box.label)
    if len(name) > _LONGEST and not whole:
        name = name[: _LONGEST - 1] + "…"
    return name if box.confidence is None else f"{name} {box.confidence:.2f}"


def _boxes(count: int) -> str:
    return f"{count:,} box" if count == 1 else f"{count:,} boxes"


# ---------------------------------------------------------------- patches


def _patch_panels(
    record: RunRecord, found: OutputPictures, example: PicturedExample
) -> list[Panel]:
    del record, found
    panels = [
        Panel(what=f"patch, {name.lower()}", source=each.picture, caption=name)
        for name, each in _outputs(example)
    ]
    difference = f"Difference, {example.amplified:,}×"
    return [
        *panels,
        Panel(what="patch of the input", source=example.image, caption="Input"),
        Panel(what=difference.lower(), source=example.difference, caption=difference),
    ]
