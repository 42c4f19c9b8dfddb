"""Data as the pretrained networks of the data directory want it.

Each works as ``benchmarks/datasets.py:NAME`` on the command line.
"""

from __future__ import annotations

from dataclasses import replace

from onebyone.data import Data, TensorSplit, load_data

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def cifar10_imagenet_statistics() -> Data:
    """CIFAR-10 normalized as the pretrained CIFAR ResNets want it."""
    data = load_data("cifar10")
    parts = {}
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        assert isinstance(split, TensorSplit)
        parts[name] = split.with_statistics(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return replace(data, **parts)
