"""The section of disagreements: test examples and classes on which the two networks differ."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from onebyone.core.records import ClassCount, ConfusedPair, Confusion, Disagreement, RunRecord
from onebyone.core.tables import Table
from onebyone.core.units import format_percent, format_points
from onebyone.report.components import disclosure, quantity, section, table
from onebyone.report.example_gallery import (
    LEFT_OUT,
    Example,
    Fact,
    Panel,
    class_name,
    example_gallery,
)
from onebyone.report.output_pictures import output_pictures
from onebyone.report.section_verdict import examples_word

_PICTURES = 60  # the most test examples shown; others are only counted
_CLASSES = 20  # rows that are visible without a click
_PAIRS = 12
_NONE = "–"


def differences_section(record: RunRecord) -> Markup:
    """Return the examples on which the two networks disagree, and the confusions by class."""
    parts = [*_examples(record), *output_pictures(record), *_confusion(record)]
    return section("differences", "Where they differ", *parts) if parts else Markup("")


# ---------------------------------------------------------------- test examples


def _examples(record: RunRecord) -> list[str | Markup]:
    if not record.disagreements:
        agreement = record.comparison.agreement if record.comparison else None
        if agreement is None or agreement.value < 1:
            return []
        unit = examples_word(record)
        return [f"The two networks predict the same for all {agreement.n:,} test {unit}."]
    shown = record.disagreements[:_PICTURES]
    gallery, left_out = example_gallery([_disagreement(record, item) for item in shown])
    return [_disagreement_words(record, shown) + (LEFT_OUT if left_out else ""), gallery]


def _disagreement_words(record: RunRecord, shown: Sequence[Disagreement]) -> str:
    unit = examples_word(record)
    before = sum(item.before == item.label for item in shown)
    after = sum(item.after == item.label for item in shown)
    agreement = record.comparison.agreement if record.comparison else None
    total = round(agreement.n * (1 - agreement.value)) if agreement else len(shown)
    some = f"; {len(shown)} are shown, the most confident first" if total > len(shown) else ""
    return (
        f"The two networks disagree on {total:,} test {unit if total != 1 else unit[:-1]}{some}. "
        f"Of these, the original is right on {before} and the rewritten network on {after}; both "
        f"are wrong on {len(shown) - before - after}."
    )


def _disagreement(record: RunRecord, item: Disagreement) -> Example:
    classes = record.data.classes if record.data else ()
    names = ("image", "original’s map", "rewritten network’s map")
    predictions = [
        Fact(name=who, text=class_name(classes, index), right=index == item.label)
        for who, index in (("Before", item.before), ("After", item.after))
    ]
    return Example(
        index=item.index,
        panels=[
            Panel(what=what, source=source)
            for what, source in zip(names, (item.image, *item.maps), strict=False)
        ],
        facts=[Fact(name="Truth", text=class_name(classes, item.label)), *predictions],
    )


# ---------------------------------------------------------------- classes


def _confusion(record: RunRecord) -> list[str | Markup]:
    found = record.confusion
    if found is None or not found.counts:
        return []
    names = record.data.classes if record.data else ()
    parts = [_classes_part(found, names), _pairs_part(found, names)]
    both = Markup('<div class="charts confusion">{}</div>').format(
        Markup("").join(Markup("<div>{}</div>").format(part) for part in parts if part)
    )
    return [Markup("<h3>Confusion by class</h3>"), _confusion_words(found, record), both]


def _confusion_words(found: Confusion, record: RunRecord) -> str:
    better = sum(count.after > count.before for count in found.counts)
    worse = sum(count.after < count.before for count in found.counts)
    listed = len(found.counts)
    of = f"{listed} classes listed" if listed < found.classes else f"{listed} classes"
    if not better + worse:
        return f"The rewritten network is right as often as the original in each of the {of}."
    fewest = min(count.n for count in found.counts)
    images = examples_word(record)
    return (
        f"Of the {of}, the rewritten network is right more often in {better} and less often in "
        f"{worse}. The smallest class has {fewest:,} test {images}: a small change in one class "
        "shows nothing."
    )


def _classes_part(found: Confusion, names: Sequence[str]) -> Markup:
    # Classes that did not change are behind a click: rows of zeros say nothing.
    changed = [count for count in found.counts if count.after != count.before]
    if len(changed) > _CLASSES:
        changed.sort(key=lambda count: -abs(count.after - count.before) / max(count.n, 1))
    counts = [*changed, *(count for count in found.counts if count.after == count.before)]
    shown = min(len(changed), _CLASSES)
    sizes = {count.n for count in counts}
    rows = [_class_row(count, names, sized=len(sizes) > 1) for count in counts]
    title = "Right, by class" if shown == len(counts) else "Right, by class: the most changed"
    left = len(rows) - shown
    of = f" of {found.classes:,} classes" if found.classes > len(rows) else " classes"
    return _listed(
        rows,
        shown,
        columns=("Class", ">Before", ">After", ">Change"),
        title=title + (f", {sizes.pop():,} each" if len(sizes) == 1 else ""),
        more=f"{left}{' more' if shown else ''}{of}",
    )


def _class_row(count: ClassCount, names: Sequence[str], *, sized: bool) -> list[str]:
    n = max(count.n, 1)
    name = class_name(names, count.label)
    change = (count.after - count.before) / n
    return [
        Markup("{}<small>n = {}</small>").format(name, f"{count.n:,}") if sized else name,
        quantity(count.before, format_percent(count.before / n)),
        quantity(count.after, format_percent(count.after / n)),
        format_points(change, 1) if change else "0",
    ]


def _pairs_part(found: Confusion, names: Sequence[str]) -> Markup:
    if not found.pairs:
        return Markup("")
    rows = [_pair_row(pair, names) for pair in found.pairs]
    rarer = f"; {found.pairs_left_out:,} rarer ones are not kept" if found.pairs_left_out else ""
    return _listed(
        rows,
        _PAIRS,
        columns=("Truth → taken for", ">Before", ">After", ">Change"),
        title="The most confused",
        more=f"{len(rows) - _PAIRS} more pairs{rarer}",
    )


def _pair_row(pair: ConfusedPair, names: Sequence[str]) -> list[str]:
    change = pair.after - pair.before
    return [
        f"{class_name(names, pair.label)} → {class_name(names, pair.predicted)}",
        quantity(pair.before, f"{pair.before:,}"),
        quantity(pair.after, f"{pair.after:,}"),
        f"{change:+,}".replace("-", "−") if change else "0",
    ]


def _listed(
    rows: list[list[str]], most: int, *, columns: tuple[str, ...], title: str, more: str
) -> Markup:
    """Return a table of the first rows; a click opens all of them."""
    shown = Table(columns=columns, rows=rows[:most], title=title)
    content = table(shown, stack=False) if most else Markup("")
    if len(rows) <= most:
        return content
    whole = table(Table(columns=columns, rows=rows[most:]), stack=False)
    return content + disclosure(more, whole)
