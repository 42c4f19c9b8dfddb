"""Pictures that are listed with their labels but not decoded, and their division into parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebyone.core.errors import DataError
from onebyone.core.randomness import generator_of
from onebyone.core.read_files import printable
from onebyone.data.pictures import Pictures
from onebyone.data.splits import held_out

# Names of parts in files and folders, in lower or upper case.
PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def part_named(name: str) -> str | None:
    """Return the part that has a name, such as ``validation`` for ``Val``; ``None`` if none has."""
    return next((part for part, names in PARTS.items() if name.lower() in names), None)


@dataclass(frozen=True)
class Listed:
    """Pictures of a part of a data set.

    Attributes:
        pictures: Where they are.
        rows: Their places there, int64 of shape ``(n,)``.
        labels: Their classes, int64 of shape ``(n,)``; 0 without classes.
    """

    pictures: Pictures
    rows: Tensor
    labels: Tensor

    @classmethod
    def all_of(cls, pictures: Pictures, labels: Tensor | Sequence[int]) -> Listed:
        """Return all pictures with a label each."""
        known = torch.as_tensor(labels, dtype=torch.int64)
        return cls(pictures, torch.arange(len(pictures)), known)

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, places: Tensor) -> Listed:
        """Return the pictures at some places."""
        return Listed(self.pictures, self.rows[places], self.labels[places])

    def take(self, limit: int | None, seed: int) -> Listed:
        """Return at most ``limit`` pictures, drawn at random."""
        if limit is None or limit >= len(self):
            return self
        places = torch.randperm(len(self), generator=generator_of(seed))
        return self.part(places[:limit].sort().values)

    def hold_out(self, count: int, seed: int) -> tuple[Listed, Listed]:
        """Return the rest and the held-out pictures, each class in proportion."""
        rest, held = held_out(len(self), count, seed=seed, targets=self.labels)
        return self.part(rest), self.part(held)


def completed(
    found: Mapping[str, Listed], *, place: str, classes: Sequence[str], seed: int
) -> dict[str, Listed]:
    """Return the training, validation and test part.

    Args:
        found: The training part; with it, none, one or both of the others. A tenth of the training
            pictures is held out for each part that is missing; without a test part, the given
            validation part is the test part.
        place: Where the training pictures are, for messages.
        classes: Names of the classes, if any.
        seed: Random seed of the division.

    Raises:
        DataError: If there are too few pictures, or a class keeps none to train on.
    """
    everything = found["train"]
    given = {name: part for name, part in found.items() if name != "train"}
    if len(given) == 2:
        return dict(found)
    _check_divisible(place, len(everything), parts=3 - len(given))
    tenth = max(1, len(everything) // 10)
    train, held = everything.hold_out(tenth, seed)
    if given:
        test, validation = next(iter(given.values())), held
    else:
        test = held
        train, validation = train.hold_out(tenth, seed)
    _check_classes(place, classes, everything, train)
    return {"train": train, "validation": validation, "test": test}


def _check_divisible(place: str, count: int, *, parts: int) -> None:
    if count < parts:
        raise DataError(
            f"{place} must have at least {parts} pictures to be divided, one for each "
            f"part, and has {count}. Add pictures, or give the parts `train`, `val` and `test`."
        )


def _check_classes(place: str, names: Sequence[str], listed: Listed, train: Listed) -> None:
    """Check that no class has lost all its pictures to the held-out parts."""
    left = set(train.labels.tolist())
    counts = Counter(listed.labels.tolist())
    lost = [label for label in range(len(names)) if label not in left and counts[label]]
    if lost:
        raise DataError(
            f"Every class must keep a picture to train on, but {printable(names[lost[0]])!r} in "
            f"{place} has {counts[lost[0]]}, which would be held out to validate and test. Add "
            "pictures (3 or more a class), or give the parts `train`, `val` and `test`."
        )
