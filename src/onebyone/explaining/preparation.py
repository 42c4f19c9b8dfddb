"""Prepares pictures as inputs in the same way as the network's training data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from onebyone.core.errors import OptionError
from onebyone.core.read_files import printable
from onebyone.core.records import DataInfo, InputSpec, ModelSource, RunRecord
from onebyone.data import Data, load_data
from onebyone.data.pictures import MOST_PIXELS, as_rgb, fit_picture, open_picture
from onebyone.explaining.record import Preparation
from onebyone.pipeline.run_folder import RECORD, is_run
from onebyone.report.pictures import Pixels

# The longer side, in pixels, of a picture shown on the page.
DISPLAY = 448


@dataclass(frozen=True)
class Known:
    """What is known about a network's inputs and classes.

    Attributes:
        classes: Names of the classes; empty if they are not known.
    """

    preparation: Preparation
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """A picture as an input of the network.

    Attributes:
        tensor: Shape ``(channels, height, width)``.
        seen: The pixels that the network sees, ``(height, width, 3)``.
        shown: The same part of the picture, in the picture's own resolution.
    """

    path: str
    tensor: Tensor
    seen: Pixels
    shown: Pixels


def find_preparation(
    model: nn.Module,
    source: ModelSource,
    *,
    folder: str | Path | None = None,
    data: object = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    inputs: InputSpec | None = None,
) -> Known:
    """Return how pictures become inputs of a network.

    The arguments come first, then the data, then the run's record, then the settings of
    torchvision or timm for its networks.

    Args:
        model: Not modified.
        source: Where it came from.
        folder: Folder of the run that it came from.
        data: An :class:`onebyone.data.Data`, or what :func:`onebyone.load_data` takes.
        mean: Subtracted from each channel of a picture scaled to 0…1.
        std: What each channel is then divided by.
        size: Height and width in pixels.
        inputs: What one example is, if known.

    Raises:
        OptionError: If this is not known; says what to give.
    """
    info = _data_info(data, folder)
    library = None if info is not None else _of_library(model, source)
    classes = info.classes if info is not None else _library_classes(source)
    found = library or (None if info is None else _of_data(info))
    spec = inputs if info is None else info.inputs
    shape = None if spec is None else spec.single("explain").sample
    if (mean is None) != (std is None):
        raise OptionError("`mean` and `std` go together: give both or neither.")
    if mean is not None and std is not None:
        if found is not None:
            shape = (found.channels, found.height, found.width)
        shape = shape or _shape_of(model, size)
        found = _given(found, shape, size, tuple(mean), tuple(std))
    if found is None:
        raise OptionError(
            f"How pictures become inputs of {source.name} is not known. Give the data that it was "
            "trained on, or the mean and the standard deviation of its channels on the scale of "
            "0…1 (0 and 1 leave pixels unchanged)."
        )
    if size is not None:
        height, width = _pixels(size)
        found = replace(found, height=height, width=width)
    return Known(found, classes)


def _data_info(data: object, folder: str | Path | None) -> DataInfo | None:
    if isinstance(data, str):
        # One example of each part is enough for the shape, the classes and the normalization.
        return load_data(data, limit=1).info()
    if isinstance(data, Data):
        return data.info()
    if data is not None:
        raise OptionError(
            f"`data` must be a Data or what load_data takes, got a {type(data).__name__}."
        )
    if folder is not None and is_run(folder):
        return RunRecord.load(Path(folder) / RECORD).data
    return None


def _of_data(info: DataInfo) -> Preparation | None:
    if info.mean is None or info.std is None or not info.inputs.is_image:
        return None
    channels, height, width = info.inputs.tensors[0].sample
    return Preparation(
        height=height,
        width=width,
        channels=_channels(channels),
        mean=info.mean,
        std=info.std,
        crop=info.crop,
        source=f"as the data {info.name}",
    )


def _shape_of(model: nn.Module, size: tuple[int, int] | None) -> tuple[int, ...] | None:
    """Return the shape of an input from its size and the channels of the first convolution."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else (first.in_channels, *(size or (0, 0)))


def _given(
    found: Preparation | None,
    shape: tuple[int, ...] | None,
    size: tuple[int, int] | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Preparation:
    if shape is not None and len(shape) != 3:
        raise OptionError(
            "Only pictures can be explained: an input must be of shape (channels, height, width), "
            f"got {shape}."
        )
    channels, height, width = shape or (max(len(mean), len(std)), 0, 0)
    channels = _channels(channels)
    values: tuple[Any, ...] = mean + std
    numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    if (
        not numbers
        or len(mean) not in (1, channels)
        or len(std) not in (1, channels)
        or min(std) <= 0
    ):
        raise OptionError(
            f"`mean` and `std` must have one finite number or {channels}, and `std` must be above "
            f"0, got {mean} and {std}."
        )
    if size is not None:
        height, width = _pixels(size)
    if not height:
        raise OptionError("The size of an input is not known. Give `size`.")
    return Preparation(
        height=height,
        width=width,
        channels=channels,
        mean=mean * (channels // len(mean)),
        std=std * (channels // len(std)),
        crop=1.0 if found is None else found.crop,
        resampling="bilinear" if found is None else found.resampling,
        source="as given",
    )


def _channels(count: int) -> int:
    if count not in (1, 3):
        raise OptionError(
            f"A network to explain must take pictures of 1 or 3 channels, but its inputs have "
            f"{count}."
        )
    return count


def _pixels(size: tuple[int, int]) -> tuple[int, int]:
    sides: tuple[Any, ...] = size
    whole = len(sides) == 2 and all(isinstance(side, int) for side in sides)
    if not whole or min(size) < 1 or size[0] * size[1] > MOST_PIXELS:
        raise OptionError(
            f"`size` must be a height and a width of at least 1 pixel, with at most "
            f"{MOST_PIXELS:,} pixels in all, got {size}."
        )
    return size


# ---------------------------------------------------------------- what libraries say


def _of_library(model: nn.Module, source: ModelSource) -> Preparation | None:
    library, _, name = (source.spec or "").partition(":")
    if library == "torchvision":
        return _of_torchvision(name)
    return _of_timm(model) if library == "timm" else None


def _of_torchvision(name: str) -> Preparation | None:
    weights = _torchvision_weights(name)
    if weights is None:
        return None
    preset = weights.transforms()
    size = preset.crop_size[0]
    return Preparation(
        height=size,
        width=size,
        channels=3,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        crop=size / preset.resize_size[0],
        resampling=_resampling(preset.interpolation.value),
        source=f"torchvision's preset for {name}",
    )


def _torchvision_weights(name: str) -> Any:
    import torchvision.models  # noqa: PLC0415  (takes a second; only for its own networks)

    if name not in torchvision.models.list_models(module=torchvision.models):
        return None  # not a classifier of pictures
    kinds = list(torchvision.models.get_model_weights(name))
    return getattr(torchvision.models.get_model_weights(name), "DEFAULT", None) if kinds else None


def _of_timm(model: nn.Module) -> Preparation | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    if not {"mean", "std", "input_size"} <= config.keys():
        return None
    _, height, width = config["input_size"]
    return Preparation(
        height=height,
        width=width,
        channels=3,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop=height / math.floor(height / (config.get("crop_pct") or 1.0)),
        resampling=_resampling(config.get("interpolation")),
        source="timm's configuration of the network",
    )


def _resampling(name: object) -> str:
    return "bicubic" if name == "bicubic" else "bilinear"


def _library_classes(source: ModelSource) -> tuple[str, ...]:
    """Return ImageNet's class names for a library's network, unless it has another head."""
    library, _, name = (source.spec or "").partition(":")
    if library == "torchvision":
        weights = _torchvision_weights(name)
        return () if weights is None else tuple(weights.meta.get("categories", ()))
    if library == "timm":
        import timm.data  # noqa: PLC0415  (takes seconds)

        timm_data: Any = timm.data
        names = timm_data.ImageNetInfo()
        return tuple(names.index_to_description(i) for i in range(names.num_classes()))
    return ()


# ---------------------------------------------------------------- pictures


def prepare(image: str | Path | Image.Image, how: Preparation) -> Prepared:
    """Return a picture as an input of the network.

    Args:
        image: A file that Pillow reads, or an opened picture, which is not modified.
        how: The preparation.

    Raises:
        DataError: If the file cannot be read.
    """
    opened = (
        as_rgb(image)
        if isinstance(image, Image.Image)
        else open_picture(Path(image), max(how.height, how.width))
    )
    picture = opened.convert("L") if how.channels == 1 else opened
    fitted = fit_picture(
        picture, (how.height, how.width), crop=how.crop, bicubic=how.resampling == "bicubic"
    )
    pixels = np.array(fitted.picture)
    values = torch.from_numpy(pixels.reshape(how.height, how.width, -1)).permute(2, 0, 1).float()
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (how.mean, how.std))
    return Prepared(
        path="picture" if isinstance(image, Image.Image) else printable(image),
        tensor=(values / 255 - mean) / std,
        seen=np.array(fitted.picture.convert("RGB")),
        shown=_shown(picture, fitted.picture, fitted.box),
    )


def _shown(
    picture: Image.Image, seen: Image.Image, box: tuple[float, float, float, float]
) -> Pixels:
    """Return the part that the network sees, in the picture's resolution if that is higher."""
    times = max(1, round(DISPLAY / max(seen.size)))
    size = (seen.width * times, seen.height * times)
    if box[2] - box[0] < size[0]:
        return np.array(seen.convert("RGB").resize(size, Image.Resampling.NEAREST))
    return np.array(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS, box=box))
