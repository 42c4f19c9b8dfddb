"""Batch norms that use the statistics of the whole batch, of which each process has a share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from onebyone.core.processes import add_up


@contextmanager
def synced_norms() -> Iterator[None]:
    """Compute batch norms in training mode over all processes inside the block.

    A training in several processes then gives the weights of one in a single process. All of them
    must run the same batch norms in the same order. The calls are caught by function rather than by
    class, since libraries have batch norms of their own that make the same call.

    References:
        As torch's ``SyncBatchNorm``, which is for GPUs alone.
    """
    with _Synced():
        yield


class _Synced(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if function is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _batch_norm(  # noqa: PLR0917
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,  # noqa: FBT001, FBT002 - the arguments of torch's function
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)  # noqa: FBT003
    mean, var, n = _statistics(x.detach())
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            unbiased = var * (n / (n - 1).clamp_min(1))
            running_var.lerp_(unbiased.to(running_var), momentum)
    given: Tensor = _Normalized.apply(x, weight, bias, mean, var, n, eps)
    return given


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each channel's mean and variance over all processes, and of how many values.

    All are in float64, in which means and squares of single processes add up exactly enough. The
    number stays a tensor, since reading it would wait for a GPU.
    """
    var, mean = torch.var_mean(x.float(), _axes(x), correction=0)
    mean, var = mean.double(), var.double()
    own = mean.new_full((1,), x.numel() // x.shape[1])
    sums = torch.cat([own * mean, own * (var + mean.square()), own])
    add_up([sums])
    n = sums[-1]
    mean, square = (sums[:-1] / n).chunk(2)
    return mean, (square - mean.square()).clamp_min(0), n


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        n: Tensor,
        eps: float,
    ) -> Tensor:
        mean, scale = mean.float(), (var + eps).rsqrt().float()
        ctx.save_for_backward(x, weight, mean, scale, n)
        return F.batch_norm(x, mean, var.float(), weight, bias, False, 0.0, eps)  # noqa: FBT003

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        x, weight, mean, scale, n = ctx.saved_tensors
        shape, axes = (1, -1, *[1] * (x.ndim - 2)), _axes(x)
        slope = given.float()
        normal = (x.float() - mean.view(shape)) * scale.view(shape)
        of_bias, of_weight = slope.sum(axes), (slope * normal).sum(axes)
        # Each process keeps its share of the parameters' gradients: these are added up later.
        sums = torch.stack([of_bias, of_weight])
        add_up([sums])
        first, second = (sums / n.float()).view(2, *shape)
        factor = scale if weight is None else scale * weight.float()
        of_x = (slope - first - normal * second) * factor.view(shape)
        return (
            of_x.to(x.dtype),
            None if weight is None else of_weight.to(weight.dtype),
            None if weight is None else of_bias.to(weight.dtype),
            None,
            None,
            None,
            None,
        )
