"""Pictures become inputs as those did that the network was trained on."""

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

from onebyone.data import Data, load_data
from onebyone.data.pictures import fit_picture, open_picture
from onebyone.errors import OptionError
from onebyone.explaining.record import Preparation
from onebyone.records import DataInfo, ModelSource, RunRecord
from onebyone.report.maps import Pixels
from onebyone.runs import RECORD, is_run

# Pixels of the longer side of a picture to look at.
DISPLAY = 448


@dataclass(frozen=True)
class Known:
    """What is known of a network's inputs and classes.

    Attributes:
        classes: Their names; empty where they are not known.
    """

    preparation: Preparation
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """A picture as the network takes it.

    Attributes:
        tensor: Shape ``(channels, height, width)``.
        seen: What the network sees, ``(height, width, 3)``.
        shown: The same part of the picture, finer where the picture is.
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
    input_shape: tuple[int, ...] | None = None,
) -> Known:
    """Return how pictures are made inputs of a network.

    What is given counts first, then the data, then what a run's record says of its data, then
    what torchvision or timm says of its networks.

    Args:
        model: Not modified.
        source: Where it came from.
        folder: Of the run that it came from.
        data: An :class:`onebyone.data.Data`, or what :func:`onebyone.load_data` takes.
        mean: Subtracted from each channel of a picture scaled to 0…1.
        std: What each channel is then divided by.
        size: Height and width in pixels.
        input_shape: Shape of one input, if known.

    Raises:
        OptionError: If it is not known; says what to give.
    """
    info = _data_info(data, folder)
    library = None if info is not None else _of_library(model, source)
    classes = info.classes if info is not None else _library_classes(source)
    found = library or (None if info is None else _of_data(info))
    shape = input_shape if info is None else info.input_shape
    if (mean is None) != (std is None):
        raise OptionError("`mean` and `std` go together: give both or neither.")
    if mean is not None and std is not None:
        if found is not None:
            shape = (found.channels, found.height, found.width)
        found = _given(found, shape or _shape_of(model, size), tuple(mean), tuple(std))
    if found is None:
        raise OptionError(
            f"How pictures become inputs of {source.name} is not known. Give the data that it was "
            "trained on, or the mean and the standard deviation of its channels on the scale of "
            "0…1 (0 and 1 for pixels as they are)."
        )
    if size is not None:
        found = _with_size(found, size)
    if not found.height:
        raise OptionError(f"The size of an input of {source.name} is not known: give `size`.")
    return Known(found, classes)


def _data_info(data: object, folder: str | Path | None) -> DataInfo | None:
    if isinstance(data, str):
        # One example of each part tells the shape, the classes and the normalization.
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
    if info.mean is None or info.std is None or len(info.input_shape) != 3:
        return None
    channels, height, width = info.input_shape
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
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
        raise OptionError(
            f"`mean` and `std` must have one value or {channels}, and `std` must be above 0, got "
            f"{mean} and {std}."
        )
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


def _with_size(found: Preparation, size: tuple[int, int]) -> Preparation:
    if min(size) < 1:
        raise OptionError(f"`size` must be a height and a width from 1 pixel, got {size}.")
    return replace(found, height=size[0], width=size[1])


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
    """Return ImageNet's names for networks of libraries that were not given another head."""
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
    """Return a picture as the network takes it.

    Args:
        image: A file that Pillow reads, or an opened picture, which is not modified.
        how: How.

    Raises:
        DataError: If the file cannot be read.
    """
    opened = (
        image.convert("RGB")
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
        path="picture" if isinstance(image, Image.Image) else str(image),
        tensor=(values / 255 - mean) / std,
        seen=np.array(fitted.picture.convert("RGB")),
        shown=_shown(picture, fitted.picture, fitted.box),
    )


def _shown(
    picture: Image.Image, seen: Image.Image, box: tuple[float, float, float, float]
) -> Pixels:
    """Return what the network sees, from the picture's own pixels where it has more of them."""
    times = max(1, round(DISPLAY / max(seen.size)))
    size = (seen.width * times, seen.height * times)
    if box[2] - box[0] < size[0]:
        return np.array(seen.convert("RGB").resize(size, Image.Resampling.NEAREST))
    return np.array(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS, box=box))
