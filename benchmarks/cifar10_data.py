"""Data as the pretrained networks of the data directory want it.

Each works as ``benchmarks/cifar10_data.py:NAME`` on the command line.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from onebyone.data import Data, TensorSplit, load_data

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NIN_MEAN = (0.4914, 0.4822, 0.4465)
NIN_STD = (0.2023, 0.1994, 0.2010)


def cifar10_imagenet_statistics() -> Data:
    """CIFAR-10 normalized as the pretrained CIFAR ResNets want it."""
    return _cifar10(IMAGENET_MEAN, IMAGENET_STD)


def cifar10_nin_statistics() -> Data:
    """CIFAR-10 normalized as the pretrained NiN wants it."""
    return _cifar10(NIN_MEAN, NIN_STD)


def enlarged(count: int, size: tuple[int, int], *, seed: int, antialias: bool = False) -> Tensor:
    """Return random training pictures ``(count, 3, *size)`` from -1 to 1, without labels."""
    part = load_data("cifar10").train.take(count, seed)
    images = torch.from_numpy(np.stack([part.image(place) for place in range(count)]))
    channels_first = images.permute(0, 3, 1, 2).float()
    large = F.interpolate(channels_first, size=size, mode="bicubic", antialias=antialias)
    return large.clamp(0, 255) / 127.5 - 1


def _cifar10(mean: tuple[float, ...], std: tuple[float, ...]) -> Data:
    data = load_data("cifar10")
    parts = {}
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        assert isinstance(split, TensorSplit)
        parts[name] = split.with_statistics(mean=mean, std=std)
    return replace(data, **parts)
