"""Precision as the last step of an option: each site in float32 or in int8, with the conversions.

The time of an int8 option is measured between float32 neighbors, conversions included. What is
saved where both of two neighbors are in int8 is a product of two choices. It is an option of its
own, a join, that may be picked only if int8 options of both are: the problem stays a linear one in
whole numbers, and is solved exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from onebyone.core.records import Cost, LayerCost, LeftAlone, Option, Plan, Settings, Step
from onebyone.networks.examples import example_input
from onebyone.networks.surgery import module_at
from onebyone.planning.joins import INT8, JOIN, SUM, is_int8, is_own, rewrites_of
from onebyone.planning.survey import Survey
from onebyone.profiling.trace import trace_layers
from onebyone.quantizing.flow import SUM_PREFIX, Flow
from onebyone.rewrites import restructure
from onebyone.rewrites.registry import cost_before, is_layer_rewrite

_ARROW = " → "  # in the name of a join
# Bytes of a float32 value, of which one is left.
_SHRINK = 4


def with_int8(found: Survey, layers: Sequence[str], harms: Mapping[str, float]) -> Survey:
    """Return a survey whose sites are in float32 or int8, rewritten or as they are.

    The harm of a rewrite in int8 is taken to be the sum of both.

    Args:
        found: Options in float32.
        layers: Names of the layers that int8 can compute.
        harms: Of each of them in int8.
    """
    step = Step(rewrite=INT8, settings={})
    able = set(layers)
    options = list(found.options)
    for option in found.options:
        if option.site in able and is_layer_rewrite(option.first.rewrite):
            after = _small(option.after)
            harm = (option.harm or 0.0) + harms[option.site]
            both = replace(option, steps=(*option.steps, step), after=after, harm=harm)
            options.append(replace(both, measured=False))
    options += [
        _as_it_is(found, layer, step, harms[layer.name])
        for layer in found.layers
        if layer.name in able
    ]
    order = {layer.name: place for place, layer in enumerate(found.layers)}
    options.sort(key=lambda option: order.get(option.site, len(order)))
    return replace(found, options=tuple(options))


def _as_it_is(found: Survey, layer: LayerCost, step: Step, harm: float) -> Option:
    before = cost_before(module_at(found.network, layer.name), layer)
    return Option(
        site=layer.name,
        steps=(step,),
        before=before,
        after=_small(before),
        occupies=(layer.name,),
        harm=harm,
        measured=True,
    )


def _small(cost: Cost) -> Cost:
    return replace(cost, bytes=cost.bytes // _SHRINK)


def joins_of(flow: Flow, convert_ms: Callable[[int], float]) -> list[Option]:
    """Return a join for each edge, and an option for each sum in int8.

    Args:
        flow: Of the network.
        convert_ms: What it takes to quantize and dequantize so many values.
    """
    found = []
    for edge in flow.edges:
        # A sum in float32 is not timed with its conversions: half of a pair's is at its neighbor.
        ends = (edge.first, edge.second)
        halves = sum(end not in flow.sums for end in ends)
        ms = convert_ms(edge.values) * halves / 2
        settings: Settings = {"first": edge.first, "second": edge.second}
        found.append(_own(f"{edge.first}{_ARROW}{edge.second}", JOIN, settings, ms))
    for name, inputs in flow.sums.items():
        found.append(_own(name, SUM, {"inputs": "\n".join(inputs)}, 0.0))
    return found


def _own(site: str, kind: str, settings: Settings, ms: float) -> Option:
    nothing = Cost(params=0, macs=0, bytes=0, ms=0.0)
    return Option(
        site=site,
        steps=(Step(rewrite=kind, settings=settings),),
        before=replace(nothing, ms=ms),
        after=nothing,
        harm=0.0,
    )


def translated(made: Plan, model: nn.Module, layers: Sequence[str]) -> Plan:
    """Return a plan whose choices are rewrites alone, with the layers that stay float32 apart.

    Args:
        made: Its choices may have a step of precision, and joins.
        model: The original, which may lack the exact head that was surveyed. Not modified.
        layers: Names of the surveyed layers that int8 can compute.
    """
    int8 = {option.site for option in made.choices if is_int8(option)}
    if not int8:
        choices = tuple(option for option in made.choices if not is_own(option))
        return _without_own(replace(made, choices=choices, precision="float32"))
    choices = tuple(
        replace(option, steps=rewrites_of(option)) for option in made.choices if rewrites_of(option)
    )
    made = _without_own(replace(made, choices=choices, precision="int8"))
    small = restructure(model, made)
    example = made.inputs.with_batch(1).single("Int8").shape
    reason = "the budgets are met with less harm so, or it is not faster in int8"
    kept = [
        LeftAlone(site=name, reason=reason)
        for name in _int8_able(small, example)
        if not any(_is_within(name, site) for site in int8)
    ]
    touched = {option.site for option in choices}
    alone = [
        LeftAlone(site=site, reason="in int8 as it is")
        for site in layers
        if site in int8 and site not in touched
    ]
    return replace(made, float32_layers=tuple(kept), left_alone=(*alone, *made.left_alone))


def _without_own(made: Plan) -> Plan:
    own = (_ARROW, SUM_PREFIX)
    left = tuple(item for item in made.left_alone if not any(word in item.site for word in own))
    return replace(made, left_alone=left)


def _int8_able(network: nn.Module, shape: tuple[int, ...]) -> list[str]:
    traced = trace_layers(network, example_input(shape))
    kinds = (nn.Conv2d, nn.Linear)
    return [each.name for each in traced.layers if isinstance(module_at(network, each.name), kinds)]


def _is_within(name: str, site: str) -> bool:
    return not site or name == site or name.startswith(f"{site}.")
