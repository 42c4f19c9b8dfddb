"""The figures of a plan that was edited by hand."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from onebyone.core.records import COUNTED, Cost, LayerCost, Option, Plan
from onebyone.networks.examples import example_of
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.planning.latency.precision import INT8, INT8_BYTES
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites import restructure
from onebyone.rewrites.registry import is_group_rewrite, is_layer_rewrite

NOTE = (
    "The plan was edited after it was made: its costs were counted anew, and what was measured "
    "or predicted for other choices was left out."
)


def recounted(plan: Plan, original: nn.Module) -> Plan:
    """Return a plan whose costs are those of its choices; itself where its file says so already.

    Args:
        plan: Perhaps edited by hand.
        original: The network that it is for. Not modified.

    Returns:
        The plan. If a choice was edited, its cost is counted, its harm is unknown, and so are the
        plan's harm and time.

    Raises:
        PlanError: If the plan does not fit the network.
    """
    small = restructure(original, plan)
    example = example_of(small, plan.inputs.with_batch(1))
    traced = trace_layers(small, example)
    size = INT8_BYTES if plan.precision == INT8 else None
    choices = tuple(_recounted(option, small, traced.layers, size) for option in plan.choices)
    left = plan.before
    if size is not None:
        left = replace(left, bytes=weight_bytes(original, float_bytes=size))
    for option in plan.choices:
        left = left - option.saved
    if choices == plan.choices and left.counts == plan.after.counts:
        return plan
    return replace(
        plan,
        choices=choices,
        after=replace(traced.cost, bytes=weight_bytes(small, float_bytes=size)),
        # Of time and memory nothing is known until they are measured again.
        budgets=tuple(each for each in plan.budgets if each.quantity in COUNTED),
        harm=None,
        front=(),
        latency=None,
        memory_bytes=None,
        notes=(*plan.notes, NOTE),
    )


def _recounted(
    option: Option, small: nn.Module, layers: tuple[LayerCost, ...], size: int | None
) -> Option:
    if is_group_rewrite(option.first.rewrite):
        names: tuple[str, ...] = option.occupies
    elif is_layer_rewrite(option.first.rewrite):
        names = (option.site,)
    else:
        return option
    cost = Cost(params=0, macs=0, bytes=0)
    for name in names:
        cost = cost + _cost_of(name, small, layers, size)
    if cost.counts == option.after.counts:
        return option
    return replace(option, after=cost, error=None, harm=None, measured=False, gain=None)


def _cost_of(name: str, small: nn.Module, layers: tuple[LayerCost, ...], size: int | None) -> Cost:
    built = small.get_submodule(name)
    inside = [each for each in layers if each.name == name or each.name.startswith(f"{name}.")]
    inside = inside if name else list(layers)
    return Cost(
        params=sum(each.numel() for each in built.parameters()),
        macs=sum(each.macs for each in inside),
        bytes=weight_bytes(built, float_bytes=size),
    )
