"""OpenVINO on the CPU, in full float32 unless bf16 is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onebyone.errors import OptionError
from onebyone.runtimes.base import Prepared, need_device
from onebyone.runtimes.onnx import layers_to_onnx, to_onnx


def prepare_openvino(model: nn.Module, example: Tensor) -> Prepared:
    """Run in float32: by itself OpenVINO chooses bf16 on some processors."""
    return _prepare(to_onnx(model, example), example, "f32")


def prepare_layers_openvino(model: nn.Module, example: Tensor) -> Prepared:
    """Run a few layers in a row, in float32."""
    return _prepare(layers_to_onnx(model, example), example, "f32")


def prepare_openvino_bf16(model: nn.Module, example: Tensor) -> Prepared:
    """Run in bf16.

    Raises:
        OptionError: If OpenVINO has no bf16 kernels for this processor: it would run float32.
    """
    _check_bf16()
    return _prepare(to_onnx(model, example), example, "bf16")


def prepare_layers_openvino_bf16(model: nn.Module, example: Tensor) -> Prepared:
    """Run a few layers in a row, in bf16.

    Raises:
        OptionError: As :func:`prepare_openvino_bf16`.
    """
    _check_bf16()
    return _prepare(layers_to_onnx(model, example), example, "bf16")


def _check_bf16() -> None:
    import openvino  # noqa: PLC0415 - an extra

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise OptionError(
            "The runtime 'openvino:bf16' needs a processor with bf16 kernels in OpenVINO, and "
            "this one has none. Use 'openvino'."
        )


def _prepare(content: bytes, example: Tensor, precision: str) -> Prepared:
    need_device(example, "cpu", "openvino")
    options = settings(precision)
    compiled = compile_openvino(content, options)
    return Prepared(runner(compiled, example.numpy()), options)


def settings(precision: str) -> dict[str, str]:
    """Return OpenVINO's options for one request at a time on torch's number of threads."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "NUM_STREAMS": "1",
        # Pinned threads wait for their core where a neighbor runs, and stay pinned afterwards.
        "ENABLE_CPU_PINNING": "NO",
    }


def compile_openvino(model: bytes | str, options: dict[str, str]) -> Any:
    """Return a compiled model from an ONNX file's content, or from the path of an ``.xml``."""
    import openvino  # noqa: PLC0415 - an extra

    core = openvino.Core()
    return core.compile_model(core.read_model(model), "CPU", options)


def runner(compiled: Any, inputs: np.ndarray[Any, Any]) -> Callable[[], list[Any]]:
    """Return a function that runs a compiled model on one input."""
    import openvino  # noqa: PLC0415 - an extra

    request = compiled.create_infer_request()
    # Shared, not copied: the array must live as long as the request, so the function holds it.
    held = np.ascontiguousarray(inputs)
    request.set_input_tensor(openvino.Tensor(held, shared_memory=True))

    def run(held: np.ndarray[Any, Any] = held) -> list[Any]:  # noqa: ARG001 - keeps it alive
        request.infer()
        return [output.data for output in request.output_tensors]

    return run
