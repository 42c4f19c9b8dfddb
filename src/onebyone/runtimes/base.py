"""The definition of a runtime: a name and ``prepare(model, example) -> callable``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.errors import OptionError
from onebyone.core.tensor_trees import Inputs, device_of, spec_of
from onebyone.runtimes.output_check import SAME_OUTPUTS


@dataclass(frozen=True)
class Precision:
    """What a runtime computes in.

    Attributes:
        tolerance: Largest difference from eager float32 on a few layers, as a share of the outputs'
            standard deviation.
        dtype: That weights and activations are cast to; ``None``: they stay as they are.
        devices: The types of device that know it.
    """

    tolerance: float
    dtype: torch.dtype | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


# A step of bf16 is 2^-8 of a value, a step of TF32 2^-11; errors of a few layers add up.
PRECISIONS: dict[str, Precision] = {
    "float32": Precision(SAME_OUTPUTS),
    "tf32": Precision(2e-2, devices=("cuda",)),
    "bf16": Precision(0.2, torch.bfloat16),
}


@dataclass(frozen=True)
class Prepared:
    """A network prepared for one input: each call runs one forward pass on it.

    Attributes:
        run: Runs the pass and returns outputs in the runtime's own form; see :func:`outputs_of`.
        options: The settings that it was prepared with, for the record.
    """

    run: Callable[[], Any]
    options: Mapping[str, str] = field(default_factory=dict)

    def __call__(self) -> Any:
        """Run one forward pass."""
        return self.run()


Prepare = Callable[[nn.Module, Any], Prepared]
PrepareOnnx = Callable[[bytes, Tensor], Prepared]


@dataclass(frozen=True)
class Runtime:
    """A way to execute a network.

    Attributes:
        name: The name; ends in the precision if that is not float32: ``eager:bf16``.
        prepare: Takes a network (not modified) and an example input ``(batch, …)``; returns a
            callable that runs one forward pass on that input. It uses torch's number of threads at
            the time of preparing and running.
        prepare_layers: The same, but faster, for a few consecutive layers; these are timed by the
            hundred. ``None`` if there is no faster way.
        prepare_onnx: The same for the content of an ONNX file, of which int8 networks are made.
            ``None`` if it runs no such files.
        package: The distribution whose version is recorded.
        extra: The extra that installs it, if it is optional.
        devices: The device types that it runs on.
        takes_trees: Whether it takes any inputs: a tensor, a tuple of positional arguments or a
            mapping of keyword arguments.
    """

    name: str
    prepare: Prepare
    prepare_layers: Prepare | None = None
    prepare_onnx: PrepareOnnx | None = None
    package: str = "torch"
    extra: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    takes_trees: bool = False

    def on(self, model: nn.Module, inputs: Inputs) -> Prepared:
        """Prepare a network for inputs; see :attr:`prepare`.

        Raises:
            NetworkInputError: If this runtime takes one tensor, and these are other inputs.
        """
        if not isinstance(inputs, Tensor) and not self.takes_trees:
            spec_of(inputs).single(f"The runtime {self.name!r}")
        return self.prepare(model, inputs)

    @property
    def installed(self) -> bool:
        """Whether its package is installed."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """The version of its package."""
        return importlib.metadata.version(self.package)

    def device_for(self, device: str) -> str:
        """Return ``device`` if it runs on that; else the CPU if it runs there."""
        elsewhere = device.partition(":")[0] not in self.devices
        return "cpu" if elsewhere and "cpu" in self.devices else device

    @property
    def precision(self) -> str:
        """The precision in its name, or ``float32``."""
        return self.name.partition(":")[2] or "float32"

    @property
    def float_bytes(self) -> int | None:
        """Bytes of a floating-point weight in it, where it changes their precision."""
        known = PRECISIONS.get(self.precision)
        return None if known is None or known.dtype is None else known.dtype.itemsize


def need_device(example: Inputs, device: str, runtime: str) -> None:
    """Check that an example is on the device that a runtime needs.

    Raises:
        OptionError: If it does not.
    """
    place = device_of(example)
    if place.type != device:
        hint = "" if device != "cuda" or torch.cuda.is_available() else "; torch sees none here"
        raise OptionError(
            f"The runtime {runtime!r} needs an input on a {device} device{hint}, but it is on "
            f"{place}. Set `device` to {device!r}, or choose another runtime."
        )
