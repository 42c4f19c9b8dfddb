"""Which layers of an ONNX network read what which others give, through what has no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onebyone.quantizing.untrained import COMPUTING, PASSING, Graph

SUM_PREFIX = "sum "  # before the name of a tensor that is a sum or a concatenation


@dataclass(frozen=True)
class Edge:
    """A tensor that one operation gives and another one reads.

    Attributes:
        first: The layer that gives it, or a sum.
        second: The layer or sum that reads it.
        values: Of one input.
    """

    first: str
    second: str
    values: int


@dataclass(frozen=True)
class Flow:
    """The layers of a network that int8 can compute, and what is between them.

    Attributes:
        edges: Between layers and sums.
        sums: Of each sum or concatenation the layers and sums that it reads.
        gives: Values of one input that each layer gives, in order of execution.
    """

    edges: tuple[Edge, ...]
    sums: Mapping[str, tuple[str, ...]]
    gives: Mapping[str, int]


def flow_of(content: bytes) -> Flow:
    """Return what flows between the layers of an ONNX file's network.

    Operations on one tensor, such as activations and pooling, are passed through. What another
    operation gives is in float32 in any case, and no edge.

    Args:
        content: An ONNX file, for inputs of one size.
    """
    import onnx  # noqa: PLC0415 - an extra

    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content))
    graph = Graph(model.graph)
    sizes = _values(model.graph)
    sources: dict[str, str] = {}
    edges: list[Edge] = []
    sums: dict[str, tuple[str, ...]] = {}
    gives: dict[str, int] = {}
    for node in graph.nodes:
        inputs, given = list(graph.tensors(node)), node.output[0]
        known = [sources[name] for name in inputs if name in sources]
        layer = graph.layer_name(node)
        if layer:
            gives[layer] = sizes.get(given, 0)
            name = layer
        elif node.op_type in COMPUTING and len(inputs) > 1 and len(known) == len(inputs):
            name = f"{SUM_PREFIX}{given}"
            sums[name] = tuple(known)
        elif node.op_type in PASSING | COMPUTING and len(inputs) == 1:
            if known:
                sources[given] = known[0]
            continue
        else:
            continue
        read = inputs[:1] if layer else inputs
        edges += [Edge(sources[t], name, sizes.get(t, 0)) for t in read if t in sources]
        sources[given] = name
    return Flow(tuple(edges), sums, gives)


def _values(graph: object) -> dict[str, int]:
    """Return how many values of one input each tensor has."""
    shaped = (*graph.input, *graph.value_info, *graph.output)  # type: ignore[attr-defined]
    return {
        each.name: math.prod(size.dim_value for size in each.type.tensor_type.shape.dim[1:])
        for each in shaped
    }
