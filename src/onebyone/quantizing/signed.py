"""A quantized network in the form that ExecuTorch's XNNPACK reads: levels with a sign."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from onebyone.quantizing.placement import fused_into
from onebyone.quantizing.simulate import quantized_operations

_ATEN = torch.ops.aten
# XNNPACK copies levels here, so what is read must be on the grid of what is written.
_COPYING = frozenset({_ATEN.cat.default, _ATEN.max_pool2d.default})
_HALF = 128


def signed_form(network: nn.Module) -> nn.Module:
    """Return a network that gives the same outputs, with levels from -128 in place of 0.

    Biases are floats, from which XNNPACK computes the same integers. The weights of a layer whose
    outputs are on no grid are floats, too: XNNPACK has no such layer.
    Each reader of a tensor gets values of its own, or XNNPACK would cut the network there.

    Args:
        network: As :func:`onebyone.quantizing.quantize` returns it; any other is returned as it
            is. Not modified.
    """
    if not isinstance(network, fx.GraphModule) or not _values(network.graph):
        return network
    made = copy.deepcopy(network)
    for node in _values(made.graph):
        _with_own_values(node)
    for node in list(made.graph.nodes):
        if node.target is quantized_operations().dequantize_per_channel.default:
            _in_floats(made, node)
        elif node.target in _COPYING:
            _on_one_grid(node)
    for node in made.graph.nodes:
        if node.target in _per_tensor():
            node.args = (*node.args[:2], *(x - _HALF for x in node.args[2:5]), torch.int8)
    made.graph.eliminate_dead_code()
    made.delete_all_unused_submodules()
    made.recompile()
    return made


def _per_tensor() -> tuple[Any, Any]:
    known = quantized_operations()
    return known.quantize_per_tensor.default, known.dequantize_per_tensor.default


def _values(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that make values of levels."""
    return [node for node in graph.nodes if node.target is _per_tensor()[1]]


def _with_own_values(node: fx.Node) -> None:
    """Give each reader but one a copy of the node that makes values of levels."""
    for reader in list(node.users)[1:]:
        with node.graph.inserting_before(reader):
            own = node.graph.node_copy(node)
        reader.replace_input_with(node, own)


def _in_floats(network: fx.GraphModule, node: fx.Node) -> None:
    """Replace integers by their values, except the weights of a layer whose outputs are rounded."""
    integers, scales = (network.get_buffer(str(part.target)) for part in _parts(node))
    layer, graph = next(iter(node.users)), network.graph
    if node is layer.args[1] and _grid_after(layer) is not None:
        return
    name = f"{node.name}_values"
    sizes = (-1, *(1 for _ in range(integers.ndim - 1)))
    network.register_buffer(name, integers * scales.reshape(sizes))
    with graph.inserting_before(node):
        node.replace_all_uses_with(graph.get_attr(name))
    graph.erase_node(node)


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    for part in node.args[:2]:
        assert isinstance(part, fx.Node)
        yield part


def _grid_after(node: fx.Node) -> tuple[Any, ...] | None:
    """Return the scale and zero point that a layer's outputs are rounded to, if to one grid."""
    given, rounded = fused_into(node) or node, _per_tensor()[0]
    grids = {reader.args[1:] if reader.target is rounded else None for reader in given.users}
    return grids.pop() if len(grids) == 1 else None


def _on_one_grid(node: fx.Node) -> None:
    """Round what a copying operation reads to the grid of what it writes."""
    grid = _grid_after(node)
    rounded, valued = _per_tensor()
    if grid is None:
        return
    for source in node.all_input_nodes:
        if source.target == valued and source.args[1:] != grid:
            with node.graph.inserting_before(node):
                levels = node.graph.call_function(rounded, (source, *grid))
                values = node.graph.call_function(valued, (levels, *grid))
            node.replace_input_with(source, values)
