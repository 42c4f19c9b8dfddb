"""The different ways to compute one layer in one call on the CPU, and the choice of the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebyone.core.rounds import limited
from onebyone.core.statistics import ratio_of

_OPS = torch.ops.mkldnn
_CONVOLUTION = _OPS._convolution_pointwise.default  # noqa: SLF001 - these are the operators' names
_CONVOLUTION_ADD = _OPS._convolution_pointwise.binary  # noqa: SLF001
_CONVOLUTION_ADD_ = _OPS._convolution_pointwise_.binary
_LINEAR = _OPS._linear_pointwise.default  # noqa: SLF001
_ADD_RELU_ = torch.ops.aten._add_relu_.Tensor
Unary = tuple[str, list[float], str]  # oneDNN's name of an activation, its scalars, its algorithm
NO_ACTIVATION: Unary = ("none", [], "")

# Rounds of timing all ways in turn, and how often such rounds repeat until the result is clear.
ROUNDS = 8
MOST_LOOKS = 3
Way = Literal["packed", "rows", "plain"]
# The alternatives to a packed convolution, and the share of its time below which each is preferred.
# "rows" is packed and fused too; "plain" is not, so it must gain more.
RATHER: dict[Way, float] = {"rows": 0.98, "plain": 0.95}


class Given(Enum):
    """Placeholders for the tensors that a call gets from the network."""

    INPUT = "the layer's input"
    BRANCH = "what is added to its output"


@dataclass(frozen=True)
class Call:
    """One way to compute a layer.

    Attributes:
        function: The function to call.
        arguments: Its arguments; each :class:`Given` stands for a tensor from the network.
        whole: Whether the call includes the activation after the layer.
    """

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    whole: bool = True

    def __call__(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """Return the layer's output for ``x``; an in-place call overwrites ``branch``."""
        given = {Given.INPUT: x, Given.BRANCH: branch}
        return self.function(*(given[a] if isinstance(a, Given) else a for a in self.arguments))


# ---------------------------------------------------------------- functions to call


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a pointwise convolution as one matrix product on a channels-last view.

    Args:
        x: Shape ``(batch, in_channels, height, width)``, channels last in memory.
        weight: Shape ``(out_channels, in_channels)``.
        bias: Shape ``(out_channels,)``, or ``None``.
    """
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def product_added(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, relu: str | None
) -> Tensor:
    """Return the sum of :func:`product` and another branch, which is not modified."""
    pixels = branch.permute(0, 2, 3, 1)
    y = torch.addmm(pixels.flatten(0, 2), x.permute(0, 2, 3, 1).flatten(0, 2), weight.t())
    return _biased(y, bias, relu).view(pixels.shape).permute(0, 3, 1, 2)


def product_added_(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, relu: str | None
) -> Tensor:
    """Return :func:`product_added`, computed in place: ``branch`` is overwritten."""
    pixels = branch.permute(0, 2, 3, 1)
    y = pixels.flatten(0, 2).addmm_(x.permute(0, 2, 3, 1).flatten(0, 2), weight.t())
    return _biased(y, bias, relu).view(pixels.shape).permute(0, 3, 1, 2)


def _biased(y: Tensor, bias: Tensor | None, relu: str | None) -> Tensor:
    if bias is not None:
        return _added_(y, bias, relu)
    return y if relu is None else y.relu_()


def _added_(y: Tensor, other: Tensor, relu: str | None) -> Tensor:
    """Add to a tensor in place, with the ReLU in the same pass if torch supports that."""
    if relu is None:
        return y.add_(other)
    if y.dtype is not torch.float32:
        return y.add_(other).relu_()
    both: Tensor = _ADD_RELU_(y, other)
    return both


def rows(x: Tensor, weight: Tensor, bias: Tensor | None, *unary: Any) -> Tensor:
    """Compute a pointwise convolution and an activation as oneDNN's linear layer over the pixels.

    Args:
        x: As for :func:`product`.
        weight: Packed by oneDNN.
        bias: As for :func:`product`.
        unary: The activation, in oneDNN's terms.
    """
    y: Tensor = _LINEAR(x.permute(0, 2, 3, 1), weight, bias, *unary)
    return y.permute(0, 3, 1, 2)


def rows_added(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, relu: str | None
) -> Tensor:
    """Return the sum of :func:`rows` and another branch, which is not modified."""
    # oneDNN's own fused sum for linear layers takes several times as long.
    return _added_(rows(x, weight, bias, *NO_ACTIVATION), branch, relu)


def convolution_added(x: Tensor, branch: Tensor, *rest: Any) -> Tensor:
    """Return the sum of a packed convolution and another branch."""
    y: Tensor = _CONVOLUTION_ADD(x, branch, *rest)
    return y


def convolution_added_(x: Tensor, branch: Tensor, *rest: Any) -> Tensor:
    """Return :func:`convolution_added`, computed in place: ``branch`` is overwritten."""
    y: Tensor = _CONVOLUTION_ADD_(branch, x, *rest)
    return y


# In-place variants, which need less memory, for when nothing reads the other branch later.
IN_PLACE: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    convolution_added: convolution_added_,
    product_added: product_added_,
}

# ---------------------------------------------------------------- the ways


def calls_of(
    layer: nn.Conv2d | nn.Linear, shape: Sequence[int], unary: Unary, *, adds: bool
) -> dict[Way, Callable[[], Call]]:
    """Return the possible ways to compute a layer and what follows it, each as a factory of calls.

    Args:
        layer: Not modified.
        shape: Shape of its input; with four dimensions, the input is channels-last.
        unary: The activation, in oneDNN's terms; after an addition only ReLU or none.
        adds: Whether another branch is added to the output before the activation.
    """
    ways: dict[Way, Callable[[], Call]] = {
        "packed": lambda: (
            _rows_call(layer, unary, adds=False)
            if isinstance(layer, nn.Linear)
            else _convolution_call(layer, shape, unary, adds=adds)
        )
    }
    if isinstance(layer, nn.Conv2d) and is_product(layer):
        ways["rows"] = lambda: _rows_call(layer, unary, adds=adds)
        ways["plain"] = lambda: _product_call(layer, unary, adds=adds)
    elif not adds:
        ways["plain"] = lambda: Call(layer, (Given.INPUT,), whole=unary is NO_ACTIVATION)
    return ways


def _convolution_call(layer: nn.Conv2d, shape: Sequence[int], unary: Unary, *, adds: bool) -> Call:
    meeting = _geometry(layer)
    weight: Tensor = _OPS._reorder_convolution_weight(  # noqa: SLF001
        layer.weight.detach(), *meeting, list(shape) or None
    )
    own = (weight, _bias(layer), *meeting)
    if not adds:
        return Call(_CONVOLUTION, (Given.INPUT, *own, *unary))
    addition: tuple[Any, ...] = ("add", 1.0, _relu_or_none(unary), [], None)
    return Call(convolution_added, (Given.INPUT, Given.BRANCH, *own, *addition))


def _rows_call(layer: nn.Conv2d | nn.Linear, unary: Unary, *, adds: bool) -> Call:
    matrix = layer.weight.detach().flatten(1)
    weight: Tensor = _OPS._reorder_linear_weight(matrix, None)  # noqa: SLF001
    if adds:
        own = (weight, _bias(layer), _relu_or_none(unary))
        return Call(rows_added, (Given.INPUT, Given.BRANCH, *own))
    function = _LINEAR if isinstance(layer, nn.Linear) else rows
    return Call(function, (Given.INPUT, weight, _bias(layer), *unary))


def _product_call(layer: nn.Conv2d, unary: Unary, *, adds: bool) -> Call:
    weight = layer.weight.detach().flatten(1).clone()
    if adds:
        own = (weight, _bias(layer), _relu_or_none(unary))
        return Call(product_added, (Given.INPUT, Given.BRANCH, *own))
    return Call(product, (Given.INPUT, weight, _bias(layer)), whole=unary is NO_ACTIVATION)


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach()


def _relu_or_none(unary: Unary) -> str | None:
    return None if unary is NO_ACTIVATION else unary[0]


def is_product(layer: nn.Conv2d | nn.Linear) -> bool:
    """Whether a layer is one matrix product of all its pixels."""
    if isinstance(layer, nn.Linear):
        return True
    padding = symmetric_padding(layer)
    return layer.kernel_size == layer.stride == (1, 1) and padding == [0, 0] and layer.groups == 1


def symmetric_padding(layer: nn.Conv2d) -> list[int] | None:
    """Return the padding as numbers; ``None`` if ``same`` pads one side more than the other."""
    if isinstance(layer.padding, tuple):
        return list(layer.padding)
    if layer.padding == "valid":
        return [0, 0]
    sums = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return None if any(total % 2 for total in sums) else [total // 2 for total in sums]


def _geometry(layer: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    """Return padding, stride, dilation and groups in oneDNN's form."""
    padding = symmetric_padding(layer) or [0, 0]
    return padding, list(layer.stride), list(layer.dilation), layer.groups


def fastest(ways: Mapping[Way, Callable[[], Any]]) -> Way:
    """Time calls in turn, and return the best way for this processor and shape.

    Another way replaces the packed one only if it is shown to be faster, by enough; see
    :func:`onebyone.core.statistics.ratio_of`.
    """
    if len(ways) == 1:
        return "packed"
    times: dict[Way, list[int]] = {way: [] for way in ways}
    for function in ways.values():  # warm-up, not timed
        function()
    best: Way = "packed"
    for _ in range(MOST_LOOKS):
        for turn in range(limited(ROUNDS)):
            for way in list(ways) if turn % 2 == 0 else reversed(list(ways)):
                started = time.perf_counter_ns()
                ways[way]()
                times[way].append(time.perf_counter_ns() - started)
        best, is_open = _best(times)
        if not is_open:
            break
    return best


def _best(times: Mapping[Way, Sequence[int]]) -> tuple[Way, bool]:
    """Return the way that is shown to be the fastest, and whether more rounds could change it."""
    best: Way = "packed"
    is_open = False
    for way, share in RATHER.items():
        if way not in times:
            continue
        gain = ratio_of(
            np.array(times[best]), np.array(times[way]), looks=MOST_LOOKS, together=len(RATHER)
        )
        if gain.value > 1 / share:
            if gain.verdict == "faster":
                best = way
            else:
                is_open = True
    return best, is_open
