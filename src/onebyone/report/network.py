"""The network as a picture: a bar a layer, before and after, with what is known of it inside.

It is HTML and CSS without a library: it works without JavaScript, prints, and reads aloud; the
script only adds the card that follows the pointer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from onebyone.records import LayerCost, Option, Plan, Profile
from onebyone.report.layers import (
    GROUPED_ABOVE,
    LayerRow,
    Quantity,
    amount,
    bar_quantity,
    group_layers,
    match_layers,
    settings_words,
)
from onebyone.report.parts import environment
from onebyone.units import format_count, format_ms

_LABELS = {
    "factorize": "factorized",
    "head": "new head",
    "deepen": "deepened",
    "separable": "made separable",
    "fold": "folded",
    "alone": "left alone",
}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a bar: its width in percent, and what colors it."""

    width: float
    rewrite: str
    row: int


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A layer, or a group of them: two bars, the figures beside them, and facts inside."""

    name: str
    what: str
    rewrite: str
    cost: str
    before: tuple[Segment, ...]
    after: tuple[Segment, ...]
    facts: tuple[tuple[str, str], ...] = ()
    pieces: tuple[str, ...] = ()
    index: int = 0


@dataclass(frozen=True, kw_only=True)
class BarGroup:
    """Bars that follow each other, under the bar of their sum."""

    head: Bar
    bars: tuple[Bar, ...]


def network_picture(before: Profile, after: Profile | None, plan: Plan | None) -> Markup:
    """Return the picture: the whole network in two strips, then a bar a layer.

    Above forty layers, the bars are in groups that open.
    """
    rows = match_layers(before, after, plan)
    quantity = bar_quantity(rows)
    grouped = len(rows) > GROUPED_ABOVE
    number = {id(row): index for index, row in enumerate(rows)}
    largest = _largest([[row] for row in rows], quantity)
    bars = [
        _layer_bar(row, index, quantity, largest, compared=after is not None)
        for index, row in enumerate(rows)
    ]
    groups = []
    if grouped:
        members = [group.rows for group in group_layers(rows)]
        names = [group.name for group in group_layers(rows)]
        widest = _largest(members, quantity)
        for name, group in zip(names, members, strict=True):
            indices = [number[id(row)] for row in group]
            head = _sum_bar(name, group, indices, quantity, widest, compared=after is not None)
            groups.append(BarGroup(head=head, bars=tuple(bars[index] for index in indices)))
    whole = _sum_bar(
        "whole",
        rows,
        list(range(len(rows))),
        quantity,
        _largest([rows], quantity),
        compared=after is not None,
    )
    present = dict.fromkeys(row.rewrite for row in rows)
    text = (
        environment()
        .get_template("network.html")
        .render(
            whole=whole,
            totals=_totals(rows, quantity, compared=after is not None),
            groups=groups,
            bars=bars,
            legend=[(name, _LABELS.get(name, name)) for name in sorted(present, key=_legend_order)],
            intro=_intro(rows, quantity, before, compared=after is not None),
            compared=after is not None,
        )
    )
    return Markup(text)  # noqa: S704  # an autoescaped template's output


def _intro(
    rows: Sequence[LayerRow], quantity: Quantity, profile: Profile, *, compared: bool
) -> str:
    if quantity == "macs":
        what = "its multiply-accumulates for one input"
    else:
        timings = (layer.timing for row in rows for layer in row.before if layer.timing)
        timing = next(timings)
        what = f"its time inside the whole network ({timing.conditions})"
    shape = "×".join(map(str, profile.input_shape))
    both = "pale before and full after" if compared else "of the original network"
    return (
        f"The width of a bar is the layer’s cost: {what}, input {shape}; {both}. "
        "Point at a layer, or open it, for all that is known of it."
    )


def _legend_order(rewrite: str) -> int:
    return list(_LABELS).index(rewrite) if rewrite in _LABELS else len(_LABELS)


def _largest(groups: Iterable[Sequence[LayerRow]], quantity: Quantity) -> float:
    sums = [
        sum(amount(layers, quantity) for layers in side)
        for rows in groups
        for side in ([row.before for row in rows], [row.after for row in rows])
    ]
    return max(sums, default=0) or 1


# ---------------------------------------------------------------- bars


def _layer_bar(
    row: LayerRow, index: int, quantity: Quantity, largest: float, *, compared: bool
) -> Bar:
    return Bar(
        name=row.name,
        what=_what(row),
        rewrite=row.rewrite,
        cost=_cost([row], quantity, compared=compared),
        before=_segments(row.before, row.rewrite, index, quantity, largest),
        after=_segments(row.after, row.rewrite, index, quantity, largest),
        facts=tuple(_facts(row, compared=compared)),
        pieces=tuple(_piece(layer) for layer in row.after) if row.option else (),
        index=index,
    )


def _sum_bar(
    name: str,
    rows: Sequence[LayerRow],
    indices: Sequence[int],
    quantity: Quantity,
    widest: float,
    *,
    compared: bool,
) -> Bar:
    sides = []
    for side in ("before", "after"):
        widths = (100 * amount(getattr(row, side), quantity) / widest for row in rows)
        sides.append(
            tuple(
                Segment(width=round(width, 3), rewrite=row.rewrite, row=index)
                for width, row, index in zip(widths, rows, indices, strict=True)
                if width > 0
            )
        )
    changed = sum(row.option is not None for row in rows)
    what = f"{len(rows)} layers" + (f", {changed} rewritten" if changed else "")
    cost = _cost(rows, quantity, compared=compared)
    return Bar(name=name, what=what, rewrite="alone", cost=cost, before=sides[0], after=sides[1])


def _segments(
    layers: Sequence[LayerCost], rewrite: str, index: int, quantity: Quantity, largest: float
) -> tuple[Segment, ...]:
    widths = (round(100 * amount([layer], quantity) / largest, 3) for layer in layers)
    return tuple(Segment(width=width, rewrite=rewrite, row=index) for width in widths if width)


def _cost(rows: Sequence[LayerRow], quantity: Quantity, *, compared: bool) -> str:
    first, second = _totals(rows, quantity, compared=compared)
    return f"{first} → {second}" if second else first


def _totals(rows: Sequence[LayerRow], quantity: Quantity, *, compared: bool) -> tuple[str, str]:
    form = format_ms if quantity == "ms" else format_count
    before = sum(amount(row.before, quantity) for row in rows)
    after = sum(amount(row.after, quantity) for row in rows)
    first = form(before) if any(row.before for row in rows) else "–"
    second = form(after) if any(row.after for row in rows) else "–"
    return first, second if compared else ""


# ---------------------------------------------------------------- what is known of a layer


def _what(row: LayerRow) -> str:
    if row.option is not None:
        return _LABELS.get(row.rewrite, row.rewrite)
    kinds = [layer.kind for layer in row.before or row.after]
    return kinds[0] if kinds else ""


def _facts(row: LayerRow, *, compared: bool) -> Iterable[tuple[str, str]]:
    first = row.before[0] if row.before else None
    if first is not None:
        yield "Layer", " + ".join(_kind(layer) for layer in row.before)
        yield "Shapes", f"{_shape(first.input_shape)} → {_shape(row.before[-1].output_shape)}"
    if row.option is not None:
        yield from _option_facts(row.option)
    elif row.reason:
        yield "Left alone", row.reason
    elif compared and not row.after:
        yield "After", "no longer in the network"
    sides = (row.before, row.after) if compared else (row.before,)
    for name, read in (("Parameters", _params), ("MACs", _macs), ("Time", _time)):
        texts = [read(side) for side in sides]
        if any(text != "–" for text in texts):
            yield name, " → ".join(texts)


def _option_facts(option: Option) -> Iterable[tuple[str, str]]:
    settings = settings_words(option.settings)
    yield "Rewrite", f"{option.rewrite}: {settings}" if settings else option.rewrite
    if len(option.occupies) > 1:
        yield "In place of", ", ".join(option.occupies)
    if option.harm is not None:
        how = "measured" if option.measured else "predicted"
        yield "Harm", f"{option.harm:.3g} ({how})"
    if option.error is not None:
        yield "Output error", f"{option.error:.3g} (relative, squared)"


def _kind(layer: LayerCost) -> str:
    return f"{layer.kind}, {layer.calls} calls" if layer.calls > 1 else layer.kind


def _piece(layer: LayerCost) -> str:
    parts = [
        layer.name or "(root)",
        _kind(layer),
        f"→ {_shape(layer.output_shape)}",
        f"{format_count(layer.params)} parameters",
        f"{format_count(layer.macs)} MACs",
    ]
    return ", ".join(parts + ([format_ms(layer.timing.median_ms)] if layer.timing else []))


def _params(layers: Sequence[LayerCost]) -> str:
    return format_count(sum(layer.params for layer in layers)) if layers else "–"


def _macs(layers: Sequence[LayerCost]) -> str:
    return format_count(sum(layer.macs for layer in layers)) if layers else "–"


def _time(layers: Sequence[LayerCost]) -> str:
    timed = [layer.timing.median_ms for layer in layers if layer.timing]
    return format_ms(sum(timed)) if timed else "–"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
