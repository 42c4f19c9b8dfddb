"""What executes a network: each runtime is a name and ``prepare(model, example) -> callable``."""

from __future__ import annotations

from onebyone.errors import MissingExtraError, UnknownNameError
from onebyone.runtimes.base import Prepared, Runtime, bfloat16_is_native
from onebyone.runtimes.compiled import prepare_compiled, prepare_compiled_bf16
from onebyone.runtimes.cuda import prepare_cuda_graph, prepare_tensorrt, prepare_tensorrt_bf16
from onebyone.runtimes.eager import (
    prepare_channels_last,
    prepare_channels_last_bf16,
    prepare_eager,
    prepare_eager_bf16,
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
    "bfloat16_is_native",
    "describe_machine",
    "difference",
    "find_runtime",
    "outputs_of",
]

_ANY = ("cpu", "cuda")
_GPU = ("cuda",)

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("eager", prepare_eager, devices=_ANY),
        Runtime("eager:bf16", prepare_eager_bf16, devices=_ANY),
        Runtime("channels-last", prepare_channels_last, devices=_ANY),
        Runtime("channels-last:bf16", prepare_channels_last_bf16, devices=_ANY),
        Runtime("packed", prepare_packed),
        Runtime("packed:bf16", prepare_packed_bf16),
        Runtime("compile", prepare_compiled, devices=_ANY),
        Runtime("compile:bf16", prepare_compiled_bf16, devices=_ANY),
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
        Runtime("cuda-graph", prepare_cuda_graph, devices=_GPU),
        Runtime(
            "tensorrt", prepare_tensorrt, package="torch_tensorrt", extra="tensorrt", devices=_GPU
        ),
        Runtime(
            "tensorrt:bf16",
            prepare_tensorrt_bf16,
            package="torch_tensorrt",
            extra="tensorrt",
            devices=_GPU,
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
