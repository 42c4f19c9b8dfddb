"""The data sets that have a name: digits, MNIST, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from onebyone.data.augment import Augmentation
from onebyone.data.splits import Data, TensorSplit, held_out
from onebyone.errors import DataError, UnknownNameError

ENVIRONMENT = "ONEBYONE_DATA"
VALIDATION = 5_000  # examples of the official training set that are kept to choose by
DIGITS_SEED = 0  # the digits' test part never changes, so that figures on it can be compared


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
    """How a named data set is read, normalized and augmented.

    Attributes:
        title: In a line, for listings.
        mean: A channel's mean over the training images, on the scale 0…1.
        std: A channel's standard deviation, likewise.
        read: Reads it.
        validation: Training examples to choose by.
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
        seed: Of the choice of validation examples; the test part is always the same.
        limit: At most so many examples in each part.
        image_size: Height and width in pixels to resize to.

    Raises:
        UnknownNameError: If there is no such data set.
        DataError: If its files are missing and cannot be downloaded, or cannot be read.
    """
    if name not in NAMED:
        raise UnknownNameError("data set", name, NAMED)
    entry = NAMED[name]
    raw = entry.read()

    def split(images: Tensor, labels: Tensor, augmentation: Augmentation | None) -> TensorSplit:
        return TensorSplit(
            resized(images, image_size),
            labels,
            mean=entry.mean,
            std=entry.std,
            augmentation=augmentation,
        )

    whole = split(raw.images, raw.labels, entry.augmentation)
    test = split(raw.test_images, raw.test_labels, None)
    rest, chosen = held_out(len(whole), entry.validation, seed=seed, targets=raw.labels)
    train, validation = whole.part(rest), whole.part(chosen, augmentation=Augmentation())
    if limit is not None:
        train, validation, test = (part.take(limit, seed) for part in (train, validation, test))
    return Data(
        name=f"{name}{raw.note}",
        classes=entry.classes,
        train=train,
        validation=validation,
        test=test,
        seed=seed,
    )


def data_directory() -> tuple[Path, bool]:
    """Return where data sets lie, and whether missing ones may be downloaded to it.

    The environment's ``ONEBYONE_DATA`` first; then ``../shared/data``, for work on the project
    itself; else the user's cache, the only one that is written to.

    Raises:
        DataError: If ``ONEBYONE_DATA`` is no folder.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"`{ENVIRONMENT}` must name a folder with data sets, got {named!r}, which is none. "
                "Create it, or unset the variable."
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
        size: Height and width in pixels, or ``None`` for the images as they are.
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
    from sklearn.datasets import load_digits  # noqa: PLC0415  # a second, and only for this

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
        place = next((found for found in places if _idx(found, "train-images-idx3-ubyte")), None)
        if place is None:
            _download(published, root, places, may_download=may_download)
            place = places[1]
        return Raw(
            images=_read_idx(place, "train-images-idx3-ubyte")[:, None],
            labels=_read_idx(place, "train-labels-idx1-ubyte").to(torch.int64),
            test_images=_read_idx(place, "t10k-images-idx3-ubyte")[:, None],
            test_labels=_read_idx(place, "t10k-labels-idx1-ubyte").to(torch.int64),
        )

    return read


def _cifar10() -> Raw:
    root, may_download = data_directory()
    sheets, published = root / "cifar10", root / "cifar-10-batches-py"
    if not published.is_dir() and (sheets / "train_0.webp").is_file():
        return _cifar10_sheets(sheets)
    if not published.is_dir():
        _download("CIFAR10", root, (published, sheets), may_download=may_download)
    from torchvision.datasets import CIFAR10  # noqa: PLC0415

    try:
        # torchvision compares checksums first, so what it unpickles is the published file.
        parts = [CIFAR10(str(root), train=train) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"Cannot read CIFAR-10 in {published}: {str(error).rstrip('.')}. Delete that folder to "
            "have it looked for or downloaded again, or put the whole data set there."
        ) from error
    images, test_images = (
        torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts
    )
    labels, test_labels = (torch.tensor(part.targets) for part in parts)
    return Raw(images=images, labels=labels, test_images=test_images, test_labels=test_labels)


def _cifar10_sheets(folder: Path) -> Raw:
    images = torch.cat([_read_sheet(folder / f"train_{index}.webp") for index in range(5)])
    return Raw(
        images=images,
        labels=_read_labels(folder / "train_labels.npy"),
        test_images=_read_sheet(folder / "test_first1000.webp"),
        test_labels=_read_labels(folder / "test_first1000_labels.npy"),
        note=" (first 1,000 test images)",
    )


def _read_sheet(path: Path) -> Tensor:
    try:
        with Image.open(path) as picture:
            sheet = torch.from_numpy(np.array(picture.convert("RGB")))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the images of CIFAR-10 in {path}: {error}.") from error
    rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
    tiles = sheet.view(rows, 32, columns, 32, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, 32, 32)


def _read_labels(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path)).to(torch.int64).flatten()
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the labels of CIFAR-10 in {path}: {error}.") from error


def _idx(folder: Path, name: str) -> Path | None:
    return next(
        (path for path in (folder / name, folder / f"{name}.gz") if path.is_file()),
        None,
    )


def _read_idx(folder: Path, name: str) -> Tensor:
    path = _idx(folder, name)
    if path is None:
        raise DataError(f"The folder {folder} must have {name} or {name}.gz, and has neither.")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        # Two zero bytes, the type (8: uint8), the number of dimensions; then each as big-endian.
        if content[:3] != b"\x00\x00\x08":
            raise DataError(f"{path} is not an idx file of bytes. Download it again.")
        dimensions = content[3]
        shape = np.frombuffer(content, ">u4", dimensions, offset=4).astype(np.int64)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"Cannot read {path}: {error}. Download it again.") from error
    return torch.from_numpy(values.copy())


def _download(published: str, root: Path, looked: tuple[Path, ...], *, may_download: bool) -> None:
    places = " or ".join(map(str, looked))
    if not may_download:
        raise DataError(
            f"{published} must lie in {places}, and does not. Put its files there, or unset "
            f"`{ENVIRONMENT}` to have it downloaded to the user's cache."
        )
    import torchvision.datasets  # noqa: PLC0415  # half a second, and only for a download

    dataset: Any = getattr(torchvision.datasets, published)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Aside first: half a data set in its place would be taken for the whole one.
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{published}-") as aside:
            for train in (True, False):
                dataset(aside, train=train, download=True)
            _move_folders(Path(aside), root)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{published} could not be downloaded to {root}: {error}. Check the connection, or "
            f"put its files into {places}, or into a folder that `{ENVIRONMENT}` names."
        ) from error


def _move_folders(source: Path, target: Path) -> None:
    """Move what lies in folders, into the same folders; archives beside them are left."""
    for path in sorted(source.glob("*/**/*")):
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
