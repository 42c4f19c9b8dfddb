"""Reads a network from an ONNX file as a module of ordinary layers.

Each operator has a function in a table that adds layers or calls to a graph of ``torch.fx``; the
network's forward is generated from that graph. Nothing of the file is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from onebyone.core.errors import ModelError
from onebyone.core.read_files import printable, reason_of
from onebyone.networks.fx_forward import set_forward
from onebyone.networks.onnx_import import activations, arithmetic, convolutions, reductions, shapes
from onebyone.networks.onnx_import.builder import Builder, GraphBuilder, Refused
from onebyone.networks.onnx_import.file import OnnxFile, OnnxNode, read_file
from onebyone.networks.onnx_import.network import OnnxNetwork

OPERATORS: Mapping[str, Builder] = {
    **activations.OPERATORS,
    **arithmetic.OPERATORS,
    **convolutions.OPERATORS,
    **reductions.OPERATORS,
    **shapes.OPERATORS,
}


@dataclass(frozen=True)
class Imported:
    """A network from a file.

    Attributes:
        network: In evaluation mode, on the CPU.
        file: What it was read from.
        arguments: Names of the forward's arguments, in the order of the file's inputs.
        graph: What the forward computes.
        made: For each value of the file that is a tensor: the node of the graph that makes it.
    """

    network: OnnxNetwork
    file: OnnxFile
    arguments: tuple[str, ...]
    graph: fx.Graph
    made: Mapping[str, fx.Node]


def read(file: OnnxFile, shapes: Sequence[tuple[int, ...]]) -> Imported:
    """Return the network of a file.

    Args:
        file: From :func:`~onebyone.networks.onnx_import.file.read_file`.
        shapes: For each input the shape of an example, batch included.

    Raises:
        ModelError: If a node cannot be read; names it and says why.
    """
    b = GraphBuilder(file, shapes)
    for node in file.nodes:
        _add(b, node)
    try:
        b.finish()
    except Refused as refusal:
        raise ModelError(f"{printable(file.path)} cannot be read: {refusal}.") from refusal
    set_forward(b.network, evaluation=b.graph, training=b.graph)
    alive = set(b.graph.nodes)
    # A layer that took the next node's bias makes the value of that node, not its own.
    last = {
        value.node: name
        for name, value in b.values.items()
        if isinstance(value, fx.Proxy) and value.node in alive
    }
    return Imported(
        network=b.network.eval(),
        file=file,
        arguments=tuple(b.arguments),
        graph=b.graph,
        made={name: node for node, name in last.items()},
    )


def _add(b: GraphBuilder, node: OnnxNode) -> None:
    add = OPERATORS.get(node.operator)
    if add is None:
        raise _refused(b, node, "this operator is not supported")
    missing = [name for name in node.inputs if name and name not in b.values]
    if missing:
        raise _refused(b, node, f"nothing before it makes its input {missing[0]!r}")
    values = [b.values[name] if name else None for name in node.inputs]
    try:
        made = add(b, node, *values)
    except Refused as refusal:
        raise _refused(b, node, str(refusal)) from refusal
    except Exception as error:  # a file may hold anything, and torch refuses it in many ways
        raise _refused(b, node, reason_of(error)) from error
    found = made if isinstance(made, tuple) else (made,)
    for name, value in zip(node.outputs, found, strict=False):
        if name:
            b.values[name] = value


def _refused(b: GraphBuilder, node: OnnxNode, why: str) -> ModelError:
    return ModelError(
        f"The node {node} of {printable(b.file.path)} cannot be read: {printable(why)}. Export the "
        f"network without it, or give its PyTorch code as path/net.py:factory."
    )


__all__ = ["OPERATORS", "Imported", "OnnxFile", "OnnxNetwork", "read", "read_file"]
