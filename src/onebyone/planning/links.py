"""Links: what two options of narrower groups save twice at a layer that both change.

A layer may read the channels of one group and write those of the next. Where both are narrowed, it
saves less than the sum of what each saves there. That difference is a product of two choices, so it
is an option of its own, a link, which saves less than nothing and is picked exactly where its two
options are: the plan stays a linear problem in whole numbers, and is solved exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import nn

from onebyone.core.records import Cost, LayerCost, Option, Settings, Step
from onebyone.networks.channel_groups import ChannelGroup
from onebyone.networks.surgery import floating_type, module_at
from onebyone.planning.exact_search import AtLeast
from onebyone.planning.joins import LINK
from onebyone.rewrites.narrow.rewrite import layer_cost

NARROW = "narrow"


@dataclass(frozen=True)
class Common:
    """A layer that reads the channels of one group and writes those of another."""

    layer: str
    first: ChannelGroup
    second: ChannelGroup


def commons_of(groups: Sequence[ChannelGroup], layers: Sequence[LayerCost]) -> list[Common]:
    """Return the layers at which two groups can both be narrowed.

    The first group is narrowed before the second: its readers are then refitted while they still
    write all channels of the second. Groups that meet in another way exclude each other.

    Args:
        groups: Of layers that share channels.
        layers: All of the network's, in order of execution.
    """
    order = {layer.name: place for place, layer in enumerate(layers)}
    done = [max(order[name] for name in group.readers) for group in groups]
    found = []
    for first, first_done in zip(groups, done, strict=True):
        for second, second_done in zip(groups, done, strict=True):
            both = set(first.members) & set(second.members)
            if first_done < second_done and both <= set(first.readers) & set(second.producers):
                found += [Common(name, first, second) for name in first.readers if name in both]
    return found


class Links:
    """Makes the links between groups of a network.

    Args:
        groups: Of layers that share channels.
        network: Has the layers, of full width. Not modified.
        layers: All of them as they were seen, in order of execution.
        float_bytes: Of a weight as it is deployed; ``None`` for the network's own.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        network: nn.Module,
        layers: Sequence[LayerCost],
        *,
        float_bytes: int | None = None,
    ) -> None:
        self._given = groups, network, layers
        own = floating_type(network).itemsize
        self._size = Fraction(own if float_bytes is None else float_bytes, own)
        self._network = network
        self._layers = {layer.name: layer for layer in layers}
        self._groups = {group.site: group for group in groups}
        self._commons = commons_of(groups, layers)

    def in_floats_of(self, size: int) -> Links:
        """Return the same for weights of so many bytes."""
        return Links(*self._given, float_bytes=size)

    def between(self, options: Iterable[Option]) -> list[Option]:
        """Return a link for each two options of groups that have a layer in common.

        Args:
            options: Of all sites; those without milliseconds have links without.
        """
        narrower: dict[str, list[Option]] = defaultdict(list)
        for option in options:
            if is_narrow(option):
                narrower[option.site].append(option)
        return [
            self._link(common, first, second)
            for common in self._commons
            for first in narrower[common.first.site]
            for second in narrower[common.second.site]
        ]

    def _link(self, common: Common, first: Option, second: Option) -> Option:
        alone, beside = self._saved(common.layer, first, second)
        counts = alone - beside
        settings: Settings = {
            "layer": common.layer,
            "first": first.site,
            "second": second.site,
            "widths": [width_of(first), width_of(second)],
        }
        before = Cost(params=0, macs=0, bytes=0)
        if first.after.ms is not None and second.after.ms is not None:
            # A layer is not timed at both widths: what is saved twice is taken to follow its MACs.
            rates = [max(o.saved.ms or 0.0, 0.0) / max(o.saved.macs, 1) for o in (first, second)]
            before = replace(before, ms=0.0)
            counts = replace(counts, ms=counts.macs * sum(rates) / 2)
        return Option(
            site=f"{first.site} & {second.site} at {common.layer}",
            steps=(Step(rewrite=LINK, settings=settings),),
            before=before,
            after=counts,
            harm=0.0,
        )

    def _saved(self, layer: str, narrowed: Option, other: Option) -> tuple[Cost, Cost]:
        """Return what an option saves at a layer, as it is and where another narrows it too."""
        mine, its = self._share(narrowed), self._share(other)
        reads = layer in self._groups[narrowed.site].readers
        module, macs = module_at(self._network, layer), self._layers[layer].macs

        def cost(own: Fraction, others: Fraction) -> Cost:
            read, written = (own, others) if reads else (others, own)
            found = layer_cost(module, macs, read=read, written=written)
            return replace(found, bytes=int(found.bytes * self._size))

        one = Fraction(1)
        return cost(one, one) - cost(mine, one), cost(one, its) - cost(mine, its)

    def _share(self, option: Option) -> Fraction:
        return Fraction(width_of(option), self._groups[option.site].channels)

    def settled(self, options: Sequence[Option]) -> tuple[Option, ...]:
        """Return chosen options without links, each with its costs as all of them leave it.

        Together they save what they saved with the links; the second option of each bears it.
        """
        found = {option.site: option for option in options if is_narrow(option)}
        for link in filter(is_link, options):
            layer, *sites = _where(link)
            first, second = (found[site] for site in sites)
            alone, beside = self._saved(layer, first, second)
            _, its = self._saved(layer, second, first)
            found[first.site] = _without(first, its, its)
            found[second.site] = _without(second, alone, replace(beside, ms=link.saved.ms))
        return tuple(found.get(o.site, o) if is_narrow(o) else o for o in options if not is_link(o))


def _without(option: Option, before: Cost, after: Cost) -> Option:
    """Return an option with less counted of its site before and after."""
    known = option.after.ms is not None
    before, after = (replace(c, ms=(c.ms or 0.0) if known else None) for c in (before, after))
    return replace(option, before=option.before - before, after=option.after - after)


def is_narrow(option: Option) -> bool:
    """Whether an option narrows a group of layers."""
    return option.first.rewrite == NARROW


def is_link(option: Option) -> bool:
    """Whether an option is a link."""
    return option.first.rewrite == LINK


def width_of(option: Option) -> int:
    """Return the channels that an option leaves its group."""
    width = option.first.settings["channels"]
    assert isinstance(width, int)
    return width


def among(options: Iterable[Option], chosen: Iterable[Option]) -> list[Option]:
    """Return the links of which both options are chosen."""
    picked = {(option.site, width_of(option)) for option in chosen if is_narrow(option)}
    return [option for option in options if is_link(option) and set(_ends(option)) <= picked]


def _where(link: Option) -> tuple[str, str, str]:
    """Return the layer that a link is at, and the sites of its two options."""
    layer, first, second = (str(link.first.settings[key]) for key in ("layer", "first", "second"))
    return layer, first, second


def _ends(link: Option) -> tuple[tuple[str, int], tuple[str, int]]:
    """Return the site and the width of a link's two options."""
    _, first, second = _where(link)
    widths = link.first.settings["widths"]
    assert isinstance(widths, list)
    return (first, widths[0]), (second, widths[1])


def places_of(options: Sequence[Option]) -> list[tuple[str, ...]]:
    """Return what each option takes for itself alone.

    That is the modules that it changes. Of a layer that links are at, one group takes the inputs
    and another the outputs; all other options take both.
    """
    ends: dict[tuple[str, str], str] = {}
    for link in filter(is_link, options):
        layer, first, second = _where(link)
        ends[first, layer], ends[second, layer] = f"inputs of {layer}", f"outputs of {layer}"
    both: dict[str, list[str]] = defaultdict(list)
    for (_, layer), end in ends.items():
        both[layer].append(end)
    found = []
    for option in options:
        taken: list[str] = []
        for name in option.occupies or (option.site,):
            mine = ends.get((option.site, name)) if is_narrow(option) else None
            taken += [mine] if mine else both.get(name, [name])
        found.append(tuple(taken))
    return found


def rows_of(options: Sequence[Option]) -> list[AtLeast]:
    """Return the bounds by which a link is picked exactly where both its options are."""
    links: dict[str, list[int]] = defaultdict(list)
    narrower: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, option in enumerate(options):
        if is_link(option):
            links[option.site].append(place)
        elif is_narrow(option):
            narrower[option.site, width_of(option)].append(place)
    rows = []
    for places in links.values():
        at_end: dict[tuple[str, int], list[int]] = defaultdict(list)
        for place in places:
            for end in _ends(options[place]):
                at_end[end].append(place)
        # No link without both its options, and one where both groups are narrowed.
        for end, mine in at_end.items():
            rows.append(_row(len(options), {-1: mine, 1: narrower[end]}, 0))
        ends = [place for end in at_end for place in narrower[end]]
        rows.append(_row(len(options), {1: places, -1: ends}, -1))
    return rows


def _row(length: int, amounts: dict[int, list[int]], least: int) -> AtLeast:
    row = [0] * length
    for amount, places in amounts.items():
        for place in places:
            row[place] = amount
    return AtLeast(tuple(row), least)
