"""The int8 form of an ONNX file for timing: its structure is that of the deployed file.

Capturing a network, choosing its integers and exporting it takes seconds, which is too long for the
hundreds of little networks that a plan times. What a kernel takes depends on shapes and on where
tensors are quantized, not on scales: here these are arbitrary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from onebyone.core.errors import ModelError
from onebyone.quantizing.pixels import find_pixels

# The operators of `placement`, as ONNX names them.
_FUSED = frozenset({"Relu", "Clip"})
PASSING = _FUSED | {
    "DepthToSpace", "Dropout", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape",
    "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
_TWO_INPUTS = frozenset({"Add", "Mul"})
AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
COMPUTING = _TWO_INPUTS | AVERAGES | {"Concat", "LeakyRelu", "Sigmoid"}
_POSITIVE = frozenset({"Relu", "Clip", "Sigmoid"})
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
# Zero in the middle of the grid costs some kernels more than zero at its end: as in a real file.
_MIDDLE = 120
# The largest scale, from 0 to 5.1. A grid that went beyond 6 would keep ONNX Runtime from computing
# a ReLU6 within its layer; in a real file none does.
_SCALE = 0.02


def int8_form(
    content: bytes,
    *,
    float32: Collection[str] = (),
    first: int = 0,
    inputs: Tensor | None = None,
) -> bytes:
    """Return an ONNX file with arbitrary scales whose layers compute in int8.

    Tensors are quantized where :func:`onebyone.quantizing.quantize` quantizes them. The outputs are
    of no use; the time is that of the real file.

    Args:
        content: An ONNX file of a network in evaluation mode, its batch norms folded.
        float32: Names of modules that stay float32.
        first: The first layer that computes in int8: those before it stay float32, too.
        inputs: Real inputs ``(batch, …)``. If they are pictures of bytes, the deployed file maps
            them to levels from 0, which some runtimes read faster than levels around a zero.

    Raises:
        ModelError: If no layer can be quantized, or there is none of a name in ``float32``.
    """
    import onnx  # noqa: PLC0415 - an extra

    model = onnx.load_from_string(content)
    graph = Graph(model.graph)
    layers = {id(node): name for node in graph.nodes if (name := graph.layer_name(node))}
    unknown = set(float32) - set(layers.values())
    if unknown:
        raise ModelError(
            f"The layers {', '.join(sorted(unknown))} must be in the exported graph under their "
            f"names to stay float32, and are not. Leave them out."
        )
    later = list(layers.items())[first:]
    quantized = {key for key, name in later if name not in float32}
    if not quantized:
        raise ModelError("A network must have a layer that can be quantized, and none is left.")
    levels = inputs is not None and find_pixels(inputs) is not None
    grids = _grids(graph, quantized, from_zero=levels)
    for node in graph.nodes:
        if id(node) in quantized:
            graph.quantize_weights(node, grids[node.input[0]])
    for tensor, grid in grids.items():
        graph.round(tensor, grid)
    graph.write()
    made: bytes = model.SerializeToString()
    return made


def with_conversion(content: bytes) -> bytes:
    """Return an ONNX file whose first activation is quantized and dequantized, for its time."""
    import onnx  # noqa: PLC0415 - an extra

    model = onnx.load_from_string(content)
    graph = Graph(model.graph)
    tensor = next(node.output[0] for node in graph.nodes if node.op_type == "Relu")
    graph.round(tensor, _Grid(0, _SCALE))
    graph.write()
    made: bytes = model.SerializeToString()
    return made


@dataclass(frozen=True)
class _Grid:
    """Where zero lies on a grid, and its scale."""

    zero_point: int
    scale: float


@dataclass
class Graph:
    """An ONNX graph whose tensors are looked up by name."""

    proto: Any
    nodes: list[Any] = field(init=False)
    constants: dict[str, NDArray[Any]] = field(init=False)
    added: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        from onnx import numpy_helper  # noqa: PLC0415 - an extra

        self.nodes = list(self.proto.node)
        self.constants = {x.name: numpy_helper.to_array(x) for x in self.proto.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.outputs = {x.name for x in self.proto.output}
        self.inputs = {x.name for x in self.proto.input}
        self.users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.users.setdefault(name, []).append(node)

    def layer_name(self, node: Any) -> str:
        """Return the module's name of a layer that int8 can compute; empty for other nodes."""
        if node.op_type not in _LAYERS or len(node.input) < 2:
            return ""
        weight = self.constants.get(node.input[1])
        if weight is None or weight.ndim != (4 if node.op_type == "Conv" else 2):
            return ""
        return str(node.input[1]).removesuffix(".weight")

    def tensors(self, node: Any) -> Iterator[str]:
        """Yield the names of the activations that an operator reads."""
        first = node.input[:1] if node.op_type in PASSING else node.input
        for name in first:
            if name and name not in self.constants:
                yield name

    def round(self, tensor: str, grid: _Grid) -> None:
        """Round a tensor to a grid for all that read it."""
        scale = self._constant(f"{tensor}_scale", np.float32(grid.scale))
        zero = self._constant(f"{tensor}_zero", np.uint8(grid.zero_point))
        levels, values = f"{tensor}_levels", f"{tensor}_rounded"
        for node in self.users.get(tensor, []):
            for place, name in enumerate(node.input):
                if name == tensor:
                    node.input[place] = values
        self._node("QuantizeLinear", [tensor, scale, zero], levels)
        self._node("DequantizeLinear", [levels, scale, zero], values)

    def quantize_weights(self, node: Any, grid: _Grid) -> None:
        """Make a layer, whose input has that grid, read integers, times their scales."""
        axis = 0 if node.op_type == "Conv" or _is_transposed(node) else 1
        weight = self.constants[node.input[1]]
        others = tuple(place for place in range(weight.ndim) if place != axis)
        scales = (np.abs(weight).max(others) / 127).clip(1e-20).astype(np.float32)
        shape = [-1 if place == axis else 1 for place in range(weight.ndim)]
        integers = np.round(weight / scales.reshape(shape)).clip(-127, 127).astype(np.int8)
        name = node.output[0]
        node.input[1] = self._dequantized(f"{name}_weight", integers, scales, axis)
        bias = self.constants.get(node.input[2]) if len(node.input) > 2 else None
        if node.op_type == "MatMul":
            return
        sums = np.zeros(len(scales), np.int32)
        # Runtimes compute a layer in int8 only if its bias has just this scale.
        steps = (np.float32(grid.scale) * scales).astype(np.float32)
        if bias is not None:
            sums = np.round(bias / steps).clip(-(2**27), 2**27).astype(np.int32)
        dequantized = self._dequantized(f"{name}_bias", sums, steps, 0)
        if len(node.input) > 2:
            node.input[2] = dequantized
        else:
            node.input.append(dequantized)

    def _dequantized(
        self, name: str, integers: NDArray[Any], scales: NDArray[Any], axis: int
    ) -> str:
        parts = {"": integers, "_scales": scales, "_zeros": np.zeros(len(scales), integers.dtype)}
        read = [self._constant(f"{name}{part}", value) for part, value in parts.items()]
        return self._node("DequantizeLinear", read, f"{name}_values", axis=axis)

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper  # noqa: PLC0415 - an extra

        self.proto.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **how: Any) -> str:
        from onnx import helper  # noqa: PLC0415 - an extra

        self.added.append(helper.make_node(kind, inputs, [output], name=output, **how))
        return output

    def write(self) -> None:
        """Put the new operators before what reads them, and drop weights that nothing reads."""
        made = {name: node for node in self.added for name in node.output}
        ordered: list[Any] = []
        done: set[int] = set()

        def put(node: Any) -> None:
            for name in node.input:
                before = made.get(name)
                if before is not None and id(before) not in done:
                    put(before)
            done.add(id(node))
            ordered.append(node)

        for node in self.nodes:
            put(node)
        read = {name for node in ordered for name in node.input} | self.outputs
        kept = [x for x in self.proto.initializer if x.name in read]
        del self.proto.node[:], self.proto.initializer[:]
        self.proto.node.extend(ordered)
        self.proto.initializer.extend(kept)


def _is_transposed(node: Any) -> bool:
    return any(each.name == "transB" and each.i for each in node.attribute)


def _grids(graph: Graph, quantized: Collection[int], *, from_zero: bool) -> dict[str, _Grid]:
    """Return the tensors that are quantized, in order, with their grids; as `placement.place`.

    Args:
        graph: Not modified.
        quantized: Its layers in int8.
        from_zero: Whether ungrouped convolutions read the inputs as levels from 0.
    """
    before = _before_layers(graph, quantized)
    read = _read_by_layers(graph, quantized)
    positive = _never_negative(graph, quantized)
    grids: dict[str, _Grid] = {}

    def own(name: str) -> _Grid:
        return _Grid(0 if name in positive else _MIDDLE, _SCALE / (1 + 0.01 * len(grids)))

    for name in graph.inputs:
        if name in before and name in read:
            mapped = from_zero and all(_reads_pixels(node) for node in graph.users[name])
            grids[name] = _Grid(0, _SCALE) if mapped else own(name)
    for node in graph.nodes:
        name, inputs = node.output[0], list(graph.tensors(node))
        wanted = [part for part in node.output if part in before]
        if not wanted or not inputs:
            continue
        fused = _fused_into(graph, inputs[0]) is node
        if not fused and node.op_type not in PASSING:
            computes = _computes(node, inputs, quantized, grids)
            if _fused_into(graph, name) is None and (name in read or computes):
                grids[name] = own(name)
        elif inputs[0] in grids:
            grids |= dict.fromkeys(wanted, grids[inputs[0]])
        elif name in read or (fused and _gives_8_bits(graph, inputs[0], quantized, grids)):
            grids[name] = own(name)
    return grids


def _reads_pixels(node: Any) -> bool:
    groups = next((each.i for each in node.attribute if each.name == "group"), 1)
    return node.op_type == "Conv" and groups == 1


def _never_negative(graph: Graph, quantized: Collection[int]) -> set[str]:
    """Return the tensors whose values are not below zero, so that it lies at their grid's end."""
    found: set[str] = set()
    for node in graph.nodes:
        inputs = list(graph.tensors(node))
        keeps = id(node) not in quantized and all(name in found for name in inputs)
        if node.op_type in _POSITIVE or (inputs and keeps):
            found.add(node.output[0])
    return found


def _fused_into(graph: Graph, name: str) -> Any:
    """Return the activation that alone reads a tensor, if there is one."""
    users = graph.users.get(name, [])
    alone = len(users) == 1 and name not in graph.outputs and users[0].op_type in _FUSED
    return users[0] if alone else None


def _gives_8_bits(
    graph: Graph, name: str, quantized: Collection[int], grids: Collection[str]
) -> bool:
    maker = next((node for node in graph.nodes if node.output[0] == name), None)
    if maker is None:
        return False
    return _computes(maker, list(graph.tensors(maker)), quantized, grids)


def _computes(
    node: Any, inputs: list[str], quantized: Collection[int], grids: Collection[str]
) -> bool:
    """Return whether an operator gives 8 bits by itself."""
    if id(node) in quantized:
        return True
    needed = 2 if node.op_type in _TWO_INPUTS else 1
    enough = node.op_type in COMPUTING and len(inputs) >= needed
    return enough and all(name in grids for name in inputs)


def _before_layers(graph: Graph, quantized: Collection[int]) -> set[str]:
    """Return the tensors that an int8 layer or an average depends on."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        wanted = id(node) in quantized or node.op_type in AVERAGES
        if wanted or any(name in found for name in node.output):
            found.update(graph.tensors(node))
    return found


def _read_by_layers(graph: Graph, quantized: Collection[int]) -> set[str]:
    """Return the tensors that int8 layers read, and those that these are parts of."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        tensors = list(graph.tensors(node))
        fused = bool(tensors) and _fused_into(graph, tensors[0]) is node
        passes = node.op_type in PASSING and (fused or node.op_type not in _FUSED)
        if id(node) in quantized or (passes and any(part in found for part in node.output)):
            found.update(tensors[:1])
    return found
