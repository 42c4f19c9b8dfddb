"""A convolution or linear layer becomes a chain through fewer channels, with 1×1 convolutions.

References:
    Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
    Applications", ICLR 2016, for ``tucker2``; Jaderberg, Vedaldi, Zisserman, "Speeding up
    Convolutional Neural Networks with Low Rank Expansions", BMVC 2014, section 2.1, for
    ``spatial``; Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification
    and Detection", TPAMI 2016, section 3.4, for ``spatial-expand``.
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
    is_linear,
    is_pointwise,
    is_trained,
    pointwise_like,
    set_kernel,
    shape_of,
    sides_of,
    spatial_like,
    weight_of,
    why_unknown,
)
from onebyone.rewrites.low_rank.factors import Factors, between, inward, outward
from onebyone.rewrites.low_rank.reduced_rank import (
    Fit,
    Problem,
    by_columns,
    ratio,
    regression,
    relative,
    through_channels,
)

# Form -> what it makes of a layer from C to O channels; of a grouped one, in each group.
FORMS = {
    "reduce": "1×1 C→r, k×k r→O",
    "expand": "k×k C→r, 1×1 r→O",
    "tucker2": "1×1 C→r1, k×k r1→r2, 1×1 r2→O",
    "spatial": "k×1 C→r, 1×k r→O",
    "spatial-expand": "k×1 C→r1, 1×k r1→r2, 1×1 r2→O",
    "pair": "1×1 C→r, 1×1 r→O (two linear layers for a linear layer)",
}

# Forms whose kernel is cut in two, rows before columns. They find by the same equations what
# `reduce` and `tucker2` do, with rows of the kernel taken for channels.
SPATIAL = {"spatial": "reduce", "spatial-expand": "tucker2"}

# Ranks tried along one dimension of a layer, at most.
GRID = 14


def why_not(module: nn.Module) -> str | None:
    """Return why a layer cannot be factorized, in words, or ``None`` where it can."""
    reason = why_unknown(module)
    if reason is not None:
        return reason
    shape = shape_of(module)
    if shape.groups > 1 and shape.group_channels == 1:
        return "depthwise: no channels to mix"
    if min(shape.values, shape.group_out) == 1:
        return "one value a place goes in or out: no rank to lower"
    return None


# ---------------------------------------------------------------- shapes and costs


def forms_of(module: nn.Module) -> tuple[str, ...]:
    """Return the forms that a layer can take."""
    if is_linear(module) or is_pointwise(module):
        return ("pair",)
    shape = shape_of(module)
    spatial = () if sides_of(module) is None else tuple(SPATIAL)
    # Through one channel there is nothing to reduce.
    if shape.group_channels == 1:
        return ("expand", *spatial)
    return ("reduce", "expand", "tucker2", *spatial)


def full_ranks(module: nn.Module, form: str) -> tuple[int, ...]:
    """Return the full rank along each dimension of a form, of one group."""
    shape = shape_of(module)
    height, width = sides_of(module) or (1, 1)
    between = min(shape.group_channels * height, shape.group_out * width)
    return {
        "reduce": (shape.group_channels,),
        "expand": (min(shape.group_out, shape.values),),
        "tucker2": (shape.group_channels, shape.group_out),
        "spatial": (between,),
        "spatial-expand": (between, min(shape.group_out, between * width)),
        "pair": (min(shape.group_channels, shape.group_out),),
    }[form]


def is_exact(module: nn.Module, settings: Settings) -> bool:
    """Whether settings are of full rank, so that the function can stay the same."""
    form, ranks = check(module, settings)
    return tuple(ranks) == full_ranks(module, form)


def form_and_ranks(settings: Settings, *, site: str = "") -> tuple[str, list[int]]:
    """Return the form and the ranks in an option's settings.

    Raises:
        PlanError: If they are not there, or not of their types.
    """
    form, ranks = settings.get("form"), settings.get("ranks")
    if not isinstance(form, str) or not isinstance(ranks, list):
        raise PlanError(
            f"The settings of {site!r} must have a `form` and a list of `ranks`, got {settings}."
        )
    return form, ranks


def check(module: nn.Module, settings: Settings, *, site: str = "") -> tuple[str, list[int]]:
    """Check that a form and its ranks fit a layer, and return them.

    Raises:
        PlanError: If they do not; says what must hold.
    """
    form, ranks = form_and_ranks(settings, site=site)
    allowed = forms_of(module)
    if form not in allowed:
        raise PlanError(f"The form of {site!r} must be one of {', '.join(allowed)}, got {form!r}.")
    most = full_ranks(module, form)
    ok = len(ranks) == len(most) and all(1 <= r <= m for r, m in zip(ranks, most, strict=True))
    if not ok:
        raise PlanError(
            f"The ranks of {site!r} as {form!r} must be {len(most)} from 1 up to "
            f"{', '.join(map(str, most))}, got {ranks}."
        )
    return form, ranks


def grid(module: nn.Module, *, most: int = GRID) -> list[Settings]:
    """Return the settings worth considering for a layer, of every form.

    Args:
        module: The layer.
        most: Ranks along one dimension.
    """
    found: list[Settings] = []
    for form in forms_of(module):
        axes = [_ranks_up_to(limit, most) for limit in full_ranks(module, form)]
        if form == "spatial":
            # Most of its ranks do not pay: there are several for each channel.
            axes = [_ranks_up_to(limit, 2 * most) for limit in full_ranks(module, form)]
        if len(axes) == 1:
            found += [{"form": form, "ranks": [rank]} for rank in axes[0]]
        else:
            found += [{"form": form, "ranks": [a, b]} for a in axes[0] for b in axes[1]]
    return found


def _ranks_up_to(limit: int, most: int) -> list[int]:
    """Return ranks to try: multiples of a power of two, and quarters of it below the first.

    Multiples because runtimes like them; the few small ones because a large layer, such as the
    first of a head, may have to lose nearly all of its channels.
    """
    step = 1
    while limit / step > most:
        step *= 2
    small = {step * quarters // 4 for quarters in (1, 2, 3)}
    return sorted(rank for rank in small | {*range(step, limit + 1, step)} if 0 < rank <= limit)


def cost(
    module: nn.Module,
    settings: Settings,
    *,
    input_size: Sequence[int],
    output_size: Sequence[int],
) -> Cost:
    """Return what the factorized layer costs for one input; its last factor has a bias.

    Args:
        module: The layer that is replaced.
        settings: The form, one of :data:`FORMS`, and the ranks of one group.
        input_size: Of the input along each axis, in pixels; empty for a linear layer on vectors.
        output_size: Of the output.
    """
    form, ranks = form_and_ranks(settings)
    shape = shape_of(module)
    input_places, output_places = math.prod(input_size), math.prod(output_size)
    # A transposed kernel meets each place of its input, a plain one each place of its output.
    met = input_places if shape.transposed else output_places
    if form == "pair":
        weights = [(shape.channels * ranks[0], met), (ranks[0] * shape.out, met)]
    elif form == "reduce":
        weights = [
            (shape.channels * ranks[0], input_places),
            (ranks[0] * shape.taps * shape.out, met),
        ]
    elif form == "expand":
        weights = [
            (shape.channels * shape.taps * ranks[0], met),
            (ranks[0] * shape.out, output_places),
        ]
    elif form in SPATIAL:
        weights = _spatial_weights(module, form, ranks, input_size, output_size)
    else:
        weights = [
            (shape.channels * ranks[0], input_places),
            (shape.groups * ranks[0] * shape.taps * ranks[1], met),
            (ranks[1] * shape.out, output_places),
        ]
    params = sum(size for size, _ in weights) + shape.out
    return Cost(
        params=params,
        macs=sum(size * places for size, places in weights),
        bytes=params * weight_of(module).element_size(),
    )


def _spatial_weights(
    module: nn.Module,
    form: str,
    ranks: Sequence[int],
    input_size: Sequence[int],
    output_size: Sequence[int],
) -> list[tuple[int, int]]:
    """Return the weights of each factor of a kernel cut in two, and how many places each meets."""
    shape, sides = shape_of(module), sides_of(module)
    assert sides is not None
    halfway = output_size[0] * input_size[1]
    met = (math.prod(input_size), halfway)
    if not shape.transposed:
        met = halfway, math.prod(output_size)
    out = shape.group_out if form == "spatial" else ranks[1]
    weights = [
        (shape.channels * sides[0] * ranks[0], met[0]),
        (shape.groups * ranks[0] * sides[1] * out, met[1]),
    ]
    if form == "spatial-expand":
        weights.append((ranks[1] * shape.out, math.prod(output_size)))
    return weights


def build(module: nn.Module, settings: Settings, *, site: str = "") -> nn.Sequential:
    """Return the factorized layer's structure with fresh weights.

    Padding, padding mode and dilation go to the k×k factor (a 1×1 without bias maps padding of
    every mode to the same padding of fewer channels); so does the stride of a k×k, while a strided
    1×1 keeps its stride on its first factor, where it saves most. A kernel that is cut in two has
    all these along each axis at the factor of that axis.

    Args:
        module: The layer that is replaced. Not modified; its dtype, device, mode and whether its
            weight is trained carry over.
        settings: The form, one of :data:`FORMS`, and the ranks of one group.
        site: The layer's name, for errors.

    Raises:
        PlanError: If the form or the ranks do not fit the layer.
    """
    form, ranks = check(module, settings, site=site)
    shape = shape_of(module)
    groups = shape.groups
    inner, outer = ranks[0] * groups, ranks[-1] * groups
    parts: OrderedDict[str, nn.Module] = OrderedDict()

    def pointwise(channels: int, out: int, *, bias: bool) -> nn.Module:
        return pointwise_like(module, channels, out, groups=groups, bias=bias)

    def spatial(channels: int, out: int, *, bias: bool) -> nn.Module:
        if is_linear(module):
            return pointwise(channels, out, bias=bias)
        return spatial_like(module, channels, out, groups=groups, bias=bias)

    if form == "pair" and not shape.transposed:
        parts["reduce"] = spatial(shape.channels, inner, bias=False)
        parts["expand"] = pointwise(inner, shape.out, bias=True)
    elif form == "pair":
        # Its output is larger than its input: the first factor works before it grows.
        parts["reduce"] = pointwise(shape.channels, inner, bias=False)
        parts["expand"] = spatial(inner, shape.out, bias=True)
    elif form == "reduce":
        parts["reduce"] = pointwise(shape.channels, inner, bias=False)
        parts["spatial"] = spatial(inner, shape.out, bias=True)
    elif form in SPATIAL:
        last = form == "spatial"
        middle = shape.out if last else outer
        parts["vertical"] = spatial_like(
            module, shape.channels, inner, groups=groups, bias=False, axis=0
        )
        parts["horizontal"] = spatial_like(module, inner, middle, groups=groups, bias=last, axis=1)
        if not last:
            parts["expand"] = pointwise(outer, shape.out, bias=True)
    else:
        before = shape.channels
        if form == "tucker2":
            parts["reduce"] = pointwise(shape.channels, inner, bias=False)
            before = inner
        parts["spatial"] = spatial(before, outer, bias=False)
        parts["expand"] = pointwise(outer, shape.out, bias=True)
    chain = nn.Sequential(parts)
    chain.requires_grad_(is_trained(module))
    return chain.train(module.training)


# ---------------------------------------------------------------- errors and weights


def errors(
    problems: Sequence[Problem], module: nn.Module, options: Sequence[Settings]
) -> list[float]:
    """Return the relative squared error of each option, without building any.

    One decomposition of each group serves all ranks of several forms. For ``tucker2`` and
    ``spatial-expand`` this is the error before the HOOI sweeps.

    Args:
        problems: Of each group.
        module: The layer.
        options: The settings of each option.
    """
    asked = [form_and_ranks(settings) for settings in options]
    lost = [0.0] * len(options)
    scale = 0.0
    for problem in problems:
        scale += problem.scale
        whole = _whole_fit(problem, asked)
        through = _through(problem, module, asked)
        for place, (form, ranks) in enumerate(asked):
            if form in through:
                found = through[form][ranks[0]]
                lost[place] += found.tail(ranks[1]) if len(ranks) > 1 else found.lost
            else:
                assert whole is not None
                lost[place] += whole.tail(ranks[0])
    return [ratio(value, scale) for value in lost]


def _through(
    problem: Problem, module: nn.Module, asked: Sequence[tuple[str, list[int]]]
) -> dict[str, dict[int, Fit]]:
    """Return the regressions through each first rank, of each form that has such."""
    found: dict[str, dict[int, Fit]] = {}
    for forms in (("reduce", "tucker2"), tuple(SPATIAL)):
        first = {ranks[0] for form, ranks in asked if form in forms}
        if first:
            through = through_channels(_seen_by(problem, module, forms[0]), sorted(first))
            found |= dict.fromkeys(forms, through)
    return found


def _seen_by(problem: Problem, module: nn.Module, form: str) -> Problem:
    """Return a problem as a form's equations see it."""
    sides = sides_of(module)
    return by_columns(problem, sides[1]) if form in SPATIAL and sides else problem


def _whole_fit(problem: Problem, asked: Sequence[tuple[str, list[int]]]) -> Fit | None:
    if any(form in ("expand", "pair") for form, _ in asked):
        return regression(problem)
    return None


def solve(problem: Problem, form: str, ranks: Sequence[int], *, rough: bool = False) -> Factors:
    """Return the factors whose outputs are nearest to what one group should give.

    Args:
        problem: As the form's equations see it.
        form: One of :data:`FORMS`.
        ranks: Of the group.
        rough: Whether a wide layer's factors may be a little off the best.
    """
    form = SPATIAL.get(form, form)
    if form == "reduce":
        return inward(problem, ranks[0])
    if form == "tucker2":
        return between(problem, ranks[0], ranks[1], rough=rough)
    return outward(problem, ranks[0])


def fit(
    chain: nn.Sequential,
    problems: Sequence[Problem],
    settings: Settings,
    module: nn.Module,
    *,
    rough: bool = False,
) -> float:
    """Write the best factors into a factorized layer, in place; return its relative error.

    Args:
        chain: From :func:`build`.
        problems: Of each group.
        settings: That it was built with.
        module: The layer that it replaces.
        rough: Whether a wide layer's factors may be those that :func:`errors` judges, which are a
            little off the best.
    """
    form, ranks = form_and_ranks(settings)
    shape = shape_of(module)
    groups = [
        solve(_seen_by(problem, module, form), form, ranks, rough=rough) for problem in problems
    ]
    first, core = _stacked([g.reduce for g in groups]), _stacked([g.spatial for g in groups])
    kernels = {
        "reduce": first,
        "vertical": first,
        "spatial": core,
        "horizontal": core,
        "expand": _stacked([g.expand for g in groups]),
    }
    if form == "pair":
        # A pair: the kernel is one place, and the first of the two.
        kernels["reduce"] = kernels["spatial"]
    biases = torch.cat([g.bias for g in groups])
    for name, part in chain.named_children():
        kernel = kernels[name]
        assert kernel is not None
        seen = shape_of(part).group_channels
        set_kernel(part, kernel.reshape(shape.groups, kernel.shape[1], seen, -1))
        if isinstance(part.bias, Tensor):
            with torch.no_grad():
                part.bias.copy_(biases)
    return relative((g.lost, g.scale) for g in groups)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present) if present else None
