"""The factors of a low-rank layer: through few input channels, few output channels, or both.

Of a kernel alone they are its truncated SVD, and between two sets of channels its higher-order SVD
with HOOI sweeps (De Lathauwer et al. 2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onebyone.rewrites.low_rank.eigen import eigen
from onebyone.rewrites.low_rank.reduced_rank import (
    Fit,
    Problem,
    channel_basis,
    is_wide,
    projected,
    regression,
    through_best,
)

HOOI_SWEEPS = 2
# Up to so many channels the bases of a kernel alone are found in float64.
SMALL = 64


@dataclass(frozen=True)
class Factors:
    """The factors of one group of a layer; those that a form lacks are ``None``.

    In float64, but of a kernel alone in its own precision.

    Attributes:
        reduce: Shape ``(r1, in)``.
        spatial: Shape ``(r2, r1, places)``.
        expand: Shape ``(out, r2)``.
        bias: Shape ``(out,)``.
        lost: Squared error of the outputs in the metric.
        scale: Their mean square in the metric.
    """

    reduce: Tensor | None
    spatial: Tensor
    expand: Tensor | None
    bias: Tensor
    lost: float
    scale: float


def outward(problem: Problem, rank: int) -> Factors:
    """Return the best layer through ``rank`` output channels: the kernel, then a 1×1."""
    if problem.plain:
        return _outward_of_kernel(problem, rank)
    _, channels, taps = problem.weight.shape
    found = regression(problem)
    expand, core = _expanded(problem, found, rank)
    expand = problem.lifted(expand)
    bias = problem.mean_y - expand @ (core @ problem.mean_x)
    core = core.reshape(rank, channels, taps)
    return Factors(None, core, expand, bias, found.tail(rank), problem.scale)


def _outward_of_kernel(problem: Problem, rank: int) -> Factors:
    """Return the truncated SVD of the kernel alone, by the smaller of its two Gram matrices."""
    exact = problem.weight.flatten(1)
    # The basis may be rough, for what is kept is computed from it in float64.
    rows = _scaled_to_one(exact)
    rows = rows.float() if min(exact.shape) > SMALL else rows
    if len(rows) <= rows.shape[1]:
        expand = torch.linalg.qr(_principal(rows, rank).double())[0]
        core = expand.T @ exact
    else:
        directions = torch.linalg.qr(_principal(rows.T, rank).double())[0]
        expand, rest = torch.linalg.qr(exact @ directions)
        core = rest @ directions.T
    lost = max(problem.scale - float(core.square().sum()), 0.0)
    core = core.reshape(rank, *problem.weight.shape[1:])
    return Factors(None, core, expand, problem.mean_y, lost, problem.scale)


def inward(problem: Problem, rank: int) -> Factors:
    """Return the best layer through ``rank`` input channels: a 1×1, then the kernel."""
    taps = problem.weight.shape[2]
    basis = channel_basis(problem)[:, :rank]
    small, found = through_best(problem, rank)
    weight = problem.lifted(found.weight)
    bias = problem.mean_y - weight @ small.mean_x
    core = weight.reshape(len(weight), rank, taps)
    return Factors(basis.T, core, None, bias, found.lost, problem.scale)


def between(problem: Problem, inner: int, outer: int, *, rough: bool = False) -> Factors:
    """Return the best layer from ``inner`` input channels to ``outer`` output channels: Tucker-2.

    Starts from the best input channels for all outputs, then turns to those that the kept outputs
    need, for as long as that helps.

    Args:
        problem: The regression.
        inner: Input channels.
        outer: Output channels.
        rough: Whether of a wide layer the start is enough.
    """
    if problem.plain:
        return _between_of_kernel(problem, inner, outer)
    _, _, taps = problem.weight.shape
    basis = channel_basis(problem)[:, :inner]
    small, found = through_best(problem, inner)
    for _ in range(0 if rough and is_wide(problem) else HOOI_SWEEPS):
        again = channel_basis(problem, directions=found.vectors[:, :outer])[:, :inner]
        other = projected(problem, again)
        second = regression(other)
        if second.tail(outer) >= found.tail(outer):
            break
        basis, small, found = again, other, second
    expand, core = _expanded(small, found, outer)
    expand = problem.lifted(expand)
    bias = problem.mean_y - expand @ (core @ small.mean_x)
    core = core.reshape(outer, inner, taps)
    return Factors(basis.T, core, expand, bias, found.tail(outer), problem.scale)


def _between_of_kernel(problem: Problem, inner: int, outer: int) -> Factors:
    """Return the Tucker-2 of the kernel alone, for which no regression is needed.

    The higher-order SVD, one axis after the other (Vannieuwenhoven et al. 2012), then half a sweep
    of HOOI as a step of orthogonal iteration: the other half would gain next to nothing.
    """
    out, channels, taps = problem.weight.shape
    unit = _unit(problem.weight)
    exact = problem.weight.transpose(1, 2) / unit
    small = min(out, channels) <= SMALL
    # The bases may be rough, for what is kept is computed from them as exactly as it must be.
    dtype = torch.float64 if small else torch.float32
    rough = exact.to(dtype, memory_format=torch.contiguous_format).contiguous()
    # In the layout (out, places, in), both unfoldings are views of the same memory.
    by_input, by_output = rough.view(-1, channels), rough.view(out, -1)
    basis = _principal(by_input.T, inner)
    expand = _principal((by_input @ basis).view(out, -1), outer)
    kept = (expand.T @ by_output).view(-1, channels)
    basis = _turned(kept.T, basis)
    if not small and problem.precision == torch.float64:
        basis, expand = (torch.linalg.qr(q.double())[0] for q in (basis, expand))
        kept = (expand.T @ exact.reshape(out, -1)).view(-1, channels)
    core = (kept @ basis).view(outer, taps, inner).transpose(1, 2).double() * unit
    lost = max(problem.scale - float(torch.linalg.vector_norm(core)) ** 2, 0.0)
    return Factors(basis.T, core, expand, problem.mean_y, lost, problem.scale)


def _unit(tensor: Tensor) -> float:
    """Return the largest absolute value, or 1 where all are 0."""
    return float(tensor.abs().max()) or 1.0


def _scaled_to_one(tensor: Tensor) -> Tensor:
    """Return values of which the largest is 1: their squares neither overflow nor vanish."""
    return tensor / _unit(tensor)


def _principal(rows: Tensor, rank: int) -> Tensor:
    """Return the principal directions ``(n, rank)`` of a matrix's ``n`` rows."""
    square = rows @ rows.T
    try:
        _, vectors = torch.linalg.eigh(square)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        _, vectors = eigen(square)
    kept: Tensor = vectors[:, -rank:]
    return kept


def _turned(rows: Tensor, basis: Tensor) -> Tensor:
    """Return a basis ``(n, r)`` after a step of orthogonal iteration towards the principal one."""
    turned: Tensor = torch.linalg.qr(rows @ (rows.T @ basis))[0]
    return turned


def _expanded(problem: Problem, found: Fit, rank: int) -> tuple[Tensor, Tensor]:
    """Split a fit into an orthonormal expansion ``(out, r)`` and what feeds it."""
    vectors = found.vectors[:, :rank]
    expand, rest = torch.linalg.qr(torch.linalg.solve(problem.root, vectors))
    return expand, rest @ (vectors.T @ problem.root @ found.weight)
