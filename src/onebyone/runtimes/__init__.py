"""What executes a network: each runtime is a name and ``prepare(model, example) -> callable``."""

from __future__ import annotations

from functools import partial

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

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("eager", prepare_eager, devices=_ANY),
        Runtime("eager:tf32", partial(prepare_eager, precision="tf32"), devices=_GPU),
        Runtime("eager:bf16", partial(prepare_eager, precision="bf16"), devices=_ANY),
        Runtime("channels-last", prepare_channels_last, devices=_ANY),
        Runtime(
            "channels-last:tf32", partial(prepare_channels_last, precision="tf32"), devices=_GPU
        ),
        Runtime(
            "channels-last:bf16", partial(prepare_channels_last, precision="bf16"), devices=_ANY
        ),
        Runtime("packed", prepare_packed),
        Runtime("packed:bf16", prepare_packed_bf16),
        Runtime("compile", prepare_compiled, devices=_ANY),
        Runtime("compile:tf32", partial(prepare_compiled, precision="tf32"), devices=_GPU),
        Runtime("compile:bf16", partial(prepare_compiled, precision="bf16"), devices=_ANY),
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
        Runtime("cuda-graph:tf32", partial(prepare_cuda_graph, precision="tf32"), devices=_GPU),
        Runtime("cuda-graph:bf16", partial(prepare_cuda_graph, precision="bf16"), devices=_GPU),
        Runtime(
            "tensorrt", prepare_tensorrt, package="torch_tensorrt", extra="tensorrt", devices=_GPU
        ),
        Runtime(
            "tensorrt:tf32",
            partial(prepare_tensorrt, precision="tf32"),
            package="torch_tensorrt",
            extra="tensorrt",
            devices=_GPU,
        ),
        Runtime(
            "tensorrt:bf16",
            partial(prepare_tensorrt, precision="bf16"),
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
