"""The picture of the network: a bar for each layer, before and after, with its details.

It is plain HTML and CSS: it works without JavaScript, in print and with screen readers. The script
only adds the card that follows the pointer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from onebyone.core.records import LayerCost, Option, Plan, Profile
from onebyone.core.rewrite_rows import REWRITES, label_of
from onebyone.core.units import format_count, format_ms
from onebyone.report.components import environment
from onebyone.report.layer_rows import (
    GROUPED_ABOVE,
    LayerRow,
    Quantity,
    amount,
    bar_quantity,
    group_layers,
    match_layers,
    step_words,
)

_ALONE = "alone"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a bar: its width in percent, and the rewrite that colors it."""

    width: float
    rewrite: str
    row: int


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A layer, or a group of layers: two bars, the figures beside them, and details.

    Attributes:
        shown: The name, without the name of its group.
    """

    name: str
    shown: str
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
    """Consecutive bars, under a bar of their sum."""

    head: Bar
    bars: tuple[Bar, ...]


def network_picture(
    before: Profile, after: Profile | None, plan: Plan | None, *, timed_in: str | None = None
) -> Markup:
    """Return the picture: the whole network in two strips, then a bar for each layer.

    With more than forty layers, the bars are in groups that open on a click.

    Args:
        before: The profile of the original.
        after: Of the rewritten network, if there is one.
        plan: What was rewritten.
        timed_in: The runtime that the run is about. If the layers were timed in another one, the
            bars show multiply-accumulates: the other runtime's times could mislead.
    """
    rows = match_layers(before, after, plan)
    layers_in = {layer.timing.runtime for row in rows for layer in row.before if layer.timing}
    quantity = bar_quantity(rows) if timed_in is None or timed_in in layers_in else "macs"
    view = _View(quantity=quantity, compared=after is not None)
    largest = view.largest([[row] for row in rows])
    inner = {option.first.rewrite for row in rows for option in row.options}
    rewrites = {row.rewrite for row in rows} | inner
    present = sorted(rewrites, key=_legend_order)
    template = environment().get_template("network.html")
    text = template.render(
        compared=view.compared,
        intro=_intro(rows, view, before, plan),
        legend=[(name, _label(name)) for name in present],
        whole=view.sum_bar("", rows, view.largest([rows])),
        totals=view.totals(rows),
        bars=[view.layer_bar(row, largest) for row in rows],
        groups=_groups(rows, view, largest) if len(rows) > GROUPED_ABOVE else [],
    )
    return Markup(text)  # noqa: S704  # an autoescaped template's output


def _groups(rows: Sequence[LayerRow], view: _View, largest: float) -> list[BarGroup]:
    groups = group_layers(rows)
    widest = view.largest([group.rows for group in groups])
    return [
        BarGroup(
            head=view.sum_bar(group.name, group.rows, widest),
            # A group of one layer is shown as that layer, on the scale of the groups.
            bars=tuple(
                view.layer_bar(row, largest, group=group.name)
                if len(group.rows) > 1
                else view.layer_bar(row, widest)
                for row in group.rows
            ),
        )
        for group in groups
    ]


def _intro(rows: Sequence[LayerRow], view: _View, profile: Profile, plan: Plan | None) -> str:
    timings = (layer.timing for row in rows for layer in row.before if layer.timing)
    timing = next(timings, None)
    if view.quantity == "ms" and timing is not None:
        what = (
            f"its time inside the whole network ({timing.conditions}; their sum leaves out "
            "activations and what is between layers)"
        )
    else:
        what = "its multiply-accumulates for one input"
    both = "pale before, full after" if view.compared else "of the original network"
    planned = "; the colors show the plan" if plan is not None and not view.compared else ""
    grouped = "Inside a group the scale is larger. " if len(rows) > GROUPED_ABOVE else ""
    return (
        f"The width of a bar is a layer’s cost: {what}, input {profile.inputs}; {both}{planned}. "
        f"{grouped}Point at a layer, or open it, for its details."
    )


def _legend_order(rewrite: str) -> int:
    """Return a rewrite's position in the legend: ours, then other packages', then ``alone``."""
    order = (*REWRITES, rewrite, _ALONE) if rewrite != _ALONE else (*REWRITES, "", _ALONE)
    return order.index(rewrite)


def _label(rewrite: str) -> str:
    return "left alone" if rewrite == _ALONE else label_of(rewrite)


# ---------------------------------------------------------------- bars


@dataclass(frozen=True, kw_only=True)
class _View:
    """The quantity of the bars, and whether there is a network after."""

    quantity: Quantity
    compared: bool

    def layer_bar(self, row: LayerRow, largest: float, *, group: str = "") -> Bar:
        return Bar(
            name=row.name,
            shown=row.name.removeprefix(f"{group}.") if group else row.name,
            what=_what(row),
            rewrite=row.rewrite,
            cost=self._cost([row]),
            before=self._sums([(row, row.before)], largest),
            after=self._pieces(row, row.after, largest),
            facts=tuple(_facts(row, compared=self.compared)),
            pieces=tuple(_piece(layer, row.name) for layer in row.after) if row.options else (),
            index=row.index,
        )

    def sum_bar(self, name: str, rows: Sequence[LayerRow], widest: float) -> Bar:
        changed = sum(bool(row.options) for row in rows)
        layers = "1 layer" if len(rows) == 1 else f"{len(rows)} layers"
        return Bar(
            name=name,
            shown=name,
            what=layers + (f", {changed} rewritten" if changed else ""),
            rewrite="alone",
            cost=self._cost(rows),
            before=self._sums([(row, row.before) for row in rows], widest),
            after=self._sums([(row, row.after) for row in rows], widest),
        )

    def largest(self, groups: Iterable[Sequence[LayerRow]]) -> float:
        """Return the length of the longest bar: the largest cost of a group, before or after."""
        sums = [
            sum(amount(layers, self.quantity) for layers in side)
            for rows in groups
            for side in ([row.before for row in rows], [row.after for row in rows])
        ]
        return max(sums, default=0) or 1

    def totals(self, rows: Sequence[LayerRow]) -> tuple[str, str]:
        """Return the rows' total cost before and after, as text."""
        form = format_ms if self.quantity == "ms" else format_count
        before = sum(amount(row.before, self.quantity) for row in rows)
        after = sum(amount(row.after, self.quantity) for row in rows)
        first = form(before) if any(row.before for row in rows) else "–"
        second = form(after) if any(row.after for row in rows) else "–"
        return first, second

    def _cost(self, rows: Sequence[LayerRow]) -> str:
        first, second = self.totals(rows)
        return f"{first} → {second}" if self.compared else first

    def _segment(
        self, row: LayerRow, rewrite: str, layers: Sequence[LayerCost], whole: float
    ) -> Segment:
        width = round(100 * amount(layers, self.quantity) / whole, 3)
        return Segment(width=width, rewrite=rewrite, row=row.index)

    def _pieces(
        self, row: LayerRow, layers: Sequence[LayerCost], largest: float
    ) -> tuple[Segment, ...]:
        """Return a piece for each layer."""
        made = (self._segment(row, row.rewrite_of(layer), (layer,), largest) for layer in layers)
        return tuple(segment for segment in made if segment.width)

    def _sums(
        self, parts: Sequence[tuple[LayerRow, Sequence[LayerCost]]], whole: float
    ) -> tuple[Segment, ...]:
        """Return a piece for each row, or for each rewrite in it."""
        made = (
            self._segment(row, rewrite, tuple(group), whole)
            for row, layers in parts
            for rewrite, group in itertools.groupby(layers, row.rewrite_of)
        )
        return tuple(segment for segment in made if segment.width)


# ---------------------------------------------------------------- what is known of a layer


def _what(row: LayerRow) -> str:
    if row.options:
        rewrites = dict.fromkeys(option.rewrites for option in row.options)
        return ", ".join(" + ".join(map(_label, names)) for names in rewrites)
    kinds = [layer.kind for layer in row.before or row.after]
    return kinds[0] if kinds else ""


def _facts(row: LayerRow, *, compared: bool) -> Iterable[tuple[str, str]]:
    first = row.before[0] if row.before else None
    if first is not None:
        yield "Layer", " + ".join(_kind(layer) for layer in row.before)
        yield "Shapes", f"{_shape(first.input_shape)} → {_shape(row.before[-1].output_shape)}"
    for option in row.options:
        yield from _option_facts(option, row.options[0])
    for item in row.left_alone:
        yield "Left alone", item.reason if not row.options else f"{item.site}: {item.reason}"
    if not (row.options or row.left_alone) and compared and not row.after:
        yield "After", "no longer in the network"
    sides = (row.before, row.after) if compared else (row.before,)
    for name, read in (("Parameters", _params), ("MACs", _macs), ("Time", _time)):
        texts = [read(side) for side in sides]
        if any(text != "–" for text in texts):
            yield name, " → ".join(texts)


def _option_facts(option: Option, outer: Option) -> Iterable[tuple[str, str]]:
    words = " + ".join(map(step_words, option.steps))
    yield "Rewrite", words if option is outer else f"of {option.site}: {words}"
    if len(option.occupies) > 1:
        yield "In place of", ", ".join(option.occupies)
    if option.harm is not None:
        how = "measured" if option.measured else "interpolated"
        yield "Harm", f"{option.harm:.3g} ({how})"
    if option.error is not None:
        yield "Output error", f"{option.error:.3g} (relative, squared)"


def _kind(layer: LayerCost) -> str:
    return f"{layer.kind}, {layer.calls} calls" if layer.calls > 1 else layer.kind


def _piece(layer: LayerCost, site: str) -> str:
    """Return a text for a layer that a rewrite made, named by the part after its site's name."""
    name = layer.name.removeprefix(site) or layer.name or "(root)"
    parts = [
        f"{name}: {_kind(layer)} → {_shape(layer.output_shape)}",
        f"{format_count(layer.params)} params",
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
