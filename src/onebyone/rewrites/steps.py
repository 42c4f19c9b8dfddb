"""The steps of an option, each carried out on the module that the one before made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from onebyone.core.errors import PlanError
from onebyone.core.records import Cost, LayerCost, Step
from onebyone.core.rewrite_rows import REWRITES
from onebyone.networks.conv_layers import is_linear, shape_of, why_unknown
from onebyone.rewrites.low_rank.reduced_rank import Problem, problems_of
from onebyone.rewrites.registry import (
    LayerRewrite,
    is_group_rewrite,
    is_layer_rewrite,
    layer_rewrite,
)


@dataclass(frozen=True)
class Carried:
    """A step that was carried out.

    Attributes:
        step: Which.
        how: Its rewrite.
        module: What it was carried out on.
        new: What became of that, with fresh weights: to be fitted in place.
    """

    step: Step
    how: LayerRewrite
    module: nn.Module
    new: nn.Module

    def is_exact(self) -> bool:
        """Whether the step keeps the function."""
        return self.how.is_exact(self.module, self.step.settings)

    def fit(self, problems: Sequence[Problem], *, rough: bool = False) -> float:
        """Write the step's weights into what it made; return the relative squared error."""
        return self.how.fit(self.new, problems, self.step.settings, self.module, rough=rough)


def carry_out(
    module: nn.Module, steps: Sequence[Step], *, site: str, after: Step | None = None
) -> Iterator[Carried]:
    """Carry out steps one after the other; weights are written meanwhile, if they are to be.

    Args:
        module: What the first of them is carried out on. Not modified.
        steps: Rewrites of one layer.
        site: Name of the module, for errors and for the names of new modules.
        after: The step that made the module, if one did.

    Yields:
        Each step once its structure is made: the next one begins with that, as it is then.

    Raises:
        PlanError: If a rewrite does not take what is there; names the site and the step.
        UnknownNameError: If there is no such rewrite.
    """
    for step in steps:
        name = step.rewrite
        if is_group_rewrite(name) or (name in REWRITES and not is_layer_rewrite(name)):
            kind = REWRITES[name].kind if name in REWRITES else "group"
            raise PlanError(
                f"The step {name!r} of the plan's site {site!r} must be a rewrite of one layer to "
                f"follow another step, but it changes the {kind}. Make it a choice "
                "of its own."
            )
        how = layer_rewrite(name)
        reason = how.why_not(module)
        if reason is not None:
            raise PlanError(_refusal(module, step, site, after, reason))
        carried = Carried(step, how, module, how.build(module, step.settings, site=site))
        yield carried
        module, after = carried.new, step


def _refusal(module: nn.Module, step: Step, site: str, after: Step | None, reason: str) -> str:
    if after is None:
        return f"The plan's site {site!r} cannot be rewritten: {reason}."
    return (
        f"The steps of the plan's site {site!r} do not go together: {step.rewrite!r} does not take "
        f"the {type(module).__name__} that {after.rewrite!r} makes: {reason}. Change their order, "
        "or leave one out."
    )


def built(
    module: nn.Module, steps: Sequence[Step], *, site: str = "", after: Step | None = None
) -> nn.Module:
    """Return the structure that steps make of a module, with fresh weights.

    Raises:
        PlanError: As :func:`carry_out`.
    """
    for carried in carry_out(module, steps, site=site, after=after):
        module = carried.new
    return module


def roughly_fitted(
    module: nn.Module, steps: Sequence[Step], problems: Sequence[Problem], *, site: str = ""
) -> nn.Module:
    """Return what steps make of a layer, with weights that are a little off the best.

    Args:
        module: The layer. Not modified.
        steps: All of them.
        problems: Of each group of the layer.
        site: Its name.

    Raises:
        PlanError: As :func:`carry_out`.
    """
    new = module
    for carried in carry_out(module, steps, site=site):
        carried.fit(problems_for(carried.module, module, problems), rough=True)
        new = carried.new
    return new


def are_exact(module: nn.Module, steps: Sequence[Step], *, site: str = "") -> bool:
    """Whether steps keep a module's function, each as its rewrite says.

    Raises:
        PlanError: As :func:`carry_out`.
    """
    return all(carried.is_exact() for carried in carry_out(module, steps, site=site))


def problems_for(
    module: nn.Module, layer: nn.Module, problems: Sequence[Problem]
) -> Sequence[Problem]:
    """Return what a step is fitted to.

    That is what the site sees and what it gave at first, for each step: so a later step compensates
    for the errors of those before it. Only a layer of another geometry is fitted to its own kernel.

    Args:
        module: What the step is carried out on.
        layer: The site as it was.
        problems: Of each group of that.
    """
    if module is layer or why_unknown(module) is not None or _alike(module, layer):
        return problems
    return problems_of(module)


def _alike(module: nn.Module, layer: nn.Module) -> bool:
    """Whether the kernels of two layers see the same places."""
    names = ("kernel_size", "stride", "padding", "dilation")
    both = [[getattr(each, name, None) for name in names] for each in (module, layer)]
    return both[0] == both[1] and shape_of(module) == shape_of(layer)


def cost_of(module: nn.Module, layer: LayerCost, steps: Sequence[Step]) -> Cost:
    """Return what a layer costs once rewritten, for one input, at the shapes it was seen at.

    Args:
        module: The layer. Not modified.
        layer: As it was seen.
        steps: All that are carried out on it: what the last one makes is what costs.

    Raises:
        PlanError: As :func:`carry_out`.
    """
    *earlier, last = steps
    sizes = layer.input_shape[1:], layer.output_shape[1:]
    if is_linear(module):
        sizes = layer.input_shape[:-1], layer.output_shape[:-1]
    cost = layer_rewrite(last.rewrite).cost(
        built(module, earlier, site=layer.name),
        last.settings,
        input_size=sizes[0],
        output_size=sizes[1],
    )
    inner, outer = (math.prod(size) for size in sizes)
    shape = shape_of(module)
    own = shape.values * shape.out * (inner if shape.transposed else outer)
    if own in (0, layer.macs):
        return cost
    # It sees more rows than the network has inputs: windows of a map, regions of a picture.
    return replace(cost, macs=round(cost.macs * layer.macs / own))
