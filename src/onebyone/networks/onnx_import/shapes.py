"""Operators that move, cut, repeat and pick values, and those that compute with sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from onebyone.networks.onnx_import.arithmetic import entries
from onebyone.networks.onnx_import.builder import (
    Builder,
    GraphBuilder,
    Refused,
    Sizes,
    check_made,
)
from onebyone.networks.onnx_import.file import OnnxNode
from onebyone.networks.onnx_import.modules import Counting, EdgePad, Filled


def _shape(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    rank = len(b.shape(x))
    start, end = node.attributes.get("start", 0), node.attributes.get("end")
    return Sizes.of([b.size(x, axis) for axis in range(rank)][start:end])


def _size(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    del node
    total: Any = 1
    for axis in range(len(b.shape(x))):
        total = b.size(x, axis) * total
    made = np.empty((), dtype=object)
    made[()] = total
    return Sizes(made, torch.int64)


def _constant(b: GraphBuilder, node: OnnxNode) -> Any:
    at = node.attributes
    if "value" in at and isinstance(at["value"], Tensor):
        value = at["value"]
        if not b.file.constants:  # Paddle keeps all its weights so
            b.keep_weight(node.outputs[0], value)
        return value
    for name, dtype in (
        ("value_float", torch.float32), ("value_floats", torch.float32),
        ("value_int", torch.int64), ("value_ints", torch.int64),
    ):  # fmt: skip
        if name in at:
            return torch.tensor(at[name], dtype=dtype)
    raise Refused("it has no value that is a tensor of numbers")


def _filled(b: GraphBuilder, node: OnnxNode, sizes: Any) -> Any:
    value = node.attributes.get("value", torch.zeros(1))
    wanted = b.numbers(sizes, "shape")
    check_made(wanted)
    if all(isinstance(size, int) for size in wanted):
        return torch.full(tuple(wanted), value.reshape(-1)[0].item(), dtype=value.dtype)
    made = Filled(value.reshape(-1)[0].item(), value.dtype)
    return b.module(node, lambda: made, wanted)


def _reshape(b: GraphBuilder, node: OnnxNode, x: Any, target: Any = None) -> Any:
    wanted = node.attributes["shape"] if target is None else b.numbers(target, "shape")
    if isinstance(x, Sizes):
        if all(isinstance(size, int) for size in wanted):
            return Sizes(x.entries.reshape(tuple(wanted)), x.dtype)
        x = b.tensor(x)
    keeps_zero = bool(node.attributes.get("allowzero"))
    found = [
        b.size(x, axis) if size_is(size, 0) and not keeps_zero else size
        for axis, size in enumerate(wanted)
    ]
    own = b.shape(x)
    if _is_flatten(b, x, found):
        return b.module(node, nn.Flatten, x)
    return b.call(torch.reshape, x, _free_batch(b, x, found, own))


def size_is(size: Any, number: int) -> bool:
    """Whether a size is a constant of that number."""
    return isinstance(size, int) and size == number


def _is_flatten(b: GraphBuilder, x: Any, wanted: Sequence[Any]) -> bool:
    """Whether a reshape keeps the batch and joins all other dimensions."""
    own = b.shape(x)
    if len(wanted) != 2 or len(own) < 2 or not isinstance(x, fx.Proxy):
        return False
    first, second = wanted
    keeps = _is_batch_of(first, x) or (
        b.frees_batch and size_is(first, own[0]) and own[0] == b.batch
    )
    rest = math.prod(own[1:])
    if size_is(second, -1):
        return keeps
    return isinstance(second, int) and second == rest and (keeps or size_is(first, -1))


def _is_batch_of(size: Any, x: fx.Proxy) -> bool:
    """Whether a number of the graph is the first size of a tensor."""
    if not isinstance(size, fx.Proxy):
        return False
    node = size.node
    return node.op == "call_method" and node.target == "size" and node.args == (x.node, 0)


def _free_batch(b: GraphBuilder, x: Any, wanted: list[Any], own: tuple[int, ...]) -> list[Any]:
    """Replace the batch that a file fixes in a reshape: the same values for any batch."""
    if not b.frees_batch or not isinstance(x, fx.Proxy) or not wanted or not own:
        return wanted
    if not size_is(wanted[0], own[0]) or own[0] != b.batch:
        return wanted
    rest = [size for size in wanted[1:] if not isinstance(size, fx.Proxy)]
    open_ended = any(size == -1 for size in rest) or len(rest) < len(wanted) - 1
    if not open_ended and math.prod(rest) != math.prod(own[1:]):
        return wanted
    return [b.size(x, 0), *wanted[1:]]


def _flatten(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    rank = len(b.shape(x))
    axis = node.attributes.get("axis", 1)
    axis = axis + rank if axis < 0 else axis
    if axis == 1:
        return b.module(node, nn.Flatten, x)
    rows: Any = 1
    for each in range(axis):
        rows = b.size(x, each) * rows
    return b.call(torch.reshape, x, [rows, -1] if axis < rank else [-1, 1])


def _axes_of(b: GraphBuilder, node: OnnxNode, given: Any) -> list[int] | None:
    if given is None:
        found = node.attributes.get("axes")
        return None if found is None else list(found)
    axes = b.numbers(given, "axes")
    if not all(isinstance(axis, int) for axis in axes):
        raise Refused("its axes must be constants")
    return axes


def _squeeze(b: GraphBuilder, node: OnnxNode, x: Any, axes: Any = None) -> Any:
    found = _axes_of(b, node, axes)
    if isinstance(x, Sizes):
        return Sizes(np.squeeze(x.entries, None if found is None else tuple(found)), x.dtype)
    if found is None:
        found = [axis for axis, size in enumerate(b.shape(x)) if size == 1]
        if b.batch == 1 and 0 in found:
            raise Refused("it removes all dimensions of size 1, so also the batch; give it axes")
    return b.call(torch.squeeze, x, tuple(found))


def _unsqueeze(b: GraphBuilder, node: OnnxNode, x: Any, axes: Any = None) -> Any:
    found = _axes_of(b, node, axes) or []
    rank = len(b.shape(x)) + len(found)
    places = sorted(axis + rank if axis < 0 else axis for axis in found)
    if isinstance(x, Sizes):
        return Sizes(np.expand_dims(x.entries, tuple(places)), x.dtype)
    for axis in places:
        x = b.call(torch.unsqueeze, x, axis)
    return x


def _transpose(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    rank = len(b.shape(x))
    order = list(node.attributes.get("perm") or reversed(range(rank)))
    return x if order == list(range(rank)) else b.call(torch.permute, x, order)


def _concat(b: GraphBuilder, node: OnnxNode, *values: Any) -> Any:
    axis = node.attributes.get("axis", 1)
    if any(isinstance(value, Sizes) for value in values):
        if all(isinstance(value, Sizes | Tensor) for value in values):
            dtype = next(value.dtype for value in values if isinstance(value, Sizes))
            return Sizes(np.concatenate([entries(value) for value in values], axis), dtype)
        values = tuple(map(b.tensor, values))
    if len(values) == 1:
        return values[0]
    return b.call(torch.cat, list(values), axis)


def _split(b: GraphBuilder, node: OnnxNode, x: Any, lengths: Any = None) -> Any:
    axis = node.attributes.get("axis", 0)
    wanted = node.attributes.get("split") if lengths is None else b.numbers(lengths, "lengths")
    size = b.shape(x)[axis]
    count = len(node.outputs)
    if wanted is None:
        part = -(-size // int(node.attributes.get("num_outputs", count)))
        wanted = [min(part, size - part * place) for place in range(count)]
        if not b.fixed and axis > 1:
            raise Refused("it splits a dimension whose size is free into equal parts")
    if isinstance(x, Sizes):
        return tuple(
            Sizes(part, x.dtype) for part in np.split(x.entries, np.cumsum(wanted[:-1]), axis)
        )
    made = b.call(torch.split, x, list(wanted), axis)
    return tuple(b.call(operator.getitem, made, place) for place in range(count))


def _slice(b: GraphBuilder, node: OnnxNode, x: Any, *given: Any) -> Any:
    at = node.attributes
    if b.opset < 10:
        starts, ends = list(at["starts"]), list(at["ends"])
        axes, steps = list(at.get("axes") or range(len(starts))), [1] * len(starts)
    else:
        padded = (*given, *[None] * (4 - len(given)))
        starts, ends = b.numbers(padded[0], "starts"), b.numbers(padded[1], "ends")
        axes = list(range(len(starts))) if padded[2] is None else b.numbers(padded[2], "axes")
        steps = [1] * len(starts) if padded[3] is None else b.numbers(padded[3], "steps")
    if not all(isinstance(number, int) for number in (*axes, *steps)):
        raise Refused("its axes and steps must be constants")
    rank = len(b.shape(x))
    cuts = [slice(None)] * rank
    flipped = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = axis + rank if axis < 0 else axis
        if step < 0:
            cuts[place] = _backwards(start, end, step, b.shape(x)[place])
            flipped.append(place)
        else:
            cuts[place] = _forwards(start, end, step)
    if isinstance(x, Sizes):
        return Sizes(_cut_sizes(x, cuts, flipped), x.dtype)
    if flipped:
        x = b.call(torch.flip, x, flipped)
    if all(cut.start is cut.stop is cut.step is None for cut in cuts):
        return x
    return b.call(operator.getitem, x, tuple(cuts))


def _forwards(start: Any, end: Any, step: int) -> slice:
    start = None if size_is(start, 0) else start
    end = None if isinstance(end, int) and end >= 2**31 - 1 else end
    return slice(start, end, None if step == 1 else step)


def _backwards(start: Any, end: Any, step: int, size: int) -> slice:
    """Return the cut of a flipped dimension that equals one with a negative step."""
    if not isinstance(start, int) or not isinstance(end, int):
        raise Refused("a slice with a negative step must have constant bounds")
    # Counted from the end of the original, so that it holds for any size where bounds are open.
    if start >= 0 and start < 2**31 - 1 and start < size - 1:
        first = size - 1 - start
    elif start < 0:
        first = -start - 1
    else:
        first = 0
    if end <= -(2**31) or end < -size:
        last = None
    elif end < 0:
        last = -end - 1
    else:
        last = max(size - 1 - end, 0)
    return slice(first, last, None if step == -1 else -step)


def _cut_sizes(x: Sizes, cuts: list[slice], flipped: list[int]) -> np.ndarray[Any, Any]:
    if any(isinstance(each, fx.Proxy) for cut in cuts for each in (cut.start, cut.stop)):
        raise Refused("it cuts a list of sizes at a size")
    made = np.flip(x.entries, tuple(flipped)) if flipped else x.entries
    found: np.ndarray[Any, Any] = made[tuple(cuts)]
    return found


def _expand(b: GraphBuilder, node: OnnxNode, x: Any, target: Any) -> Any:
    del node
    x = b.tensor(x)
    wanted, own = b.numbers(target, "shape"), b.shape(x)
    check_made(wanted)
    rank = max(len(wanted), len(own))
    wanted = [1] * (rank - len(wanted)) + wanted
    sizes = [
        -1 if size_is(size, 1) and axis >= rank - len(own) else size
        for axis, size in enumerate(wanted)
    ]
    if not isinstance(x, fx.Proxy) and not any(isinstance(size, fx.Proxy) for size in sizes):
        return x.expand(sizes)
    # Both may be larger: a sum with zeros of the shape broadcasts in both directions.
    clear = all(
        size_is(size, -1) or axis < rank - len(own) or own[axis - rank + len(own)] == 1
        or size_is(size, own[axis - rank + len(own)]) or isinstance(size, fx.Proxy)
        for axis, size in enumerate(sizes)
    )  # fmt: skip
    if not clear:
        raise Refused(f"it expands {own} to {wanted}")
    return b.method("expand", x, sizes)


def _tile(b: GraphBuilder, node: OnnxNode, x: Any, repeats: Any) -> Any:
    del node
    times = b.numbers(repeats, "repeats")
    if not isinstance(x, fx.Proxy):
        check_made(
            [size * n for size, n in zip(b.shape(x), times, strict=True) if isinstance(n, int)]
        )
    return b.call(torch.tile, b.tensor(x), times)


def _gather(b: GraphBuilder, node: OnnxNode, x: Any, indices: Any) -> Any:
    axis = node.attributes.get("axis", 0)
    if isinstance(x, Sizes) and isinstance(indices, Tensor):
        at = indices.numpy()
        if at.size and (at.max() >= x.entries.shape[axis] or at.min() < -x.entries.shape[axis]):
            raise Refused(f"it picks entry {at.max()} of {x.entries.shape[axis]}")
        picked = np.empty(at.shape, dtype=object)
        for place in np.ndindex(at.shape):
            picked[place] = x.entries[int(at[place])]
        return Sizes(picked, x.dtype)
    x = b.tensor(x)
    axis = axis + len(b.shape(x)) if axis < 0 else axis
    if isinstance(indices, Sizes) and indices.entries.ndim == 0:
        indices = indices.entries.item()
        return b.call(operator.getitem, x, (*[slice(None)] * axis, indices))
    if isinstance(indices, Tensor) and indices.dim() == 0:
        return b.call(torch.select, x, axis, int(indices))
    indices = b.tensor(indices)
    if isinstance(indices, Tensor) and indices.numel() and int(indices.min()) >= 0:
        if indices.dim() == 1:
            return b.call(torch.index_select, x, axis, indices.long())
    elif not isinstance(indices, Tensor):
        # Indices may count from the end.
        indices = b.method("long", indices)
    return b.call(operator.getitem, x, (*[slice(None)] * axis, indices))


def _gather_elements(b: GraphBuilder, node: OnnxNode, x: Any, indices: Any) -> Any:
    axis = node.attributes.get("axis", 0)
    x, indices = b.tensor(x), b.tensor(indices)
    size = b.size(x, axis)
    at = b.call(torch.remainder, b.method("long", indices), size)
    return b.call(torch.gather, x, axis, at)


def _pad(b: GraphBuilder, node: OnnxNode, x: Any, *given: Any) -> Any:
    x = b.tensor(x)
    rank = len(b.shape(x))
    value: Any = node.attributes.get("value", 0.0)
    if b.opset < 11:
        pads, axes = list(node.attributes["pads"]), list(range(rank))
    else:
        padded = (*given, *[None] * (3 - len(given)))
        pads = b.numbers(padded[0], "pads")
        value = 0 if padded[1] is None else b.constant(padded[1], "value").reshape(-1)[0].item()
        axes = list(range(rank)) if padded[2] is None else b.numbers(padded[2], "axes")
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        before[axis], after[axis] = pads[place], pads[place + len(axes)]
    if all(size_is(pad, 0) for pad in (*before, *after)):
        return x
    mode = node.attributes.get("mode", "constant") or "constant"
    if mode != "constant":
        if not all(isinstance(pad, int) for pad in (*before, *after)):
            raise Refused("its pads must be constants")
        return b.module(node, lambda: EdgePad(before, after, mode), x)
    order = [pad for axis in reversed(range(rank)) for pad in (before[axis], after[axis])]
    while size_is(order[-1], 0) and size_is(order[-2], 0):
        order = order[:-2]
    return b.call(F.pad, x, order, value=value)


def _to_depth(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    block = int(node.attributes["blocksize"])
    n, c, h, w = (b.size(x, axis) for axis in range(4))
    parts = b.call(torch.reshape, x, [n, c, h // block, block, w // block, block])
    first = node.attributes.get("mode", "DCR") == "DCR"  # of a block come before channels
    moved = b.call(torch.permute, parts, [0, 3, 5, 1, 2, 4] if first else [0, 1, 3, 5, 2, 4])
    return b.call(torch.reshape, moved, [n, c * block * block, h // block, w // block])


def _to_space(b: GraphBuilder, node: OnnxNode, x: Any) -> Any:
    x = b.tensor(x)
    block = int(node.attributes["blocksize"])
    if node.attributes.get("mode", "DCR") == "CRD":
        return b.module(node, lambda: nn.PixelShuffle(block), x)
    n, c, h, w = (b.size(x, axis) for axis in range(4))
    parts = b.call(torch.reshape, x, [n, block, block, c // (block * block), h, w])
    moved = b.call(torch.permute, parts, [0, 3, 4, 1, 5, 2])
    return b.call(torch.reshape, moved, [n, c // (block * block), h * block, w * block])


def _range(b: GraphBuilder, node: OnnxNode, start: Any, limit: Any, step: Any) -> Any:
    if any(isinstance(each, fx.Proxy) for each in (start, limit, step)):
        raise Refused("its bounds are computed from values of tensors")
    dtype = limit.dtype
    first, last, by = (b.numbers(each, "bounds")[0] for each in (start, limit, step))
    if all(isinstance(each, int | float) for each in (first, last, by)):
        check_made([int((last - first) / by) if by else -1] if (last - first) * by > 0 else [0])
        return torch.arange(first, last, by, dtype=dtype)
    return b.module(node, Counting, first, last, by)


def _triangle(b: GraphBuilder, node: OnnxNode, x: Any, k: Any = None) -> Any:
    offset = 0 if k is None else int(b.constant(k, "k"))
    upper = node.attributes.get("upper", 1)
    return b.call(torch.triu if upper else torch.tril, b.tensor(x), offset)


OPERATORS: Mapping[str, Builder] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "DepthToSpace": _to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _triangle,
    "Unsqueeze": _unsqueeze,
}
