"""Folders of pictures, a folder a class or without classes, decoded once into memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onebyone.data.augment import Augmentation
from onebyone.data.pictures import fit_picture, open_picture
from onebyone.data.splits import Data, TensorSplit, held_out
from onebyone.errors import DataError, OptionError
from onebyone.free_memory import free_bytes
from onebyone.units import format_bytes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224
CROP = 7 / 8  # of the shorter side: 224 of 256 pixels, as ImageNet's networks are tested
MEMORY_SHARE = 0.6  # of the memory that is free: the network and its activations need the rest

_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_VALIDATION_NAMES = ("val", "valid", "validation")


def load_folder(
    folder: Path, *, seed: int = 0, limit: int | None = None, image_size: int | None = None
) -> Data:
    """Load ``folder/train``, ``folder/val`` and ``folder/test``, or one folder that is divided.

    Each holds a folder a class, or pictures, which then have no labels. Where there is no ``val``,
    a tenth of the training pictures are held out; where there is no ``test``, ``val`` is the test
    part; where there is no ``train``, they lie in ``folder`` itself and a tenth is held out for
    either.
    Pictures become RGB, their shorter side 8/7 of the size, then the center is cut out;
    normalized by ImageNet's mean and standard deviation.

    Args:
        folder: Where the class folders or the pictures lie.
        seed: Of the division.
        limit: At most so many pictures in each part; others are not decoded.
        image_size: Height and width in pixels; 224 where not given.

    Raises:
        DataError: If a folder is missing or empty, a picture cannot be read, a class is unknown
            in the training part, or the pictures would not fit into memory.
        OptionError: If the size is below 1.
    """
    size = IMAGE_SIZE if image_size is None else image_size
    if size < 1:
        raise OptionError(f"`image_size` must be at least 1 pixel, got {size}.")
    if not folder.is_dir():
        raise DataError(f"The image folder must be a folder, got {folder}, which is none.")
    found, classes = _find_parts(folder, seed)
    parts = {name: part.take(limit, seed) for name, part in found.items()}
    _check_memory(sum(len(part.paths) for part in parts.values()), size)
    splits = {
        name: TensorSplit(
            _decode(part.paths, size),
            torch.tensor(part.labels) if classes else None,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            augmentation=_augmentation(size) if name == "train" else None,
        )
        for name, part in parts.items()
    }
    return Data(name=folder.resolve().name, classes=classes, seed=seed, crop=CROP, **splits)


class _Files:
    """Paths of pictures with the class of each, 0 where there are no classes."""

    def __init__(self, paths: list[Path], labels: list[int]) -> None:
        self.paths, self.labels = paths, labels

    def part(self, rows: Tensor) -> _Files:
        chosen = rows.tolist()
        return _Files([self.paths[row] for row in chosen], [self.labels[row] for row in chosen])

    def take(self, limit: int | None, seed: int) -> _Files:
        if limit is None or limit >= len(self.paths):
            return self
        rows = torch.randperm(len(self.paths), generator=torch.Generator().manual_seed(seed))
        return self.part(rows[:limit].sort().values)

    def hold_out(self, count: int, seed: int) -> tuple[_Files, _Files]:
        rest, held = held_out(len(self.paths), count, seed=seed, targets=torch.tensor(self.labels))
        return self.part(rest), self.part(held)


def _find_parts(folder: Path, seed: int) -> tuple[dict[str, _Files], tuple[str, ...]]:
    if not (folder / "train").is_dir():
        classes = _class_names(folder)
        everything = _find_files(folder, classes)
        tenth = max(1, len(everything.paths) // 10)
        rest, test = everything.hold_out(tenth, seed)
        train, validation = rest.hold_out(tenth, seed)
        return {"train": train, "validation": validation, "test": test}, classes
    classes = _class_names(folder / "train")
    train = _find_files(folder / "train", classes)
    named = next((folder / name for name in _VALIDATION_NAMES if (folder / name).is_dir()), None)
    has_test = (folder / "test").is_dir()
    if named is None and not has_test:
        raise DataError(
            f"{folder} has `train` but neither `val` nor `test`. Add one of them, or give the "
            f"folder {folder / 'train'} to have it divided."
        )
    if named is not None:
        validation = _find_files(named, classes)
    test = _find_files(folder / "test", classes) if has_test else validation
    if named is None or not has_test:
        train, validation = train.hold_out(max(1, len(train.paths) // 10), seed)
    return {"train": train, "validation": validation, "test": test}, classes


def _class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the folders, or none where the pictures lie in the folder itself."""
    names = tuple(
        sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
    )
    if not names and not _pictures(folder):
        raise DataError(
            f"{folder} must hold a folder of pictures for each class, or pictures "
            f"({', '.join(sorted(_SUFFIXES))}) without labels, and has neither."
        )
    return names


def _find_files(folder: Path, classes: tuple[str, ...]) -> _Files:
    if not classes:
        loose = sorted(_pictures(folder))
        return _Files(loose, [0] * len(loose))
    names = _class_names(folder)
    if not names:
        raise DataError(
            f"{folder} must hold a folder of pictures for each class, as the part to train on does."
        )
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise DataError(
            f"The classes of {folder} must be among those to train on, got {', '.join(unknown)}. "
            f"Classes to train on: {', '.join(classes[:12])}{', …' if len(classes) > 12 else ''}."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        place = folder / name
        pictures = sorted(_pictures(place)) if place.is_dir() else []
        if place.is_dir() and not pictures:
            raise DataError(
                f"{place} must hold pictures ({', '.join(sorted(_SUFFIXES))}), and has none. "
                "Remove the folder, or add pictures of its class."
            )
        paths += pictures
        labels += [label] * len(pictures)
    return _Files(paths, labels)


def _pictures(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]


def _check_memory(count: int, size: int) -> None:
    needed, free = count * 3 * size * size, free_bytes()
    if free is not None and needed > MEMORY_SHARE * free:
        raise DataError(
            f"{count:,} pictures of {size}×{size} need {format_bytes(needed)} of memory, more "
            f"than {MEMORY_SHARE:.0%} of the {format_bytes(free)} that are free. Give a smaller "
            "`image_size` or a `limit`, or a torch data set from a Python file."
        )


def _decode(paths: list[Path], size: int) -> Tensor:
    images = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
    pixels = images.numpy()

    def decode(index: int) -> None:
        pixels[index] = _read_picture(paths[index], size)

    # Pillow lets go of the interpreter's lock while it decodes and resizes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(decode, range(len(paths))):
            pass
    return images.permute(0, 3, 1, 2).contiguous()


def _read_picture(path: Path, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(fit_picture(open_picture(path, size), (size, size), crop=CROP).picture)


def _augmentation(size: int) -> Augmentation:
    # The share of 4 pixels in CIFAR's 32.
    return Augmentation.named("crop-flip", shift=size // 8) if size >= 8 else Augmentation()
