"""What a runtime is: a name and ``prepare(model, example) -> callable``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.errors import OptionError


@dataclass(frozen=True)
class Prepared:
    """A network made ready for one input: each call runs one forward pass on it.

    Attributes:
        run: Returns the runtime's own form of the outputs; see :func:`outputs_of`.
        options: The settings that it was prepared with, to be recorded.
    """

    run: Callable[[], Any]
    options: Mapping[str, str] = field(default_factory=dict)

    def __call__(self) -> Any:
        """Run one forward pass."""
        return self.run()


Prepare = Callable[[nn.Module, Tensor], Prepared]


@dataclass(frozen=True)
class Runtime:
    """A way to execute a network.

    Attributes:
        name: A precision other than float32 is a part of it: ``eager:bf16``.
        prepare: Takes a network (not modified) and an example input ``(batch, …)``; returns a
            callable that runs one forward pass on that input. It uses as many threads as torch
            is set to while it is prepared and run.
        prepare_layers: The same for a few layers in a row, where it can be done faster: as they
            are timed by hundreds.
        package: The distribution whose version is recorded.
        extra: The extra that installs it, where it is optional.
        devices: The types of device that it runs on.
    """

    name: str
    prepare: Prepare
    prepare_layers: Prepare | None = None
    package: str = "torch"
    extra: str | None = None
    devices: tuple[str, ...] = ("cpu",)

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """The version of its package."""
        return importlib.metadata.version(self.package)

    def device_for(self, device: str) -> str:
        """The device it runs on where the rest of the work is on ``device``: that, or the CPU."""
        elsewhere = device.partition(":")[0] not in self.devices
        return "cpu" if elsewhere and "cpu" in self.devices else device

    @property
    def precision(self) -> str:
        """``float32``, or the precision that its name ends in."""
        return self.name.partition(":")[2] or "float32"


def need_device(example: Tensor, device: str, runtime: str) -> None:
    """Check that an example lies on the device that a runtime needs.

    Raises:
        OptionError: If it does not.
    """
    if example.device.type != device:
        hint = "" if device != "cuda" or torch.cuda.is_available() else "; torch sees none here"
        raise OptionError(
            f"The runtime {runtime!r} needs an input on a {device} device{hint}, but it is on "
            f"{example.device}. Set `device` to {device!r}, or choose another runtime."
        )
