"""Makes data of listed pictures, which are decoded into memory if they fit, else streamed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onebyone.core.errors import OptionError
from onebyone.core.processes import is_main, on_main
from onebyone.core.run_lines import LOGGER
from onebyone.data.augment import Augmentation
from onebyone.data.listed import Listed
from onebyone.data.pictures import why_not_in_memory
from onebyone.data.splits import Data, Split
from onebyone.data.streams import PictureSplit

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224
CROP = 7 / 8  # share of the shorter side: 224 of 256 pixels, the usual test crop on ImageNet


def picture_data(
    parts: Mapping[str, Listed],
    *,
    name: str,
    classes: tuple[str, ...],
    seed: int,
    limit: int | None,
    image_size: int | None,
    workers: int | None,
) -> Data:
    """Return the data of listed pictures.

    Args:
        parts: ``train``, ``validation`` and ``test``.
        name: Name of the data set.
        classes: Names of the classes; without them, pictures have no labels.
        seed: Random seed of the limit.
        limit: Most pictures in each part; others are not decoded.
        image_size: Height and width in pixels; default 224.
        workers: Number of threads that decode pictures as they are used. By default pictures that
            fit into memory are decoded once, and others as they are used.

    Raises:
        DataError: If pictures cannot be decoded.
        OptionError: If the size is below 1.
    """
    size = IMAGE_SIZE if image_size is None else image_size
    if size < 1:
        raise OptionError(f"`image_size` must be at least 1 pixel, got {size}.")
    taken = {part: listed.take(limit, seed) for part, listed in parts.items()}
    streams = workers is not None
    if not streams:
        # The main process decides for all, since each sees another amount of free memory.
        why = on_main(lambda: why_not_in_memory(sum(map(len, taken.values())), size))
        streams = why is not None
        if streams and is_main():
            LOGGER.info(f"{why}: they are decoded each time that they are used.")
    splits: dict[str, Any] = {}
    for part, listed in taken.items():
        split = _streamed(
            listed, size, labelled=bool(classes), augments=part == "train", workers=workers
        )
        splits[part] = split if streams else split.in_memory()
    return Data(name=name, classes=classes, seed=seed, crop=CROP, **splits)


def all_pictures(listed: Listed, *, labelled: bool) -> Split:
    """Return listed pictures as one split: decoded into memory if they fit, else streamed."""
    split = _streamed(listed, IMAGE_SIZE, labelled=labelled, augments=True, workers=None)
    return split.in_memory() if on_main(split.fits_memory) else split


def _streamed(
    listed: Listed, size: int, *, labelled: bool, augments: bool, workers: int | None
) -> PictureSplit:
    return PictureSplit(
        listed,
        size=size,
        crop=CROP,
        labelled=labelled,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        augmentation=_augmentation(size) if augments else None,
        workers=workers,
    )


def _augmentation(size: int) -> Augmentation:
    # The same share as 4 of CIFAR's 32 pixels.
    return Augmentation.named("crop-flip", shift=size // 8) if size >= 8 else Augmentation()
