"""WebDataset shards: tar files of pictures, read one by one through an index."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from onebyone.core.errors import DataError
from onebyone.core.processes import on_main
from onebyone.core.read_files import printable, reason_of
from onebyone.data.listed import Listed, completed, part_named
from onebyone.data.picture_data import picture_data
from onebyone.data.pictures import decode_picture
from onebyone.data.shard_index import NO_LABEL, ShardIndex, index_shards, member_name, shards_in
from onebyone.data.splits import Data

MOST_SHARDS = 1_000_000  # that a pattern may name
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class ShardPictures:
    """The pictures in shards.

    Args:
        paths: Of the shards.
        indices: Where the pictures are in each.
    """

    def __init__(self, paths: Sequence[Path], indices: Sequence[ShardIndex]) -> None:
        self._paths = tuple(paths)
        counts = [len(index.offsets) for index in indices]
        self._shards = np.repeat(np.arange(len(paths)), counts)
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])

    def __len__(self) -> int:
        return len(self._shards)

    def open(self, row: int, size: int | None) -> Image.Image:
        """Return a picture in RGB."""
        path, offset = self._paths[self._shards[row]], int(self._offsets[row])
        wanted = int(self._sizes[row])
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(wanted)
        except OSError as error:
            raise DataError(
                f"The shard {printable(path)} can no longer be read: {reason_of(error)}. Put it "
                "back, and start again."
            ) from error
        if len(content) < wanted:
            raise DataError(
                f"The shard {printable(path)} became shorter while it was used. Start again."
            )
        return decode_picture(content, partial(_name, path, offset), size)


def _name(path: Path, offset: int) -> str:
    return f"{member_name(path, offset)} in {printable(path)}"


class Shards(Dataset[Any]):
    """The pictures of WebDataset shards as a map-style torch data set.

    Use it for transforms of your own, such as those of torchvision, in a ``DataLoader`` with
    workers. Items are ``(transform(picture), label)``, or without labels ``transform(picture)``.

    A shard is an uncompressed tar file. Members with the same name up to the first dot are a
    sample: a picture (``.jpg``, ``.png``, …) and its class as a number (``.cls``). Their places in
    the file are found once and kept in the user's cache, so each picture can be read by itself:
    the same seed gives the same order, in any number of workers and processes.

    Args:
        pattern: Shards such as ``data/train-{0000..0099}.tar`` or ``data/*.tar``, or a folder.
        transform: Takes a ``PIL.Image`` in RGB.

    Attributes:
        targets: The labels, int64 of shape ``(n,)``; ``None`` without labels.

    Raises:
        DataError: If there is no shard, or one cannot be read.
    """

    def __init__(self, pattern: str | Path, transform: Callable[[Any], Any] | None = None) -> None:
        listed = _listed(shard_paths(str(pattern)))
        self._pictures = listed.pictures
        self.transform = transform
        self.targets = _checked_labels({"all": listed})["all"]

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Any:
        row = range(len(self))[index]
        picture: Any = self._pictures.open(row, None)
        made = picture if self.transform is None else self.transform(picture)
        return made if self.targets is None else (made, int(self.targets[row]))


def load_shards(
    pattern: str,
    *,
    seed: int = 0,
    limit: int | None = None,
    image_size: int | None = None,
    workers: int | None = None,
) -> Data:
    """Load the pictures of WebDataset shards.

    The names of shards, or else of their folders, say which part they belong to: ``train``,
    ``val`` or ``test``, as in ``imagenet-train-0001.tar``. Shards of one part alone, or of none,
    are divided. Pictures are scaled and normalized as those of :func:`load_folder`.

    Args:
        pattern: As for :class:`Shards`.
        seed: Random seed of the division.
        limit: Most pictures in each part; others are not decoded.
        image_size: Height and width in pixels; default 224.
        workers: As for :func:`load_folder`.

    Raises:
        DataError: If there is no shard, one cannot be read, or some pictures have labels and
            others have none.
        OptionError: If the size is below 1.
    """
    paths = shard_paths(pattern)
    found = {part: _listed(of) for part, of in _by_part(paths).items()}
    labels = _checked_labels(found)
    classes = _class_names([of for of in labels.values() if of is not None])
    parts = completed(found, place=printable(pattern), classes=classes, seed=seed)
    name = printable(paths[0].resolve().parent.name)
    return picture_data(
        parts,
        name=name,
        classes=classes,
        seed=seed,
        limit=limit,
        image_size=image_size,
        workers=workers,
    )


# ---------------------------------------------------------------- patterns and parts


def shard_paths(pattern: str) -> list[Path]:
    """Return the shards that a pattern names, in order, each once.

    Raises:
        DataError: If it names none, or no files on this machine.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(
            f"Shards must be files on this machine, so that each picture can be read by itself, "
            f"got {printable(pattern)}. Copy them here first."
        )
    paths = chain.from_iterable(map(_matches, _expanded(pattern)))
    found = list(dict.fromkeys(paths))
    if not found:
        raise DataError(
            f"No shard matches {printable(pattern)}. Give a folder with .tar files, or a pattern "
            "such as data/train-{0000..0099}.tar or 'data/*.tar'."
        )
    return found


def _matches(name: str) -> Iterator[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        yield from shards_in(path)
    elif glob.has_magic(name) and not path.exists():
        yield from map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207
    else:
        yield path


def _expanded(pattern: str) -> Iterator[str]:
    """Yield the names of a pattern with braces: ``{000..099}`` or ``{train,val}``."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    inside = _RANGE.fullmatch(braces[1])
    if inside is None:
        choices: Sequence[str] = braces[1].split(",")
    else:
        first, last = int(inside[1]), int(inside[2])
        if not 0 <= last - first < MOST_SHARDS:
            raise DataError(
                f"A range of shards must go up, to at most {MOST_SHARDS:,} of them, got "
                f"{printable(braces[0])}."
            )
        choices = [f"{number:0{len(inside[1])}}" for number in range(first, last + 1)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    for choice in choices:
        yield from _expanded(f"{before}{choice}{after}")


def _by_part(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the shards of each part; those of a single part are all to be divided."""
    named = {path: _part_of(path) for path in paths}
    parts = set(named.values())
    if len(parts) == 1:
        return {"train": list(paths)}
    if None in parts or "train" not in parts:
        odd = next((path for path in paths if named[path] is None), paths[0])
        raise DataError(
            "Shards must all belong to a part, `train`, `val` or `test`, by their names or those "
            f"of their folders, and some to `train`, got {printable(odd)}. Rename it, or give a "
            "pattern of shards that belong together."
        )
    of = sorted(part for part in parts if part is not None)
    return {part: [path for path in paths if named[path] == part] for part in of}


def _part_of(path: Path) -> str | None:
    for name in (path.stem, path.resolve().parent.name):
        words = map(part_named, re.findall("[a-z]+", name.lower()))
        found = {part for part in words if part is not None}
        if len(found) == 1:
            return found.pop()
    return None


# ---------------------------------------------------------------- labels


def _listed(paths: Sequence[Path]) -> Listed:
    # One process of several reads the shards.
    indices = on_main(lambda: index_shards(paths))
    labels = torch.from_numpy(np.concatenate([index.labels for index in indices]))
    return Listed.all_of(ShardPictures(paths, indices), labels)


def _checked_labels(found: dict[str, Listed]) -> dict[str, Tensor | None]:
    """Return the labels of each part; ``None`` if no picture has one.

    Raises:
        DataError: If only some pictures have one.
    """
    lacking = sum(int((listed.labels == NO_LABEL).sum()) for listed in found.values())
    total = sum(map(len, found.values()))
    if 0 < lacking < total:
        raise DataError(
            f"Either all pictures in shards must have a label (.cls) or none, but {lacking:,} of "
            f"{total:,} have none. Write the shards with all labels."
        )
    return {part: None if lacking else listed.labels for part, listed in found.items()}


def _class_names(labels: Sequence[Tensor]) -> tuple[str, ...]:
    return tuple(map(str, range(1 + max((int(of.max()) for of in labels), default=-1))))
