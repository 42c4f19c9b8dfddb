"""Queries about a node of a traced network: its module, its shape, whether it mutates a tensor."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from onebyone.core.precision import has_bf16
from onebyone.runtimes.packed.layer_calls import symmetric_padding


def module_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or ``None``."""
    if node.op != "call_module":
        return None
    return graph.get_submodule(str(node.target))


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's output, or ``None`` if that is not one tensor."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def layer_of(graph: fx.GraphModule, node: fx.Node) -> nn.Conv2d | nn.Linear | None:
    """Return the convolution or linear layer that a node calls, or ``None`` if oneDNN lacks it."""
    layer = module_of(graph, node)
    if type(layer) not in (nn.Conv2d, nn.Linear) or len(node.args) != 1 or node.kwargs:
        return None
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    if not _has_kernels(layer.weight.dtype):
        return None
    return layer if isinstance(layer, nn.Linear) or _is_plain(layer, shape_of(node)) else None


def _is_plain(layer: nn.Conv2d, shape: tuple[int, ...] | None) -> bool:
    of_maps = shape is not None and len(shape) == 4
    return of_maps and layer.padding_mode == "zeros" and symmetric_padding(layer) is not None


def _has_kernels(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16("cpu"))


def mutates(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node modifies one of its input tensors."""
    if node.op == "call_module":
        return bool(getattr(module_of(graph, node), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    functional = node.op == "call_function"
    return functional and (
        name.endswith("_")
        or bool(node.kwargs.get("inplace"))
        or node.target in (operator.iadd, operator.imul, operator.isub, operator.setitem)
    )
