"""Reads a user's items and collates them, with seeded random draws and failures that say why."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, get_worker_info

from onebyone.core.read_files import reason_of
from onebyone.core.user_code import place_of

FIX = "Fix the data set or drop this example."
RESIZE = "Resize all inputs to one shape, by torchvision's Resize and CenterCrop."
_MEMORY = "Give a smaller batch, or free memory."
_LENGTH = "Its `__len__` may be too large: fix that, or the data set."
TRANSFORM = "Add a transform such as torchvision's ToTensor and Normalize."


@dataclass(frozen=True)
class Failed:
    """A failure to read items; loading processes return it because not all errors are picklable."""

    reason: str
    cure: str
    place: int | None = None  # in the batch
    error: BaseException | None = None


@dataclass(frozen=True)
class _Read:
    """The items of a batch, the seed of their random draws, and the first one's index."""

    items: list[Any]
    seed: int
    first: int


class Items(Dataset[Any]):
    """Reads items of a data set, each with its own seeded random draws."""

    def __init__(self, dataset: Dataset[Any], rows: list[int] | None, seed: int) -> None:
        self.dataset, self.rows, self.seed = dataset, rows, seed

    def __getitems__(self, positions: list[int]) -> _Read:
        with _generators_restored():
            items = [self._item(place, position) for place, position in enumerate(positions)]
        return _Read(items, self.seed, self._found(positions[0])[1])

    def _found(self, position: int) -> tuple[Any, int]:
        return root_of(self.dataset, position if self.rows is None else self.rows[position])

    def _item(self, place: int, position: int) -> Any:
        root, index = self._found(position)
        _seed_generators(self.seed, index)
        try:
            return root[index]
        # A user's code may raise anything or call sys.exit().
        except (Exception, SystemExit) as error:  # noqa: BLE001
            if isinstance(error, MemoryError):
                return _failed(error, place, _MEMORY)
            return _failed(error, place, _LENGTH if isinstance(error, IndexError) else FIX)


class Collated:
    """Makes a batch, unless an item failed.

    Args:
        collate: The user's collate function, or torch's.
        form: The form that items should have.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], form: Any) -> None:
        self.collate, self.form = collate, form

    def __call__(self, read: _Read) -> Any:
        """Return the collated batch, or why there is none."""
        items = read.items
        failed = next((item for item in items if isinstance(item, Failed)), None)
        if failed is not None:
            return failed
        with _generators_restored():
            _seed_generators(read.seed, -1 - read.first)  # collating may be random, as in CutMix
            try:
                return self.collate(items)
            except (Exception, SystemExit) as error:  # noqa: BLE001
                return self._failed(items, error)

    def _failed(self, items: list[Any], error: BaseException) -> Failed:
        odd = next((n for n, item in enumerate(items) if form_of(item) != self.form), None)
        if isinstance(error, MemoryError):
            return _failed(error, None, _MEMORY)
        if odd is None:
            missing = "NoneType" in str(error)
            return _failed(error, None, FIX if missing else TRANSFORM)
        if _types(form_of(items[odd])) == _types(self.form):
            return _failed(error, odd, RESIZE)
        return _failed(error, odd, FIX if items[odd] is None else TRANSFORM)


def form_of(item: Any) -> Any:
    """Return the nested types and shapes of an item, which all items of a batch must share."""
    if isinstance(item, (tuple, list)):
        return tuple(form_of(part) for part in item)
    if isinstance(item, Mapping):
        return tuple((key, form_of(part)) for key, part in item.items())
    shape = getattr(item, "shape", None)
    return _Leaf(type(item), tuple(shape) if isinstance(shape, (tuple, list)) else None)


class _Leaf(NamedTuple):
    """A type, and a shape if there is one."""

    kind: type
    shape: tuple[int, ...] | None


def _types(form: Any) -> Any:
    if isinstance(form, _Leaf):
        return form.kind
    return tuple(map(_types, form)) if isinstance(form, tuple) else form


def _failed(error: BaseException, place: int | None, cure: str) -> Failed:
    told = ", ".join(filter(None, [type(error).__name__, place_of(error)]))
    # Errors of the user's own classes may not be picklable.
    kept = error if get_worker_info() is None else None
    return Failed(f"{reason_of(error)} ({told})", cure, place, kept)


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Restore the global generators of torch, numpy and Python afterwards."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])


def _seed_generators(seed: int, index: int) -> None:
    # Odd constants (splitmix64) make neighboring seeds and indices draw differently.
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    random.seed(mixed)
    np.random.seed((mixed ^ (mixed >> 32)) % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(mixed)


def root_of(dataset: Any, row: int) -> tuple[Any, int]:
    """Return the data set behind subsets, and the row's index in it."""
    while type(dataset) is Subset:
        dataset, row = dataset.dataset, int(dataset.indices[row])
    return dataset, row
