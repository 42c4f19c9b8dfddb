"""The best linear map for given data, in closed form from second moments.

Reduced-rank regression (Izenman 1975; for asymmetric data Zhang et al. 2016, "Accelerating Very
Deep Convolutional Networks") in a metric that says which output errors the rest of the network
feels. With white inputs and the plain metric it is the truncated SVD.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.calibration.moments import Moments
from onebyone.networks.conv_layers import bias_of, kernel_of, shape_of, weight_of
from onebyone.rewrites.low_rank.eigen import eigen, eigenvalues

# Damping of the normal equations, relative to their mean diagonal: dead channels stay solvable.
DAMPING = 1e-4
# Where that leaves them less than positive definite, ten times as much, and again, up to this:
# float32 sums of inputs that vary along few directions have negative eigenvalues.
MOST_DAMPING = 1e-1
# The metric's floor, relative to its mean diagonal: every output counts a little.
METRIC_FLOOR = 1e-2
# A kernel that sees more values than this at once is wide: each decomposition takes seconds.
WIDE = 2048
# A layer with more outputs than this, and twice as many as inputs, gives them in a space of few
# dimensions. Its problem is written in that space: else each decomposition of the outputs of a head
# of many thousand classes takes minutes.
MANY_OUTPUTS = 1024
# Below this the normal equations' damping is lost in float32.
LEAST_RIDGE = 1e-20
# Above this float32 squares overflow.
MOST_SQUARE = 1e15
# A mean square below this is none.
LEAST_POWER = 1e-300
# A residual that is no more than this share of the covariances is rounding.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Problem:
    """What one group of a layer should give from what it sees, all in float64 on the CPU.

    A rough one, of a wide layer, is in float32.

    Attributes:
        weight: The kernel, shape ``(out, in, places)``: what the data leaves open stays near it.
        mean_x: Shape ``(in × places,)``.
        mean_y: Shape ``(out,)``.
        xx: Covariance of what it sees, shape ``(in × places, in × places)``; ``None`` where only
            the outputs are known, or, of the kernel alone, for white inputs.
        yx: Covariance of what it should give with what it sees, shape ``(out, in × places)``;
            ``None`` as ``xx``: the layer itself is then the best map.
        given_yy: Covariance of what it should give, shape ``(out, out)``; ``None``: the kernel's
            own for white inputs.
        root: Symmetric square root of the metric on output errors, shape ``(out, out)``.
        ridge: Added to the diagonal of ``xx``.
        unit: The mean diagonal of the metric, which its root is scaled by.
        whole: Whether all input channels are seen, not a summary of them.
        plain: Whether it is the kernel alone: white inputs, and all outputs count alike.
        precision: Of the layer's own weight: a kernel alone need not be factorized more exactly.
        span: Where the layer has far more outputs than inputs, an orthonormal basis of all that it
            can give, shape ``(outputs, out)``: ``out`` then counts its columns, and all but
            ``mean_y`` is written in it. ``None``: the outputs as they are.
    """

    weight: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor | None
    yx: Tensor | None
    given_yy: Tensor | None
    root: Tensor
    ridge: float = 0.0
    unit: float = 1.0
    whole: bool = True
    plain: bool = False
    precision: torch.dtype = torch.float64
    span: Tensor | None = None

    def lifted(self, weight: Tensor) -> Tensor:
        """Return a weight ``(out, …)`` of the problem as one of the layer, ``(outputs, …)``."""
        return weight if self.span is None else self.span @ weight

    def lowered(self, weight: Tensor) -> Tensor:
        """Return a weight ``(outputs, …)`` of the layer as one of the problem, ``(out, …)``."""
        return weight if self.span is None else self.span.T @ weight

    @cached_property
    def yy(self) -> Tensor:
        """Covariance of what it should give, shape ``(out, out)``."""
        if self.given_yy is not None:
            return self.given_yy
        flat = self.weight.flatten(1)
        return flat @ flat.T

    @cached_property
    def metric(self) -> Tensor:
        """The metric itself: the square of its root."""
        return self.root @ self.root

    @cached_property
    def scale(self) -> float:
        """Mean square of the outputs in the metric: what errors are relative to."""
        if self.plain and self.given_yy is None:
            return float(torch.linalg.vector_norm(self.weight)) ** 2
        return self.measured(self.yy)

    @property
    def felt(self) -> float:
        """Mean square of the outputs in the metric as it was given, before it was scaled."""
        return self.unit * self.scale

    def measured(self, squares: Tensor) -> float:
        """Return the trace of a covariance of outputs in the metric."""
        return float(squares.trace() if self.plain else (self.metric * squares).sum())

    def seen(self, **changes: Any) -> Problem:
        """Return the same problem with other inputs; what its outputs alone tell is kept."""
        found = replace(self, **changes)
        if not self.plain:
            vars(found).update(metric=self.metric, yy=self.yy, scale=self.scale)
        return found

    def rough(self) -> Problem:
        """Return the problem of a wide layer in float32: what options are worth shows in it too.

        Any other, and one whose inputs hardly vary, is returned as it is. What is solved with it
        raises :class:`torch.linalg.LinAlgError` where float32 is not enough.
        """
        if not is_wide(self) or self.ridge < LEAST_RIDGE or not self._fits_float32:
            return self
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        changes: dict[str, Any] = {k: v.float() for k, v in given.items() if isinstance(v, Tensor)}
        return replace(self, **changes)

    @property
    def _fits_float32(self) -> bool:
        given = (self.weight, self.mean_x, self.mean_y, self.xx, self.yx, self.given_yy)
        return all(tensor is None or float(tensor.abs().max()) < MOST_SQUARE for tensor in given)

    # Every form and every rank of a layer starts from these.

    @cached_property
    def views(self) -> dict[int, Problem]:
        """The problem as :func:`by_columns` gives it, for each width of the kernel asked for."""
        return {}

    @cached_property
    def nested(self) -> list[Nested]:
        """The regressions through the first channels, once they have been asked for."""
        return []

    @cached_property
    def basis(self) -> Tensor:
        """Basis of the input channels for all outputs, as :func:`channel_basis` gives it."""
        return _channel_basis(self, None)

    @cached_property
    def fitted(self) -> Fit:
        """The regression, as :func:`regression` gives it."""
        return _regression(self)


def problems_of(
    module: nn.Module, moments: Sequence[Moments] | None = None, *, metric: Tensor | None = None
) -> list[Problem]:
    """Return the regression problem of each group of a layer.

    Args:
        module: A convolution or linear layer. Not modified.
        moments: Of each group's data; ``None`` for the kernel alone (white inputs).
        metric: Positive semi-definite, shape ``(out, out)``: how errors of the outputs count;
            ``None`` for all alike. Between groups it is not seen.
    """
    shape = shape_of(module)
    kernel = kernel_of(module)
    bias = bias_of(module)
    offsets = torch.zeros(shape.out, dtype=torch.float64) if bias is None else bias
    precision = torch.float64 if _weight_type(module) == torch.float64 else torch.float32
    problems = []
    for group in range(shape.groups):
        mine = slice(group * shape.group_out, (group + 1) * shape.group_out)
        data = None if moments is None else moments[group]
        weight, counts, span = kernel[group], None if metric is None else metric[mine, mine], None
        if data is not None and shape.taps == 1 and _has_many_outputs(weight):
            weight, counts, data, span = _in_its_span(weight, counts, data)
        root, unit = torch.eye(len(weight), dtype=torch.float64), 1.0
        if counts is not None:
            root, unit = metric_root(counts), mean_diagonal(counts)
        found = _problem(weight, offsets[mine], data, root)
        plain = data is None and metric is None
        problems.append(replace(found, plain=plain, precision=precision, unit=unit, span=span))
    return problems


def _has_many_outputs(weight: Tensor) -> bool:
    return len(weight) > max(MANY_OUTPUTS, 2 * weight[0].numel())


def _in_its_span(
    weight: Tensor, metric: Tensor | None, data: Moments
) -> tuple[Tensor, Tensor | None, Moments, Tensor]:
    """Return a layer's problem in the space of its outputs, and a basis of that space.

    What a layer should give is what it gives on other inputs. So the best weights of any rank give
    nothing outside of that space, in any metric.
    """
    span = torch.linalg.qr(weight.flatten(1))[0]
    lowered = replace(
        data,
        yx=None if data.yx is None else span.T @ data.yx,
        yy=span.T @ data.yy @ span,
    )
    if metric is not None:
        metric = span.T @ metric.double() @ span
    return torch.einsum("ok,oip->kip", span, weight), metric, lowered, span


def _weight_type(module: nn.Module) -> torch.dtype:
    return weight_of(module).dtype


def _problem(kernel: Tensor, offset: Tensor, data: Moments | None, root: Tensor) -> Problem:
    if data is None:
        zero = torch.zeros(kernel[0].numel(), dtype=torch.float64)
        return Problem(kernel, zero, offset, None, None, None, root)
    ridge = 0.0
    if data.xx is not None:
        ridge = DAMPING * max(float(data.xx.diagonal().mean()), 0.0) + LEAST_POWER
    return Problem(kernel, data.mean_x, data.mean_y, data.xx, data.yx, data.yy, root, ridge)


def mean_diagonal(metric: Tensor) -> float:
    """Return the mean diagonal of a metric; 0 where it is not finite, and so says nothing."""
    mean = float(metric.diagonal().mean())
    return max(mean, 0.0) if bool(metric.isfinite().all()) and math.isfinite(mean) else 0.0


def metric_root(metric: Tensor, *, floor: float = METRIC_FLOOR) -> Tensor:
    """Return the symmetric square root of a metric, floored and scaled to mean diagonal 1."""
    mean = mean_diagonal(metric)
    if mean == 0:
        return torch.eye(len(metric), dtype=torch.float64)
    values, vectors = eigen(metric.double() / mean)
    values = values.clamp_min(0) + floor
    root: Tensor = (vectors * values.sqrt()) @ vectors.T
    return root


# ---------------------------------------------------------------- summaries of the input


def channel_basis(problem: Problem, *, directions: Tensor | None = None) -> Tensor:
    """Return an orthonormal basis of the input channels, the most useful directions first.

    The span of the first r columns is the best r-channel summary if the data's correlations over
    channels and over kernel places were independent (the nearest Kronecker product is taken); for
    white inputs that is the higher-order SVD.

    Args:
        problem: The regression.
        directions: Output directions that count, orthonormal in the metric, shape ``(out, r2)``;
            ``None`` for all.

    Returns:
        Shape ``(in, in)``.
    """
    return problem.basis if directions is None else _channel_basis(problem, directions)


def _channel_basis(problem: Problem, directions: Tensor | None) -> Tensor:
    _, channels, taps = problem.weight.shape
    weighted = problem.weight.transpose(0, 1)
    if directions is not None or not problem.plain:
        seen = problem.root if directions is None else directions.T @ problem.root
        weighted = torch.einsum("po,ocq->cpq", seen, problem.weight)
    if problem.xx is None:
        flat = weighted.flatten(1)
        _, vectors = eigen(flat @ flat.T)
        turned: Tensor = vectors.flip(1)
        return turned
    blocks = problem.xx.reshape(channels, taps, channels, taps)
    between_channels = torch.einsum("cpdp->cd", blocks) / taps
    between_places = torch.einsum("cpcq->pq", blocks) / channels
    between_places = between_places / between_places.trace().clamp_min(1e-300) * taps
    use = (weighted @ between_places).flatten(1) @ weighted.flatten(1).T
    root = _root(use)
    _, vectors = eigen(root @ between_channels @ root)
    basis: Tensor = torch.linalg.qr(root @ vectors.flip(1))[0]
    return basis


def _root(matrix: Tensor) -> Tensor:
    values, vectors = eigen((matrix + matrix.T) / 2)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def by_columns(problem: Problem, columns: int) -> Problem:
    """Return the same problem with a kernel's rows taken for channels: its places are columns.

    What holds of channels then holds of columns of pixels: a 1×1 becomes a k×1, and the k×k
    between a 1×k.

    Args:
        problem: Of a kernel whose places are in rows of as many columns.
        columns: The kernel's width.
    """
    if columns not in problem.views:
        weight = problem.weight.reshape(len(problem.weight), -1, columns)
        problem.views[columns] = problem.seen(weight=weight)
    return problem.views[columns]


def projected(problem: Problem, basis: Tensor) -> Problem:
    """Return the problem seen through a summary of the input channels, ``basis`` ``(in, r)``."""
    out, channels, taps = problem.weight.shape
    rank = basis.shape[1]
    weight = torch.einsum("ocp,cr->orp", problem.weight, basis)
    mean_x = torch.einsum("cr,cp->rp", basis, problem.mean_x.reshape(channels, taps)).flatten()
    if problem.xx is None or problem.yx is None:
        return problem.seen(weight=weight, mean_x=mean_x, given_yy=problem.yy, whole=False)
    half = (basis.T @ problem.xx.reshape(channels, -1)).reshape(rank * taps, channels, taps)
    full = torch.einsum("ds,adq->asq", basis, half)
    yx = torch.einsum("ocp,cr->orp", problem.yx.reshape(out, channels, taps), basis)
    return problem.seen(
        weight=weight,
        mean_x=mean_x,
        xx=full.reshape(rank * taps, rank * taps),
        yx=yx.flatten(1),
        whole=False,
    )


# ---------------------------------------------------------------- the regression


def regress(problem: Problem) -> Tensor:
    """Return the best map ``(out, in × places)`` from centered inputs to centered outputs.

    Damped towards the kernel itself: directions in which the data says nothing keep its weights.
    """
    prior = problem.weight.flatten(1)
    if problem.xx is None or problem.yx is None:
        return prior
    residual = problem.yx - prior @ problem.xx
    # Rounding only: the data is the kernel's own, and the kernel is the answer.
    rounding = ROUNDING[residual.dtype]
    if float(residual.abs().max()) <= rounding * max(float(problem.yx.abs().max()), 1e-300):
        return prior
    step = torch.cholesky_solve(residual.T, damped(problem.xx, problem.ridge)[0]).T
    return prior + step


def damped(square: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Return the Cholesky factor of a covariance with a ridge on its diagonal, and the ridge.

    Args:
        square: Symmetric, and but for rounding positive semi-definite. Not modified.
        ridge: Where it is too small for float64, a greater one is taken.

    Raises:
        torch.linalg.LinAlgError: If it is too small for float32, or nothing helps.
    """
    while True:
        lifted = square.clone()
        lifted.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(lifted)
        if not failed:
            return lower, ridge
        most = MOST_DAMPING * max(float(square.diagonal().mean()), 0.0)
        if square.dtype != torch.float64 or not 10 * ridge <= most * (1 + 1e-6):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"A covariance of shape {tuple(square.shape)} must be positive definite, and is "
                f"not with {ridge:.2g} on its diagonal."
            )
        ridge *= 10


@dataclass(frozen=True)
class Fit:
    """A regression with the principal directions of what it gives, in the metric.

    Attributes:
        weight: Shape ``(out, in × places)``.
        given: Covariance of what it gives, shape ``(out, out)``.
        lost: Squared error that no rank can mend, in the metric.
        root: Of the metric; ``None`` where all outputs count alike.
    """

    weight: Tensor
    given: Tensor
    lost: float
    root: Tensor | None = None

    @property
    def vectors(self) -> Tensor:
        """Orthonormal directions, shape ``(out, out)``, the largest first."""
        return self._principal[1]

    @cached_property
    def values(self) -> Tensor:
        """Mean squares along them."""
        if "_principal" in vars(self):
            return self._principal[0]
        # Without the directions, which most fits are not asked for, in a third of the time.
        values = eigenvalues(self._in_metric)
        return values.flip(0).clamp_min(0)

    @cached_property
    def _principal(self) -> tuple[Tensor, Tensor]:
        values, vectors = eigen(self._in_metric)
        return values.flip(0).clamp_min(0), vectors.flip(1)

    @cached_property
    def _in_metric(self) -> Tensor:
        mine = self.given if self.root is None else self.root @ self.given @ self.root
        return (mine + mine.T) / 2

    def tail(self, rank: int) -> float:
        """Return the squared error of that rank, in the metric."""
        return self.lost + float(self.values[rank:].sum())


def regression(problem: Problem) -> Fit:
    """Return the regression and its principal directions."""
    return problem.fitted


def _regression(problem: Problem) -> Fit:
    weight = regress(problem)
    if problem.xx is None or problem.yx is None:
        # Its own outputs, or those through a summary of white inputs.
        given = problem.yy if problem.whole else weight @ weight.T
        return _fit(problem, weight, given, given)
    given = weight @ problem.xx @ weight.T
    return _fit(problem, weight, given, weight @ problem.yx.T)


def _fit(problem: Problem, weight: Tensor, given: Tensor, cross: Tensor) -> Fit:
    lost = problem.scale + problem.measured(given) - 2 * problem.measured(cross)
    return Fit(weight, given, max(lost, 0.0), None if problem.plain else problem.root)


# ---------------------------------------------------------------- every rank at once


class Nested:
    """The regressions through the first r of a problem's best input channels, for any r.

    The channels are rotated once, into the order of their use. The normal equations of the first r
    are then the leading block of all of them, and so is their Cholesky factor. So one decomposition
    serves every r.

    Args:
        problem: The regression.
        most: The largest r.
    """

    def __init__(self, problem: Problem, most: int) -> None:
        self.most = most
        self.problem = projected(problem, channel_basis(problem)[:, :most])
        self._lower: Tensor | None = None
        self._ridge = 0.0
        self._half: Tensor | None = None
        if self.problem.xx is not None and self.problem.yx is not None:
            self._lower, self._ridge = damped(self.problem.xx, self.problem.ridge)
            prior = self.problem.weight.flatten(1)
            target = (self.problem.yx + self._ridge * prior).T
            self._half = torch.linalg.solve_triangular(self._lower, target, upper=False)

    def fit(self, rank: int) -> Fit:
        """Return the regression through the first ``rank`` channels."""
        taps = self.problem.weight.shape[2]
        if self._lower is None or self._half is None:
            leading = self.problem.weight[:, :rank].flatten(1)
            given = leading @ leading.T
            return _fit(self.problem, leading, given, given)
        size = rank * taps
        half = self._half[:size]
        weight = torch.linalg.solve_triangular(self._lower[:size, :size].T, half, upper=True).T
        given = half.T @ half - self._ridge * (weight @ weight.T)
        assert self.problem.yx is not None
        return _fit(self.problem, weight, given, weight @ self.problem.yx[:, :size].T)

    def first(self, rank: int) -> Problem:
        """Return the problem as seen through the first ``rank`` channels."""
        whole = self.problem
        size = rank * whole.weight.shape[2]
        return whole.seen(
            weight=whole.weight[:, :rank],
            mean_x=whole.mean_x[:size],
            xx=None if whole.xx is None else whole.xx[:size, :size],
            yx=None if whole.yx is None else whole.yx[:, :size],
        )


def through_channels(problem: Problem, ranks: Sequence[int]) -> dict[int, Fit]:
    """Return the regression through the best r input channels for each r in ``ranks``."""
    nested = Nested(problem, max(ranks))
    problem.nested[:] = [nested]
    return {rank: nested.fit(rank) for rank in sorted(set(ranks))}


def is_wide(problem: Problem) -> bool:
    """Whether a problem's decompositions take seconds."""
    return problem.xx is not None and len(problem.xx) > WIDE


def through_best(problem: Problem, rank: int) -> tuple[Problem, Fit]:
    """Return the problem through its best input channels with its regression."""
    for nested in problem.nested:
        if rank <= nested.most:
            return nested.first(rank), nested.fit(rank)
    small = projected(problem, channel_basis(problem)[:, :rank])
    return small, regression(small)


def relative(parts: Iterable[tuple[float, float]]) -> float:
    """Return the error of several groups relative to their outputs, from ``(lost, scale)`` each."""
    return ratio(*map(sum, zip(*parts, strict=True)))


def ratio(lost: float, scale: float) -> float:
    """Return an error relative to the outputs, finite also where these do not vary."""
    return min(lost / max(scale, LEAST_POWER), sys.float_info.max)
