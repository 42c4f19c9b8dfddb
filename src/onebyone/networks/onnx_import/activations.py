"""Activations and normalizations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebyone.networks.onnx_import.arithmetic import refused_training
from onebyone.networks.onnx_import.builder import Builder, GraphBuilder, Refused
from onebyone.networks.onnx_import.file import OnnxNode

_BATCH_NORMS: Mapping[int, type[Any]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d
}  # fmt: skip
_INSTANCE_NORMS: Mapping[int, type[Any]] = {
    3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d
}  # fmt: skip


def _layer(b: GraphBuilder, node: OnnxNode, x: Any, *, make: Callable[[Any], nn.Module]) -> Any:
    return b.module(node, lambda: make(node.attributes.get), b.tensor(x))


def _clip(b: GraphBuilder, node: OnnxNode, x: Any, low: Any = None, high: Any = None) -> Any:
    x = b.tensor(x)
    at = node.attributes
    if b.opset < 11:
        bounds = [at.get("min", -3.4028234663852886e38), at.get("max", 3.4028234663852886e38)]
        low, high = (torch.tensor(each) for each in bounds)
    if low is None and high is None:
        return x
    known = all(each is None or isinstance(each, Tensor) for each in (low, high))
    if not known or not b.dtype(x).is_floating_point:
        return b.call(torch.clamp, x, *(None if v is None else b.tensor(v) for v in (low, high)))
    least = -math.inf if low is None else low.item()
    most = math.inf if high is None else high.item()
    if least > most:  # ONNX then gives the upper bound everywhere
        return b.call(torch.clamp, x, least, most)
    return b.module(node, lambda: _bounded(least, most), x)


def _bounded(least: float, most: float) -> nn.Module:
    """Return the activation that keeps values between two bounds."""
    if (least, most) == (0, 6):
        return nn.ReLU6()
    return nn.ReLU() if least == 0 and most > 3e38 else nn.Hardtanh(least, most)


def _hard_sigmoid(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return b.module(node, nn.Hardsigmoid, x)
    line = b.call(operator.add, b.call(operator.mul, x, alpha), beta)
    return b.call(torch.clamp, line, 0.0, 1.0)


def _parametric(b: GraphBuilder, node: OnnxNode, x: Any, slope: Any) -> Any:
    x = b.tensor(x)
    shape = b.shape(x)
    if isinstance(slope, Tensor) and slope.is_floating_point():
        own = [1] * (len(shape) - slope.dim()) + list(slope.shape)
        wanted = [size if axis == 1 else 1 for axis, size in enumerate(shape)]
        if slope.numel() == 1 or (len(shape) > 1 and own == wanted):

            def make() -> nn.Module:
                layer = nn.PReLU(slope.numel())
                layer.weight = nn.Parameter(slope.reshape(-1).clone())
                return layer

            return b.module(node, make, x, weight=node.inputs[1])
    scaled = b.call(torch.mul, x, b.tensor(slope))
    return b.call(torch.where, b.call(operator.lt, x, 0), scaled, x)


def _softmax(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    make: Any = nn.Softmax if node.operator == "Softmax" else nn.LogSoftmax
    rank = len(b.shape(x))
    axis = node.attributes.get("axis", -1 if b.opset >= 13 else 1)
    axis = axis + rank if axis < 0 else axis
    last = axis == rank - 1
    if b.opset >= 13 or last:
        return b.module(node, lambda: make(dim=axis), x)
    # Before opset 13 all dimensions from the axis on are one.
    if all(size == 1 for size in b.shape(x)[axis + 1 :]) and b.fixed:
        return b.module(node, lambda: make(dim=axis), x)
    flat = b.call(torch.flatten, x, axis)
    made = b.module(node, lambda: make(dim=axis), flat)
    return b.call(torch.reshape, made, [b.size(x, each) for each in range(rank)])


def _softplus(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    return b.module(node, nn.Softplus, b.tensor(x))


def _thresholded(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    alpha = node.attributes.get("alpha", 1.0)
    return b.module(node, lambda: nn.Threshold(alpha, 0.0), b.tensor(x))


def _selu(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    alpha = node.attributes.get("alpha", 1.6732632423543772)
    gamma = node.attributes.get("gamma", 1.0507009873554805)
    if abs(alpha - 1.6732632423543772) < 1e-5 and abs(gamma - 1.0507009873554805) < 1e-5:
        return b.module(node, nn.SELU, x)
    return b.call(operator.mul, b.module(node, lambda: nn.ELU(alpha), x), gamma)


def _swish(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    alpha = node.attributes.get("alpha", 1.0)
    if alpha == 1:
        return b.module(node, nn.SiLU, x)
    return b.call(torch.mul, x, b.call(torch.sigmoid, b.call(operator.mul, x, alpha)))


def _shrink(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    bias, edge = node.attributes.get("bias", 0.0), node.attributes.get("lambd", 0.5)
    low = b.call(operator.add, x, bias)
    high = b.call(operator.sub, x, bias)
    middle = b.call(torch.where, b.call(operator.gt, x, edge), high, 0.0)
    return b.call(torch.where, b.call(operator.lt, x, -edge), low, middle)


# ---------------------------------------------------------------- normalizations


def _batch_norm(  # noqa: PLR0917
    b: GraphBuilder, node: OnnxNode, x: Any, scale: Any, bias: Any, mean: Any, variance: Any
) -> Any:
    refused_training(node)
    x = b.tensor(x)
    values = (scale, bias, mean, variance)
    epsilon = node.attributes.get("epsilon", 1e-5)
    rank = len(b.shape(x))
    if not all(isinstance(value, Tensor) for value in values) or rank not in _BATCH_NORMS:
        return b.call(F.batch_norm, x, mean, variance, scale, bias, eps=epsilon)

    def make() -> nn.Module:
        layer = _BATCH_NORMS[rank](
            scale.numel(), eps=epsilon, momentum=1 - node.attributes.get("momentum", 0.9)
        )
        layer.weight = nn.Parameter(scale.clone())
        layer.bias = nn.Parameter(bias.clone())
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        made: nn.Module = layer
        return made

    return b.module(node, make, x, weight=node.inputs[1])


def _instance_norm(b: GraphBuilder, node: OnnxNode, x: Any, scale: Any, bias: Any) -> Any:
    x = b.tensor(x)
    epsilon = node.attributes.get("epsilon", 1e-5)
    rank = len(b.shape(x))
    if not isinstance(scale, Tensor) or not isinstance(bias, Tensor) or rank not in _INSTANCE_NORMS:
        scale, bias = b.tensor(scale), b.tensor(bias)
        return b.call(F.instance_norm, x, weight=scale, bias=bias, eps=epsilon)

    def make() -> nn.Module:
        layer = _INSTANCE_NORMS[rank](scale.numel(), eps=epsilon, affine=True)
        layer.weight = nn.Parameter(scale.clone())
        layer.bias = nn.Parameter(bias.clone())
        made: nn.Module = layer
        return made

    return b.module(node, make, x, weight=node.inputs[1])


def _layer_norm(b: GraphBuilder, node: OnnxNode, x: Any, scale: Any, bias: Any = None) -> Any:
    if any(b.uses.get(name) for name in node.outputs[1:]):
        raise Refused("it returns its mean too, which is not supported")
    x = b.tensor(x)
    shape = b.shape(x)
    axis = node.attributes.get("axis", -1)
    axis = axis + len(shape) if axis < 0 else axis
    return layer_norm(b, node, x, axis, scale, bias, node.attributes.get("epsilon", 1e-5))


def layer_norm(  # noqa: PLR0917
    b: GraphBuilder, node: OnnxNode, x: Any, axis: int, scale: Any, bias: Any, epsilon: float
) -> Any:
    """Add a normalization over the last dimensions, from ``axis`` on."""
    sizes = b.shape(x)[axis:]
    values = [each for each in (scale, bias) if each is not None]
    if all(isinstance(each, Tensor) and tuple(each.shape) == sizes for each in values):

        def make() -> nn.Module:
            layer = nn.LayerNorm(sizes, eps=epsilon, bias=bias is not None)
            layer.weight = nn.Parameter(scale.clone())
            if bias is not None:
                layer.bias = nn.Parameter(bias.clone())
            return layer

        return b.module(node, make, x, weight=node.inputs[1])
    axes = list(range(axis, len(b.shape(x))))
    centered = b.call(torch.sub, x, b.call(torch.mean, x, axes, keepdim=True))
    variance = b.call(torch.mean, b.call(torch.square, centered), axes, keepdim=True)
    deviation = b.call(torch.sqrt, b.call(operator.add, variance, epsilon))
    made = b.call(torch.mul, b.call(torch.div, centered, deviation), b.tensor(scale))
    return made if bias is None else b.call(torch.add, made, b.tensor(bias))


def _group_norm(b: GraphBuilder, node: OnnxNode, x: Any, scale: Any, bias: Any) -> Any:
    x = b.tensor(x)
    groups = int(node.attributes["num_groups"])
    channels = b.shape(x)[1]
    scale, bias = b.constant(scale, "scale"), b.constant(bias, "bias")
    if b.opset < 21:  # one value for each group then
        scale, bias = (each.repeat_interleave(channels // groups) for each in (scale, bias))

    def make() -> nn.Module:
        layer = nn.GroupNorm(groups, channels, eps=node.attributes.get("epsilon", 1e-5))
        layer.weight = nn.Parameter(scale.clone())
        layer.bias = nn.Parameter(bias.clone())
        return layer

    return b.module(node, make, x, weight=node.inputs[1])


def _rms_norm(b: GraphBuilder, node: OnnxNode, x: Any, scale: Any) -> Any:
    axis = node.attributes.get("axis", -1)
    sizes = list(b.shape(x)[axis:])
    return b.call(F.rms_norm, x, sizes, b.tensor(scale), node.attributes.get("epsilon", 1e-5))


def _local_response(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    at = node.attributes
    size = int(at["size"])
    if size % 2 == 0:
        raise Refused("its size must be odd")
    make = partial(
        nn.LocalResponseNorm, size, at.get("alpha", 1e-4), at.get("beta", 0.75), at.get("bias", 1.0)
    )
    return b.module(node, make, b.tensor(x))


def _unit_length(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    at = node.attributes
    return b.call(F.normalize, b.tensor(x), p=float(at.get("p", 2)), dim=at.get("axis", -1))


def _mean_variance(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    axes = list(node.attributes.get("axes", [0, 2, 3]))
    centered = b.call(torch.sub, x, b.call(torch.mean, x, axes, keepdim=True))
    variance = b.call(torch.mean, b.call(torch.square, centered), axes, keepdim=True)
    return b.call(torch.div, centered, b.call(operator.add, b.call(torch.sqrt, variance), 1e-9))


OPERATORS: Mapping[str, Builder] = {
    "BatchNormalization": _batch_norm,
    "Celu": partial(_layer, make=lambda at: nn.CELU(at("alpha", 1.0))),
    "Clip": _clip,
    "Elu": partial(_layer, make=lambda at: nn.ELU(at("alpha", 1.0))),
    "Gelu": partial(_layer, make=lambda at: nn.GELU(at("approximate", "none"))),
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": partial(_layer, make=lambda _: nn.Hardswish()),
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": partial(_layer, make=lambda at: nn.LeakyReLU(at("alpha", 0.01))),
    "LogSoftmax": _softmax,
    "LpNormalization": _unit_length,
    "MeanVarianceNormalization": _mean_variance,
    "Mish": partial(_layer, make=lambda _: nn.Mish()),
    "PRelu": _parametric,
    "RMSNormalization": _rms_norm,
    "Relu": partial(_layer, make=lambda _: nn.ReLU()),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": partial(_layer, make=lambda _: nn.Sigmoid()),
    "Softmax": _softmax,
    "Softplus": _softplus,
    "Softsign": partial(_layer, make=lambda _: nn.Softsign()),
    "Swish": _swish,
    "Tanh": partial(_layer, make=lambda _: nn.Tanh()),
    "ThresholdedRelu": _thresholded,
}
