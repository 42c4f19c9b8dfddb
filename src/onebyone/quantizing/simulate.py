"""A quantized network simulated in torch: what runtimes compute in int8, in fake quantization."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from onebyone.core.errors import ModelError, RecordError
from onebyone.quantizing.graph import Captured
from onebyone.quantizing.record import LEVELS, Grid, Int8Record

INT32 = 2**31 - 1
BIAS_LIMIT = INT32 // 8  # leaves room for the sum that it is added to


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """Return values rounded to a grid, half to even, and clipped to its ends."""
    levels = torch.round(x / grid.scale) + grid.zero_point
    return (levels.clamp_(0, LEVELS) - grid.zero_point).mul_(grid.scale)


def weight_name(node: str) -> str:
    """Return the name under which a layer's integer weights are kept."""
    return f"{node}.weight"


def bias_name(node: str) -> str:
    """Return the name under which a layer's integer bias is kept."""
    return f"{node}.bias"


def bias_scales(grid: Grid, scales: Tensor) -> Tensor:
    """Return the scale of each channel's 32-bit sums: those of its input and weights multiplied."""
    return (torch.tensor(grid.scale, dtype=torch.float32) * scales).float()


def simulated(
    captured: Captured, record: Int8Record, integers: Mapping[str, Tensor]
) -> fx.GraphModule:
    """Return the network that computes what the exported file does.

    Its operations are those of torch's ``quantized_decomposed`` library, which exporters write as
    QuantizeLinear and DequantizeLinear.

    Args:
        captured: The network's graph. Not modified.
        record: Made for that graph.
        integers: Weights (int8) and biases (int32) of the int8 layers.

    Raises:
        RecordError: If the record was made for another network.
    """
    operations = quantized_operations()
    _check_fits(captured, record, integers)
    module = copy.deepcopy(captured.module)
    nodes = {node.name: node for node in module.graph.nodes}
    inputs = {name: _grid_before(nodes[name], record) for name in captured.layers}
    scales = _scales(captured, record)
    for name, grid in record.grids.items():
        _round(module.graph, nodes[name], grid, operations)
    for name, scale in scales.items():
        before = inputs[name]
        assert before is not None
        weight, bias = integers[weight_name(name)], integers[bias_name(name)]
        _replace_weights(
            module, nodes[name], weight, scale, bias, grid=before, operations=operations
        )
    if any(captured.sizes[1:]):  # the first are channels, which the first layer checks
        _hold_sizes(module, captured.sizes)
    module.graph.eliminate_dead_code()
    for name in scales:
        for part in ("weight", "bias"):
            delattr(module, f"{name}_{part}")
    module.recompile()
    return module.eval()


@fx.node.has_side_effect
def check_sizes(inputs: Tensor, sizes: tuple[int | None, ...]) -> None:
    """Check that an input has the sizes that a graph was traced for.

    Raises:
        ModelError: If it has others.
    """
    if any(held not in (None, size) for held, size in zip(sizes, inputs.shape[1:], strict=True)):
        held = " × ".join("any" if size is None else str(size) for size in sizes)
        raise ModelError(
            f"This int8 network must get inputs of the size {held}, with which it was traced, got "
            f"{' × '.join(map(str, inputs.shape[1:]))}. Quantize the network again with inputs of "
            "that size."
        )


def _hold_sizes(module: fx.GraphModule, sizes: tuple[int | None, ...]) -> None:
    """Let a network refuse inputs of other sizes than those that it was traced for."""
    (source,) = (node for node in module.graph.nodes if node.op == "placeholder")
    with module.graph.inserting_after(source):
        module.graph.call_function(check_sizes, (source, sizes))


def quantized_operations() -> Any:
    """Return torch's operations that round to grids and back; importing their file adds them."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


def _scales(captured: Captured, record: Int8Record) -> dict[str, Tensor]:
    return {
        node: torch.tensor(layer.scales, dtype=torch.float32)
        for node, layer in zip(captured.layers, record.layers, strict=True)
        if layer.precision == "int8"
    }


def _check_fits(captured: Captured, record: Int8Record, integers: Mapping[str, Tensor]) -> None:
    names = [layer.name for layer in captured.layers.values()]
    if names != [layer.name for layer in record.layers]:
        raise RecordError(
            f"The record of {record.network} must be of this network's layers, and is of others. "
            "Give the network that was quantized."
        )
    nodes = {node.name: node for node in captured.graph.nodes}
    for name in record.grids:
        if name not in nodes:
            raise RecordError(f"The record's grid {name!r} must be of a tensor of this network.")
    for (node, layer), kept in zip(captured.layers.items(), record.layers, strict=True):
        if kept.precision == "float32":
            continue
        weight = integers.get(weight_name(node))
        if weight is None or weight.shape != layer.weight.shape:
            raise RecordError(f"The integer weights of layer {layer.name!r} must be of its shape.")
        if len(kept.scales) != len(weight) or _grid_before(nodes[node], record) is None:
            raise RecordError(f"The layer {layer.name!r} must have a scale a channel and a grid.")


def _grid_before(layer: fx.Node, record: Int8Record) -> Grid | None:
    source: Any = layer.args[0]
    return record.grids.get(source.name)


def _round(graph: fx.Graph, node: fx.Node, grid: Grid, operations: Any) -> None:
    """Round a tensor to a grid for all that read it."""
    where = (grid.scale, grid.zero_point, 0, LEVELS, torch.uint8)
    with graph.inserting_after(node):
        levels = graph.call_function(operations.quantize_per_tensor.default, (node, *where))
    with graph.inserting_after(levels):
        values = graph.call_function(operations.dequantize_per_tensor.default, (levels, *where))
    node.replace_all_uses_with(values, delete_user_cb=lambda user: user is not levels)


def _replace_weights(
    module: fx.GraphModule,
    node: fx.Node,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor,
    *,
    grid: Grid,
    operations: Any,
) -> None:
    """Make a layer read integers, times their scales."""
    made = []
    for part, values, scale, limits in (
        ("weight", weight, scales, (-128, 127)),
        ("bias", bias, bias_scales(grid, scales), (-INT32 - 1, INT32)),
    ):
        # ONNX Runtime computes a linear layer in int8 only if its weights have zero points.
        zeros = torch.zeros(len(scale), dtype=values.dtype)
        parts = {"integers": values, "scales": scale, "zeros": zeros}
        for name, tensor in parts.items():
            module.register_buffer(f"{node.name}_{part}_{name}", tensor.clone())
        with module.graph.inserting_before(node):
            read = [module.graph.get_attr(f"{node.name}_{part}_{name}") for name in parts]
            made.append(
                module.graph.call_function(
                    operations.dequantize_per_channel.default,
                    (*read, 0, *limits, values.dtype),
                )
            )
    node.args = (node.args[0], *made, *node.args[3:])
