"""Convolutions and pooling."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebyone.networks.onnx_import.builder import Builder, GraphBuilder, Refused
from onebyone.networks.onnx_import.file import OnnxNode
from onebyone.networks.onnx_import.modules import SamePad

_CONVOLUTIONS: Mapping[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: Mapping[int, type[Any]] = {
    1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d
}  # fmt: skip
_ZERO_PADS: Mapping[int, type[Any]] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
_MAX_POOLS: Mapping[int, type[Any]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_AVERAGE_POOLS: Mapping[int, type[Any]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE: Mapping[int, type[Any]] = {
    1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d
}  # fmt: skip
_ADAPTIVE_MAX: Mapping[int, type[Any]] = {
    1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d
}  # fmt: skip


class _Window:
    """The window of a convolution or a pooling: its sizes, and the pads before and after."""

    def __init__(self, b: GraphBuilder, node: OnnxNode, x: Any, kernel: Sequence[int]) -> None:
        self.rank = len(kernel)
        if self.rank not in _CONVOLUTIONS or len(b.shape(x)) != self.rank + 2:
            raise Refused(f"it must have 1 to 3 dimensions of space, got {self.rank}")
        ones = [1] * self.rank
        at = node.attributes
        self.kernel = tuple(int(size) for size in kernel)
        self.stride = tuple(at.get("strides") or ones)
        self.dilation = tuple(at.get("dilations") or ones)
        self.auto = at.get("auto_pad", "NOTSET") or "NOTSET"
        pads = list(at.get("pads") or [0] * (2 * self.rank))
        lengths = {len(self.kernel), len(self.stride), len(self.dilation)}
        if lengths != {self.rank} or len(pads) != 2 * self.rank:
            raise Refused("its strides, dilations and pads must fit its kernel")
        self.before, self.after = pads[: self.rank], pads[self.rank :]
        self.same = self.auto in ("SAME_UPPER", "SAME_LOWER")
        if self.auto == "VALID":
            self.before, self.after = [0] * self.rank, [0] * self.rank
        if self.same and (b.fixed or set(self.stride) == {1}):
            self._fix(b.shape(x)[2:])

    def _fix(self, sizes: Sequence[int]) -> None:
        """Turn automatic pads into numbers, which hold for the only size that there is."""
        self.same = False
        for axis, size in enumerate(sizes):
            window = (self.kernel[axis] - 1) * self.dilation[axis] + 1
            stride = self.stride[axis]
            total = max((-(-size // stride) - 1) * stride + window - size, 0)
            less, more = total // 2, total - total // 2
            upper = self.auto == "SAME_UPPER"
            self.before[axis], self.after[axis] = (less, more) if upper else (more, less)

    @property
    def pads(self) -> list[int]:
        """The pads in torch's order: of the last dimension first."""
        pairs = reversed(list(zip(self.before, self.after, strict=True)))
        return [pad for pair in pairs for pad in pair]

    @property
    def takes_own_pads(self) -> bool:
        """Whether torch's pooling takes these pads: at most half of the kernel."""
        return all(2 * pad <= size for pad, size in zip(self.before, self.kernel, strict=True))

    def padded(self, b: GraphBuilder, node: OnnxNode, x: Any, value: float = 0.0) -> Any:
        """Add what a layer's own padding cannot do; the layer then pads ``self.before``."""
        if self.same:
            upper = self.auto == "SAME_UPPER"
            pad = SamePad(self.kernel, self.stride, self.dilation, upper=upper, value=value)
            self.before = self.after = [0] * self.rank
            return b.module(_named(node, "pad"), lambda: pad, x)
        if self.before == self.after and min(self.before) >= 0:
            return x
        pads, self.before, self.after = self.pads, [0] * self.rank, [0] * self.rank
        if value == 0:
            return b.module(_named(node, "pad"), lambda: _ZERO_PADS[self.rank](tuple(pads)), x)
        return b.call(F.pad, x, pads, value=value)


def _named(node: OnnxNode, ending: str) -> OnnxNode:
    """Return a node with the name of a helper of another one."""
    stem = node.name if not node.name.startswith("/") else node.name.rpartition("/")[0]
    name = f"{stem}_{ending}/X" if node.name.startswith("/") else f"{stem}_{ending}"
    return OnnxNode(name, node.operator, (), node.outputs, {})


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.reshape(-1).clone())
    made: nn.Module = layer
    return made


def _convolution(b: GraphBuilder, node: OnnxNode, x: Any, w: Any, bias: Any = None) -> Any:
    x = b.tensor(x)
    weight = b.constant(w, "weight")
    bias = None if bias is None else b.constant(bias, "bias")
    groups = int(node.attributes.get("group", 1))
    window = _Window(b, node, x, weight.shape[2:])
    x = window.padded(b, node, x)
    channels = weight.shape[1] * groups
    if b.shape(x)[1] != channels or weight.shape[0] % groups:
        raise Refused(f"its weight is for {channels} channels, but gets {b.shape(x)[1]}")

    def make() -> nn.Module:
        layer = _CONVOLUTIONS[window.rank](
            channels,
            weight.shape[0],
            window.kernel,
            stride=window.stride,
            padding=tuple(window.before),
            dilation=window.dilation,
            groups=groups,
            bias=bias is not None,
            device="meta",
        )
        return _filled(layer, weight, bias)

    return b.module(node, make, x, weight=node.inputs[1])


def _transposed(b: GraphBuilder, node: OnnxNode, x: Any, w: Any, bias: Any = None) -> Any:
    x = b.tensor(x)
    weight = b.constant(w, "weight")
    bias = None if bias is None else b.constant(bias, "bias")
    groups = int(node.attributes.get("group", 1))
    window = _Window(b, _explicit(node), x, weight.shape[2:])
    if node.attributes.get("output_shape") and not b.fixed:
        raise Refused("its `output_shape` is for one size of input, but the file leaves it free")
    extra = list(node.attributes.get("output_padding") or [0] * window.rank)
    before, after = _transposed_pads(node, window, b.shape(x)[2:], extra)
    # Torch has one pad for both ends: what differs is more output, or cut off afterwards.
    padding = [max(min(a, c), 0) for a, c in zip(before, after, strict=True)]
    more = [e + p - c for e, p, c in zip(extra, padding, after, strict=True)]
    cut = [a - p for a, p in zip(before, padding, strict=True)]
    longer = [max(m, 0) for m in more]
    fits = [m < max(s, d) for m, s, d in zip(longer, window.stride, window.dilation, strict=True)]
    if min(cut, default=0) < 0 or not all(fits):
        raise Refused("its pads and output_padding cannot be written in PyTorch")

    def make() -> nn.Module:
        layer = _TRANSPOSED[window.rank](
            weight.shape[0],
            weight.shape[1] * groups,
            window.kernel,
            stride=window.stride,
            padding=tuple(padding),
            output_padding=tuple(longer),
            groups=groups,
            bias=bias is not None,
            dilation=window.dilation,
            device="meta",
        )
        return _filled(layer, weight, bias)

    made = b.module(node, make, x, weight=node.inputs[1])
    for axis, (first, last) in enumerate(zip(cut, more, strict=True)):
        if first or last < 0:
            at = [slice(None)] * (axis + 2) + [slice(first, last if last < 0 else None)]
            made = b.call(operator.getitem, made, tuple(at))
    return made


def _explicit(node: OnnxNode) -> OnnxNode:
    """Return a node without automatic pads: those of a transposed convolution are its own."""
    kept = {name: value for name, value in node.attributes.items() if name != "auto_pad"}
    return OnnxNode(node.name, node.operator, node.inputs, node.outputs, kept)


def _transposed_pads(
    node: OnnxNode, window: _Window, sizes: Sequence[int], extra: list[int]
) -> tuple[list[int], list[int]]:
    """Return the pads of a transposed convolution, which may come from the wanted output."""
    auto = node.attributes.get("auto_pad", "NOTSET") or "NOTSET"
    wanted = node.attributes.get("output_shape")
    if not wanted and auto in ("NOTSET", "VALID"):
        return list(window.before), list(window.after)
    before, after = [], []
    for axis, size in enumerate(sizes):
        stride = window.stride[axis]
        reach = (window.kernel[axis] - 1) * window.dilation[axis] + 1
        target = list(wanted)[-len(sizes) :][axis] if wanted else size * stride
        total = stride * (size - 1) + extra[axis] + reach - target
        if total < 0:
            extra[axis] -= total
            total = 0
        less, more = total // 2, total - total // 2
        first, last = (less, more) if auto == "SAME_UPPER" else (more, less)
        before.append(first)
        after.append(last)
    return before, after


# ---------------------------------------------------------------- pooling


def _max_pool(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    window = _Window(b, node, x, node.attributes["kernel_shape"])
    if not b.dtype(x).is_floating_point:
        raise Refused("it takes the maximum of integers; export the network in float32")
    ceil = bool(node.attributes.get("ceil_mode", 0))
    indices = len(node.outputs) > 1 and bool(node.outputs[1])
    if indices:
        raise Refused("it returns the positions of the maxima, which is not supported")
    if window.takes_own_pads:
        x = window.padded(b, node, x, -math.inf)
    else:
        pads, window.before = window.pads, [0] * window.rank
        x = b.call(F.pad, x, pads, value=-math.inf)
    return b.module(
        node,
        lambda: _MAX_POOLS[window.rank](
            window.kernel,
            stride=window.stride,
            padding=tuple(window.before),
            dilation=window.dilation,
            ceil_mode=ceil,
        ),
        x,
    )


def _average_pool(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    window = _Window(b, node, x, node.attributes["kernel_shape"])
    if set(window.dilation) != {1}:
        raise Refused("an average pooling with dilation is not supported")
    ceil = bool(node.attributes.get("ceil_mode", 0))
    counted = bool(node.attributes.get("count_include_pad", 0))
    even = not window.same and window.before == window.after
    if even and window.takes_own_pads:
        return b.module(
            node,
            lambda: _AVERAGE_POOLS[window.rank](
                window.kernel,
                stride=window.stride,
                padding=tuple(window.before),
                ceil_mode=ceil,
                count_include_pad=counted,
            ),
            x,
        )
    if ceil:
        raise Refused("an average pooling with `ceil_mode` and pads that differ is not supported")
    ones = b.call(torch.ones_like, b.call(operator.getitem, x, (slice(0, 1), slice(0, 1))))
    sums, counts = _uneven(b, node, window, x, ones)
    if counted:
        return sums
    return b.call(torch.div, sums, counts)


def _uneven(b: GraphBuilder, node: OnnxNode, window: _Window, x: Any, ones: Any) -> tuple[Any, Any]:
    """Return the averages with pads counted as zeros, and each window's share inside."""
    pool = _AVERAGE[window.rank]
    made = []
    same, before, after = window.same, window.before, window.after
    for part in (x, ones):
        window.same, window.before, window.after = same, list(before), list(after)
        padded = window.padded(b, node, part) if same else b.call(F.pad, part, window.pads)
        made.append(b.call(pool, padded, window.kernel, stride=window.stride))
    return made[0], made[1]


def _global_pool(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    rank = len(b.shape(x)) - 2
    known = _ADAPTIVE if node.operator == "GlobalAveragePool" else _ADAPTIVE_MAX
    if rank not in known:
        raise Refused(f"it must have 1 to 3 dimensions of space, got {rank}")
    return b.module(node, lambda: known[rank](1), x)


def _power_pool(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    power = node.attributes.get("p", 2)
    axes = list(range(2, len(b.shape(x))))
    return b.call(torch.linalg.vector_norm, x, power, axes, keepdim=True)


OPERATORS: Mapping[str, Builder] = {
    "AveragePool": _average_pool,
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "GlobalAveragePool": _global_pool,
    "GlobalLpPool": _power_pool,
    "GlobalMaxPool": _global_pool,
    "MaxPool": _max_pool,
}
