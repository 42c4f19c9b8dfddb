"""Operators that reduce dimensions, sort, and resize."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from onebyone.networks.onnx_import.builder import Builder, GraphBuilder, Refused, Sizes, objects
from onebyone.networks.onnx_import.file import OnnxNode
from onebyone.networks.onnx_import.modules import Resize


def _reduced(b: GraphBuilder, node: OnnxNode, x: Any, axes: Any = None, *, function: Any) -> Any:
    keeps = bool(node.attributes.get("keepdims", 1))
    given = node.attributes.get("axes") if axes is None else b.numbers(axes, "axes")
    if isinstance(x, Sizes) and x.entries.ndim == 1 and node.operator == "ReduceProd":
        total: Any = 1
        for each in x.entries.flat:
            total = each * total
        made = objects([total])
        return Sizes(made if keeps else made.reshape(()), x.dtype)
    x = b.tensor(x)
    rank = len(b.shape(x))
    if not given:
        if node.attributes.get("noop_with_empty_axes"):
            return x
        given = list(range(rank))
    found = [axis + rank if axis < 0 else axis for axis in given]
    return function(b, x, found, keeps)


def _plainly(b: GraphBuilder, x: Any, axes: list[int], keeps: bool, *, of: Any) -> Any:  # noqa: FBT001
    return b.call(of, x, axes, keepdim=keeps)


def _product(b: GraphBuilder, x: Any, axes: list[int], keeps: bool) -> Any:  # noqa: FBT001
    dtype = b.dtype(x)
    for axis in sorted(axes, reverse=True):
        x = b.call(torch.prod, x, axis, keepdim=keeps, dtype=dtype)
    return x


def _total(b: GraphBuilder, x: Any, axes: list[int], keeps: bool) -> Any:  # noqa: FBT001
    return b.call(torch.sum, x, axes, keepdim=keeps, dtype=b.dtype(x))


def _mean(b: GraphBuilder, x: Any, axes: list[int], keeps: bool) -> Any:  # noqa: FBT001
    if not b.dtype(x).is_floating_point:
        raise Refused("it averages integers; export the network in float32")
    return b.call(torch.mean, x, axes, keepdim=keeps)


def _norm(b: GraphBuilder, x: Any, axes: list[int], keeps: bool, *, power: int) -> Any:  # noqa: FBT001
    if not b.dtype(x).is_floating_point:
        raise Refused("it takes a norm of integers; export the network in float32")
    return b.call(torch.linalg.vector_norm, x, power, axes, keepdim=keeps)


def _log_total(b: GraphBuilder, x: Any, axes: list[int], keeps: bool) -> Any:  # noqa: FBT001
    return b.call(torch.log, b.call(torch.sum, x, axes, keepdim=keeps))


def _squares(b: GraphBuilder, x: Any, axes: list[int], keeps: bool) -> Any:  # noqa: FBT001
    return b.call(torch.sum, b.call(torch.mul, x, x), axes, keepdim=keeps, dtype=b.dtype(x))


def _extreme_place(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    axis, keeps = node.attributes.get("axis", 0), bool(node.attributes.get("keepdims", 1))
    function = torch.argmax if node.operator == "ArgMax" else torch.argmin
    if not node.attributes.get("select_last_index"):
        return b.call(function, x, axis, keepdim=keeps)
    found = b.call(function, b.call(torch.flip, x, [axis]), axis, keepdim=keeps)
    return b.call(operator.sub, b.size(x, axis) - 1, found)


def _largest(b: GraphBuilder, node: OnnxNode, x: Any, k: Any = None) -> Any:
    count = node.attributes["k"] if k is None else b.numbers(k, "k")[0]
    at = node.attributes
    found = b.call(
        torch.topk,
        b.tensor(x),
        count,
        dim=at.get("axis", -1),
        largest=bool(at.get("largest", 1)),
        sorted=bool(at.get("sorted", 1)),
    )
    return b.call(operator.getitem, found, 0), b.call(operator.getitem, found, 1)


def _running_total(b: GraphBuilder, node: OnnxNode, x: Any, axis: Any) -> Any:
    x, place = b.tensor(x), int(b.constant(axis, "axis"))
    backwards = node.attributes.get("reverse")
    x = b.call(torch.flip, x, [place]) if backwards else x
    made = b.call(torch.cumsum, x, place, dtype=b.dtype(x))
    made = b.call(torch.sub, made, x) if node.attributes.get("exclusive") else made
    return b.call(torch.flip, made, [place]) if backwards else made


# ---------------------------------------------------------------- resizing


def _resize(b: GraphBuilder, node: OnnxNode, x: Any, *given: Any) -> Any:
    x = b.tensor(x)
    rank, at = len(b.shape(x)), node.attributes
    if node.operator == "Upsample" or b.opset < 11:
        scales, sizes = given[0] if given else at.get("scales"), None
        coordinates, rounding = "asymmetric", "floor"
    else:
        padded = (*given, *[None] * (3 - len(given)))
        scales, sizes = padded[1], padded[2]
        coordinates = at.get("coordinate_transformation_mode", "half_pixel")
        rounding = at.get("nearest_mode", "round_prefer_floor")
    mode = at.get("mode", "nearest")
    _check_resize(at, mode, coordinates)
    axes = [axis + rank if axis < 0 else axis for axis in at.get("axes") or range(rank)]
    sizes = None if sizes is None or b.shape(sizes) == (0,) else b.numbers(sizes, "sizes")
    if sizes is None:
        if scales is None:
            raise Refused("it has neither sizes nor scales")
        scales = list(scales) if isinstance(scales, list) else b.numbers(scales, "scales")
    else:
        scales = None
    return _resized(b, node, x, axes, (sizes, scales), (mode, coordinates, rounding))


def _check_resize(at: Mapping[str, Any], mode: str, coordinates: str) -> None:
    if at.get("antialias"):
        raise Refused("resizing with `antialias` is not supported")
    if at.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Refused("resizing with `keep_aspect_ratio_policy` is not supported")
    if coordinates == "tf_crop_and_resize":
        raise Refused("resizing with `tf_crop_and_resize` is not supported")
    if mode == "cubic" and at.get("cubic_coeff_a", -0.75) != -0.75:
        raise Refused("cubic resizing must have a `cubic_coeff_a` of -0.75, as in PyTorch")
    if at.get("exclude_outside"):
        raise Refused("resizing with `exclude_outside` is not supported")


def _resized(  # noqa: PLR0917
    b: GraphBuilder, node: OnnxNode, x: Any, axes: list[int], target: Any, how: Any
) -> Any:
    sizes, scales = target
    mode, coordinates, rounding = how
    rank = len(b.shape(x))
    kept = [
        place
        for place, axis in enumerate(axes)
        if axis > 1 or not _unchanged(b, x, axis, place, sizes, scales)
    ]
    axes = [axes[place] for place in kept]
    sizes = None if sizes is None else [sizes[place] for place in kept]
    scales = None if scales is None else [float(scales[place]) for place in kept]
    whole = axes == list(range(2, rank)) and rank in (3, 4, 5)
    one = sizes is not None and any(isinstance(size, int) and size == 1 for size in sizes)
    whole = whole and not (one and coordinates == "pytorch_half_pixel")
    known = _in_torch(mode, coordinates, rounding, rank, scales) if whole else None
    if known is not None and b.dtype(x).is_floating_point:
        name, aligned = known
        size = {"size": sizes} if scales is None else {"scale_factor": scales}
        return b.call(F.interpolate, x, **size, mode=name, align_corners=aligned)
    if mode == "cubic" or (mode == "linear" and not b.dtype(x).is_floating_point):
        raise Refused(f"{mode} resizing with {coordinates!r} is not supported")
    if not axes:
        return x
    return b.module(node, lambda: Resize(mode, coordinates, rounding), x, axes, sizes, scales)


def _unchanged(  # noqa: PLR0917
    b: GraphBuilder, x: Any, axis: int, place: int, sizes: Any, scales: Any
) -> bool:
    """Whether a dimension keeps its size."""
    if scales is not None:
        return bool(scales[place] == 1)
    size = sizes[place]
    if isinstance(size, fx.Proxy):
        node = size.node
        return node.target == "size" and node.args[1:] == (axis,)
    return bool(size == b.shape(x)[axis])


def _in_torch(
    mode: str, coordinates: str, rounding: str, rank: int, scales: list[float] | None
) -> tuple[str, bool | None] | None:
    """Return torch's name for a kind of resizing, and its `align_corners`; ``None`` without."""
    whole = scales is not None and all(scale >= 1 and scale == int(scale) for scale in scales)
    if mode == "nearest":
        floors = coordinates == "asymmetric" and rounding == "floor"
        rounds = coordinates == "half_pixel" and rounding == "round_prefer_floor"
        # Torch takes the floor of another coordinate: the same for these scales.
        rounds = rounds and all(int(scale) % 2 or int(scale) == 2 for scale in scales or ())
        return ("nearest", None) if whole and (floors or rounds) else None
    names = {3: "linear", 4: "bilinear", 5: "trilinear"} if mode == "linear" else {4: "bicubic"}
    if rank not in names:
        return None
    if coordinates == "align_corners":
        return names[rank], True
    plain = scales is None or whole or mode == "cubic"
    half = coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and mode == "linear")
    return (names[rank], False) if half and plain else None


# ---------------------------------------------------------------- recurrent networks

_ORDER = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2], "RNN": [0]}
_LAYERS: Mapping[str, type[Any]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


def _recurrent(b: GraphBuilder, node: OnnxNode, x: Any, w: Any, r: Any, *more: Any) -> Any:
    x = b.tensor(x)
    given: list[Any] = [*more, *[None] * (5 - len(more))]
    bias, lengths, first, cell, peepholes = given
    weights = [b.constant(each, "weights") for each in (w, r)]
    bias = None if bias is None else b.constant(bias, "bias")
    hidden, both = _check_recurrent(node, lengths, peepholes)
    names = [f"{'_reverse' if back else ''}" for back in range(2 if both else 1)]

    def make() -> nn.Module:
        layer = _LAYERS[node.operator](
            b.shape(x)[-1], hidden, bidirectional=both, bias=bias is not None, device="meta"
        )
        gates = _ORDER[node.operator]
        for place, ending in enumerate(names):
            for kind, tensor in zip(("ih", "hh"), weights, strict=True):
                _set(layer, f"weight_{kind}_l0{ending}", tensor[place], gates, hidden)
            if bias is not None:
                for kind, tensor in zip(("ih", "hh"), bias[place].chunk(2), strict=True):
                    _set(layer, f"bias_{kind}_l0{ending}", tensor, gates, hidden)
        made: nn.Module = layer
        return made

    state = _state(b, node, first, cell)
    backwards = node.attributes.get("direction") == "reverse"
    x = b.call(torch.flip, x, [0]) if backwards else x
    args = (x,) if state is None else (x, state)
    found = b.module(node, make, *args, weight=node.inputs[1])
    every = b.call(operator.getitem, found, 0)
    last = b.call(operator.getitem, found, 1)
    every = b.call(torch.flip, every, [0]) if backwards else every
    # ONNX keeps the directions apart: (time, directions, batch, features).
    time, batch = b.size(every, 0), b.size(every, 1)
    apart = b.call(torch.reshape, every, [time, batch, len(names), hidden])
    apart = b.call(torch.permute, apart, [0, 2, 1, 3])
    if node.operator != "LSTM":
        return apart, last
    return apart, b.call(operator.getitem, last, 0), b.call(operator.getitem, last, 1)


def _check_recurrent(node: OnnxNode, lengths: Any, peepholes: Any) -> tuple[int, bool]:
    at = node.attributes
    if peepholes is not None or at.get("input_forget") or at.get("clip"):
        raise Refused("peepholes, coupled gates and clipping are not supported")
    if lengths is not None and not isinstance(lengths, Tensor):
        raise Refused("lengths of sequences that are computed are not supported")
    if at.get("layout"):
        raise Refused("a layout with the batch in front is not supported")
    if node.operator == "GRU" and not at.get("linear_before_reset"):
        raise Refused("a GRU must have `linear_before_reset`, as in PyTorch")
    usual = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
    both = at.get("direction", "forward") == "bidirectional"
    given = at.get("activations")
    if given and list(given) != usual[node.operator] * (2 if both else 1):
        raise Refused(f"its activations must be PyTorch's, got {given}")
    return int(at["hidden_size"]), both


def _state(b: GraphBuilder, node: OnnxNode, first: Any, cell: Any) -> Any:
    """Return the first state; ``None`` for zeros, which torch has for any batch."""
    given = [each for each in (first, cell) if each is not None]
    if all(_is_zero(each) for each in given):
        return None
    if node.operator == "LSTM" and len(given) < 2:
        raise Refused("it has a first output or a first cell alone")
    tensors = tuple(map(b.tensor, given))
    return tensors if node.operator == "LSTM" else tensors[0]


def _is_zero(value: Any) -> bool:
    """Whether a value is zero everywhere: a constant, or made as one for any batch."""
    if isinstance(value, Tensor):
        return not bool(value.count_nonzero())
    if not isinstance(value, fx.Proxy) or value.node.op != "call_module":
        return False
    made = value.tracer.module.get_submodule(str(value.node.target))  # type: ignore[attr-defined]
    return bool(getattr(made, "value", None) == 0)


def _set(layer: nn.Module, name: str, tensor: Tensor, gates: list[int], hidden: int) -> None:
    parts = [tensor[gate * hidden : (gate + 1) * hidden] for gate in gates]
    setattr(layer, name, nn.Parameter(torch.cat(parts).contiguous().clone()))


OPERATORS: Mapping[str, Builder] = {
    "ArgMax": _extreme_place,
    "ArgMin": _extreme_place,
    "CumSum": _running_total,
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "RNN": _recurrent,
    "ReduceL1": partial(_reduced, function=partial(_norm, power=1)),
    "ReduceL2": partial(_reduced, function=partial(_norm, power=2)),
    "ReduceLogSum": partial(_reduced, function=_log_total),
    "ReduceLogSumExp": partial(_reduced, function=partial(_plainly, of=torch.logsumexp)),
    "ReduceMax": partial(_reduced, function=partial(_plainly, of=torch.amax)),
    "ReduceMean": partial(_reduced, function=_mean),
    "ReduceMin": partial(_reduced, function=partial(_plainly, of=torch.amin)),
    "ReduceProd": partial(_reduced, function=_product),
    "ReduceSum": partial(_reduced, function=_total),
    "ReduceSumSquare": partial(_reduced, function=_squares),
    "Resize": _resize,
    "TopK": _largest,
    "Upsample": _resize,
}
