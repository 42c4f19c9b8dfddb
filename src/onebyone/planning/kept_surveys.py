"""Surveys kept on disk: the options of the same network, data and settings are not measured twice.

A file holds records alone: nothing in it is executed. It is found by a hash of all that the options
depend on: weights, code and outputs of the network, calibration inputs, what outputs mean,
settings, versions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.meaning import Meaning
from onebyone.core import processes
from onebyone.core.errors import OutputError
from onebyone.core.identity import Digest
from onebyone.core.measures import Own
from onebyone.core.records import Option
from onebyone.core.tensor_trees import first_examples, tensors_in
from onebyone.core.version import __version__
from onebyone.core.write_files import write_text
from onebyone.networks.surgery import run
from onebyone.rewrites.registry import GROUP_METHODS, METHODS, group_rewrites, layer_rewrites

FORMAT = 1  # raised when options are found in another way
# A survey that took less time is not kept, and of the others only the latest ones.
LEAST_SECONDS = 5.0
MOST_FILES = 50
# Examples whose outputs tell one network from another one with the same weights.
TOLD_BY = 8


@dataclass(frozen=True)
class KeptOptions:
    """The options of layers and of groups of layers, and why others have none, by layer."""

    options: tuple[Option, ...]
    reasons: dict[str, str]


@dataclass(frozen=True)
class Keeper:
    """Where the options of one survey are kept.

    Attributes:
        folder: It is made when something is first kept.
        key: Of all that the options depend on.
    """

    folder: Path
    key: str

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.key[:32]}.json"

    def get(self, names: Sequence[str]) -> KeptOptions | None:
        """Return what was kept; ``None`` if there is nothing, or a file that is not ours.

        Args:
            names: Of the layers that options may occupy.
        """
        try:
            found = msgspec.json.decode(self._file.read_bytes(), type=_Content)
        except (OSError, msgspec.MsgspecError):
            return None
        if found.key != self.key or not {*found.kept.reasons} <= {*names}:
            return None
        self._file.touch()
        return found.kept

    def put(self, kept: KeptOptions, *, seconds: float) -> None:
        """Keep options that took some seconds; a folder that cannot be written is done without."""
        if seconds < LEAST_SECONDS:
            return
        with suppress(OutputError, OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self._file, msgspec.json.encode(_Content(self.key, kept)).decode())
            latest = sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
            for old in latest[:-MOST_FILES]:
                old.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Content:
    key: str
    kept: KeptOptions


def keeper_for(
    folder: Path,
    network: nn.Module,
    data: CalibrationData,
    meaning: Meaning,
    settings: Mapping[str, object],
) -> Keeper:
    """Return where the options of a survey are kept.

    Args:
        folder: Of all surveys.
        network: In evaluation mode. Not modified.
        data: The calibration data.
        meaning: Of the outputs.
        settings: What options depend on besides, each with a text of its own.
    """
    digest = Digest()
    for name, value in {**settings, **_versions()}.items():
        digest.text(f"{name}: {value!r}")
    _add_network(digest, network)
    _add_meaning(digest, meaning)
    for place, batch in enumerate(data.batches()):
        for tensor in tensors_in(batch):
            digest.tensor(f"batch {place}", tensor)
    shown = first_examples(next(iter(data.batches())), TOLD_BY)
    for tensor in tensors_in(run(network, shown)):
        digest.tensor("output", tensor)
    return Keeper(folder, digest.hexadecimal())


def _versions() -> dict[str, object]:
    return {
        "format": FORMAT,
        "onebyone": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
    }


def _add_network(digest: Digest, network: nn.Module) -> None:
    for name, module in network.named_modules():
        kind = type(module)
        digest.text(f"{name}: {kind.__module__}.{kind.__qualname__}({module.extra_repr()})")
    for kind in dict.fromkeys(type(module) for module in network.modules()):
        if not _is_of_torch(kind):
            for _, function in inspect.getmembers(kind, inspect.isfunction):
                if not _is_of_torch(function):
                    digest.code(function)
    for name, value in network.state_dict().items():
        if isinstance(value, Tensor):
            digest.tensor(name, value)
    for how in {**layer_rewrites(), **group_rewrites()}.values():
        for method in (*METHODS, *GROUP_METHODS):
            digest.code(getattr(how, method, None))


def _is_of_torch(made: object) -> bool:
    # What a program makes at run time may have no module.
    return str(getattr(made, "__module__", "")).startswith("torch.")


def _add_meaning(digest: Digest, meaning: Meaning) -> None:
    digest.text(meaning.task.name)
    for part in meaning.parts:
        digest.text(f"{part.task.name} {part.form} {part.vector}")
        digest.tensor("scale", part.scale)
        if isinstance(part.task.measure, Own):
            digest.code(part.task.measure.function)
