"""A k×k convolution becomes a sum of terms: depthwise k×k convolutions and one 1×1.

References:
    Guo, Li, Lin, Chen, "Network Decoupling: From Regular to Depthwise Separable Convolutions",
    BMVC 2018, arXiv:1808.05517, for the two forms and the kernel alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onebyone.core.errors import PlanError
from onebyone.core.records import Cost, Settings
from onebyone.networks.conv_layers import (
    is_trained,
    pointwise_like,
    set_kernel,
    shape_of,
    spatial_like,
    weight_of,
    why_unknown,
)
from onebyone.rewrites.low_rank.reduced_rank import Problem, relative
from onebyone.rewrites.low_rank.separable_terms import Terms, kernel_of_terms, path_to, solutions

# Form -> what it makes of a layer from C to O channels, with T terms. Of a grouped layer the 1×1
# has the same groups.
FORMS = {
    "depthwise-pointwise": "depthwise k×k C→C·T, 1×1 C·T→O",
    "pointwise-depthwise": "1×1 C→O·T, depthwise k×k O·T→O",
}


def why_not(module: nn.Module) -> str | None:
    """Return why a layer cannot be separated, in words, or ``None`` where it can."""
    reason = why_unknown(module)
    if reason is not None:
        return reason
    shape = shape_of(module)
    if shape.taps == 1:
        return "no places to separate: its kernel is one place"
    if shape.groups > 1 and shape.group_channels == 1:
        return "depthwise already"
    return None


# ---------------------------------------------------------------- settings and costs


def most_terms(module: nn.Module, form: str) -> int:
    """Return the number of terms with which a form is the same function."""
    shape = shape_of(module)
    first = form == "depthwise-pointwise"
    return min(shape.taps, shape.group_out if first else shape.group_channels)


def is_exact(module: nn.Module, settings: Settings) -> bool:
    """Whether settings have all terms, so that the function can stay the same."""
    form, terms = _checked(module, settings, site="")
    return terms == most_terms(module, form)


def grid(module: nn.Module) -> list[Settings]:
    """Return the settings worth considering: up to half the terms, of the form that costs less.

    With more terms the layer costs nearly as much as before; low-rank factors then reach the same
    error at a lower cost.
    """
    shape, strided = shape_of(module), set(module.stride) != {1}  # type: ignore[arg-type]
    forms = ["depthwise-pointwise"]
    # The 1×1 first is cheaper if the layer has fewer outputs than inputs, or enlarges the map.
    if strided if shape.transposed else not strided and shape.out < shape.channels:
        forms.append("pointwise-depthwise")
    return [
        {"form": form, "terms": terms}
        for form in forms
        for terms in path_to((most_terms(module, form) + 1) // 2)
    ]


def cost(
    module: nn.Module,
    settings: Settings,
    *,
    input_size: Sequence[int],
    output_size: Sequence[int],
) -> Cost:
    """Return what the separated layer costs for one input; its last factor has a bias.

    Args:
        module: The layer that is replaced.
        settings: ``form`` and ``terms``.
        input_size: Of the input along each axis, in pixels.
        output_size: Of the output.
    """
    form, terms = _checked(module, settings, site="")
    input_places, output_places = math.prod(input_size), math.prod(output_size)
    shape = shape_of(module)
    mixing = shape.group_channels * shape.out * terms
    first = form == "depthwise-pointwise"
    filters = (shape.channels if first else shape.out) * terms * shape.taps
    params = filters + mixing + shape.out
    return Cost(
        params=params,
        macs=filters * (input_places if shape.transposed else output_places)
        + mixing * (output_places if first else input_places),
        bytes=params * weight_of(module).element_size(),
    )


def _checked(module: nn.Module, settings: Settings, *, site: str) -> tuple[str, int]:
    """Return form and terms of settings.

    Raises:
        PlanError: If they are not there, or do not fit the layer.
    """
    form, terms = settings.get("form"), settings.get("terms")
    if form not in FORMS:
        raise PlanError(f"The form of {site!r} must be one of {', '.join(FORMS)}, got {form!r}.")
    assert isinstance(form, str)
    most = most_terms(module, form)
    # bool is an int to Python.
    if not isinstance(terms, int) or isinstance(terms, bool) or not 1 <= terms <= most:
        raise PlanError(
            f"The `terms` of {site!r} as {form!r} must be an int from 1 to {most}, got {terms!r}."
        )
    return form, terms


def build(module: nn.Module, settings: Settings, *, site: str = "") -> nn.Sequential:
    """Return the separated layer's structure with fresh weights.

    Stride, padding, padding mode and dilation go to the depthwise factor.

    Args:
        module: The layer that is replaced. Not modified; its dtype, device, mode and whether its
            weight is trained carry over.
        settings: ``form`` and ``terms``.
        site: The layer's name, for errors.

    Raises:
        PlanError: If the layer cannot be separated, or the settings do not fit it.
    """
    reason = why_not(module)
    if reason is not None:
        raise PlanError(f"The layer {site!r} cannot be separated: {reason}.")
    form, terms = _checked(module, settings, site=site)
    shape = shape_of(module)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if form == "depthwise-pointwise":
        inner = shape.channels * terms
        parts["depthwise"] = spatial_like(
            module, shape.channels, inner, groups=shape.channels, bias=False
        )
        parts["pointwise"] = pointwise_like(
            module, inner, shape.out, groups=shape.groups, bias=True
        )
    else:
        inner = shape.out * terms
        parts["pointwise"] = pointwise_like(
            module, shape.channels, inner, groups=shape.groups, bias=False
        )
        parts["depthwise"] = spatial_like(module, inner, shape.out, groups=shape.out, bias=True)
    chain = nn.Sequential(parts)
    chain.requires_grad_(is_trained(module))
    return chain.train(module.training)


# ---------------------------------------------------------------- errors and weights


def errors(
    problems: Sequence[Problem], module: nn.Module, options: Sequence[Settings]
) -> list[float]:
    """Return the relative squared error of each option, without building any.

    Args:
        problems: Of each group. Where the covariance of what it sees is not known, the error is
            that of the kernel.
        module: The layer. Not modified.
        options: The settings of each option.

    Raises:
        PlanError: If settings do not fit the layer.
    """
    asked = [_checked(module, settings, site="") for settings in options]
    found: dict[tuple[str, int], float] = {}
    for form in {form for form, _ in asked}:
        wanted = sorted({terms for other, terms in asked if other == form})
        groups = [solutions(problem, form, wanted) for problem in problems]
        for terms in wanted:
            found[form, terms] = relative((g[terms].lost, g[terms].scale) for g in groups)
    return [found[key] for key in asked]


def fit(
    chain: nn.Sequential,
    problems: Sequence[Problem],
    settings: Settings,
    module: nn.Module,
    *,
    rough: bool = False,  # noqa: ARG001 - they are the same
) -> float:
    """Write the best terms into a separated layer, in place; return its relative error.

    Args:
        chain: From :func:`build`.
        problems: Of each group.
        settings: That it was built with.
        module: The layer that it replaces. Not modified.
        rough: Whether a wide layer's terms may be those that :func:`errors` judges.

    Raises:
        PlanError: If the settings do not fit the layer.
    """
    form, terms = _checked(module, settings, site="")
    groups = [solutions(problem, form, [terms])[terms] for problem in problems]
    filters = torch.cat([g.filters for g in groups])
    mixes = [g.mix for g in groups]
    if form == "depthwise-pointwise":
        filters = filters.unsqueeze(2)
        # Of each group: outputs, then its channels' terms.
        mix = torch.stack([m.transpose(0, 1).flatten(1) for m in mixes])
    else:
        filters = filters.unsqueeze(1)
        mix = torch.stack([m.transpose(1, 2).flatten(0, 1) for m in mixes])
    for name, kernel in (("depthwise", filters), ("pointwise", mix.unsqueeze(3))):
        set_kernel(chain.get_submodule(name), kernel)
    bias = chain[-1].bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias.copy_(torch.cat([_bias(p, form, g) for p, g in zip(problems, groups, strict=True)]))
    return relative((g.lost, g.scale) for g in groups)


def _bias(problem: Problem, form: str, terms: Terms) -> Tensor:
    kernel = kernel_of_terms(form, terms.filters, terms.mix).flatten(1)
    return problem.mean_y - kernel @ problem.mean_x
