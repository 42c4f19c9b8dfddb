"""Whether a rewritten layer is what was solved for: the error of the weights that it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onebyone.networks.conv_layers import kernel_of, shape_of, weight_of
from onebyone.rewrites.low_rank.reduced_rank import Problem, is_wide, ratio

# The error may be so many times what the equations gave, and more by what rounding of the weights
# to their type adds.
FACTOR = 10
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
ROUNDING_OF_HALVES = 5e-2


def why_not_as_solved(
    chain: nn.Sequential, problems: Sequence[Problem], module: nn.Module, solved: float
) -> str | None:
    """Return how the error of a rewritten layer differs from that of its equations, or ``None``.

    Args:
        chain: With its weights.
        problems: Of each group, which it was fitted to.
        module: The layer that it replaces.
        solved: The relative squared error that the equations gave.
    """
    if any(is_wide(problem) for problem in problems):
        return None  # the products would cost as much as the fit
    kernel = chain_kernel(chain, module)
    lost = sum(_lost(p, mine) for p, mine in zip(problems, kernel, strict=True))
    found = ratio(lost, sum(problem.scale for problem in problems))
    if found <= FACTOR * solved + ROUNDING.get(weight_of(module).dtype, ROUNDING_OF_HALVES):
        return None
    return f"its relative squared error is {found:.2g}, but {solved:.2g} was solved for"


def chain_kernel(chain: nn.Sequential, module: nn.Module) -> Tensor:
    """Return the one kernel that a rewritten layer multiplies with, ``(groups, out, in, places)``.

    In float64 on the CPU, shaped as that of the layer.

    Args:
        chain: What the layer became. Not modified.
        module: The layer.
    """
    parts = dict(chain.named_children())
    if "depthwise" in parts:
        return _separable_kernel(chain, module)
    kernel: Tensor | None = None
    for part in parts.values():
        mine = kernel_of(part)
        kernel = mine if kernel is None else _one_after_the_other(kernel, mine)
    assert kernel is not None
    return kernel


def _one_after_the_other(first: Tensor, second: Tensor) -> Tensor:
    both = torch.einsum("gmcp,gomq->gocpq", first, second)
    return both.flatten(3)


def _separable_kernel(chain: nn.Sequential, module: nn.Module) -> Tensor:
    shape = shape_of(module)
    depthwise, pointwise = (kernel_of(chain.get_submodule(n)) for n in ("depthwise", "pointwise"))
    groups, out, channels = shape.groups, shape.group_out, shape.group_channels
    if next(iter(dict(chain.named_children()))) == "depthwise":
        filters = depthwise.reshape(groups, channels, -1, shape.taps)
        mix = pointwise.reshape(groups, out, channels, -1)
        return torch.einsum("goct,gctp->gocp", mix, filters)
    filters = depthwise.reshape(groups, out, -1, shape.taps)
    mix = pointwise.reshape(groups, out, -1, channels)
    return torch.einsum("gotc,gotp->gocp", mix, filters)


def _lost(problem: Problem, kernel: Tensor) -> float:
    """Return the squared error of a kernel ``(out, in, places)`` on a problem, in its metric."""
    flat = problem.lowered(kernel.flatten(1))
    if problem.xx is None or problem.yx is None:
        if problem.given_yy is not None:
            return 0.0  # of what it sees nothing is known
        missing = flat - problem.weight.flatten(1)
        return problem.measured(missing @ missing.T)
    cross = flat @ problem.yx.T
    given = flat @ problem.xx @ flat.T
    return max(problem.measured(problem.yy - cross - cross.T + given), 0.0)
