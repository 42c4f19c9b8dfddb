"""Plans in which every group of layers loses channels, whatever harm that does."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from onebyone.core.records import Option, Plan
from onebyone.core.tensor_trees import spec_of
from onebyone.planning.groups import group_options
from onebyone.planning.links import Links, places_of
from onebyone.profiling.trace import LayerCosts
from onebyone.rewrites.narrow import rewrite as narrow


def plan_of_widths(
    network: nn.Module, example: Tensor, costs: LayerCosts, width: Callable[[int], int]
) -> Plan:
    """Return the plan by which all groups that do not exclude each other get other widths.

    Args:
        network: Not modified.
        example: An input.
        costs: What the network was traced to cost on that input.
        width: Gives the channels that are kept, of those that there are; at least one is.
    """
    layers = {layer.name: layer for layer in costs.layers}
    groups = narrow.find(network, example).groups
    links = Links(groups, network, costs.layers)
    options = [
        option
        for group in groups
        for option in group_options(
            "narrow", network, group, layers, [{"channels": max(1, width(group.channels))}]
        )
    ]
    # A group is fitted once what its last reader sees is known.
    order = {layer.name: place for place, layer in enumerate(costs.layers)}
    last = {group.site: max(order[name] for name in group.readers) for group in groups}
    options.sort(key=lambda option: last[option.site])
    taken, chosen = set[str](), list[Option]()
    whole = [*options, *links.between(options)]
    for option, places in zip(options, places_of(whole), strict=False):
        if taken.isdisjoint(places):
            taken |= set(places)
            chosen.append(option)
    choices = links.settled([*chosen, *links.between(chosen)])
    after = costs.cost
    for option in choices:
        after = after - option.saved
    return Plan(
        network=type(network).__name__,
        inputs=spec_of(example),
        budgets=(),
        before=costs.cost,
        after=after,
        choices=choices,
        left_alone=(),
    )
