"""Describes the machine that measurements are made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from onebyone.core.records import Machine

_PACKAGES = (
    "onebyone",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "onnxruntime",
    "openvino",
    "executorch",
    "torch_tensorrt",
)


def describe_machine(device: str | torch.device = "cpu") -> Machine:
    """Return this machine's processor, cores, threads, device and package versions."""
    device = torch.device(device)
    name = str(device)
    if device.type == "cuda":
        name = f"{device} {torch.cuda.get_device_name(device)}"
    versions = {p: importlib.metadata.version(p) for p in _PACKAGES if _has(p)}
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
