"""Loads folders of pictures, with one folder per class or without classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from onebyone.core.errors import DataError
from onebyone.core.read_files import printable, reason_of, why_no_folder
from onebyone.data.listed import Listed, completed, part_named
from onebyone.data.picture_data import picture_data
from onebyone.data.pictures import LISTED, FilePictures
from onebyone.data.splits import Data

SUFFIXES = frozenset(
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


def load_folder(
    folder: str | Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    image_size: int | None = None,
    workers: int | None = None,
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
        workers: Number of threads that decode pictures as they are used; by default those that fit
            into memory are decoded once.

    Raises:
        DataError: If a folder is missing or empty, a picture cannot be read or is not inside a
            class folder, or a class is unknown in the training part or has no picture left there.
        OptionError: If the size is below 1.
    """
    folder = Path(folder).expanduser()
    why = why_no_folder(folder)
    if why is not None:
        raise DataError(
            f"The image folder must be a folder with pictures, but {printable(folder)} {why}."
        )
    parts, classes = _find_parts(folder, seed)
    return picture_data(
        parts,
        name=printable(folder.resolve().name),
        classes=classes,
        seed=seed,
        limit=limit,
        image_size=image_size,
        workers=workers,
    )


def _find_parts(folder: Path, seed: int) -> tuple[dict[str, Listed], tuple[str, ...]]:
    places = _part_folders(folder) or {"train": folder}
    names = _class_names(places["train"])
    found = {part: _find_files(place, names) for part, place in places.items()}
    parts = completed(found, place=printable(places["train"]), classes=names, seed=seed)
    return parts, _shown(folder, names)


def _part_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the parts; none if all pictures are in one folder."""
    found: dict[str, Path] = {}
    others = []
    for name in _subfolders(folder):
        part = part_named(name)
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
            f"({', '.join(sorted(SUFFIXES))}) without labels, and has neither."
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


def _find_files(folder: Path, classes: tuple[str, ...]) -> Listed:
    if not classes:
        loose = sorted(_pictures(folder))
        return Listed.all_of(FilePictures(loose), [0] * len(loose))
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
                f"{printable(folder / name)} must hold pictures ({', '.join(sorted(SUFFIXES))}), "
                f"and has none{_others(folder / name)}. Remove the folder, or add pictures of its "
                "class."
            )
        paths += pictures
        labels += [label] * len(pictures)
    return Listed.all_of(FilePictures(paths), labels)


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
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


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
