"""What executes a network: each runtime is a name and ``prepare(model, example) -> callable``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.errors import MissingExtraError, ModelError, UnknownNameError
from onebyone.records import Machine
from onebyone.sites import evaluation_copy

Prepared = Callable[[], Any]


@dataclass(frozen=True)
class Runtime:
    """A way to execute a network.

    Attributes:
        prepare: Takes a network (not modified) and an example input ``(batch, …)``; returns a
            callable that runs one forward pass on that input.
        package: The distribution whose version is recorded.
        extra: The extra that installs it, where it is optional.
    """

    name: str
    prepare: Callable[[nn.Module, Tensor], Prepared]
    package: str = "torch"
    extra: str | None = None

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """The version of its package."""
        return importlib.metadata.version(self.package)


def _inference(network: Callable[..., Any], example: Tensor) -> Prepared:
    def forward() -> Any:
        with torch.inference_mode():
            return network(example)

    return forward


def _prepare_eager(model: nn.Module, example: Tensor) -> Prepared:
    return _inference(evaluation_copy(model, device=example.device), example)


def _prepare_channels_last(model: nn.Module, example: Tensor) -> Prepared:
    network = evaluation_copy(model, device=example.device)
    if example.ndim == 4:
        network = network.to(memory_format=torch.channels_last)
        example = example.to(memory_format=torch.channels_last)
    return _inference(network, example)


def _prepare_compiled(model: nn.Module, example: Tensor) -> Prepared:
    network = evaluation_copy(model, device=example.device)
    return _inference(torch.compile(network), example)


def _prepare_onnxruntime(model: nn.Module, example: Tensor) -> Prepared:
    import onnxruntime  # noqa: PLC0415 - an extra

    network = evaluation_copy(model, device="cpu")
    try:
        program = torch.onnx.export(
            network, (example.cpu(),), input_names=["input"], dynamo=True, verbose=False
        )
        assert program is not None
        serialized = program.model_proto.SerializeToString()
    except Exception as error:
        raise ModelError(
            f"The network {type(model).__name__} could not be exported to ONNX: {error}"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: example.cpu().numpy()}
    return lambda: session.run(None, feed)


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("eager", _prepare_eager),
        Runtime("channels-last", _prepare_channels_last),
        Runtime("compile", _prepare_compiled),
        Runtime("onnxruntime", _prepare_onnxruntime, package="onnxruntime", extra="onnx"),
    )
}


def find_runtime(name: str) -> Runtime:
    """Return the runtime of that name.

    Raises:
        UnknownNameError: If there is none.
        MissingExtraError: If its package is not installed.
    """
    if name not in RUNTIMES:
        raise UnknownNameError("runtime", name, RUNTIMES)
    runtime = RUNTIMES[name]
    if not runtime.installed:
        raise MissingExtraError(runtime.package, runtime.extra or "", f"The runtime {name!r}")
    return runtime


def describe_machine(device: str | torch.device = "cpu") -> Machine:
    """Return where numbers are obtained now: processor, cores, threads, device, versions."""
    device = torch.device(device)
    name = str(device)
    if device.type == "cuda":
        name = f"{device} {torch.cuda.get_device_name(device)}"
    packages = ("onebyone", "torch", "torchvision", "timm", "numpy", "onnxruntime")
    versions = {p: importlib.metadata.version(p) for p in packages if _has(p)}
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=name,
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions=versions,
    )


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
