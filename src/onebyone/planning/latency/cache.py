"""A cache on disk of what sites and their options take in a runtime."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from onebyone.core.errors import OutputError
from onebyone.core.records import Deployment, Ratio
from onebyone.core.user_cache import user_cache
from onebyone.core.write_files import write_text
from onebyone.profiling.process_memory import allocator
from onebyone.runtimes import describe_machine

FORMAT = 3  # of the file, and of how layers are timed: raised when old times no longer hold


@dataclass(frozen=True)
class Timed:
    """An option's time beside that of the site as it is.

    Attributes:
        before_ms: Of a batch with the site as it is, between its neighbors.
        after_ms: With the option instead, in the same rounds.
        gain: Time before / time after.
        disturbed: Whether the machine was too busy for a verdict: such times are not kept.
    """

    before_ms: float
    after_ms: float
    gain: Ratio
    disturbed: bool = False


@dataclass(frozen=True)
class Site:
    """What a time depends on besides where it is measured: a layer, and the shape that it sees."""

    layer: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.layer} on {'×'.join(map(str, self.shape))}"


class Timings:
    """Times by site and option, in one file for all that they depend on otherwise.

    That is the processor, the device, the number of threads, the batch, the runtime, its version
    and torch's, and how the allocator is set.

    Args:
        deployment: Where the times were, and are to be, measured.
        folder: Where files are kept; ``None`` keeps nothing. It is made when it is first needed.
    """

    def __init__(self, deployment: Deployment, folder: Path | None) -> None:
        machine = describe_machine(deployment.device)
        self.conditions = {
            "format": str(FORMAT),
            "processor": machine.processor,
            "cores": str(machine.cores),
            "device": machine.device,
            "torch": str(torch.__version__),
            "runtime": f"{deployment.runtime} {deployment.version}",
            "threads": str(deployment.threads),
            "batch": str(deployment.batch),
            "allocator": allocator(),
        }
        prefix = deployment.runtime.replace(":", "-")
        if deployment.precision != "float32":
            self.conditions["precision"] = deployment.precision
            prefix = f"{prefix}-{deployment.precision}"
        self._file = None
        if folder is not None:
            name = hashlib.sha256(msgspec.json.encode(self.conditions)).hexdigest()[:16]
            self._file = folder / f"{prefix}-{name}.json"
        self._known = self._read()
        self._changed = False

    def get(self, site: Site, option: str) -> Timed | None:
        """Return an option's time, if it is known."""
        return self._known.get(str(site), {}).get(option)

    def put(self, site: Site, option: str, timed: Timed) -> None:
        """Add an option's time, to be written by :meth:`save`."""
        self._known.setdefault(str(site), {})[option] = timed
        self._changed = True

    def forgotten(self) -> Timings:
        """Return the same cache without what it knows: times that prove wrong are replaced."""
        other = copy(self)
        other._known = {}  # noqa: SLF001
        return other

    def save(self) -> None:
        """Write what is new; a cache that cannot be written is done without."""
        if self._file is None or not self._changed:
            return
        merged = self._read()
        for site, options in self._known.items():
            merged[site] = merged.get(site, {}) | options
        content = {"conditions": self.conditions, "times": merged}
        with suppress(OutputError, OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, msgspec.json.encode(content).decode())
            self._changed = False

    def _read(self) -> dict[str, dict[str, Timed]]:
        if self._file is None:
            return {}
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=_Content).times
        except (OSError, msgspec.MsgspecError):
            return {}  # none yet, or not a file of ours: times are measured anew


@dataclass(frozen=True)
class _Content:
    conditions: dict[str, str]
    times: dict[str, dict[str, Timed]]


def cache_folder() -> Path:
    """Return where times are kept: ``ONEBYONE_CACHE``, or a folder in the user's cache."""
    return user_cache() / "timings"
