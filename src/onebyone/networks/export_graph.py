"""A graph of a network's module calls, from ``torch.export``.

Export returns single operations, each with the modules that it came from. The operations of one
call of a module without children are merged into that call.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from onebyone.core.shared_state import errors_unprinted, warnings_ignored
from onebyone.networks.fx_forward import CannotTrace, attributes_kept

_ATEN = torch.ops.aten
# Operations and the equivalent function.
_FUNCTIONS: dict[Any, Any] = {
    _ATEN.view.default: torch.reshape,
    _ATEN.reshape.default: torch.reshape,
    _ATEN._unsafe_view.default: torch.reshape,  # noqa: SLF001 - so it is called
    _ATEN.flatten.using_ints: torch.flatten,
    _ATEN.squeeze.default: torch.squeeze,
    _ATEN.squeeze.dim: torch.squeeze,
    _ATEN.squeeze.dims: torch.squeeze,
    _ATEN.mean.dim: torch.mean,
    _ATEN.permute.default: torch.permute,
    _ATEN.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
    _ATEN.linear.default: F.linear,
}


def exported_graph(
    network: nn.Module, example: Tensor
) -> tuple[fx.Graph, dict[fx.Node, tuple[int, ...]]]:
    """Return a graph of module and function calls, and the shapes of their outputs.

    Args:
        network: In evaluation mode. Not modified.
        example: An input ``(batch, …)``.

    Raises:
        CannotTrace: If the network cannot be exported; the message says why.
    """
    # torch prints the whole graph of a network that it cannot export.
    with attributes_kept(network), warnings_ignored(), errors_unprinted():
        try:
            program = torch.export.export(network, (example.clone(),), strict=False)
        except Exception as error:  # a user's forward may do anything
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CannotTrace(lines[0].rstrip(".")) from error
    modules = dict(network.named_modules())
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    shapes: dict[fx.Node, tuple[int, ...]] = {}
    operations = list(program.graph.nodes)
    for key, group in itertools.groupby(operations, key=lambda n: _origin(n, modules)):
        nodes = list(group)
        name, is_leaf = key[0], key[1]
        for node in [nodes[-1]] if is_leaf else nodes:
            new = _copied(
                graph, node, nodes if is_leaf else [node], name if is_leaf else None, made
            )
            made.update(dict.fromkeys(nodes if is_leaf else [node], new))
            new.meta["caller"] = name.rpartition(".")[0] if is_leaf else name
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                shapes[new] = tuple(int(size) for size in value.shape)
    return graph, shapes


def _origin(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, bool, str]:
    """Return the name of a node's innermost module, whether it is a leaf, and its call's key."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack or node.op != "call_function":
        return "", False, node.op
    key, (name, _) = list(stack.items())[-1]
    module = modules.get(name)
    leaf = module is not None and bool(name) and not any(True for _ in module.children())
    return name, leaf, key


def _copied(
    graph: fx.Graph,
    node: fx.Node,
    group: list[fx.Node],
    module: str | None,
    made: dict[fx.Node, fx.Node],
) -> fx.Node:
    """Add a node to the new graph for one operation, or for a whole module call."""
    if node.op == "output":
        # Changed buffers come first, then what the forward returns.
        results: Any = node.args[0]
        output: fx.Node = graph.output(made[results[-1]])
        return output
    if module is None:
        target = _FUNCTIONS.get(node.target, node.target)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda old: made[old])
        return graph.create_node(node.op, target, args, kwargs)
    inputs = dict.fromkeys(
        source
        for part in group
        for source in part.all_input_nodes
        if source not in group and source.op != "placeholder"
    )
    # The weights are placeholders too. So is the network's input, which a head never takes.
    return graph.call_module(module, tuple(made[source] for source in inputs))
