"""A folder in which finished trainings are kept, so that an interrupted measurement goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from onebyone.article.record import SeedRun
from onebyone.errors import OptionError, OutputError, RecordError
from onebyone.models import load_weights, save_weights
from onebyone.records import DataInfo, Record

Settings = Mapping[str, str | int | float]

_ADVICE = "Delete it to measure it anew, or give another folder."


@dataclass(frozen=True, kw_only=True)
class _Kept(Record):
    """A finished training, and what must be the same for it to be taken over."""

    settings: Settings
    data: DataInfo
    run: SeedRun


class Shelf:
    """Finished trainings by name, in a folder or, without one, nowhere.

    Args:
        folder: Made if missing; ``None`` to keep nothing.
        data: What is trained on: what was kept of other data is refused.

    Raises:
        OutputError: If the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None, *, data: DataInfo) -> None:
        self._folder = None if folder is None else Path(folder)
        self._data = data
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"Cannot make the folder {self._folder}: {error.strerror}."
                ) from error

    def checkpoint(self, name: str) -> Path | None:
        """Return where a training may keep its state while it runs."""
        return self._file(name, "pt")

    def find(self, name: str, settings: Settings) -> SeedRun | None:
        """Return a finished training, or ``None``.

        Raises:
            RecordError: If its file cannot be read.
            OptionError: If it was made with other settings or other data; says which.
        """
        path = self._file(name, "json")
        if path is None or not path.exists():
            return None
        try:
            kept = _Kept.load(path)
        except RecordError as error:
            raise RecordError(f"{error} {_ADVICE}") from error
        different = [
            f"{key} {kept.settings.get(key)!r} instead of {settings.get(key)!r}"
            for key in sorted({*kept.settings, *settings})
            if kept.settings.get(key) != settings.get(key)
        ]
        if kept.data != self._data:
            different.append(f"data {_words(kept.data)} instead of {_words(self._data)}")
        if different:
            raise OptionError(
                f"What is kept in {path} must come from the same measurement, and has "
                f"{', '.join(different)}. {_ADVICE}"
            )
        return kept.run

    def keep(
        self, name: str, settings: Settings, run: SeedRun, *, model: nn.Module | None = None
    ) -> None:
        """Keep a finished training, and its weights where a model is given.

        Raises:
            OutputError: If the files cannot be written.
        """
        record, weights, state = (
            self._file(name, ending) for ending in ("json", "safetensors", "pt")
        )
        if record is None or weights is None or state is None:
            return
        # The weights first: whoever finds the figures finds them too.
        if model is not None:
            save_weights(model, weights)
        _Kept(settings=settings, data=self._data, run=run).save(record)
        state.unlink(missing_ok=True)

    def load(self, name: str, model: nn.Module) -> bool:
        """Read kept weights into a model, and return whether there were any.

        Raises:
            WeightsError: If they are not those of the model.
        """
        weights = self._file(name, "safetensors")
        if weights is None or not weights.exists():
            return False
        load_weights(model, weights, network=name)
        return True

    def _file(self, name: str, ending: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}.{ending}"


def _words(data: DataInfo) -> str:
    return f"{data.name} ({data.train:,} to train, seed {data.seed})"
