"""The runtime OpenVINO, on the CPU, in full float32 or bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onebyone.core.errors import OptionError
from onebyone.core.records import InputSpec
from onebyone.core.tensor_trees import Inputs
from onebyone.runtimes.base import Prepared, need_device
from onebyone.runtimes.files import FileNetwork
from onebyone.runtimes.onnx import arrays_for, call_of, layers_to_onnx, to_onnx


def prepare_openvino(model: nn.Module, example: Inputs) -> Prepared:
    """Run in float32; without this setting OpenVINO chooses bf16 on some processors."""
    if isinstance(model, FileNetwork) and model.runtime == "openvino":
        return _prepare(str(model.path), example, "f32", model.call)
    return _prepare(to_onnx(model, example), example, "f32", call_of(model, example))


def prepare_layers_openvino(model: nn.Module, example: Tensor) -> Prepared:
    """Run a few consecutive layers in float32."""
    return _prepare(layers_to_onnx(model, example), example, "f32")


def prepare_onnx_in_openvino(content: bytes, example: Tensor) -> Prepared:
    """Run the content of an ONNX file; what it has in float32 stays so."""
    return _prepare(content, example, "f32")


def prepare_openvino_bf16(model: nn.Module, example: Inputs) -> Prepared:
    """Run in bf16.

    Raises:
        OptionError: If OpenVINO has no bf16 kernels for this processor; it would run float32.
    """
    _check_bf16()
    return _prepare(to_onnx(model, example), example, "bf16", call_of(model, example))


def prepare_layers_openvino_bf16(model: nn.Module, example: Tensor) -> Prepared:
    """Run a few consecutive layers in bf16.

    Raises:
        OptionError: As :func:`prepare_openvino_bf16`.
    """
    _check_bf16()
    return _prepare(layers_to_onnx(model, example), example, "bf16")


def _check_bf16() -> None:
    if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise OptionError(
            "The runtime 'openvino:bf16' needs a processor with bf16 kernels in OpenVINO, and "
            "this one has none. Use 'openvino'."
        )


def _prepare(
    content: bytes | str, example: Inputs, precision: str, known: InputSpec | None = None
) -> Prepared:
    need_device(example, "cpu", "openvino")
    options, model = settings(precision), openvino_core().read_model(content)
    names = [each.get_any_name() for each in model.inputs]
    arrays = arrays_for(names, example, known)
    inputs = [arrays[name] for name in names]
    compiled = openvino_core().compile_model(with_sizes(model, inputs), "CPU", options)
    return Prepared(runner(compiled, inputs), options)


def with_sizes(model: Any, inputs: Sequence[np.ndarray[Any, Any]]) -> Any:
    """Return a model with the sizes of its inputs fixed to those of arrays.

    Each layer of free sizes takes some microseconds more at each run; the exported loader fixes
    them, too. The model is changed.
    """
    if any(port.partial_shape.is_dynamic for port in model.inputs):
        sizes = {port: array.shape for port, array in zip(model.inputs, inputs, strict=True)}
        model.reshape(sizes)
    return model


def settings(precision: str) -> dict[str, str]:
    """Return OpenVINO's options for single requests with torch's number of threads."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "NUM_STREAMS": "1",
        # A pinned thread waits if its core is busy, and it stays pinned afterwards.
        "ENABLE_CPU_PINNING": "NO",
    }


@cache
def openvino_core() -> Any:
    """Return OpenVINO's core, the same one for the whole process.

    The CPU plugin of a core replaces the thread's alternate signal stack, and restores the former
    one when the core is freed. If the first of two cores is freed first, the second restores a
    stack that is no longer there. The next signal with a handler, such as SIGCHLD, then ends the
    process with a segmentation fault. One core for all avoids this.
    """
    import openvino  # noqa: PLC0415 - an extra

    return openvino.Core()


def compile_openvino(model: bytes | str, options: dict[str, str]) -> Any:
    """Return a compiled model, from the content of an ONNX file or the path of an ``.xml``."""
    core = openvino_core()
    return core.compile_model(core.read_model(model), "CPU", options)


def runner(compiled: Any, inputs: Sequence[np.ndarray[Any, Any]]) -> Callable[[], list[Any]]:
    """Return a function that runs a compiled model on inputs, in the order that it has."""
    import openvino  # noqa: PLC0415 - an extra

    request = compiled.create_infer_request()
    # The memory is shared, not copied, so the function keeps the arrays alive.
    held = [np.ascontiguousarray(each) for each in inputs]
    for place, array in enumerate(held):
        request.set_input_tensor(place, openvino.Tensor(array, shared_memory=True))

    def run(held: list[np.ndarray[Any, Any]] = held) -> list[Any]:  # noqa: ARG001 - keeps them alive
        request.infer()
        return [output.data for output in request.output_tensors]

    return run
