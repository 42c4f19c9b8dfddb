"""Operators that compute element by element: sums, products, comparisons, conversions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from onebyone.networks.onnx_import.builder import Builder, GraphBuilder, Refused, Sizes, objects
from onebyone.networks.onnx_import.file import OnnxNode, dtype_of

# A constant with more values does not take part in computing sizes.
_FEW = 64
_EITHER_WAY = (torch.add, torch.mul)


def _joined(b: GraphBuilder, node: OnnxNode, *values: Any, function: Any, number: Any) -> Any:
    """Apply an operator of two arguments to any number of them, from the left."""
    found = values[0]
    for value in values[1:]:
        found = _pair(b, node, found, value, function, number)
    return found


def _pair(  # noqa: PLR0917
    b: GraphBuilder, node: OnnxNode, x: Any, y: Any, function: Any, number: Any
) -> Any:
    if _are_sizes(x, y) and number is not None:
        return _of_sizes(x, y, number)
    x, y = b.tensor(x), b.tensor(y)
    if node.operator == "Add":
        fused = _with_bias(b, x, y)
        if fused is None:
            fused = _with_bias(b, y, x)
        if fused is not None:
            return fused
    if isinstance(x, Tensor) and isinstance(y, fx.Proxy) and function in _EITHER_WAY:
        x, y = y, x
    # A number in front stays a tensor: PyTorch's exporter to ONNX fails on numbers there.
    return b.call(function, x, _inlined(b, y, x))


def _are_sizes(*values: Any) -> bool:
    """Whether values are numbers from sizes, with few constants among them."""
    return any(isinstance(value, Sizes) for value in values) and all(
        isinstance(value, Sizes) or (isinstance(value, Tensor) and value.numel() <= _FEW)
        for value in values
    )


def _of_sizes(x: Any, y: Any, number: Callable[[Any, Any], Any]) -> Sizes:
    dtype = x.dtype if isinstance(x, Sizes) else y.dtype
    first, second = np.broadcast_arrays(entries(x), entries(y))
    made = [number(a, c) for a, c in zip(first.flat, second.flat, strict=True)]
    return Sizes(objects(made).reshape(first.shape), dtype)


def entries(value: Sizes | Tensor) -> np.ndarray[Any, Any]:
    """Return numbers as an array of objects."""
    if isinstance(value, Sizes):
        return value.entries
    return objects(value.reshape(-1).tolist()).reshape(tuple(value.shape))


def _inlined(b: GraphBuilder, value: Any, other: Any) -> Any:
    """Return a constant of one value as Python's number, if the other argument keeps its type."""
    if not isinstance(value, Tensor) or not isinstance(other, fx.Proxy) or value.numel() != 1:
        return value
    same = value.dtype == b.dtype(other) and value.dim() <= len(b.shape(other))
    if not same or value.dtype == torch.bool:
        return value
    return value.item()


def _with_bias(b: GraphBuilder, x: Any, bias: Any) -> Any:
    """Return the output of a layer without bias that gets one; ``None`` if it cannot."""
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        return None
    layer: Any = b.layer_of(x, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if layer is None or layer.bias is not None or bias.dtype != layer.weight.dtype:
        return None
    channels, rank = int(layer.weight.shape[0]), len(b.shape(x))
    axis = rank - 1 if isinstance(layer, nn.Linear) else 1
    wanted = [channels if place == axis else 1 for place in range(rank)]
    own = [1] * (rank - bias.dim()) + list(bias.shape)
    if own != wanted:
        return None
    b.keep_apart(x)
    layer.bias = nn.Parameter(bias.reshape(-1).clone())
    # The shape stays, so the node need not be computed again.
    return x


def _whole_division(x: Any, y: Any) -> Any:
    return x / y if isinstance(x, float) or isinstance(y, float) else x // y


def _divide(b: GraphBuilder, node: OnnxNode, x: Any, y: Any) -> Any:
    if _are_sizes(x, y):
        dtype = x.dtype if isinstance(x, Sizes) else y.dtype
        return _of_sizes(x, y, operator.truediv if dtype.is_floating_point else operator.floordiv)
    x, y = b.tensor(x), b.tensor(y)
    if b.dtype(x).is_floating_point:
        return _pair(b, node, x, y, torch.div, None)
    return b.call(torch.div, x, y, rounding_mode="trunc")


def _modulo(b: GraphBuilder, node: OnnxNode, x: Any, y: Any) -> Any:
    if node.attributes.get("fmod"):
        return b.call(torch.fmod, b.tensor(x), b.tensor(y))
    return _joined(b, node, x, y, function=torch.remainder, number=operator.mod)


def _mean(b: GraphBuilder, node: OnnxNode, *values: Any) -> Any:
    total = _joined(b, node, *map(b.tensor, values), function=torch.add, number=None)
    return b.call(operator.truediv, total, len(values))


def _extreme(b: GraphBuilder, node: OnnxNode, *values: Any) -> Any:
    largest = node.operator == "Max"
    if len(values) > 1 and _are_sizes(*values):
        return _joined(b, node, *values, function=None, number=_larger if largest else _smaller)
    function = torch.maximum if largest else torch.minimum
    found = b.tensor(values[0])
    for value in values[1:]:
        found = b.call(function, found, b.tensor(value))
    return found


def _larger(x: Any, y: Any) -> Any:
    return x if _known(x, y) and x >= y else y if _known(x, y) else _sym(torch.sym_max, x, y)


def _smaller(x: Any, y: Any) -> Any:
    return x if _known(x, y) and x <= y else y if _known(x, y) else _sym(torch.sym_min, x, y)


def _known(*numbers: Any) -> bool:
    return not any(isinstance(number, fx.Proxy) for number in numbers)


def _sym(function: Any, *numbers: Any) -> Any:
    """Call a function of numbers that takes those of the graph too."""
    tracer = next(each.tracer for each in numbers if isinstance(each, fx.Proxy))
    return tracer.create_proxy("call_function", function, numbers, {})


def _compare(b: GraphBuilder, node: OnnxNode, x: Any, y: Any, *, function: Any, plain: Any) -> Any:
    if _are_sizes(x, y):

        def number(a: Any, c: Any) -> Any:
            if _known(a, c):
                return plain(a, c)
            fixed = a if _known(a) else c
            if node.operator == "Equal" and _known(fixed) and fixed < 0:
                return False  # a size is never negative
            return _sym(plain, a, c)

        return Sizes(_of_sizes(x, y, number).entries, torch.bool)
    x, y = b.tensor(x), b.tensor(y)
    return b.call(function, x, y if isinstance(x, Tensor) else _inlined(b, y, x))


def _where(b: GraphBuilder, node: OnnxNode, condition: Any, x: Any, y: Any) -> Any:
    del node
    values = (condition, x, y)
    if _are_sizes(*values):
        arrays = np.broadcast_arrays(*map(entries, values))
        rows = list(zip(*(array.flat for array in arrays), strict=True))
        if all(_known(row[0]) for row in rows):
            made = objects([a if test else c for test, a, c in rows])
            return Sizes(made.reshape(arrays[0].shape), x.dtype)
    return b.call(torch.where, *map(b.tensor, values))


def _unary(b: GraphBuilder, node: OnnxNode, x: Any, *, function: Any) -> Any:
    del node
    return b.call(function, b.tensor(x))


def _rounded(b: GraphBuilder, node: OnnxNode, x: Any, *, function: Any) -> Any:
    """Return sizes rounded to whole numbers of their type, or a tensor."""
    if not isinstance(x, Sizes):
        return b.call(function, x)

    def one(value: Any) -> Any:
        if _known(value):
            return getattr(np, node.operator.lower())(value).item()
        return value // 1 if node.operator == "Floor" else -((-value) // 1)

    return Sizes(objects([one(each) for each in x.entries.flat]).reshape(x.entries.shape), x.dtype)


def _negated(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    if isinstance(x, Sizes):
        return Sizes(objects([-each for each in x.entries.flat]).reshape(x.entries.shape), x.dtype)
    return _unary(b, node, x, function=torch.neg)


def _cast(b: GraphBuilder, node: OnnxNode, x: Any, like: Any = None) -> Any:
    dtype = dtype_of(node.attributes["to"]) if like is None else b.dtype(like)
    if isinstance(x, Sizes):
        return _cast_sizes(x, dtype)
    if b.dtype(x) == dtype:
        return x
    return b.method("to", x, dtype)


def _cast_sizes(x: Sizes, dtype: torch.dtype) -> Sizes:
    def one(value: Any) -> Any:
        if not _known(value):
            if dtype.is_floating_point == x.dtype.is_floating_point:
                return value
            return _sym(torch.sym_float if dtype.is_floating_point else torch.sym_int, value)
        kind: Any = float if dtype.is_floating_point else bool if dtype == torch.bool else int
        return kind(value)

    return Sizes(objects([one(each) for each in x.entries.flat]).reshape(x.entries.shape), dtype)


def _power(b: GraphBuilder, node: OnnxNode, x: Any, y: Any) -> Any:
    del node
    if _are_sizes(x, y):
        return _of_sizes(x, y, operator.pow)
    x, y = b.tensor(x), b.tensor(y)
    dtype = b.dtype(x)
    if b.dtype(y) != dtype and isinstance(y, Tensor) and y.numel() == 1 and y.dim() == 0:
        return b.method("to", b.call(torch.pow, x, y.item()), dtype)
    made = b.call(torch.pow, x, _inlined(b, y, x))
    return made if b.dtype(made) == dtype else b.method("to", made, dtype)


def _product_of_matrices(b: GraphBuilder, node: OnnxNode, x: Any, y: Any) -> Any:
    x, y = b.tensor(x), b.tensor(y)
    if isinstance(y, Tensor) and y.dim() == 2 and len(b.shape(x)) >= 2 and y.is_floating_point():
        return linear(b, node, x, y.t())
    return b.call(torch.matmul, x, y)


def linear(b: GraphBuilder, node: OnnxNode, x: Any, weight: Tensor, bias: Any = None) -> Any:
    """Add a fully connected layer."""

    def make() -> nn.Module:
        # On `meta` no random weights are drawn from the caller's generator.
        outputs, inputs = weight.shape
        layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.contiguous().clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.reshape(-1).expand(outputs).contiguous().clone())
        return layer

    return b.module(node, make, x, weight=node.inputs[1])


def _general_product(b: GraphBuilder, node: OnnxNode, x: Any, y: Any, z: Any = None) -> Any:
    alpha, beta = node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    x, y = b.tensor(x), b.tensor(y)
    z = None if z is None else b.tensor(z)
    if node.attributes.get("transA"):
        x = b.method("t", x)
    weight = b.method("t", y) if not node.attributes.get("transB") else y
    outputs = b.shape(weight)[0]
    # What is added to every row is the bias of a layer.
    row = isinstance(z, Tensor) and z.is_floating_point() and z.numel() in (1, outputs)
    row = row and (z.dim() < 2 or z.shape[0] == 1)
    if isinstance(weight, Tensor) and weight.is_floating_point() and (z is None or row):
        return linear(b, node, x, weight * alpha, None if z is None else z * beta)
    made = b.call(torch.matmul, x, b.method("t", weight))
    made = made if alpha == 1 else b.call(operator.mul, made, alpha)
    if z is None:
        return made
    return b.call(torch.add, made, z if beta == 1 else b.call(operator.mul, z, beta))


def _einsum(b: GraphBuilder, node: OnnxNode, *values: Any) -> Any:
    return b.call(torch.einsum, node.attributes["equation"], *map(b.tensor, values))


def _shifted(b: GraphBuilder, node: OnnxNode, x: Any, y: Any) -> Any:
    left = node.attributes.get("direction") == "LEFT"
    function = torch.bitwise_left_shift if left else torch.bitwise_right_shift
    return b.call(function, b.tensor(x), b.tensor(y))


def _identity(b: GraphBuilder, node: OnnxNode, x: Any, *others: Any) -> Any:
    """Dropout and Identity: the mask of a dropout that is off is true everywhere."""
    if len(others) > 1 and bool(b.constant(others[1], "training_mode")):
        raise Refused("it computes as in training; export the network in evaluation mode")
    if len(node.outputs) > 1 and node.operator == "Dropout":
        return x, b.call(torch.ones_like, b.tensor(x), dtype=torch.bool)
    return x


def _binary(function: Any, number: Any) -> Builder:
    return partial(_joined, function=function, number=number)


_FUNCTIONS: Mapping[str, Any] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin,
    "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "Cos": torch.cos,
    "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "IsNaN": torch.isnan,
    "Log": torch.log, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Round": torch.round, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "BitwiseNot": torch.bitwise_not, "Det": torch.det,
}  # fmt: skip
_COMPARISONS: Mapping[str, tuple[Any, Any]] = {
    "Equal": (torch.eq, operator.eq),
    "Greater": (torch.gt, operator.gt),
    "GreaterOrEqual": (torch.ge, operator.ge),
    "Less": (torch.lt, operator.lt),
    "LessOrEqual": (torch.le, operator.le),
}

OPERATORS: Mapping[str, Builder] = {
    "Add": _binary(torch.add, operator.add),
    "And": _binary(torch.logical_and, None),
    "BitShift": _shifted,
    "BitwiseAnd": _binary(torch.bitwise_and, None),
    "BitwiseOr": _binary(torch.bitwise_or, None),
    "BitwiseXor": _binary(torch.bitwise_xor, None),
    "Cast": _cast,
    "CastLike": _cast,
    "Ceil": partial(_rounded, function=torch.ceil),
    "Div": _divide,
    "Dropout": _identity,
    "Einsum": _einsum,
    "Floor": partial(_rounded, function=torch.floor),
    "Gemm": _general_product,
    "Identity": _identity,
    "MatMul": _product_of_matrices,
    "Max": _extreme,
    "Mean": _mean,
    "Min": _extreme,
    "Mod": _modulo,
    "Mul": _binary(torch.mul, operator.mul),
    "Neg": _negated,
    "Or": _binary(torch.logical_or, None),
    "Pow": _power,
    "Sub": _binary(torch.sub, operator.sub),
    "Sum": _binary(torch.add, operator.add),
    "Where": _where,
    "Xor": _binary(torch.logical_xor, None),
    **{name: partial(_unary, function=function) for name, function in _FUNCTIONS.items()},
    **{
        name: partial(_compare, function=function, plain=plain)
        for name, (function, plain) in _COMPARISONS.items()
    },
}


def refused_training(node: OnnxNode) -> None:
    """Refuse a node that computes as in training.

    Raises:
        Refused: If it does.
    """
    if node.attributes.get("training_mode"):
        raise Refused("it computes as in training; export the network in evaluation mode")
