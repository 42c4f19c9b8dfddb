"""A k×k convolution becomes a sum of terms: depthwise k×k convolutions and one 1×1.

From the kernel alone the terms are the singular vectors of its slices: of each input channel's
(output channels × places), or of each output channel's (input channels × places). With
calibration data they are those that keep the *outputs*: one channel after the other is fitted by
reduced-rank regression to what the others leave over, then the 1×1 by one regression on what the
depthwise filters give. Each step can only lower the error on the data.

References:
    Guo, Li, Lin, Chen, "Network Decoupling: From Regular to Depthwise Separable Convolutions",
    BMVC 2018, arXiv:1808.05517, for the two forms and the kernel alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
from onebyone.rewrites.low_rank.eigen import eigen
from onebyone.rewrites.low_rank.reduced_rank import (
    DAMPING,
    Problem,
    damped,
    is_wide,
    regress,
    relative,
)

# Form -> what it makes of a layer from C to O channels, with T terms. Of a grouped layer the 1×1
# has the same groups.
FORMS = {
    "depthwise-pointwise": "depthwise k×k C→C·T, 1×1 C·T→O",
    "pointwise-depthwise": "1×1 C→O·T, depthwise k×k O·T→O",
}

# Rounds over all channels for each number of terms, and the share of the error that a round must
# take away for another to follow.
SWEEPS = 2
LEAST_GAIN = 0.02
# Steps of conjugate gradients for the 1×1 of a pointwise-depthwise chain.
STEPS = 6
# Channels whose common residual is kept up to date together.
BLOCK = 32


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
        for terms in _path((most_terms(module, form) + 1) // 2)
    ]


def _path(most: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, … up to ``most`` itself."""
    path, step = [], 1
    terms = 1
    while terms < most:
        path.append(terms)
        if terms >= 4 * step:
            step *= 2
        terms += step
    return [*path, most]


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
        groups = [_solutions(problem, form, wanted) for problem in problems]
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
    groups = [_solutions(problem, form, [terms])[terms] for problem in problems]
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


def _bias(problem: Problem, form: str, terms: _Terms) -> Tensor:
    kernel = _kernel(form, terms.filters, terms.mix).flatten(1)
    return problem.mean_y - kernel @ problem.mean_x


@dataclass(frozen=True)
class _Terms:
    """Depthwise filters and how they are mixed; ``side`` is the channels that they belong to.

    Attributes:
        filters: Shape ``(side, terms, places)``.
        mix: Shape ``(side, other side, terms)``.
        lost: Squared error in the metric.
        scale: Mean square of the outputs in the metric.
    """

    filters: Tensor
    mix: Tensor
    lost: float = float("inf")
    scale: float = 0.0


def _kernel(form: str, filters: Tensor, mix: Tensor) -> Tensor:
    """Return the kernel ``(out, in, places)`` that terms give."""
    slices = mix @ filters
    return slices.transpose(0, 1) if form == "depthwise-pointwise" else slices


def _solutions(problem: Problem, form: str, wanted: Sequence[int]) -> dict[int, _Terms]:
    """Return the terms for each number of them, each at least as good as any with fewer."""
    first = form == "depthwise-pointwise"
    slices = problem.weight.transpose(0, 1) if first else problem.weight
    if problem.xx is None or problem.yx is None:
        weighted = problem.root @ slices if first else slices
        return {t: _white(problem, form, _truncated(slices, weighted, t)) for t in wanted}
    data = _Data(problem.xx, problem.yx, problem.metric, problem)
    path = [terms for terms in _path(min(slices.shape[1:])) if terms <= max(wanted)]
    found: dict[int, _Terms] = {}
    before: _Terms | None = None
    for terms in sorted({*path, *wanted}):
        starts = []
        if before is None or not is_wide(problem):
            starts.append(_truncated(slices, slices, terms))
        if before is not None:
            starts.append(_widened(before, slices, terms))
        found[terms] = _refine_depthwise(data, starts) if first else _refine_pointwise(data, starts)
        # The path is the same whatever is asked for, so that the answers are too.
        before = found[terms] if terms in path else before
    return {terms: found[terms] for terms in wanted}


# ---------------------------------------------------------------- the kernel alone


def _truncated(slices: Tensor, weighted: Tensor, terms: int) -> _Terms:
    """Return the leading terms of each slice ``(side, other side, places)``.

    Args:
        slices: What is kept.
        weighted: The same in the metric in which the leading terms lead.
        terms: How many.
    """
    filters = _right_vectors(weighted)[:, :terms]
    return _Terms(filters, slices @ filters.mT)


def _right_vectors(slices: Tensor) -> Tensor:
    """Return right singular vectors as rows, found in float64, which LAPACK never gives up on."""
    vectors: Tensor = torch.linalg.svd(slices.double(), full_matrices=False).Vh
    return vectors.to(slices)


def _white(problem: Problem, form: str, terms: _Terms) -> _Terms:
    lost = problem.root @ (_kernel(form, terms.filters, terms.mix) - problem.weight).flatten(1)
    whole = problem.root @ problem.weight.flatten(1)
    return replace(terms, lost=float(lost.square().sum()), scale=float(whole.square().sum()))


def _widened(terms: _Terms, slices: Tensor, count: int) -> _Terms:
    """Return the same kernel in more terms: new filters that are not used yet.

    The new filters are the leading ones of what the old ones cannot give of the slices.
    """
    old = torch.linalg.qr(terms.filters.mT).Q
    rest = slices - (slices @ old) @ old.mT
    new = _right_vectors(rest)[:, : count - terms.filters.shape[1]]
    filters = torch.cat([terms.filters, new], dim=1)
    unused = terms.mix.new_zeros(*terms.mix.shape[:2], new.shape[1])
    return _Terms(filters, torch.cat([terms.mix, unused], dim=2))


# ---------------------------------------------------------------- with data: depthwise first


@dataclass(frozen=True)
class _Data:
    """A problem with its covariances, and its metric on output errors ``(out, out)``."""

    xx: Tensor
    yx: Tensor
    metric: Tensor
    problem: Problem

    def missing(self, kernel: Tensor, columns: slice) -> Tensor:
        """Return the covariance ``(out, columns)`` of what is missing with some inputs."""
        return self.yx[:, columns] - kernel @ self.xx[:, columns]

    def lost(self, cross: Tensor, given: Tensor) -> float:
        """Return a squared error in the metric.

        Args:
            cross: Covariance of what is given with what should be.
            given: Covariance of what is given.
        """
        return max(float((self.metric * (self.problem.yy - 2 * cross + given)).sum()), 0.0)


def _rounds(data: _Data) -> int:
    """Return how many rounds are worth their time: on a wide layer each takes seconds."""
    return min(SWEEPS, 1) if is_wide(data.problem) else SWEEPS


def _refine_depthwise(data: _Data, starts: Sequence[_Terms]) -> _Terms:
    """Return the best of several starts, bettered round by round."""
    now = min((_mixed(data, start) for start in starts), key=lambda terms: terms.lost)
    for _ in range(_rounds(data)):
        new = _mixed(data, _swept(data, now))
        if new.lost >= now.lost:
            break
        little = new.lost > (1 - LEAST_GAIN) * now.lost
        now = new
        if little:
            break
    return now


def _mixed(data: _Data, terms: _Terms) -> _Terms:
    """Regress the outputs on what the depthwise filters give: the best 1×1 for them."""
    side, out, count = terms.mix.shape
    places = terms.filters.shape[2]
    problem = data.problem
    half = (terms.filters @ data.xx.reshape(side, places, -1)).reshape(-1, side, places)
    xx = (half.transpose(0, 1) @ terms.filters.mT).transpose(0, 1)
    xx = xx.reshape(side * count, side * count)
    yx = (data.yx.reshape(out, side, places).transpose(0, 1) @ terms.filters.mT).transpose(0, 1)
    yx = yx.reshape(out, side * count)
    prior = terms.mix.transpose(0, 1)
    mean = terms.filters @ problem.mean_x.reshape(side, places, 1)
    seen = replace(problem, weight=prior, mean_x=mean.flatten(), xx=xx, yx=yx, whole=False)
    mix = regress(seen)
    lost = data.lost(mix @ yx.T, mix @ xx @ mix.T)
    mix = mix.reshape(out, side, count).transpose(0, 1)
    return _Terms(terms.filters, mix, lost, problem.scale)


def _swept(data: _Data, terms: _Terms) -> _Terms:
    """Fit each channel's terms anew, one after the other, to what the others leave over.

    For one channel filters and mix are found together, by reduced-rank regression in the metric.
    """
    side, _, count = terms.mix.shape
    places = terms.filters.shape[2]
    mix, filters = terms.mix.clone(), terms.filters.clone()
    kernel = _kernel("depthwise-pointwise", filters, mix).flatten(1)
    for start in range(0, side, BLOCK):
        end = min(start + BLOCK, side)
        columns = slice(start * places, end * places)
        missing = data.missing(kernel, columns)
        for channel in range(start, end):
            inside = slice((channel - start) * places, (channel - start + 1) * places)
            own = slice(channel * places, (channel + 1) * places)
            seen = data.xx[own, own]
            # In float64 whatever the rest is in: neighbouring places may be nearly the same.
            lower, ridge = damped(seen.double(), data.problem.ridge)
            old = kernel[:, own].clone()
            wanted = missing[:, inside] + old @ seen + ridge * old
            filters[channel], mix[channel] = _reduced_rank(
                wanted, lower.to(seen), data.metric, count
            )
            kernel[:, own] = mix[channel] @ filters[channel]
            missing -= (kernel[:, own] - old) @ data.xx[own, columns]
    return _Terms(filters, mix)


def _reduced_rank(
    wanted: Tensor, lower: Tensor, metric: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Return filters ``(rank, places)`` of length 1 and their mix ``(out, rank)``.

    Args:
        wanted: Covariance of outputs and inputs, shape ``(out, places)``.
        lower: Cholesky factor of the inputs' covariance, shape ``(places, places)``.
        metric: On the outputs.
        rank: How many filters.
    """
    white = torch.linalg.solve_triangular(lower, wanted.T, upper=False).T
    _, vectors = eigen(white.T @ metric @ white)
    leading = vectors.flip(1)[:, :rank]
    filters = torch.linalg.solve_triangular(lower.T, leading, upper=True).T
    lengths = filters.norm(dim=1)
    return filters / lengths[:, None], (white @ leading) * lengths


# ---------------------------------------------------------------- with data: the 1×1 first

# Each output has inputs of its own, so that a regression would be a system of equations for each;
# steps of conjugate gradients on all at once do with the covariance as it is.

_Map = Callable[[Tensor], Tensor]


def _refine_pointwise(data: _Data, starts: Sequence[_Terms]) -> _Terms:
    """Better the best of several starts: the 1×1, then the filters, in turns."""
    now = min((_judged(data, start) for start in starts), key=lambda terms: terms.lost)
    for _ in range(_rounds(data)):
        new = _judged(data, _better_filters(data, _better_mix(data, now)))
        if new.lost >= now.lost:
            break
        now = new
    return now


def _judged(data: _Data, terms: _Terms) -> _Terms:
    kernel = _kernel("pointwise-depthwise", terms.filters, terms.mix).flatten(1)
    lost = data.lost(kernel @ data.yx.T, kernel @ data.xx @ kernel.T)
    return replace(terms, lost=lost, scale=data.problem.scale)


def _better_mix(data: _Data, terms: _Terms) -> _Terms:
    """Better the 1×1 for depthwise filters that stay."""
    filters = terms.filters
    channels, window = _separate_covariances(data, terms)
    inputs, outputs = _inverse(channels), _inverse(filters @ window @ filters.mT)
    mix = _conjugate_gradients(
        data,
        terms.mix,
        give=lambda mix: mix @ filters,
        pull=lambda missing: missing @ filters.mT,
        scale=lambda step: inputs @ step @ outputs,
    )
    return _Terms(filters, mix)


def _better_filters(data: _Data, terms: _Terms) -> _Terms:
    """Better the depthwise filters for a 1×1 that stays."""
    mix = terms.mix
    channels, window = _separate_covariances(data, terms)
    inputs, outputs = _inverse(mix.mT @ channels @ mix), _inverse(window)
    filters = _conjugate_gradients(
        data,
        terms.filters,
        give=lambda filters: mix @ filters,
        pull=lambda missing: mix.mT @ missing,
        scale=lambda step: inputs @ step @ outputs,
    )
    lengths = filters.norm(dim=2, keepdim=True).clamp_min(torch.finfo(filters.dtype).tiny)
    return _Terms(filters / lengths, mix * lengths.mT)


def _separate_covariances(data: _Data, terms: _Terms) -> tuple[Tensor, Tensor]:
    """Return the inputs' covariance between channels and between places, damped."""
    channels, places = terms.mix.shape[1], terms.filters.shape[2]
    blocks = data.xx.reshape(channels, places, channels, places)
    between = torch.einsum("cpdp->cd", blocks) / places
    window = torch.einsum("cpcq->pq", blocks) / between.trace().clamp_min(1e-300)
    for matrix in (between, window):
        matrix.diagonal().add_(DAMPING * float(matrix.diagonal().mean()) + 1e-300)
    return between, window


def _inverse(matrices: Tensor) -> Tensor:
    """Invert positive semi-definite matrices, those of no full rank as far as they go."""
    wide = matrices.double()
    trace = wide.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    floor = (1e-10 * trace + 1e-300) * torch.eye(matrices.shape[-1], dtype=wide.dtype)
    inverse: Tensor = torch.linalg.inv(wide + floor)
    return inverse.to(matrices)


def _conjugate_gradients(
    data: _Data, start: Tensor, *, give: _Map, pull: _Map, scale: _Map
) -> Tensor:
    """Return better values of what a kernel depends on linearly.

    Args:
        data: What the kernel is judged by.
        start: The values, one block for each output.
        give: From them to the kernel ``(out, in, places)``.
        pull: The transposed map.
        scale: About the inverse of each output's curvature.
    """
    values, kernel = start, give(start)
    weights = data.metric.diagonal().clamp_min(1e-300)[:, None, None]
    missing = data.missing(kernel.flatten(1), slice(None))
    direction, before = torch.zeros_like(start), 0.0
    for _ in range(STEPS):
        gradient = pull((data.metric @ missing).reshape(kernel.shape))
        scaled = scale(gradient) / weights
        power = float((gradient * scaled).sum())
        direction = scaled + direction * (power / before if before else 0.0)
        change = give(direction).flatten(1)
        moved = change @ data.xx
        curvature = float(((data.metric @ change) * moved).sum())
        if not (power > 0 and curvature > 0):
            break
        step = float((gradient * direction).sum()) / curvature
        values = values + step * direction
        missing = missing - step * moved
        before = power
    return values
