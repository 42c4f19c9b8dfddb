"""The data sets with a name: digits, MNIST, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from onebyone.core.errors import DataError, UnknownNameError
from onebyone.core.read_files import printable, reason_of, why_no_folder
from onebyone.data.arrays import read_cifar_batch, read_idx, read_npy
from onebyone.data.augment import Augmentation
from onebyone.data.pictures import check_picture_memory, open_picture
from onebyone.data.splits import Data, TensorSplit, drawn_rows, held_out

ENVIRONMENT = "ONEBYONE_DATA"
VALIDATION = 5_000  # examples held out of the official training set for validation
DIGITS_SEED = 0  # the test part of digits never changes, so that results are comparable


@dataclass(frozen=True, kw_only=True)
class Raw:
    """Images and labels as published: uint8 ``(n, channels, height, width)`` and int64 ``(n,)``."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class NamedData:
    """How to read, normalize and augment a named data set.

    Attributes:
        title: One line for listings.
        classes: Names of the classes.
        mean: Mean of each channel over the training images, on the scale 0…1.
        std: Standard deviation of each channel, on the same scale.
        augmentation: Augmentation of the training images.
        read: Reads it.
        validation: Number of training examples held out for validation.
    """

    title: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    read: Callable[[], Raw]
    validation: int = VALIDATION


def load_named(
    name: str, *, seed: int = 0, limit: int | None = None, image_size: int | None = None
) -> Data:
    """Load one of :data:`NAMED`.

    Args:
        name: Its name.
        seed: Random seed for choosing validation examples; the test part is always the same.
        limit: Most examples in each part.
        image_size: Height and width in pixels to resize to.

    Raises:
        UnknownNameError: If there is no such data set.
        DataError: If its files are missing and cannot be downloaded, cannot be read, or would not
            fit into memory at that size.
    """
    if name not in NAMED:
        raise UnknownNameError("data set", name, NAMED)
    entry = NAMED[name]
    raw = entry.read()

    rest, chosen = held_out(len(raw.images), entry.validation, seed=seed, targets=raw.labels)
    rows = {"train": rest, "validation": chosen, "test": torch.arange(len(raw.test_images))}
    if limit is not None:
        rows = {
            part: of[drawn_rows(len(of), limit, seed)] if limit < len(of) else of
            for part, of in rows.items()
        }
    if image_size is not None:
        count = sum(map(len, rows.values()))
        check_picture_memory(count, image_size, channels=raw.images.shape[1])

    def split(images: Tensor, labels: Tensor, augmentation: Augmentation | None) -> TensorSplit:
        return TensorSplit(
            images, labels, mean=entry.mean, std=entry.std, augmentation=augmentation
        )

    def part(of: Tensor, augmentation: Augmentation | None) -> TensorSplit:
        # Resize only the images of this part.
        return split(resized(raw.images[of], image_size), raw.labels[of], augmentation)

    if image_size is None:
        whole = split(raw.images, raw.labels, entry.augmentation)
        train = whole.part(rows["train"])
        validation = whole.part(rows["validation"], augmentation=Augmentation())
    else:
        train, validation = part(rows["train"], entry.augmentation), part(rows["validation"], None)
    test_images = resized(raw.test_images[rows["test"]], image_size)
    test = split(test_images, raw.test_labels[rows["test"]], None)
    return Data(
        name=f"{name}{raw.note}",
        classes=entry.classes,
        train=train,
        validation=validation,
        test=test,
        seed=seed,
    )


def data_directory() -> tuple[Path, bool]:
    """Return the folder of data sets, and whether missing ones may be downloaded to it.

    It is the folder in the environment variable ``ONEBYONE_DATA``; else ``../shared/data`` if it
    exists, for work on the project itself; else the user's cache. Only the cache is written to.

    Raises:
        DataError: If ``ONEBYONE_DATA`` is not a folder.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        folder = Path(named).expanduser()
        why = why_no_folder(folder)
        if why is not None:
            raise DataError(
                f"`{ENVIRONMENT}` must name a folder with data sets, but {named!r} {why}. Create "
                "it, or unset the variable."
            )
        return folder, False
    beside = Path("..") / "shared" / "data"
    if beside.is_dir():
        return beside.resolve(), False
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "onebyone" / "data", True


def resized(images: Tensor, size: int | None) -> Tensor:
    """Return uint8 images of another height and width, bilinear with antialiasing.

    Args:
        images: Shape ``(n, channels, height, width)``. Not modified.
        size: Height and width in pixels, or ``None`` to keep the size.
    """
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    parts = [
        F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for part in torch.split(images, 1024)
    ]
    return torch.cat(parts)


def _digits() -> Raw:
    from sklearn.datasets import load_digits  # noqa: PLC0415  # takes a second; only needed here

    bunch = load_digits()
    scans = torch.from_numpy(np.asarray(bunch.images))[:, None]
    images = resized((scans * (255 / 16)).round().to(torch.uint8), 28)
    labels = torch.from_numpy(np.asarray(bunch.target)).to(torch.int64)
    rest, test = held_out(len(images), 397, seed=DIGITS_SEED, targets=labels)
    return Raw(
        images=images[rest],
        labels=labels[rest],
        test_images=images[test],
        test_labels=labels[test],
    )


def _mnist_like(folder: str, published: str) -> Callable[[], Raw]:
    def read() -> Raw:
        root, may_download = data_directory()
        places = (root / folder, root / published / "raw")
        place = next((found for found in places if _holds_any(found)), None)
        if place is None or (may_download and not _holds_all(place)):
            _download(published, root, places, may_download=may_download)
            place = places[1]
        images, labels = _labelled(place, "train")
        test_images, test_labels = _labelled(place, "t10k")
        return Raw(images=images, labels=labels, test_images=test_images, test_labels=test_labels)

    return read


def _labelled(place: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images ``(n, 1, height, width)`` and labels ``(n,)`` from two idx files."""
    of_images, of_labels = (f"{part}-{kind}" for kind in _IDX_KINDS)
    images = read_idx(_idx_file(place, of_images), dimensions=3)
    labels = read_idx(_idx_file(place, of_labels), dimensions=1)
    _check_labels(place / of_images, place / of_labels, len(images), labels)
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).to(torch.int64)


def _check_labels(images: Path, labels: Path, count: int, values: NDArray[Any]) -> None:
    if len(values) != count or not count:
        raise DataError(
            f"There must be a label in {printable(labels)} for each of the {count:,} images in "
            f"{printable(images)}, got {len(values):,}. Download both again."
        )
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 9:
        raise DataError(
            f"The labels in {printable(labels)} must be whole numbers from 0 to 9, got "
            f"{values.min()} to {values.max()}. Download it again."
        )


def _cifar10() -> Raw:
    root, may_download = data_directory()
    sheets, published = root / "cifar10", root / "cifar-10-batches-py"
    if not published.is_dir() and (sheets / "train_0.webp").is_file():
        return _cifar10_sheets(sheets)
    if not published.is_dir():
        _download("CIFAR10", root, (published, sheets), may_download=may_download)
    from torchvision.datasets import CIFAR10  # noqa: PLC0415  # for its checksums

    try:
        images, labels = _cifar10_part(published, CIFAR10.train_list)
        test_images, test_labels = _cifar10_part(published, CIFAR10.test_list)
    except DataError as error:
        raise DataError(
            f"Cannot read CIFAR-10 in {printable(published)}: {error} Delete that folder to have "
            "it looked for or downloaded again, or put the whole data set there."
        ) from error
    return Raw(images=images, labels=labels, test_images=test_images, test_labels=test_labels)


def _cifar10_part(folder: Path, files: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for name, checksum in files:
        part, part_labels = read_cifar_batch(folder / name, md5=checksum)
        images.append(torch.from_numpy(part))
        labels += part_labels
    return torch.cat(images), torch.tensor(labels)


def _cifar10_sheets(folder: Path) -> Raw:
    train, test = [folder / f"train_{index}.webp" for index in range(5)], "test_first1000"
    images = torch.cat([_read_sheet(path) for path in train])
    test_images = _read_sheet(folder / f"{test}.webp")
    return Raw(
        images=images,
        labels=_read_labels(train[0], folder / "train_labels.npy", len(images)),
        test_images=test_images,
        test_labels=_read_labels(
            folder / f"{test}.webp", folder / f"{test}_labels.npy", len(test_images)
        ),
        note=" (first 1,000 test images)",
    )


def _read_sheet(path: Path) -> Tensor:
    """Return the tiles of 32×32 pixels in a picture, row by row."""
    sheet = torch.from_numpy(np.array(open_picture(path)))
    if sheet.shape[0] % 32 or sheet.shape[1] % 32:
        raise DataError(
            f"The sides of {printable(path)} must be multiples of 32, one tile per image, "
            f"got {sheet.shape[1]}×{sheet.shape[0]}. Copy it again."
        )
    rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
    tiles = sheet.view(rows, 32, columns, 32, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, 32, 32)


def _read_labels(images: Path, path: Path, count: int) -> Tensor:
    values = read_npy(path).reshape(-1)
    _check_labels(images, path, count, values)
    return torch.from_numpy(values.astype(np.int64))


_IDX_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def _idx(folder: Path, name: str) -> Path | None:
    return next(
        (path for path in (folder / name, folder / f"{name}.gz") if path.is_file()),
        None,
    )


def _idx_file(folder: Path, name: str) -> Path:
    path = _idx(folder, name)
    if path is None:
        raise DataError(
            f"The folder {printable(folder)} must have {name} or {name}.gz, and has neither. Put "
            "it there."
        )
    return path


def _holds_any(folder: Path) -> bool:
    return any(_idx(folder, f"{part}-{kind}") for part in ("train", "t10k") for kind in _IDX_KINDS)


def _holds_all(folder: Path) -> bool:
    return all(_idx(folder, f"{part}-{kind}") for part in ("train", "t10k") for kind in _IDX_KINDS)


def _download(published: str, root: Path, looked: tuple[Path, ...], *, may_download: bool) -> None:
    places = " or ".join(map(str, looked))
    if not may_download:
        raise DataError(
            f"{published} must lie in {places}, and does not. Put its files there, or unset "
            f"`{ENVIRONMENT}` to have it downloaded to the user's cache."
        )
    import torchvision.datasets  # noqa: PLC0415  # takes half a second; only needed to download

    dataset: Any = getattr(torchvision.datasets, published)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Download to a temporary folder first, so that a partial data set is never used.
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{published}-") as aside:
            for train in (True, False):
                dataset(aside, train=train, download=True)  # compares checksums
            _move_folders(Path(aside), root)
    except Exception as error:  # connections, archives and disks raise many kinds
        raise DataError(
            f"{published} could not be downloaded to {root}: {reason_of(error)}. Check the "
            f"connection and the free space, or put its files into {places}, or into a folder "
            f"that `{ENVIRONMENT}` names."
        ) from error


def _move_folders(source: Path, target: Path) -> None:
    """Move the content of each folder into the same folder of the target, without archives."""
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        place = target / folder.name
        if not place.exists():
            folder.replace(place)  # moves the whole folder at once
            continue
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                place = target / path.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)


_CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_DIGITS = tuple("0123456789")

# The names are those of `core.data_names.DATA_NAMES`.
NAMED = {
    "digits": NamedData(
        title="1,797 scanned digits of scikit-learn, enlarged to 28×28; needs no download",
        classes=_DIGITS,
        mean=(0.306,),
        std=(0.325,),
        augmentation=Augmentation.named("shift", shift=2),
        read=_digits,
        validation=200,
    ),
    "mnist": NamedData(
        title="70,000 handwritten digits, 28×28",
        classes=_DIGITS,
        mean=(0.1307,),
        std=(0.3081,),
        augmentation=Augmentation.named("shift", shift=2),
        read=_mnist_like("mnist", "MNIST"),
    ),
    "fashion-mnist": NamedData(
        title="70,000 pictures of clothes, 28×28",
        classes=_FASHION_CLASSES,
        mean=(0.2860,),
        std=(0.3530,),
        augmentation=Augmentation(shift=1, flip=True),
        read=_mnist_like("fashion_mnist", "FashionMNIST"),
    ),
    "cifar10": NamedData(
        title="60,000 color photographs of 10 things, 32×32",
        classes=_CIFAR10_CLASSES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augmentation=Augmentation.named("crop-flip", shift=4),
        read=_cifar10,
    ),
}
