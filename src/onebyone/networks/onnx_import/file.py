"""Reads an ONNX file into plain records: nodes, constants, inputs and outputs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onebyone.core.errors import MissingExtraError, ModelError
from onebyone.core.read_files import printable, reason_of, why_no_file

# A constant with more values than this is refused: files can claim any size.
MOST_VALUES = 2**31
_OWN_DOMAINS = ("", "ai.onnx")
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "QLinear", "Integer", "DynamicQuantize")
_OLDEST, _NEWEST = 7, 28


@dataclass(frozen=True)
class OnnxNode:
    """One node of the file.

    Attributes:
        name: Its name; ``#12`` after its place where it has none.
        operator: Such as ``Conv``.
        inputs: Names of values; empty for one that is left out.
        outputs: Names of values.
        attributes: Plain values; tensors are constants.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{printable(self.name)!r} ({printable(self.operator)})"


@dataclass(frozen=True)
class OnnxInput:
    """An input of the file; a size that is free is ``None``."""

    name: str
    sizes: tuple[int | None, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class OnnxFile:
    """The content of a file.

    Attributes:
        path: The file.
        sha256: Of its content, without the files of weights beside it.
        opset: Version of the operators.
        nodes: In the order of computing.
        constants: Weights by name.
        inputs: Without weights.
        outputs: Names of values.
        model: The whole model, with the weights of files beside it, as onnx's own object.
    """

    path: Path
    sha256: str
    opset: int
    nodes: tuple[OnnxNode, ...]
    constants: Mapping[str, Tensor]
    inputs: tuple[OnnxInput, ...]
    outputs: tuple[str, ...]
    model: Any


def read_file(path: Path) -> OnnxFile:
    """Read an ONNX file, and the files of weights beside it; nothing of it is run.

    Raises:
        ModelError: If it is missing, unreadable, quantized, or has operators that are not ONNX's.
        MissingExtraError: If the package onnx is not installed.
    """
    why = why_no_file(path)
    if why is not None:
        raise ModelError(f"The network's file {printable(path)} must exist, but it {why}.")
    content = path.read_bytes()
    model = _parsed(path)
    graph = model.graph
    try:
        _check_texts(graph)
        _check_operators(path, model)
        constants = {each.name: constant_of(each) for each in graph.initializer}
        nodes = tuple(_node(place, node) for place, node in enumerate(graph.node))
        inputs = tuple(_input(each) for each in graph.input if each.name not in constants)
    except ModelError:
        raise
    except Exception as error:  # onnx and NumPy raise many kinds for what does not fit
        raise unreadable(path, reason_of(error)) from error
    outputs = tuple(each.name for each in graph.output)
    if not inputs or not outputs:
        raise unreadable(path, "it has no input or no output")
    return OnnxFile(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        opset=_opset(path, model),
        nodes=nodes,
        constants=constants,
        inputs=inputs,
        outputs=outputs,
        model=model,
    )


def unreadable(path: Path, why: str) -> ModelError:
    """Return the error for a file whose content is not valid."""
    return ModelError(
        f"{printable(path)} must be a valid ONNX file, but it cannot be read: {why}. Check it with "
        f"`onnx.checker.check_model`, or export it again."
    )


def constant_of(proto: Any) -> Tensor:
    """Return the tensor of a constant in the file.

    Raises:
        ModelError: If it has a type that torch has not.
        ValueError: If its sizes are not those of its values.
    """
    from onnx import numpy_helper  # noqa: PLC0415 - an extra

    sizes = tuple(proto.dims)
    if any(size < 0 for size in sizes) or math.prod(sizes) > MOST_VALUES:
        raise ValueError(f"the constant {printable(proto.name)} has the sizes {sizes}")
    array = np.array(numpy_helper.to_array(proto))
    if array.dtype.kind not in "fiub" or array.dtype.name.startswith(("int4", "uint4", "float8")):
        raise ModelError(
            f"The constant {printable(proto.name)} must be of numbers, but is of "
            f"{array.dtype.name}. Export the network in float32."
        )
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(array)


def _parsed(path: Path) -> Any:
    try:
        import onnx  # noqa: PLC0415 - an extra
        import onnx.inliner  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("onnx", "onnx", f"The file {printable(path)}") from error
    try:
        # It also refuses weights outside of the file's folder.
        model = onnx.load(str(path))
        return onnx.inliner.inline_local_functions(model) if model.functions else model
    except Exception as error:  # protobuf's and onnx's own classes
        raise unreadable(path, reason_of(error)) from error


def _opset(path: Path, model: Any) -> int:
    found = [each.version for each in model.opset_import if each.domain in _OWN_DOMAINS]
    if not found:
        raise unreadable(path, "it does not say which version of the operators it uses")
    version = int(max(found))
    if not _OLDEST <= version <= _NEWEST:
        raise ModelError(
            f"{printable(path)} must use the operators of opset {_OLDEST} to {_NEWEST}, got "
            f"{version}. Convert it with `onnx.version_converter.convert_version`."
        )
    return version


def _check_texts(graph: Any) -> None:
    """Check that all names are text: protobuf gives bytes where they are not.

    Raises:
        TypeError: If one is not.
    """
    for node in graph.node:
        named = [each.name for each in node.attribute]
        for name in (node.name, node.op_type, node.domain, *node.input, *node.output, *named):
            if not isinstance(name, str):
                raise TypeError(f"the name {name!r} of a node is not text")
    for each in (*graph.initializer, *graph.input, *graph.output):
        if not isinstance(each.name, str):
            raise TypeError(f"the name {each.name!r} of a value is not text")


def _check_operators(path: Path, model: Any) -> None:
    quantized = [
        node for node in model.graph.node if any(word in node.op_type for word in _QUANTIZED)
    ]
    if quantized:
        node = quantized[0]
        raise ModelError(
            f"{printable(path)} is quantized: its node {printable(node.name)!r} is a "
            f"{printable(node.op_type)}. Its weights are rounded already, so rewrites have nothing "
            f"exact to start from. Give the float32 file that it was made from; `compare` and "
            f"`bench` run this file as it is."
        )
    foreign = [node for node in model.graph.node if node.domain not in _OWN_DOMAINS]
    if foreign:
        node = foreign[0]
        raise ModelError(
            f"The node {printable(node.name)!r} of {printable(path)} is a "
            f"{printable(node.op_type)} of {printable(node.domain)!r}, which is not ONNX's own. "
            f"Give the file as it was before a tool optimized it for one runtime."
        )


def _node(place: int, node: Any) -> OnnxNode:
    return OnnxNode(
        name=node.name or f"#{place}",
        operator=node.op_type,
        inputs=_without_ends(node.input),
        outputs=tuple(node.output),
        attributes={each.name: _attribute(each) for each in node.attribute},
    )


def _without_ends(names: Iterable[str]) -> tuple[str, ...]:
    """Return names without empty ones at the end: inputs that are left out."""
    found = list(names)
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def _attribute(attribute: Any) -> Any:
    from onnx import AttributeProto, helper  # noqa: PLC0415 - an extra

    if attribute.type == AttributeProto.TENSOR:
        return constant_of(attribute.t)
    if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        return None  # of loops and branches, which are refused by name
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, int | float):
        return value
    return [each.decode("utf-8", "replace") if isinstance(each, bytes) else each for each in value]


def _input(proto: Any) -> OnnxInput:
    kind = proto.type.tensor_type
    if not proto.type.HasField("tensor_type"):
        raise ModelError(f"The input {printable(proto.name)} must be a tensor.")
    sizes = tuple(
        int(each.dim_value) if each.HasField("dim_value") and each.dim_value > 0 else None
        for each in kind.shape.dim
    )
    return OnnxInput(proto.name, sizes, dtype_of(kind.elem_type))


def dtype_of(number: int) -> torch.dtype:
    """Return torch's type for ONNX's number of an element type.

    Raises:
        ModelError: If torch has none for it.
    """
    from onnx import TensorProto  # noqa: PLC0415 - an extra

    known: dict[int, torch.dtype] = {
        TensorProto.FLOAT: torch.float32,
        TensorProto.DOUBLE: torch.float64,
        TensorProto.FLOAT16: torch.float16,
        TensorProto.BFLOAT16: torch.bfloat16,
        TensorProto.UINT8: torch.uint8,
        TensorProto.INT8: torch.int8,
        TensorProto.INT16: torch.int16,
        TensorProto.INT32: torch.int32,
        TensorProto.INT64: torch.int64,
        TensorProto.BOOL: torch.bool,
    }
    if number not in known:
        raise ModelError(
            f"A tensor must be of numbers, but the file has one of type number {number}. Export "
            f"the network in float32."
        )
    return known[number]
