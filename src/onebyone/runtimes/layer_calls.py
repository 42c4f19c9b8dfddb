"""One layer as one call on the CPU, in each of the ways that there are, and the fastest of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OPS = torch.ops.mkldnn
CONVOLUTION = _OPS._convolution_pointwise.default  # noqa: SLF001 - these are the operators' names
CONVOLUTION_ADD = _OPS._convolution_pointwise.binary  # noqa: SLF001
CONVOLUTION_ADD_ = _OPS._convolution_pointwise_.binary
LINEAR = _OPS._linear_pointwise.default  # noqa: SLF001
Unary = tuple[str, list[float], str]  # oneDNN's name of an activation, its scalars, its algorithm
NO_ACTIVATION: Unary = ("none", [], "")

TRIALS = 4
Way = Literal["packed", "rows", "plain"]
# What a layer can be instead of a packed convolution, and what share of the time it may take to be
# preferred: rows are packed and fused as well, the others are not.
RATHER: dict[Way, float] = {"rows": 0.98, "plain": 0.95}


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a pointwise convolution as one matrix product on the view with channels last.

    Args:
        x: Shape ``(batch, in_channels, height, width)``, channels last in memory.
        weight: Shape ``(out_channels, in_channels)``.
        bias: Shape ``(out_channels,)``, or ``None``.
    """
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def rows(x: Tensor, weight: Tensor, bias: Tensor | None, *unary: Any) -> Tensor:
    """Return a pointwise convolution and an activation as oneDNN's linear layer of the pixels.

    Args:
        x: As for :func:`product`.
        weight: Packed by oneDNN.
        bias: As for :func:`product`.
        unary: The activation, as oneDNN has it.
    """
    y: Tensor = LINEAR(x.permute(0, 2, 3, 1), weight, bias, *unary)
    return y.permute(0, 3, 1, 2)


def rows_added(
    x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, relu: str | None
) -> Tensor:
    """Return :func:`rows` and another branch's values, added; ``other`` is not modified."""
    # oneDNN's own sum with a linear layer takes several times as long.
    y = rows(x, weight, bias, *NO_ACTIVATION).add_(other)
    return y if relu is None else y.relu_()


def symmetric_padding(layer: nn.Conv2d) -> list[int] | None:
    """Return the padding in numbers; ``None`` where ``same`` would pad one side more."""
    if isinstance(layer.padding, tuple):
        return list(layer.padding)
    if layer.padding == "valid":
        return [0, 0]
    sums = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return None if any(total % 2 for total in sums) else [total // 2 for total in sums]


def is_product(layer: nn.Conv2d | nn.Linear) -> bool:
    """Whether a layer is one matrix product of all its pixels."""
    if isinstance(layer, nn.Linear):
        return True
    padding = symmetric_padding(layer)
    return layer.kernel_size == layer.stride == (1, 1) and padding == [0, 0] and layer.groups == 1


def geometry(layer: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    """Return padding, stride, dilation and groups, as oneDNN takes them."""
    padding = symmetric_padding(layer) or [0, 0]
    return padding, list(layer.stride), list(layer.dilation), layer.groups


def packed_convolution(layer: nn.Conv2d, shape: Sequence[int]) -> Tensor:
    """Return a convolution's weight packed by oneDNN, for inputs of a shape if one is given."""
    packed: Tensor = _OPS._reorder_convolution_weight(  # noqa: SLF001
        layer.weight.detach(), *geometry(layer), list(shape) or None
    )
    return packed


def packed_rows(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Return a linear layer's or pointwise convolution's weight, packed by oneDNN as a matrix."""
    weight = layer.weight.detach().flatten(1)
    packed: Tensor = _OPS._reorder_linear_weight(weight, None)  # noqa: SLF001
    return packed


def addition(unary: Unary) -> tuple[Any, ...]:
    """Return how oneDNN is told to add another branch, and what follows."""
    return ("add", 1.0, relu_or_none(unary), [], None)


def relu_or_none(unary: Unary) -> str | None:
    """Return oneDNN's name of the activation after an addition, which can be a ReLU alone."""
    return None if unary is NO_ACTIVATION else unary[0]


def calls_of(
    layer: nn.Conv2d | nn.Linear,
    x: Tensor,
    other: Tensor | None,
    unary: Unary,
    after: Callable[[Tensor], Tensor] | None,
) -> dict[Way, Callable[[], Tensor]]:
    """Return each way to do a layer and what follows it, as a call without arguments.

    Args:
        layer: Not modified.
        x: Its input; a map lies with channels last.
        other: A branch that is added to the output, which the calls write over; or ``None``.
        unary: The activation after that, as oneDNN has it.
        after: The same as torch has it.
    """
    ways: dict[Way, Callable[[], Tensor]] = {"packed": _packed_call(layer, x, other, unary)}
    if isinstance(layer, nn.Conv2d) and is_product(layer):
        ways["rows"] = _rows_call(layer, x, other, unary)
    if other is None:
        multiply = _plain_call(layer, x)
        ways["plain"] = multiply if after is None else lambda: after(multiply())
    return ways


def _packed_call(
    layer: nn.Conv2d | nn.Linear, x: Tensor, other: Tensor | None, unary: Unary
) -> Callable[[], Tensor]:
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        rows_weight = packed_rows(layer)
        return lambda: LINEAR(x, rows_weight, bias, *unary)
    weight, meeting = packed_convolution(layer, x.shape), geometry(layer)
    if other is None:
        return lambda: CONVOLUTION(x, weight, bias, *meeting, *unary)
    return lambda: CONVOLUTION_ADD_(other, x, weight, bias, *meeting, *addition(unary))


def _rows_call(
    layer: nn.Conv2d, x: Tensor, other: Tensor | None, unary: Unary
) -> Callable[[], Tensor]:
    packed, bias = packed_rows(layer), None if layer.bias is None else layer.bias.detach()
    if other is None:
        return lambda: rows(x, packed, bias, *unary)
    return lambda: rows_added(x, other, packed, bias, relu_or_none(unary))


def _plain_call(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Callable[[], Tensor]:
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        return partial(F.linear, x, layer.weight.detach(), bias)
    if is_product(layer):
        return partial(product, x, layer.weight.detach().flatten(1), bias)
    return partial(layer, x)


def fastest(ways: Mapping[Way, Callable[[], Tensor]]) -> Way:
    """Time calls in turn, and return which to take: the processor and the shape decide."""
    times: dict[Way, list[int]] = {way: [] for way in ways}
    for _ in range(TRIALS + 1):
        for way, function in ways.items():
            started = time.perf_counter_ns()
            function()
            times[way].append(time.perf_counter_ns() - started)
    # The least of a few, the first of all apart: a neighbor can only make a call slower.
    least = {way: min(each[1:]) for way, each in times.items()}
    best: Way = "packed"
    for way, share in RATHER.items():
        if way in least and least[way] < share * least[best]:
            best = way
    return best
