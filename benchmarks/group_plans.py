"""Plans in which every group of layers loses channels, whatever harm that does."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from onebyone.core.records import Plan
from onebyone.core.tensor_trees import spec_of
from onebyone.planning.groups import group_options
from onebyone.profiling.trace import LayerCosts
from onebyone.rewrites.narrow import rewrite as narrow


def plan_of_widths(
    network: nn.Module, example: Tensor, costs: LayerCosts, width: Callable[[int], int]
) -> Plan:
    """Return the plan by which groups with no layer in common get other widths.

    Args:
        network: Not modified.
        example: An input.
        costs: What the network was traced to cost on that input.
        width: Gives the channels that are kept, of those that there are; at least one is.
    """
    layers = {layer.name: layer for layer in costs.layers}
    after, choices, taken = costs.cost, [], set[str]()
    for group in narrow.find(network, example).groups:
        if taken & set(group.members):
            continue
        taken |= set(group.members)
        asked = {"channels": max(1, width(group.channels))}
        choices += group_options("narrow", network, group, layers, [asked])
        after = after - choices[-1].saved
    return Plan(
        network=type(network).__name__,
        inputs=spec_of(example),
        budgets=(),
        before=costs.cost,
        after=after,
        choices=tuple(choices),
        left_alone=(),
    )
