"""The terms of a separable kernel: of the kernel alone, or those that keep the outputs on data.

From the kernel alone the terms are the singular vectors of its slices: of each input channel's
(output channels × places), or of each output channel's (input channels × places). With
calibration data they are those that keep the *outputs*: one channel after the other is fitted by
reduced-rank regression to what the others leave over, then the 1×1 by one regression on what the
depthwise filters give. Each step can only lower the error on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from onebyone.rewrites.low_rank.eigen import eigen
from onebyone.rewrites.low_rank.reduced_rank import DAMPING, Problem, damped, is_wide, regress

# Rounds over all channels for each number of terms, and the share of the error that a round must
# take away for another to follow.
SWEEPS = 2
LEAST_GAIN = 0.02
# Steps of conjugate gradients for the 1×1 of a pointwise-depthwise chain.
STEPS = 6
# Channels whose common residual is kept up to date together.
BLOCK = 32


def path_to(most: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, … up to ``most`` itself."""
    path, step = [], 1
    terms = 1
    while terms < most:
        path.append(terms)
        if terms >= 4 * step:
            step *= 2
        terms += step
    return [*path, most]


@dataclass(frozen=True)
class Terms:
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


def kernel_of_terms(form: str, filters: Tensor, mix: Tensor) -> Tensor:
    """Return the kernel ``(out, in, places)`` that terms give."""
    slices = mix @ filters
    return slices.transpose(0, 1) if form == "depthwise-pointwise" else slices


def solutions(problem: Problem, form: str, wanted: Sequence[int]) -> dict[int, Terms]:
    """Return the terms for each number of them, each at least as good as any with fewer."""
    first = form == "depthwise-pointwise"
    slices = problem.weight.transpose(0, 1) if first else problem.weight
    if problem.xx is None or problem.yx is None:
        weighted = problem.root @ slices if first else slices
        return {t: _white(problem, form, _truncated(slices, weighted, t)) for t in wanted}
    data = _Data(problem.xx, problem.yx, problem.metric, problem)
    path = [terms for terms in path_to(min(slices.shape[1:])) if terms <= max(wanted)]
    found: dict[int, Terms] = {}
    before: Terms | None = None
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


def _truncated(slices: Tensor, weighted: Tensor, terms: int) -> Terms:
    """Return the leading terms of each slice ``(side, other side, places)``.

    Args:
        slices: What is kept.
        weighted: The same in the metric in which the leading terms lead.
        terms: How many.
    """
    filters = _right_vectors(weighted)[:, :terms]
    return Terms(filters, slices @ filters.mT)


def _right_vectors(slices: Tensor) -> Tensor:
    """Return right singular vectors as rows, found in float64, which LAPACK never gives up on."""
    vectors: Tensor = torch.linalg.svd(slices.double(), full_matrices=False).Vh
    return vectors.to(slices)


def _white(problem: Problem, form: str, terms: Terms) -> Terms:
    lost = problem.root @ (
        kernel_of_terms(form, terms.filters, terms.mix) - problem.weight
    ).flatten(1)
    whole = problem.root @ problem.weight.flatten(1)
    return replace(terms, lost=float(lost.square().sum()), scale=float(whole.square().sum()))


def _widened(terms: Terms, slices: Tensor, count: int) -> Terms:
    """Return the same kernel in more terms: new filters that are not used yet.

    The new filters are the leading ones of what the old ones cannot give of the slices.
    """
    old = torch.linalg.qr(terms.filters.mT).Q
    rest = slices - (slices @ old) @ old.mT
    new = _right_vectors(rest)[:, : count - terms.filters.shape[1]]
    filters = torch.cat([terms.filters, new], dim=1)
    unused = terms.mix.new_zeros(*terms.mix.shape[:2], new.shape[1])
    return Terms(filters, torch.cat([terms.mix, unused], dim=2))


@dataclass(frozen=True)
class _Data:
    """A problem with its covariances, and its metric on output errors ``(out, out)``."""

    xx: Tensor
    yx: Tensor
    metric: Tensor
    problem: Problem

    @cached_property
    def whitening(self) -> tuple[Tensor, list[float]]:
        """What makes each channel's inputs white, shape ``(side, places, places)``, and its ridge.

        These are the inverse Cholesky factors of the damped covariances, in the type of the data.
        """
        places = self.problem.weight.shape[2]
        side = len(self.xx) // places
        blocks = self.xx.reshape(side, places, side, places)
        each = torch.arange(side)
        # In float64 whatever the rest is in: neighbouring places may be nearly the same.
        own = blocks[each, :, each].double()
        lifted = own + self.problem.ridge * torch.eye(places, dtype=own.dtype)
        lower, failed = torch.linalg.cholesky_ex(lifted)
        ridges = [self.problem.ridge] * side
        for channel in failed.nonzero().flatten().tolist():
            lower[channel], ridges[channel] = damped(own[channel], self.problem.ridge)
        unit = torch.eye(places, dtype=own.dtype).expand(side, -1, -1)
        inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return inverse.to(self.xx), ridges

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


def _refine_depthwise(data: _Data, starts: Sequence[Terms]) -> Terms:
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


def _mixed(data: _Data, terms: Terms) -> Terms:
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
    return Terms(terms.filters, mix, lost, problem.scale)


def _swept(data: _Data, terms: Terms) -> Terms:
    """Fit each channel's terms anew, one after the other, to what the others leave over.

    For one channel filters and mix are found together, by reduced-rank regression in the metric.
    """
    side, _, count = terms.mix.shape
    places = terms.filters.shape[2]
    mix, filters = terms.mix.clone(), terms.filters.clone()
    kernel = kernel_of_terms("depthwise-pointwise", filters, mix).flatten(1)
    roots, ridges = data.whitening
    for start in range(0, side, BLOCK):
        end = min(start + BLOCK, side)
        columns = slice(start * places, end * places)
        missing = data.missing(kernel, columns)
        for channel in range(start, end):
            inside = slice((channel - start) * places, (channel - start + 1) * places)
            own = slice(channel * places, (channel + 1) * places)
            seen = data.xx[own, own]
            old = kernel[:, own].clone()
            wanted = missing[:, inside] + old @ seen + ridges[channel] * old
            filters[channel], mix[channel] = _reduced_rank(
                wanted, roots[channel], data.metric, count
            )
            kernel[:, own] = mix[channel] @ filters[channel]
            missing -= (kernel[:, own] - old) @ data.xx[own, columns]
    return Terms(filters, mix)


def _reduced_rank(wanted: Tensor, root: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return filters ``(rank, places)`` of length 1 and their mix ``(out, rank)``.

    Args:
        wanted: Covariance of outputs and inputs, shape ``(out, places)``.
        root: Inverse Cholesky factor of the inputs' covariance, shape ``(places, places)``.
        metric: On the outputs.
        rank: How many filters.
    """
    white = wanted @ root.T
    _, vectors = eigen(white.T @ metric @ white)
    leading = vectors.flip(1)[:, :rank]
    filters = leading.T @ root
    lengths = filters.norm(dim=1)
    return filters / lengths[:, None], (white @ leading) * lengths


# Each output has inputs of its own, so that a regression would be a system of equations for each;
# steps of conjugate gradients on all at once do with the covariance as it is.

_Map = Callable[[Tensor], Tensor]


def _refine_pointwise(data: _Data, starts: Sequence[Terms]) -> Terms:
    """Better the best of several starts: the 1×1, then the filters, in turns."""
    now = min((_judged(data, start) for start in starts), key=lambda terms: terms.lost)
    for _ in range(_rounds(data)):
        new = _judged(data, _better_filters(data, _better_mix(data, now)))
        if new.lost >= now.lost:
            break
        now = new
    return now


def _judged(data: _Data, terms: Terms) -> Terms:
    kernel = kernel_of_terms("pointwise-depthwise", terms.filters, terms.mix).flatten(1)
    lost = data.lost(kernel @ data.yx.T, kernel @ data.xx @ kernel.T)
    return replace(terms, lost=lost, scale=data.problem.scale)


def _better_mix(data: _Data, terms: Terms) -> Terms:
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
    return Terms(filters, mix)


def _better_filters(data: _Data, terms: Terms) -> Terms:
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
    return Terms(filters / lengths, mix * lengths.mT)


def _separate_covariances(data: _Data, terms: Terms) -> tuple[Tensor, Tensor]:
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
