"""Exported files as networks to score and compare; each runs in its own runtime."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from onebyone.core.errors import MissingExtraError, ModelError
from onebyone.core.records import InputSpec

SUFFIXES = {".onnx": "onnxruntime", ".xml": "openvino"}
_EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}


class Costs(NamedTuple):
    """Parameters and MACs of a file's layers.

    Attributes:
        params: Number of weights of convolutions and matrix products.
        macs: Their multiply-accumulates for one input.
    """

    params: int
    macs: int


def is_network_file(spec: str | Path) -> bool:
    """Whether a name is that of a file for one of the runtimes."""
    return Path(spec).suffix in SUFFIXES


class FileNetwork(nn.Module):
    """A network in a file that runs in its runtime: ONNX Runtime or OpenVINO.

    It can be called, scored and timed, but has no weights to read or change.

    Args:
        path: An ``.onnx`` or ``.xml`` file.

    Raises:
        ModelError: If the file is missing, or its runtime cannot read it.
        MissingExtraError: If its runtime is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.runtime = SUFFIXES[self.path.suffix]
        if not self.path.is_file():
            raise ModelError(f"The network's file {self.path} must exist, but it does not.")
        self.eval()
        self._sizes = self._read_sizes()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Open the file again, because sessions of runtimes cannot be copied."""
        del memo
        return type(self)(self.path)

    @property
    def file_bytes(self) -> int:
        """The size of the file; for an ``.xml``, with the weights beside it."""
        beside = self.path.with_suffix(".bin")
        weights = beside.stat().st_size if self.runtime == "openvino" and beside.exists() else 0
        return self.path.stat().st_size + weights

    @property
    def content(self) -> bytes:
        """The content of an ONNX file.

        Raises:
            ModelError: If it is a file for OpenVINO, which no other runtime runs.
        """
        if self.runtime != "onnxruntime":
            raise ModelError(
                f"The file {self.path} only runs in OpenVINO. Choose the runtime 'openvino'."
            )
        return self.path.read_bytes()

    @property
    def inputs(self) -> InputSpec | None:
        """What one example is, from the file or ``preprocessing.json`` beside it, if known."""
        sizes = self._sizes[1:]
        if sizes and all(size is not None for size in sizes):
            return InputSpec.of_shape((1, *(size for size in sizes if size is not None)))
        try:
            text = (self.path.parent / "preprocessing.json").read_text(encoding="utf-8")
            return InputSpec.from_json(json.dumps(json.loads(text)["inputs"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def made_with(self) -> tuple[str, ...] | None:
        """The processor's instructions for 8-bit products where an int8 file was made, if known.

        They are read from ``int8.json`` beside it.
        """
        try:
            text = (self.path.parent / "int8.json").read_text(encoding="utf-8")
            return tuple(str(name) for name in json.loads(text)["instructions"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def forward(self, inputs: Tensor) -> Tensor | list[Tensor]:
        """Return the file's outputs, a list if there are several."""
        step = self._sizes[0] or max(len(inputs), 1)
        parts = [self._run(part) for part in torch.split(inputs, step)]
        outputs = [torch.cat(each) for each in zip(*parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else outputs

    def costs(self, shape: tuple[int, ...]) -> Costs:
        """Return the parameters and MACs of the file's layers for an input shape ``(1, …)``."""
        return (
            _onnx_costs(self.content, shape)
            if self.runtime == "onnxruntime"
            else self._costs(shape)
        )

    def _run(self, inputs: Tensor) -> list[Tensor]:
        array = inputs.detach().cpu().float().contiguous().numpy()
        try:
            found = self._call(array)
        except RuntimeError as error:
            raise ModelError(
                f"The file {self.path} could not be run on an input of shape {array.shape}: {error}"
            ) from error
        return [torch.from_numpy(each.copy()) for each in found]

    def _call(self, array: Any) -> list[Any]:
        if self.runtime == "openvino":
            return list(self._loaded(array).values())
        name = self._loaded.get_inputs()[0].name
        try:
            found: list[Any] = self._loaded.run(None, {name: array})
        except Exception as error:  # the runtime's own classes, which derive only from Exception
            raise RuntimeError(str(error)) from error
        return found

    @cached_property
    def _loaded(self) -> Any:
        # Both import this module.
        from onebyone.runtimes.onnx import onnxruntime_session  # noqa: PLC0415
        from onebyone.runtimes.openvino import compile_openvino, settings  # noqa: PLC0415

        try:
            if self.runtime == "openvino":
                return compile_openvino(str(self.path), settings("f32"))
            return onnxruntime_session(self.content)
        except ImportError as error:
            extra = _EXTRAS[self.runtime]
            raise MissingExtraError(self.runtime, extra, f"The file {self.path}") from error
        except Exception as error:
            raise ModelError(f"{self.runtime} cannot read the file {self.path}: {error}") from error

    def _read_sizes(self) -> tuple[int | None, ...]:
        if self.runtime == "openvino":
            shape = self._loaded.inputs[0].partial_shape
            return tuple(size.get_length() if size.is_static else None for size in shape)
        sizes = self._loaded.get_inputs()[0].shape
        return tuple(size if isinstance(size, int) else None for size in sizes)

    def _costs(self, shape: tuple[int, ...]) -> Costs:
        import openvino  # noqa: PLC0415 - an extra

        from onebyone.runtimes.openvino import openvino_core  # noqa: PLC0415 - imports this module

        model = openvino_core().read_model(str(self.path))
        model.reshape(openvino.PartialShape([1, *shape[1:]]))
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


def _onnx_costs(content: bytes, shape: tuple[int, ...]) -> Costs:
    import onnx  # noqa: PLC0415 - an extra

    model = onnx.load_from_string(content)
    for place, size in zip(model.graph.input[0].type.tensor_type.shape.dim, shape, strict=False):
        place.dim_value = size
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
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
