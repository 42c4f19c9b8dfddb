"""Channel scales moved between layers, so that all channels of a tensor use its grid's range.

Between layers that are linear but for ReLU, pooling, additions and concatenations, a channel may be
multiplied by any positive number if the weights that read it are divided by it. All tensors that
are added to one another share their channels' scales.

References:
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
    ICCV 2019; Xiao et al., "SmoothQuant", ICML 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from onebyone.quantizing.fit import Walk
from onebyone.quantizing.graph import Captured, Layer, tensor_inputs
from onebyone.quantizing.placement import Placement, is_float
from onebyone.quantizing.ranges import min_max_grid
from onebyone.quantizing.rounding import nearest
from onebyone.quantizing.simulate import on_grid

_ATEN = torch.ops.aten
# How far scales follow the activations' ranges, against those of the weights that read them.
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLES = 16
_MOST = 32.0  # that a channel is scaled by
_SAME_CHANNELS = frozenset(
    {
        _ATEN.relu.default,
        _ATEN.leaky_relu.default,
        _ATEN.max_pool2d.default,
        _ATEN.avg_pool2d.default,
        _ATEN.adaptive_avg_pool2d.default,
        _ATEN.mean.dim,
        _ATEN.clone.default,
        _ATEN.alias.default,
        _ATEN.dropout.default,
        _ATEN.upsample_nearest2d.vec,
    }
)
_RESHAPING = frozenset({_ATEN.view.default, _ATEN.reshape.default, _ATEN.flatten.using_ints})


class _Classes:
    """Channels that must have one scale; some must keep theirs."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._fixed: list[bool] = []

    def new(self, count: int, *, fixed: bool = False) -> list[int]:
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        self._fixed.extend([fixed] * count)
        return list(range(start, start + count))

    def find(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, first: int, second: int) -> None:
        one, other = self.find(first), self.find(second)
        self._parent[other] = one
        self._fixed[one] = self._fixed[one] or self._fixed[other]

    def fix(self, items: Collection[int]) -> None:
        for item in items:
            self._fixed[self.find(item)] = True

    def fixed(self, item: int) -> bool:
        return self._fixed[self.find(item)]


@dataclass
class Channels:
    """The class of each channel of each tensor of a graph."""

    classes: _Classes = field(default_factory=_Classes)
    of: dict[fx.Node, list[int]] = field(default_factory=dict)

    def __getitem__(self, node: fx.Node) -> list[int]:
        return [self.classes.find(item) for item in self.of[node]]


def equalize(
    captured: Captured,
    placement: Placement,
    quantized: Collection[str],
    inputs: Tensor,
    *,
    bits: int = 8,
) -> tuple[Captured, dict[str, str]]:
    """Return a graph of the same function whose channels share their tensors' ranges better.

    Each set of tensors that share scales gets those of several strengths with which rounding harms
    the outputs of the layers that read them least; none, if that is best.

    Args:
        captured: Its layers' weights are replaced, its graph is kept.
        placement: Where tensors are quantized.
        quantized: Nodes of the int8 layers; others keep their weights.
        inputs: Examples. Not modified.
        bits: Of a weight.

    Returns:
        The graph, and a remark for each layer whose inputs were scaled.
    """
    channels = find_channels(captured, quantized)
    values = _values(captured, placement, inputs[:EXAMPLES])
    remarks: dict[str, str] = {}
    layers = dict(captured.layers)
    for component in _components(channels, values):
        scales, strength = _best_scales(captured, channels, component, values, bits)
        if not scales:
            continue
        for node in captured.graph.nodes:
            layer = layers.get(node.name)
            if layer is None or node.name not in quantized:
                continue
            source: Any = node.args[0]
            before = _factors(channels[source], scales)
            after = _factors(channels[node], scales)
            layers[node.name] = _scaled(layer, before, after)
            if before is not None:
                remarks[node.name] = f"input channels scaled, strength {strength:g}"
    for layer in layers.values():
        setattr(captured.module, f"{layer.node}_weight", layer.weight)
        setattr(captured.module, f"{layer.node}_bias", layer.bias)
    return replace(captured, layers=layers), remarks


def find_channels(captured: Captured, quantized: Collection[str]) -> Channels:
    """Return which channels of which tensors must have one scale, and which must keep theirs."""
    channels = Channels()
    for node in captured.graph.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                channels.classes.fix(channels.of.get(source, []))
        elif node.op == "get_attr" or not is_float(node):
            channels.of[node] = []
        else:
            channels.of[node] = _channels_of(node, channels, quantized)
    return channels


def _channels_of(node: fx.Node, channels: Channels, quantized: Collection[str]) -> list[int]:
    classes = channels.classes
    shape = node.meta["val"].shape
    count = int(shape[1]) if len(shape) in (2, 4) and isinstance(shape[1], int) else 0
    if node.name in quantized:
        return classes.new(count)
    sources = list(tensor_inputs(node))
    inputs = [channels.of.get(source, []) for source in sources]
    follow = next((how for how, targets in _FOLLOWING if node.target in targets), None)
    found = follow(node, inputs, classes) if follow and all(inputs) else None
    if found is not None and len(found) == count:
        return found
    for each in inputs:
        classes.fix(each)
    return classes.new(count, fixed=True)


def _same(node: fx.Node, inputs: list[list[int]], classes: _Classes) -> list[int] | None:
    del node, classes
    return inputs[0]


def _added(node: fx.Node, inputs: list[list[int]], classes: _Classes) -> list[int] | None:
    del node
    if len(inputs) != 2 or len(inputs[0]) != len(inputs[1]):
        return None
    for first, second in zip(*inputs, strict=True):
        classes.join(first, second)
    return inputs[0]


def _concatenated(node: fx.Node, inputs: list[list[int]], classes: _Classes) -> list[int] | None:
    del classes
    return [item for each in inputs for item in each] if _axis(node, 1) == 1 else None


def _sliced(node: fx.Node, inputs: list[list[int]], classes: _Classes) -> list[int] | None:
    del classes
    return inputs[0] if _axis(node, 1) != 1 else None


def _padded(node: fx.Node, inputs: list[list[int]], classes: _Classes) -> list[int] | None:
    padding: Any = node.args[1]
    if len(node.args) > 2 or node.kwargs or len(padding) > 6:
        return None
    before, after = padding[4:6] if len(padding) > 4 else (0, 0)
    if min(before, after) < 0:
        return None
    # Channels of zeros may have any scale.
    return [*classes.new(before), *inputs[0], *classes.new(after)]


def _flattened(node: fx.Node, inputs: list[list[int]], classes: _Classes) -> list[int] | None:
    del classes
    before, after = (each.meta["val"].shape for each in (next(tensor_inputs(node)), node))
    if len(before) != 4 or len(after) != 2 or not isinstance(after[1], int):
        return None
    return [item for item in inputs[0] for _ in range(after[1] // len(inputs[0]))]


_Following = Callable[[fx.Node, list[list[int]], _Classes], list[int] | None]
_FOLLOWING: tuple[tuple[_Following, Collection[Any]], ...] = (
    (_same, _SAME_CHANNELS),
    (_added, (_ATEN.add.Tensor,)),
    (_concatenated, (_ATEN.cat.default,)),
    (_sliced, (_ATEN.slice.Tensor,)),
    (_padded, (_ATEN.pad.default,)),
    (_flattened, _RESHAPING),
)


def _axis(node: fx.Node, place: int) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)


def _values(captured: Captured, placement: Placement, inputs: Tensor) -> dict[fx.Node, Tensor]:
    """Return the quantized tensors' values on a few examples."""
    walk = Walk(captured, inputs)
    kept = {}
    for node in captured.graph.nodes:
        walk.plain[node] = walk.run(node, walk.plain)
        if placement.grids.get(node.name) == node.name:
            kept[node] = walk.plain[node]
        walk.forget(node)
    return kept


def _components(channels: Channels, values: Mapping[fx.Node, Tensor]) -> list[tuple[fx.Node, ...]]:
    """Return the sets of quantized tensors that share scales which are free."""
    first: dict[int, int] = {}
    sets = _Classes()
    nodes = [node for node in values if channels.of[node]]
    for place, node in enumerate(nodes):
        sets.new(1)
        for item in channels[node]:
            if not channels.classes.fixed(item):
                sets.join(first.setdefault(item, place), place)
    found: dict[int, list[fx.Node]] = {}
    for place, node in enumerate(nodes):
        if any(not channels.classes.fixed(item) for item in channels[node]):
            found.setdefault(sets.find(place), []).append(node)
    return [tuple(each) for each in found.values()]


def _best_scales(
    captured: Captured,
    channels: Channels,
    component: tuple[fx.Node, ...],
    values: Mapping[fx.Node, Tensor],
    bits: int,
) -> tuple[dict[int, float], float]:
    """Return the scale of each class of a set of tensors, and its strength; none if none helps."""
    reach: dict[int, float] = {}
    weights: dict[int, float] = {}
    readers = {node: _layers_reading(captured, node) for node in component}
    for node in component:
        largest = values[node].abs().transpose(0, 1).flatten(1).amax(1).tolist()
        for item, value in zip(channels[node], largest, strict=True):
            if not channels.classes.fixed(item):
                reach[item] = max(reach.get(item, 0.0), value)
        for layer in readers[node]:
            _gather_columns(layer, channels[node], weights)
    floor = 1e-3 * max(reach.values(), default=0.0)
    tried: list[tuple[float, float, dict[int, float]]] = []
    for strength in STRENGTHS if floor else ():
        scales = {
            item: max(value, floor) ** strength
            / max(weights.get(item, 1.0), 1e-3) ** (1 - strength)
            for item, value in reach.items()
        }
        scales = {} if strength == 0 else _bounded(scales)
        error = sum(
            _harm(layer, values[node], _factors(channels[node], scales), bits)
            for node in component
            for layer in (*readers[node], *_others_reading(captured, node))
        )
        tried.append((error, strength, scales))
    if not tried:
        return {}, 0.0
    _, strength, scales = min(tried, key=lambda each: each[0])
    return scales, strength


def _bounded(scales: dict[int, float]) -> dict[int, float]:
    logs = torch.tensor(list(scales.values()), dtype=torch.float64).log()
    centered = (logs - logs.median()).exp().clamp(1 / _MOST, _MOST)
    return dict(zip(scales, centered.tolist(), strict=True))


def _layers_reading(captured: Captured, node: fx.Node) -> list[Layer]:
    return [captured.layers[user.name] for user in node.users if user.name in captured.layers]


def _others_reading(captured: Captured, node: fx.Node) -> list[None]:
    return [None] if any(user.name not in captured.layers for user in node.users) else []


def _gather_columns(layer: Layer, items: list[int], weights: dict[int, float]) -> None:
    """Note each input channel's largest weight, as a share of the largest of its output channel."""
    flat = layer.weight.abs().flatten(2) if layer.weight.ndim > 2 else layer.weight.abs()[..., None]
    rows = flat.amax((1, 2), keepdim=True).clamp_min(1e-20)
    share = (flat / rows).amax(2).reshape(layer.groups, -1, flat.shape[1]).amax(1).reshape(-1)
    for item, value in zip(items, share.tolist(), strict=True):
        weights[item] = max(weights.get(item, 0.0), value)


def _factors(items: list[int], scales: Mapping[int, float]) -> Tensor | None:
    if not any(item in scales for item in items):
        return None
    return torch.tensor([scales.get(item, 1.0) for item in items])


def _harm(layer: Layer | None, x: Tensor, scales: Tensor | None, bits: int) -> float:
    """Return the relative squared error of what reads a tensor, the tensor scaled and rounded."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    factor = torch.ones(1) if scales is None else scales
    inner = x / factor.reshape(shape)
    inner = on_grid(inner, min_max_grid(inner))
    if layer is None:
        exact, given = x, inner * factor.reshape(shape)
    else:
        exact = layer.run(x)
        scaled = _scaled(layer, scales, None)
        flat = scaled.weight.flatten(1)
        integers, sizes = nearest(flat, bits=bits)
        weight = (integers * sizes.unsqueeze(1)).reshape(layer.weight.shape)
        given = layer.run(inner, weight, layer.bias)
    size = float(exact.var()) or 1.0
    return float((given - exact).square().mean()) / size


def _scaled(layer: Layer, before: Tensor | None, after: Tensor | None) -> Layer:
    """Return a layer for inputs divided by ``before``, its outputs divided by ``after``."""
    weight, bias = layer.weight, layer.bias
    if before is not None:
        each = before.reshape(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1)
        shape = (len(weight), -1, *[1] * (weight.ndim - 2))
        weight = weight * each.reshape(len(weight), -1).reshape(shape)
    if after is not None:
        weight = weight / after.reshape(-1, *[1] * (weight.ndim - 1))
        bias = bias / after
    return replace(layer, weight=weight, bias=bias)
