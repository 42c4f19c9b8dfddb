"""Where a quantized network's tensors lie on a grid of 8 bits, and which share one."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from onebyone.quantizing.graph import Captured, tensor_inputs

_ATEN = torch.ops.aten
# Activations that runtimes compute within the layer before them.
FUSED = frozenset(
    {_ATEN.relu.default, _ATEN.relu6.default, _ATEN.hardtanh.default, _ATEN.clamp.default}
)
# Operations whose outputs are some of their inputs: on the same grid they lose nothing.
PASSING = FUSED | {
    _ATEN.max_pool2d.default,
    _ATEN.view.default,
    _ATEN.reshape.default,
    _ATEN._unsafe_view.default,  # noqa: SLF001 - so it is called
    _ATEN.flatten.using_ints,
    _ATEN.permute.default,
    _ATEN.transpose.int,
    _ATEN.slice.Tensor,
    _ATEN.select.int,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.unsqueeze.default,
    _ATEN.clone.default,
    _ATEN.alias.default,
    _ATEN.pixel_shuffle.default,
    _ATEN.channel_shuffle.default,
    _ATEN.upsample_nearest2d.vec,
    _ATEN.dropout.default,
}
# Operations that give a list of parts of their input, each of which `getitem` picks.
SPLITTING = frozenset({_ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.chunk.default})
_PADDING = frozenset({_ATEN.pad.default, _ATEN.constant_pad_nd.default})
AVERAGES = frozenset({_ATEN.avg_pool2d.default, _ATEN.adaptive_avg_pool2d.default, _ATEN.mean.dim})
# Operations that runtimes compute in 8 bits where all inputs have grids.
COMPUTING = AVERAGES | frozenset(
    {
        _ATEN.add.Tensor,
        _ATEN.mul.Tensor,
        _ATEN.cat.default,
        _ATEN.leaky_relu.default,
        _ATEN.sigmoid.default,
    }
)


@dataclass(frozen=True)
class Placement:
    """Which tensors of a graph are quantized.

    Attributes:
        grids: For the name of each quantized tensor that of the one whose grid it has: its own,
            or that of the tensor which it is a part of.
        points: The tensors that have a grid of their own, in order.
    """

    grids: dict[str, str]

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the tensors with grids of their own, in order."""
        return tuple(name for name, grid in self.grids.items() if name == grid)


def passes(node: fx.Node) -> bool:
    """Return whether an operation's outputs are some of its one input's values, or zero."""
    if node.op != "call_function":
        return False
    if node.target in _PADDING:
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        constant = node.target is _ATEN.constant_pad_nd.default or mode == "constant"
        if node.target is _ATEN.constant_pad_nd.default:
            value = node.args[2] if len(node.args) > 2 else 0
        return bool(constant and value in (None, 0, 0.0))
    if node.target is _ATEN.clamp.default or node.target is _ATEN.hardtanh.default:
        return all(bound is None or bound == 0 for bound in node.args[1:2])
    return node.target in PASSING


def fused_into(node: fx.Node) -> fx.Node | None:
    """Return the activation that a runtime computes together with an operation, if there is one."""
    users = list(node.users)
    if len(users) != 1 or users[0].target not in FUSED:
        return None
    return users[0]


def is_float(node: fx.Node) -> bool:
    """Return whether a node gives one float32 tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def place(captured: Captured, quantized: Collection[str]) -> Placement:
    """Return where tensors are quantized, given the nodes of the layers that compute in int8."""
    graph = captured.graph
    before = _before_layers(graph, quantized)
    read = _read_by_layers(graph, quantized)
    grids: dict[str, str] = {}
    for node in graph.nodes:
        parts = node.target in SPLITTING
        if node.op not in ("placeholder", "call_function") or not (parts or is_float(node)):
            continue
        if node.name not in before:
            continue
        source = _source(node)
        if source is None:
            if fused_into(node) is None and (node in read or _computes(node, quantized, grids)):
                grids[node.name] = node.name
        elif source is not node and source.name in grids:
            grids[node.name] = grids[source.name]
        elif source is not node and _is_activation_of(node, source, quantized, grids, read):
            grids[node.name] = node.name
    lists = {node.name for node in graph.nodes if node.target in SPLITTING}
    return Placement({name: grid for name, grid in grids.items() if name not in lists})


def _source(node: fx.Node) -> fx.Node | None:
    """Return the input whose values an operation passes on; ``None`` if it makes new ones."""
    inputs = list(tensor_inputs(node))
    if node.target in SPLITTING or _is_part(node):
        return inputs[0]
    fused = node.target in FUSED and inputs and fused_into(inputs[0]) is node
    if fused or passes(node):
        return next((source for source in inputs if is_float(source)), None)
    return None


def _is_part(node: fx.Node) -> bool:
    """Return whether a node picks one of the parts of a tensor."""
    source: Any = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target in SPLITTING


def _is_activation_of(
    node: fx.Node,
    source: fx.Node,
    quantized: Collection[str],
    grids: dict[str, str],
    read: set[fx.Node],
) -> bool:
    if fused_into(source) is not node:
        return node in read
    return node in read or _computes(source, quantized, grids)


def _computes(node: fx.Node, quantized: Collection[str], grids: dict[str, str]) -> bool:
    """Return whether an operation gives 8 bits by itself."""
    if node.name in quantized:
        return True
    inputs = list(tensor_inputs(node))
    tensors = [source for source in inputs if is_float(source)]
    needed = 2 if node.target in (_ATEN.add.Tensor, _ATEN.mul.Tensor) else 1
    return (
        node.target in COMPUTING
        and len(tensors) >= needed
        and all(source.name in grids for source in tensors)
    )


def _before_layers(graph: fx.Graph, quantized: Collection[str]) -> set[str]:
    """Return the tensors that an int8 layer or an average depends on.

    Runtimes compute a layer in int8 only if its outputs are on a grid. The average of many values
    makes their rounding small.
    """
    found: set[str] = set()
    for node in reversed(graph.nodes):
        for user in node.users:
            if user.name in found or user.name in quantized or user.target in AVERAGES:
                found.add(node.name)
    return found


def _read_by_layers(graph: fx.Graph, quantized: Collection[str]) -> set[fx.Node]:
    """Return the tensors that int8 layers read, and those that these are parts of."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        direct = any(user.name in quantized for user in node.users)
        if direct or any(user in found and _source(user) is node for user in node.users):
            found.add(node)
    return found
