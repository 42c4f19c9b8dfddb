"""A convolution or linear layer becomes a chain through fewer channels, with 1×1 convolutions.

The weights are not those of the nearest kernel but those of the nearest *output on calibration
data*, in closed form from second moments: reduced-rank regression (Izenman 1975; for asymmetric
data Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks") in a metric that says
which output errors the rest of the network feels. With white inputs and the plain metric this is
the truncated SVD, and for the Tucker-2 form the higher-order SVD with HOOI sweeps.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from onebyone.calibration import Moments
from onebyone.errors import OptionError, PlanError
from onebyone.records import Cost

_Pair = tuple[int, int]

# Form -> what it makes of a layer from C to O channels.
FORMS = {
    "reduce": "1×1 C→r, k×k r→O",
    "expand": "k×k C→r, 1×1 r→O",
    "tucker2": "1×1 C→r1, k×k r1→r2, 1×1 r2→O",
    "pair": "1×1 C→r, 1×1 r→O (two linear layers for a linear layer)",
}

# Damping of the normal equations, relative to their mean diagonal: dead channels stay solvable.
DAMPING = 1e-4
# The metric's floor, relative to its mean diagonal: no output may be lost for nothing.
METRIC_FLOOR = 1e-2
HOOI_SWEEPS = 2
# A kernel may see this many values at once: their covariance is a square of that side in float64,
# 0.5 GB, and the regression needs several.
MOST_VALUES = 8192


def why_not(module: nn.Module) -> str | None:
    """Return why a layer cannot be factorized, in words, or ``None`` where it can."""
    kind = type(module).__name__
    if nn.utils.parametrize.is_parametrized(module):
        return f"the weight of this {kind} is computed by a parametrization"
    if type(module) is not nn.Linear:
        reason = _why_no_convolution(module, kind)
        if reason is not None:
            return reason
    channels, _, taps = sizes(module)
    if channels * taps > MOST_VALUES:
        return (
            f"its kernel sees {channels * taps:,} values at once, more than the {MOST_VALUES:,} "
            f"whose covariance is kept"
        )
    return None


def _why_no_convolution(module: nn.Module, kind: str) -> str | None:
    if not isinstance(module, nn.Conv2d):
        return f"{kind} is not a convolution that can be factorized"
    # A subclass may compute its weight or its padding in its own forward.
    if type(module).forward is not nn.Conv2d.forward:
        return f"{kind} has a forward of its own"
    if type(module)._conv_forward is not nn.Conv2d._conv_forward:  # noqa: SLF001
        return f"{kind} computes its convolution in its own way"
    if module.groups != 1:
        depthwise = module.groups == module.in_channels
        return "depthwise: no channels to mix" if depthwise else f"grouped ({module.groups} groups)"
    return None


# ---------------------------------------------------------------- shapes and costs


def forms_of(module: nn.Module) -> tuple[str, ...]:
    """Return the forms that a layer can take."""
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        return ("reduce", "expand", "tucker2")
    return ("pair",)


def sizes(module: nn.Module) -> tuple[int, int, int]:
    """Return input channels, output channels and places of the kernel."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, 1
    assert isinstance(module, nn.Conv2d)
    return module.in_channels, module.out_channels, math.prod(module.kernel_size)


def check_ranks(module: nn.Module, form: str, ranks: list[int], *, site: str) -> None:
    """Check that a form and its ranks fit a layer.

    Raises:
        PlanError: If they do not; says what must hold.
    """
    allowed = forms_of(module)
    if form not in allowed:
        raise PlanError(f"The form of {site!r} must be one of {', '.join(allowed)}, got {form!r}.")
    channels, out, taps = sizes(module)
    limits = {
        "reduce": (channels,),
        "expand": (min(out, channels * taps),),
        "tucker2": (channels, out),
        "pair": (min(channels, out),),
    }[form]
    ok = len(ranks) == len(limits) and all(1 <= r <= m for r, m in zip(ranks, limits, strict=True))
    if not ok:
        raise PlanError(
            f"The ranks of {site!r} as {form!r} must be {len(limits)} from 1 up to "
            f"{', '.join(map(str, limits))}, got {ranks}."
        )


def cost(
    module: nn.Module,
    form: str,
    ranks: list[int],
    *,
    input_places: int,
    output_places: int,
) -> Cost:
    """Return what the factorized layer costs for one input; its last factor has a bias.

    Args:
        module: The layer that is replaced.
        form: One of :data:`FORMS`.
        ranks: One rank, two for ``tucker2``.
        input_places: Height × width of the input (1 for a linear layer on vectors).
        output_places: Height × width of the output.
    """
    channels, out, taps = sizes(module)
    if form == "reduce":
        weights = [(channels * ranks[0], input_places), (ranks[0] * taps * out, output_places)]
    elif form in ("expand", "pair"):
        weights = [(channels * taps * ranks[0], output_places), (ranks[0] * out, output_places)]
    else:
        weights = [
            (channels * ranks[0], input_places),
            (ranks[0] * taps * ranks[1], output_places),
            (ranks[1] * out, output_places),
        ]
    return Cost(
        params=sum(size for size, _ in weights) + out,
        macs=sum(size * places for size, places in weights),
    )


def build(module: nn.Module, form: str, ranks: list[int], *, site: str = "") -> nn.Sequential:
    """Return the factorized layer's structure with fresh weights.

    Padding, padding mode and dilation go to the k×k factor (a 1×1 without bias maps padding of
    every mode to the same padding of fewer channels); so does the stride of a k×k, while a strided
    1×1 keeps its stride on its first factor, where it saves most.

    Args:
        module: The layer that is replaced. Not modified; its dtype, device, mode and whether its
            weight is trained carry over.
        form: One of :data:`FORMS`.
        ranks: One rank, two for ``tucker2``.
        site: The layer's name, for errors.

    Raises:
        PlanError: If the form or the ranks do not fit the layer.
    """
    check_ranks(module, form, ranks, site=site)
    weight = module.weight
    assert isinstance(weight, Tensor)
    device, dtype = weight.device, weight.dtype
    channels, out, _ = sizes(module)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if isinstance(module, nn.Linear):
        parts["reduce"] = nn.Linear(channels, ranks[0], bias=False, device=device, dtype=dtype)
        parts["expand"] = nn.Linear(ranks[0], out, bias=True, device=device, dtype=dtype)
    else:
        assert isinstance(module, nn.Conv2d)
        inner = channels
        if form in ("reduce", "tucker2"):
            parts["reduce"] = nn.Conv2d(
                channels, ranks[0], 1, bias=False, device=device, dtype=dtype
            )
            inner = ranks[0]
        last = form == "reduce"
        parts["reduce" if form == "pair" else "spatial"] = nn.Conv2d(
            inner,
            out if last else ranks[-1],
            cast("_Pair", module.kernel_size),
            stride=cast("_Pair", module.stride),
            padding=cast("str | _Pair", module.padding),
            dilation=cast("_Pair", module.dilation),
            padding_mode=module.padding_mode,
            bias=last,
            device=device,
            dtype=dtype,
        )
        if not last:
            parts["expand"] = nn.Conv2d(ranks[-1], out, 1, bias=True, device=device, dtype=dtype)
    chain = nn.Sequential(parts)
    chain.requires_grad_(weight.requires_grad)
    return chain.train(module.training)


# ---------------------------------------------------------------- the regression


@dataclass(frozen=True)
class Problem:
    """What a factorized layer should give from what it sees, all in float64.

    Attributes:
        weight: The kernel, shape ``(out, in, places)``: what the data leaves open stays near it.
        mean_x: Shape ``(in × places,)``.
        mean_y: Shape ``(out,)``.
        xx: Shape ``(in × places, in × places)``.
        yx: Shape ``(out, in × places)``.
        yy: Shape ``(out, out)``.
        root: Symmetric square root of the metric on output errors, shape ``(out, out)``.
        damping: Relative to the mean diagonal of ``xx``.
    """

    weight: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor
    root: Tensor
    damping: float = DAMPING

    @property
    def scale(self) -> float:
        """Mean square of the outputs in the metric: what errors are relative to."""
        return float((self.root @ self.yy @ self.root).trace())


def problem_of(
    module: nn.Module, moments: Moments | None, *, metric: Tensor | None = None
) -> Problem:
    """Return the regression problem of a layer.

    Args:
        module: A convolution or linear layer. Not modified.
        moments: Of its data; ``None`` for the kernel alone (white inputs).
        metric: Positive semi-definite, shape ``(out, out)``: how errors of the outputs count;
            ``None`` for all alike.
    """
    channels, out, taps = sizes(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    flat = weight.detach().to(device="cpu", dtype=torch.float64).reshape(out, channels * taps)
    bias = module.bias
    offset = torch.zeros(out, dtype=torch.float64)
    if isinstance(bias, Tensor):
        offset = bias.detach().to(device="cpu", dtype=torch.float64)
    root = torch.eye(out, dtype=torch.float64) if metric is None else metric_root(metric)
    kernel = flat.reshape(out, channels, taps)
    if moments is None:
        identity = torch.eye(channels * taps, dtype=torch.float64)
        zero = torch.zeros(channels * taps, dtype=torch.float64)
        return Problem(kernel, zero, offset, identity, flat, flat @ flat.T, root)
    return Problem(kernel, moments.mean_x, moments.mean_y, moments.xx, moments.yx, moments.yy, root)


def metric_root(metric: Tensor, *, floor: float = METRIC_FLOOR) -> Tensor:
    """Return the symmetric square root of a metric, floored and scaled to mean diagonal 1."""
    mean = float(metric.diagonal().mean())
    if not math.isfinite(mean) or mean <= 0:
        return torch.eye(len(metric), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(metric.double() / mean)
    values = values.clamp_min(0) + floor
    root: Tensor = (vectors * values.sqrt()) @ vectors.T
    return root


@dataclass(frozen=True)
class Factors:
    """The factors of a layer, in float64; those that a form lacks are ``None``.

    Attributes:
        reduce: Shape ``(r1, in)``.
        spatial: Shape ``(r2, r1, places)``.
        expand: Shape ``(out, r2)``.
        bias: Shape ``(out,)``.
        error: Squared error of the outputs in the metric, relative to their variance.
    """

    reduce: Tensor | None
    spatial: Tensor
    expand: Tensor | None
    bias: Tensor
    error: float


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
    _, channels, taps = problem.weight.shape
    blocks = problem.xx.reshape(channels, taps, channels, taps)
    between_channels = torch.einsum("cpdp->cd", blocks) / taps
    between_places = torch.einsum("cpcq->pq", blocks) / channels
    between_places = between_places / between_places.trace().clamp_min(1e-300) * taps
    weighted = torch.einsum("po,ocq->pcq", problem.root, problem.weight)
    if directions is not None:
        weighted = torch.einsum("po,pcq->ocq", directions, weighted)
    use = torch.einsum("ocp,pq,odq->cd", weighted, between_places, weighted)
    root = _root(use)
    _, vectors = torch.linalg.eigh(root @ between_channels @ root)
    basis: Tensor = torch.linalg.qr(root @ vectors.flip(1))[0]
    return basis


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def projected(problem: Problem, basis: Tensor) -> Problem:
    """Return the problem seen through a summary of the input channels, ``basis`` ``(in, r)``."""
    out, channels, taps = problem.weight.shape
    rank = basis.shape[1]
    half = torch.einsum("cr,cpx->rpx", basis, problem.xx.reshape(channels, taps, -1))
    full = torch.einsum("ds,rpdq->rpsq", basis, half.reshape(rank, taps, channels, taps))
    return replace(
        problem,
        weight=torch.einsum("ocp,cr->orp", problem.weight, basis),
        mean_x=torch.einsum("cr,cp->rp", basis, problem.mean_x.reshape(channels, taps)).flatten(),
        xx=full.reshape(rank * taps, rank * taps),
        yx=torch.einsum("ocp,cr->orp", problem.yx.reshape(out, channels, taps), basis).flatten(1),
    )


def _leading(problem: Problem, rank: int) -> Problem:
    """Return the problem seen through its first ``rank`` channels alone."""
    _, channels, taps = problem.weight.shape
    xx = problem.xx.reshape(channels, taps, channels, taps)[:rank, :, :rank]
    return replace(
        problem,
        weight=problem.weight[:, :rank],
        mean_x=problem.mean_x[: rank * taps],
        xx=xx.reshape(rank * taps, rank * taps),
        yx=problem.yx[:, : rank * taps],
    )


def regress(problem: Problem) -> Tensor:
    """Return the best map ``(out, in × places)`` from centered inputs to centered outputs.

    Damped towards the kernel itself: directions in which the data says nothing keep its weights.
    """
    prior = problem.weight.flatten(1)
    residual = problem.yx - prior @ problem.xx
    # Rounding only: the data is the kernel's own, and the kernel is the answer.
    if float(residual.abs().max()) <= 1e-12 * max(float(problem.yx.abs().max()), 1e-300):
        return prior
    damped = problem.xx.clone()
    diagonal = damped.diagonal()
    diagonal += problem.damping * float(diagonal.mean()) + 1e-300
    step = torch.cholesky_solve(residual.T, torch.linalg.cholesky(damped)).T
    return prior + step


@dataclass(frozen=True)
class _Fit:
    """A regression with the principal directions of what it gives, in the metric.

    Attributes:
        weight: Shape ``(out, in × places)``.
        vectors: Orthonormal, shape ``(out, out)``, the largest first.
        values: Mean squares along them.
        lost: Squared error that no rank can mend, in the metric.
    """

    weight: Tensor
    vectors: Tensor
    values: Tensor
    lost: float


def _fit(problem: Problem) -> _Fit:
    weight = regress(problem)
    root = problem.root
    given = root @ (weight @ problem.xx @ weight.T) @ root
    values, vectors = torch.linalg.eigh((given + given.T) / 2)
    cross = weight @ problem.yx.T
    error = root @ (problem.yy - cross - cross.T) @ root
    lost = float(error.trace()) + float(given.trace())
    return _Fit(weight, vectors.flip(1), values.flip(0).clamp_min(0), max(lost, 0.0))


def errors(problem: Problem, form: str, grid: list[list[int]]) -> list[float]:
    """Return the relative error of each option of a form, without building any.

    One decomposition serves all ranks of ``expand`` and ``pair``, one for each first rank those of
    ``tucker2``. For ``tucker2`` this is the value before the HOOI sweeps.

    Args:
        problem: The regression.
        form: One of :data:`FORMS`.
        grid: The ranks of each option.
    """
    scale = max(problem.scale, 1e-300)
    if form in ("expand", "pair"):
        fit = _fit(problem)
        return [(fit.lost + float(fit.values[ranks[0] :].sum())) / scale for ranks in grid]
    # Rotated once; the best r channels are then the first r.
    rotated = projected(problem, channel_basis(problem))
    fits = {first: _fit(_leading(rotated, first)) for first in {ranks[0] for ranks in grid}}
    if form == "reduce":
        return [fits[ranks[0]].lost / scale for ranks in grid]
    return [
        (fits[ranks[0]].lost + float(fits[ranks[0]].values[ranks[1] :].sum())) / scale
        for ranks in grid
    ]


def solve(problem: Problem, form: str, ranks: list[int]) -> Factors:
    """Return the factors whose outputs are nearest to what the layer should give.

    Raises:
        OptionError: If there is no such form.
    """
    if form not in FORMS:
        raise OptionError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}.")
    scale = max(problem.scale, 1e-300)
    out, channels, taps = problem.weight.shape
    if form in ("expand", "pair"):
        fit = _fit(problem)
        expand, core = _expanded(problem, fit, ranks[0])
        lost = fit.lost + float(fit.values[ranks[0] :].sum())
        bias = problem.mean_y - expand @ (core @ problem.mean_x)
        return Factors(None, core.reshape(ranks[0], channels, taps), expand, bias, lost / scale)
    basis = channel_basis(problem)[:, : ranks[0]]
    small = projected(problem, basis)
    fit = _fit(small)
    if form == "reduce":
        bias = problem.mean_y - fit.weight @ small.mean_x
        core = fit.weight.reshape(out, ranks[0], taps)
        return Factors(basis.T, core, None, bias, fit.lost / scale)
    for _ in range(HOOI_SWEEPS):
        again = channel_basis(problem, directions=fit.vectors[:, : ranks[1]])[:, : ranks[0]]
        other = projected(problem, again)
        second = _fit(other)
        if _tail(second, ranks[1]) >= _tail(fit, ranks[1]):
            break
        basis, small, fit = again, other, second
    expand, core = _expanded(small, fit, ranks[1])
    bias = problem.mean_y - expand @ (core @ small.mean_x)
    core = core.reshape(ranks[1], ranks[0], taps)
    return Factors(basis.T, core, expand, bias, _tail(fit, ranks[1]) / scale)


def _tail(fit: _Fit, rank: int) -> float:
    return fit.lost + float(fit.values[rank:].sum())


def _expanded(problem: Problem, fit: _Fit, rank: int) -> tuple[Tensor, Tensor]:
    """Split a fit into an orthonormal expansion ``(out, r)`` and what feeds it."""
    vectors = fit.vectors[:, :rank]
    outward = torch.linalg.solve(problem.root, vectors)
    inward = vectors.T @ problem.root @ fit.weight
    expand, rest = torch.linalg.qr(outward)
    return expand, rest @ inward


def fill(chain: nn.Sequential, factors: Factors) -> None:
    """Write factors into a factorized layer; ``chain`` is modified in place."""
    tensors = {"reduce": factors.reduce, "spatial": factors.spatial, "expand": factors.expand}
    if not hasattr(chain, "spatial"):
        # A pair: the k×k factor is the first 1×1.
        tensors = {"reduce": factors.spatial, "expand": factors.expand}
    with torch.no_grad():
        for name, module in chain.named_children():
            value = tensors[name]
            weight, bias = module.weight, module.bias
            assert value is not None
            assert isinstance(weight, Tensor)
            weight.copy_(value.reshape(weight.shape))
            if isinstance(bias, Tensor):
                bias.copy_(factors.bias)
