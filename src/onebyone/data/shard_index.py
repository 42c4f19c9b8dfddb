"""Finds the pictures in WebDataset shards: an index of each, kept in the user's cache."""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from onebyone.core.errors import DataError, OutputError
from onebyone.core.read_files import printable, reason_of, why_no_file
from onebyone.core.run_lines import LOGGER
from onebyone.core.units import format_seconds, plural
from onebyone.core.user_cache import user_cache
from onebyone.core.write_files import write_bytes
from onebyone.data.folders import SUFFIXES

FORMAT = 1  # of the index: raised when samples are found in another way
# Members that hold a class number, as WebDataset decodes them.
LABELS = ("cls", "class", "label")
MOST_CLASSES = 1_000_000  # each class gets a name
MOST_DIGITS = 20  # bytes of such a member
NO_LABEL = -1
TOLD = 2.0  # seconds of indexing that are worth a line
_KINDS = {"offsets": np.int64, "sizes": np.int64, "labels": np.int64}


@dataclass(frozen=True)
class ShardIndex:
    """Where the pictures of a shard are, in its order.

    Attributes:
        offsets: The first byte of each picture, int64 of shape ``(n,)``.
        sizes: Its number of bytes.
        labels: Its class; ``NO_LABEL`` if it has none.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass
class _Sample:
    """The members of a tar file with the same name up to the first dot."""

    key: str
    picture: tuple[int, int] | None = None  # first byte, and number of bytes
    label: int = NO_LABEL


def index_shards(paths: Sequence[Path]) -> list[ShardIndex]:
    """Return the index of each shard; those that were indexed before are not read again.

    A shard is known by its path, size and time of change.

    Raises:
        DataError: If a shard cannot be read, or a sample has no picture or no number as label.
    """
    started, new, found = time.perf_counter(), 0, []
    for path in paths:
        kept = _kept_file(path)
        index = _read_kept(kept)
        if index is None:
            index = _index(path)
            _keep(kept, index)
            new += 1
        found.append(index)
    took = time.perf_counter() - started
    if new and took > TOLD:
        LOGGER.info(f"{plural(new, 'shard')} indexed after {format_seconds(took)}")
    return found


def member_name(path: Path, offset: int) -> str:
    """Return the name of the member whose content begins at an offset, for a message."""
    try:
        with path.open("rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "replace")
    except (OSError, tarfile.HeaderError):
        return f"at byte {offset:,}"
    return printable(header.name)


# ---------------------------------------------------------------- the index of a shard


def _index(path: Path) -> ShardIndex:
    samples: list[_Sample] = []
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                _add(samples, member, shard, path)
                shard.members = []  # type: ignore[attr-defined]  # else it keeps all of them
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"The shard {printable(path)} must be a whole, uncompressed tar file, but: "
            f"{reason_of(error)}. Copy it again, or uncompress it: pictures in a compressed file "
            "cannot be read one by one."
        ) from error
    pictures = [_picture(sample, path) for sample in samples]
    if not pictures:
        raise DataError(f"The shard {printable(path)} must hold pictures, and has none. Remove it.")
    return ShardIndex(
        np.array([offset for offset, _ in pictures], np.int64),
        np.array([size for _, size in pictures], np.int64),
        np.array([sample.label for sample in samples], np.int64),
    )


def _add(
    samples: list[_Sample], member: tarfile.TarInfo, shard: tarfile.TarFile, path: Path
) -> None:
    """Add a member of a tar file to its sample, which is the last one or a new one."""
    name = PurePosixPath(member.name)
    if not member.isfile() or member.issparse() or name.name.startswith((".", "__")):
        return
    stem, _, ending = name.name.partition(".")
    key, ending = str(name.with_name(stem)), ending.lower()
    if not samples or samples[-1].key != key:
        samples.append(_Sample(key))
    sample = samples[-1]
    if f".{ending}" in SUFFIXES:
        if sample.picture is not None:
            raise DataError(
                f"A sample must have one picture, but {printable(key)} in {printable(path)} has "
                "several. Write the shard with one for each name."
            )
        sample.picture = member.offset_data, member.size
    elif ending in LABELS and sample.label == NO_LABEL:
        sample.label = _label(member, shard, path)


def _label(member: tarfile.TarInfo, shard: tarfile.TarFile, path: Path) -> int:
    file = shard.extractfile(member)
    content = b"" if file is None else file.read(MOST_DIGITS + 1)
    if not content.strip().isdigit() or int(content[:MOST_DIGITS]) >= MOST_CLASSES:
        raise DataError(
            f"A label must be the number of a class, from 0 to {MOST_CLASSES - 1:,}, but "
            f"{printable(member.name)} in {printable(path)} holds {content[:MOST_DIGITS]!r}. Write "
            "numbers."
        )
    return int(content)


def _picture(sample: _Sample, path: Path) -> tuple[int, int]:
    if sample.picture is None:
        raise DataError(
            f"A sample must have a picture ({', '.join(sorted(SUFFIXES))}), but "
            f"{printable(sample.key)} in {printable(path)} has none. Leave it out of the shard, or "
            "give a torch data set from a Python file."
        )
    return sample.picture


# ---------------------------------------------------------------- kept ones


def _kept_file(path: Path) -> Path:
    why = why_no_file(path)
    if why is not None:
        raise DataError(f"The shard {printable(path)} {why}. Check the pattern.")
    status = path.stat()
    told = f"{FORMAT} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()
    return user_cache() / "shards" / f"{digest[:32]}.safetensors"


def _read_kept(file: Path) -> ShardIndex | None:
    try:
        found = load(file.read_bytes())
    except (OSError, SafetensorError, ValueError):
        return None  # none yet, or not a file of ours: the shard is indexed anew
    if {name: array.dtype for name, array in found.items()} != _KINDS:
        return None
    return ShardIndex(**found)


def _keep(file: Path, index: ShardIndex) -> None:
    """Keep an index; a folder that cannot be written is done without."""
    with suppress(OutputError, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, save(vars(index)))


def shards_in(folder: Path) -> Iterator[Path]:
    """Yield the tar files in a folder and its subfolders."""
    yield from sorted(path for path in folder.rglob("*.tar") if not path.name.startswith("."))
