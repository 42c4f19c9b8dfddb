"""What executes a network: each runtime is a name and ``prepare(model, example) -> callable``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from onebyone.errors import MissingExtraError, UnknownNameError
from onebyone.runtimes.base import Prepared, Runtime
from onebyone.runtimes.compiled import prepare_compiled
from onebyone.runtimes.cuda import prepare_cuda_graph, prepare_tensorrt
from onebyone.runtimes.eager import (
    prepare_channels_last,
    prepare_eager,
    prepare_packed,
    prepare_packed_bf16,
)
from onebyone.runtimes.executorch import prepare_executorch
from onebyone.runtimes.machine import describe_machine
from onebyone.runtimes.onnx import prepare_layers_onnxruntime, prepare_onnxruntime
from onebyone.runtimes.openvino import (
    prepare_layers_openvino,
    prepare_layers_openvino_bf16,
    prepare_openvino,
    prepare_openvino_bf16,
)
from onebyone.runtimes.outputs import difference, outputs_of

__all__ = [
    "RUNTIMES",
    "Prepared",
    "Runtime",
    "describe_machine",
    "difference",
    "find_runtime",
    "outputs_of",
]

_ANY = ("cpu", "cuda")
_GPU = ("cuda",)


def _in_precisions(
    name: str, prepare: Callable[..., Prepared], *, devices: tuple[str, ...] = _ANY, **how: Any
) -> tuple[Runtime, ...]:
    """Return a runtime that takes a precision, once for each: full float32, TF32 and bf16."""
    tf32, bf16 = (partial(prepare, precision=precision) for precision in ("tf32", "bf16"))
    return (
        Runtime(name, prepare, devices=devices, **how),
        Runtime(f"{name}:tf32", tf32, devices=_GPU, **how),
        Runtime(f"{name}:bf16", bf16, devices=devices, **how),
    )


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        *_in_precisions("eager", prepare_eager),
        *_in_precisions("channels-last", prepare_channels_last),
        Runtime("packed", prepare_packed),
        Runtime("packed:bf16", prepare_packed_bf16),
        *_in_precisions("compile", prepare_compiled),
        Runtime(
            "onnxruntime",
            prepare_onnxruntime,
            prepare_layers_onnxruntime,
            package="onnxruntime",
            extra="onnx",
        ),
        Runtime(
            "openvino",
            prepare_openvino,
            prepare_layers_openvino,
            package="openvino",
            extra="openvino",
        ),
        Runtime(
            "openvino:bf16",
            prepare_openvino_bf16,
            prepare_layers_openvino_bf16,
            package="openvino",
            extra="openvino",
        ),
        Runtime("executorch", prepare_executorch, package="executorch", extra="executorch"),
        *_in_precisions("cuda-graph", prepare_cuda_graph, devices=_GPU),
        *_in_precisions(
            "tensorrt", prepare_tensorrt, devices=_GPU, package="torch_tensorrt", extra="tensorrt"
        ),
    )
}


def find_runtime(name: str) -> Runtime:
    """Return the runtime of that name.

    Raises:
        UnknownNameError: If there is none.
        MissingExtraError: If its package is not installed.
    """
    if name not in RUNTIMES:
        raise UnknownNameError("runtime", name, RUNTIMES, listed=len(RUNTIMES))
    runtime = RUNTIMES[name]
    if not runtime.installed:
        raise MissingExtraError(runtime.package, runtime.extra or "", f"The runtime {name!r}")
    return runtime
