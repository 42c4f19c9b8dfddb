"""Runtimes that execute a network: each has a name and ``prepare(model, example) -> callable``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from onebyone.core.errors import MissingExtraError, PluginError, UnknownNameError
from onebyone.core.plugins import plugins
from onebyone.runtimes.base import PRECISIONS, Prepared, Runtime
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
from onebyone.runtimes.onnx import (
    prepare_layers_onnxruntime,
    prepare_onnx_in_onnxruntime,
    prepare_onnxruntime,
)
from onebyone.runtimes.openvino import (
    prepare_layers_openvino,
    prepare_layers_openvino_bf16,
    prepare_onnx_in_openvino,
    prepare_openvino,
    prepare_openvino_bf16,
)
from onebyone.runtimes.output_check import difference, outputs_of

__all__ = [
    "RUNTIMES",
    "Prepared",
    "Runtime",
    "describe_machine",
    "difference",
    "find_runtime",
    "known_runtime",
    "outputs_of",
    "runtime_names",
]

_ANY = ("cpu", "cuda")
_GPU = ("cuda",)


def _in_precisions(
    name: str, prepare: Callable[..., Prepared], *, devices: tuple[str, ...] = _ANY, **how: Any
) -> tuple[Runtime, ...]:
    """Return one runtime per precision that its devices know."""
    return tuple(
        Runtime(
            name if precision == "float32" else f"{name}:{precision}",
            prepare if precision == "float32" else partial(prepare, precision=precision),
            devices=tuple(device for device in devices if device in known.devices),
            **how,
        )
        for precision, known in PRECISIONS.items()
    )


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        *_in_precisions("eager", prepare_eager, takes_trees=True),
        *_in_precisions("channels-last", prepare_channels_last, takes_trees=True),
        Runtime("packed", prepare_packed),
        Runtime("packed:bf16", prepare_packed_bf16),
        *_in_precisions("compile", prepare_compiled, takes_trees=True),
        Runtime(
            "onnxruntime",
            prepare_onnxruntime,
            prepare_layers_onnxruntime,
            prepare_onnx_in_onnxruntime,
            package="onnxruntime",
            extra="onnx",
            takes_trees=True,
        ),
        Runtime(
            "openvino",
            prepare_openvino,
            prepare_layers_openvino,
            prepare_onnx_in_openvino,
            package="openvino",
            extra="openvino",
            takes_trees=True,
        ),
        Runtime(
            "openvino:bf16",
            prepare_openvino_bf16,
            prepare_layers_openvino_bf16,
            package="openvino",
            extra="openvino",
            takes_trees=True,
        ),
        Runtime("executorch", prepare_executorch, package="executorch", extra="executorch"),
        *_in_precisions("cuda-graph", prepare_cuda_graph, devices=_GPU, takes_trees=True),
        *_in_precisions(
            "tensorrt", prepare_tensorrt, devices=_GPU, package="torch_tensorrt", extra="tensorrt"
        ),
    )
}


PLUGINS = "onebyone.runtimes"
"""The entry point group through which another package adds a :class:`Runtime`."""


def runtime_names() -> tuple[str, ...]:
    """Return the names of all runtimes; those from other installed packages come last."""
    return (*RUNTIMES, *plugins(PLUGINS, RUNTIMES))


def known_runtime(name: str) -> Runtime:
    """Return the runtime with that name, even if its package is not installed.

    Raises:
        UnknownNameError: If there is none.
        PluginError: If another package adds it, and it cannot be used.
    """
    if name in RUNTIMES:
        return RUNTIMES[name]
    added = plugins(PLUGINS, RUNTIMES)
    if name not in added:
        names = runtime_names()
        raise UnknownNameError("runtime", name, names, listed=len(names))
    runtime: Runtime = added[name].load(Runtime)
    if runtime.name != name:
        raise PluginError(
            f"The runtime that the package {added[name].package!r} adds as {name!r} must have that "
            f"`name`, got {runtime.name!r}."
        )
    return runtime


def find_runtime(name: str) -> Runtime:
    """Return the runtime with that name, ready for use.

    Raises:
        UnknownNameError: If there is none.
        MissingExtraError: If its package is not installed.
        PluginError: If another package adds it, and it cannot be used.
    """
    runtime = known_runtime(name)
    if not runtime.installed:
        raise MissingExtraError(runtime.package, runtime.extra or "", f"The runtime {name!r}")
    return runtime
