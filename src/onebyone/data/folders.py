"""Loads folders of pictures, with one folder per class or without classes, into memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebyone.core.errors import DataError, OptionError
from onebyone.core.randomness import generator_of
from onebyone.core.read_files import printable, reason_of, why_no_folder
from onebyone.data.augment import Augmentation
from onebyone.data.pictures import LISTED, check_picture_memory, read_pictures
from onebyone.data.splits import Data, TensorSplit, held_out

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224
CROP = 7 / 8  # share of the shorter side: 224 of 256 pixels, the usual test crop on ImageNet

_SUFFIXES = frozenset(
    (
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)
# Names of the folders of parts, in lower or upper case.
_PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def load_folder(
    folder: Path, *, seed: int = 0, limit: int | None = None, image_size: int | None = None
) -> Data:
    """Load ``folder/train``, ``folder/val`` and ``folder/test``, or divide one folder.

    Each part holds one folder per class, or pictures directly, which then have no labels.

    - With only one of ``val`` and ``test``, that one is the test part, and a tenth of the training
      pictures is held out for validation.
    - Without ``train``, the pictures are in ``folder`` itself, and a tenth is held out for each
      of the other parts.

    Subfolders of a class folder and links to folders are read too, each once; hidden files are not.
    Pictures are converted to RGB. Their shorter side is resized to 8/7 of the size, then the center
    is cropped, and values are normalized by ImageNet's mean and standard deviation.

    Args:
        folder: Folder of the parts, the classes or the pictures.
        seed: Random seed of the division.
        limit: Most pictures in each part; others are not decoded.
        image_size: Height and width in pixels; default 224.

    Raises:
        DataError: If a folder is missing or empty, a picture cannot be read or is not inside a
            class folder, a class is unknown in the training part or has no picture left there, or
            the pictures would not fit into memory.
        OptionError: If the size is below 1.
    """
    size = IMAGE_SIZE if image_size is None else image_size
    if size < 1:
        raise OptionError(f"`image_size` must be at least 1 pixel, got {size}.")
    why = why_no_folder(folder)
    if why is not None:
        raise DataError(
            f"The image folder must be a folder with pictures, but {printable(folder)} {why}."
        )
    found, classes = _find_parts(folder, seed)
    parts = {name: part.take(limit, seed) for name, part in found.items()}
    check_picture_memory(sum(len(part.paths) for part in parts.values()), size)
    splits: dict[str, Any] = {
        name: TensorSplit(
            _decode(part.paths, size),
            torch.tensor(part.labels) if classes else None,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            augmentation=_augmentation(size) if name == "train" else None,
        )
        for name, part in parts.items()
    }
    return Data(
        name=printable(folder.resolve().name), classes=classes, seed=seed, crop=CROP, **splits
    )


class _Files:
    """Paths of pictures and the class of each; 0 without classes."""

    def __init__(self, paths: list[Path], labels: list[int]) -> None:
        self.paths, self.labels = paths, labels

    def part(self, rows: Tensor) -> _Files:
        chosen = rows.tolist()
        return _Files([self.paths[row] for row in chosen], [self.labels[row] for row in chosen])

    def take(self, limit: int | None, seed: int) -> _Files:
        if limit is None or limit >= len(self.paths):
            return self
        rows = torch.randperm(len(self.paths), generator=generator_of(seed))
        return self.part(rows[:limit].sort().values)

    def hold_out(self, count: int, seed: int) -> tuple[_Files, _Files]:
        rest, held = held_out(len(self.paths), count, seed=seed, targets=torch.tensor(self.labels))
        return self.part(rest), self.part(held)


def _find_parts(folder: Path, seed: int) -> tuple[dict[str, _Files], tuple[str, ...]]:
    places = _part_folders(folder)
    if not places:
        names = _class_names(folder)
        everything = _find_files(folder, names)
        tenth = max(1, len(everything.paths) // 10)
        _check_divisible(folder, everything, parts=3)
        rest, test = everything.hold_out(tenth, seed)
        train, validation = rest.hold_out(tenth, seed)
        _check_classes(folder, names, everything, train)
        return {"train": train, "validation": validation, "test": test}, _shown(folder, names)
    names = _class_names(places["train"])
    train = everything = _find_files(places["train"], names)
    given = {part: _find_files(place, names) for part, place in places.items() if part != "train"}
    if len(given) < 2:
        _check_divisible(places["train"], train, parts=2)
        train, held = train.hold_out(max(1, len(train.paths) // 10), seed)
        _check_classes(places["train"], names, everything, train)
        # Without a test part, the given validation part is the test part.
        given = {"validation": held, "test": next(iter(given.values()))}
    return {"train": train, **given}, _shown(folder, names)


def _part_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the parts; none if all pictures are in one folder."""
    found: dict[str, Path] = {}
    others = []
    for name in _subfolders(folder):
        part = next((part for part, names in _PARTS.items() if name.lower() in names), None)
        if part is None:
            others.append(name)
        elif part in found:
            raise DataError(
                f"{printable(folder)} must have one folder for each part, and has "
                f"{found[part].name!r} and {name!r}. Remove one of them, or put their classes "
                "together."
            )
        else:
            found[part] = folder / name
    if "train" in found and len(found) > 1:
        return found
    if found and (not others or ("train" in found and _subfolders(found["train"]))):
        _refuse_part(folder, found, others)
    return {}  # for example, "test" is one class among others


def _refuse_part(folder: Path, found: Mapping[str, Path], others: Sequence[str]) -> None:
    name = next(iter(found.values())).name
    if "train" not in found:
        raise DataError(
            f"{printable(folder)} has {name!r} but no `train`. Add it, or give the folder "
            f"{printable(folder / name)} to have it divided."
        )
    beside = ""
    if others:
        beside = (
            f" If {name!r} is a class beside {printable(others[0])!r}, it must hold pictures, not "
            "folders."
        )
    raise DataError(
        f"{printable(folder)} has {name!r} but neither `val` nor `test`. Add one of them, or give "
        f"the folder {printable(folder / name)} to have it divided.{beside}"
    )


def _check_divisible(folder: Path, files: _Files, *, parts: int) -> None:
    count = len(files.paths)
    if count < parts:
        raise DataError(
            f"{printable(folder)} must have at least {parts} pictures to be divided, one for each "
            f"part, and has {count}. Add pictures, or give folders `train`, `val` and `test`."
        )


def _check_classes(folder: Path, names: Sequence[str], files: _Files, train: _Files) -> None:
    """Check that no class has lost all its pictures to the held-out parts."""
    left = set(train.labels)
    lost = [name for label, name in enumerate(names) if label not in left]
    if lost:
        held = Counter(files.labels)[names.index(lost[0])]
        raise DataError(
            f"Every class must keep a picture to train on, but {printable(lost[0])!r} in "
            f"{printable(folder)} has {held}, which would be held out to validate and test. Add "
            "pictures (3 or more a class), or give folders `train`, `val` and `test`."
        )


def _subfolders(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in _entries(folder)
        if not entry.name.startswith(".") and entry.is_dir()
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the class folders; none if the pictures are in the folder itself."""
    names = tuple(_subfolders(folder))
    if not names and not any(_pictures(folder)):
        raise DataError(
            f"{printable(folder)} must hold a folder of pictures for each class, or pictures "
            f"({', '.join(sorted(_SUFFIXES))}) without labels, and has neither."
        )
    return names


def _shown(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    shown = tuple(printable(name) for name in names)
    twice = [name for name, count in Counter(shown).items() if count > 1]
    if twice:
        raise DataError(
            f"The folders of two classes in {printable(folder)} are both shown as {twice[0]!r}. "
            "Rename one of them."
        )
    return shown


def _find_files(folder: Path, classes: tuple[str, ...]) -> _Files:
    if not classes:
        loose = sorted(_pictures(folder))
        return _Files(loose, [0] * len(loose))
    names = _class_names(folder)
    if not names:
        raise DataError(
            f"{printable(folder)} must hold a folder of pictures for each class, as the part to "
            "train on does."
        )
    _check_known(folder, names, classes)
    _check_loose(folder)
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if name not in names:
            continue
        pictures = sorted(_pictures(folder / name))
        if not pictures:
            raise DataError(
                f"{printable(folder / name)} must hold pictures ({', '.join(sorted(_SUFFIXES))}), "
                f"and has none{_others(folder / name)}. Remove the folder, or add pictures of its "
                "class."
            )
        paths += pictures
        labels += [label] * len(pictures)
    return _Files(paths, labels)


def _check_known(folder: Path, names: Sequence[str], classes: Sequence[str]) -> None:
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise DataError(
            f"The classes of {printable(folder)} must be among those to train on, got "
            f"{', '.join(map(printable, unknown))}. Classes to train on: "
            f"{', '.join(map(printable, classes[:12]))}{', …' if len(classes) > 12 else ''}."
        )


def _check_loose(folder: Path) -> None:
    """Refuse pictures beside the class folders, because their class is unknown."""
    loose = sorted(
        entry.name for entry in _entries(folder) if _is_picture(entry.name) and not entry.is_dir()
    )
    if loose:
        more = ", …" if len(loose) > LISTED else ""
        raise DataError(
            f"All pictures in {printable(folder)} must lie in the folder of a class, but "
            f"{len(loose):,} beside these folders: {', '.join(map(printable, loose[:LISTED]))}"
            f"{more}. Move them into one, or out of {printable(folder)}."
        )


def _others(folder: Path) -> str:
    """Describe what a folder holds instead of pictures."""
    endings = Counter(
        Path(entry.name).suffix.lower() for entry in _entries(folder) if entry.is_file()
    )
    if not endings:
        return ""
    ending, count = endings.most_common(1)[0]
    return f", but {count:,} files {f'that end in {printable(ending)}' if ending else 'of no kind'}"


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES


def _pictures(folder: Path) -> Iterator[Path]:
    """Yield the pictures in a folder and its subfolders; follows links, reads each folder once."""
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        status = place.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link to a folder that was already read
        seen.add((status.st_dev, status.st_ino))
        for entry in _entries(place):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                waiting.append(place / entry.name)
            elif _is_picture(entry.name):
                yield place / entry.name  # reading a dangling link or a pipe raises an error later


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"The folder {printable(folder)} cannot be read: {reason_of(error)}. Change its "
            "permissions, or move it elsewhere."
        ) from error


def _decode(paths: list[Path], size: int) -> Tensor:
    images = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
    read_pictures(paths, (size, size), crop=CROP, into=images.numpy())
    return images.permute(0, 3, 1, 2).contiguous()


def _augmentation(size: int) -> Augmentation:
    # The same share as 4 of CIFAR's 32 pixels.
    return Augmentation.named("crop-flip", shift=size // 8) if size >= 8 else Augmentation()
