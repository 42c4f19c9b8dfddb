"""The store of finished trainings, so that an interrupted measurement can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from onebyone.article.record import SeedRun
from onebyone.core.errors import RecordError
from onebyone.core.identity import check_same, words_of
from onebyone.core.records import Identity, Record
from onebyone.core.version import __version__
from onebyone.core.write_files import make_folder, remove_leftovers
from onebyone.data import Data
from onebyone.data.hashing import hash_data
from onebyone.networks.zoo import load_weights, save_weights

Settings = Mapping[str, str | int | float]

_ADVICE = "Delete it to measure it anew, or give another folder."


@dataclass(frozen=True, kw_only=True)
class _Kept(Record):
    """A finished training, with the settings and data that must be the same to reuse it."""

    identity: Identity
    run: SeedRun


class Shelf:
    """Finished trainings by name, in a folder; without a folder nothing is kept.

    Args:
        folder: Made if missing; ``None`` to keep nothing.
        data: Identity of the training data. Trainings of other data are refused.

    Raises:
        OutputError: If the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None, *, data: Data) -> None:
        self._folder = None if folder is None else Path(folder)
        self._data = "" if folder is None else hash_data(data)
        if self._folder is not None:
            make_folder(self._folder)
            remove_leftovers(self._folder)

    def checkpoint(self, name: str) -> Path | None:
        """Return the path of a running training's checkpoint."""
        return self._file(name, "pt")

    def find(self, name: str, settings: Settings, *, network: str) -> SeedRun | None:
        """Return a finished training, or ``None``.

        Args:
            name: Name of the training.
            settings: All settings that its result depends on.
            network: SHA-256 of the network before the training.

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
        check_same(kept.identity, self._identity(settings, network), where=path, advice=_ADVICE)
        return kept.run

    def keep(
        self,
        name: str,
        settings: Settings,
        run: SeedRun,
        *,
        network: str,
        model: nn.Module | None = None,
    ) -> None:
        """Keep a finished training, and its weights if a model is given.

        Raises:
            OutputError: If the files cannot be written.
        """
        record, weights, state = (
            self._file(name, ending) for ending in ("json", "safetensors", "pt")
        )
        if record is None or weights is None or state is None:
            return
        # The weights first, so that they exist whenever the figures do.
        if model is not None:
            save_weights(model, weights)
        _Kept(identity=self._identity(settings, network), run=run).save(record)
        state.unlink(missing_ok=True)

    def load(self, name: str, model: nn.Module) -> bool:
        """Load kept weights into a model, and return whether there were any.

        Raises:
            WeightsError: If they do not fit the model.
        """
        weights = self._file(name, "safetensors")
        if weights is None or not weights.exists():
            return False
        load_weights(model, weights, network=name)
        return True

    def _identity(self, settings: Settings, network: str) -> Identity:
        return Identity(
            network=network,
            data=self._data,
            settings={key: words_of(value) for key, value in settings.items()},
            versions={"onebyone": __version__, "torch": str(torch.__version__)},
        )

    def _file(self, name: str, ending: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}.{ending}"
