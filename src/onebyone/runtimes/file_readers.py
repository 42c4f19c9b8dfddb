"""Reads exported files, each kind in its runtime: their inputs, outputs and costs."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from onebyone.core.errors import ModelError

# ONNX's names of types that torch calls otherwise.
_TYPES = {"float": "float32", "double": "float64"}

Arrays = Mapping[str, NDArray[Any]]


class Port(NamedTuple):
    """An input of a file; a size that is free is ``None``."""

    name: str
    sizes: tuple[int | None, ...]
    dtype: torch.dtype


class Costs(NamedTuple):
    """Parameters and MACs of a file's layers.

    Attributes:
        params: Number of weights of convolutions and matrix products.
        macs: Their multiply-accumulates for one input.
    """

    params: int
    macs: int


class Reader(ABC):
    """A file of a network in its runtime.

    Attributes:
        path: Of the file.
    """

    runtime: str
    extra: str

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def file_bytes(self) -> int:
        """The size of the file, with the weights beside it."""
        return self.path.stat().st_size

    @abstractmethod
    def ports(self) -> tuple[Port, ...]:
        """Return the file's inputs."""

    @abstractmethod
    def run(self, arrays: Arrays) -> Sequence[NDArray[Any]]:
        """Return the file's outputs.

        Raises:
            RuntimeError: If the runtime cannot run these inputs.
        """

    @abstractmethod
    def costs(self, shapes: Mapping[str, tuple[int, ...]]) -> Costs:
        """Return the parameters and MACs for inputs of these shapes, by their names."""


class OnnxReader(Reader):
    """An ONNX file in ONNX Runtime."""

    runtime, extra = "onnxruntime", "onnx"

    @property
    def content(self) -> bytes:
        """The content of the file, with that of its files of weights.

        Raises:
            ModelError: If its files of weights cannot be read, or are too large for one content.
        """
        own = self.path.read_bytes()
        # The word stands in every file with weights beside it; without it nothing is parsed.
        return self._whole() if b"location" in own else own

    def _whole(self) -> bytes:
        import onnx  # noqa: PLC0415 - an extra

        try:
            # It refuses weights outside of the file's folder.
            whole: bytes = onnx.load(str(self.path)).SerializeToString()
        except Exception as error:  # protobuf's and onnx's own classes
            raise ModelError(
                f"The network's file {self.path} must be readable with its files of weights, but "
                f"is not: {error}"
            ) from error
        return whole

    @cached_property
    def _session(self) -> Any:
        from onebyone.runtimes.onnx import onnxruntime_session  # noqa: PLC0415 - imports this one

        return onnxruntime_session(self.content)

    def ports(self) -> tuple[Port, ...]:
        """Return the file's inputs."""
        return tuple(
            Port(
                port.name,
                tuple(size if isinstance(size, int) else None for size in port.shape),
                _torch_type(port.type.removeprefix("tensor(").removesuffix(")")),
            )
            for port in self._session.get_inputs()
        )

    def run(self, arrays: Arrays) -> list[NDArray[Any]]:
        """Return the file's outputs."""
        try:
            found: list[NDArray[Any]] = self._session.run(None, dict(arrays))
        except Exception as error:  # the runtime's own classes, which derive only from Exception
            raise RuntimeError(str(error)) from error
        return found

    def costs(self, shapes: Mapping[str, tuple[int, ...]]) -> Costs:
        """Return the parameters and MACs for inputs of these shapes."""
        import onnx  # noqa: PLC0415 - an extra

        model = onnx.load_from_string(self.content)
        for each in model.graph.input:
            places = each.type.tensor_type.shape.dim
            for place, size in zip(places, shapes.get(each.name, ()), strict=False):
                place.dim_value = size
        graph = onnx.shape_inference.infer_shapes(model).graph
        sizes = {
            value.name: tuple(size.dim_value for size in value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.value_info, *graph.output)
        }
        sizes |= {each.name: tuple(each.dims) for each in graph.initializer}
        params = macs = 0
        for node in graph.node:
            if node.op_type not in ("Conv", "Gemm", "MatMul"):
                continue
            first, weight = sizes.get(node.input[0], ()), sizes.get(node.input[1], ())
            summed = weight[1:] if node.op_type == "Conv" else first[-1:]
            params += math.prod(weight)
            macs += math.prod(sizes.get(node.output[0], ())) * math.prod(summed)
        return Costs(params, macs)


class OpenVinoReader(Reader):
    """An ``.xml`` file, with its weights beside it, in OpenVINO."""

    runtime, extra = "openvino", "openvino"

    @property
    def file_bytes(self) -> int:
        """The size of the file, with the weights beside it."""
        beside = self.path.with_suffix(".bin")
        return super().file_bytes + (beside.stat().st_size if beside.exists() else 0)

    @cached_property
    def _compiled(self) -> Any:
        from onebyone.runtimes.openvino import (  # noqa: PLC0415 - imports this one
            compile_openvino,
            settings,
        )

        return compile_openvino(str(self.path), settings("f32"))

    def ports(self) -> tuple[Port, ...]:
        """Return the file's inputs."""
        return tuple(
            Port(
                port.get_any_name(),
                tuple(size.get_length() if size.is_static else None for size in port.partial_shape),
                _torch_type(port.get_element_type().to_dtype().name),
            )
            for port in self._compiled.inputs
        )

    def run(self, arrays: Arrays) -> list[NDArray[Any]]:
        """Return the file's outputs."""
        inputs = [arrays[port.get_any_name()] for port in self._compiled.inputs]
        return list(self._compiled(inputs).values())

    def costs(self, shapes: Mapping[str, tuple[int, ...]]) -> Costs:
        """Return the parameters and MACs for inputs of these shapes."""
        import openvino  # noqa: PLC0415 - an extra

        from onebyone.runtimes.openvino import openvino_core  # noqa: PLC0415 - imports this one

        model = openvino_core().read_model(str(self.path))
        model.reshape({name: openvino.PartialShape([*shape]) for name, shape in shapes.items()})
        params = macs = 0
        for node in model.get_ordered_ops():
            kind = node.get_type_name()
            if kind not in ("Convolution", "GroupConvolution", "MatMul"):
                continue
            weight = tuple(node.input(1).get_shape())
            summed = {
                "Convolution": weight[1:],
                "GroupConvolution": weight[2:],
                "MatMul": tuple(node.input(0).get_shape())[-1:],
            }[kind]
            params += math.prod(weight)
            macs += math.prod(node.output(0).get_shape()) * math.prod(summed)
        return Costs(params, macs)


class ExecuTorchReader(Reader):
    """A ``.pte`` file of one input in ExecuTorch.

    Its layers cannot be read, so their costs are those in ``export.json`` beside it.
    """

    runtime, extra = "executorch", "executorch"

    @cached_property
    def _program(self) -> Any:
        from onebyone.runtimes.executorch import LoadedProgram  # noqa: PLC0415 - imports this one

        return LoadedProgram(self.path.read_bytes())

    def ports(self) -> tuple[Port, ...]:
        """Return the file's input; its name is not in the file."""
        return (Port("input", self._program.shape, torch.float32),)

    def run(self, arrays: Arrays) -> list[NDArray[Any]]:
        """Return the file's outputs."""
        found = self._program(torch.from_numpy(arrays["input"]))
        return [np.asarray(output) for output in found]

    def costs(self, shapes: Mapping[str, tuple[int, ...]]) -> Costs:
        """Return the parameters and MACs that the exporter counted for the file's own size."""
        del shapes
        try:
            text = (self.path.parent / "export.json").read_text(encoding="utf-8")
            known = json.loads(text)
            return Costs(int(known["params"]), int(known["macs"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"The file {self.path} must have the export.json beside it that `onebyone export` "
                f"wrote: the layers of a .pte file cannot be counted. Got none that can be read."
            ) from error


READERS: dict[str, type[Reader]] = {
    ".onnx": OnnxReader,
    ".xml": OpenVinoReader,
    ".pte": ExecuTorchReader,
}


def _torch_type(name: str) -> torch.dtype:
    """Return the type of a file's input; it has ONNX's or NumPy's name."""
    found: Any = getattr(torch, _TYPES.get(name, name), None)
    return found if isinstance(found, torch.dtype) else torch.float32
