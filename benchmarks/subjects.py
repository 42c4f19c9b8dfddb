"""The networks that are scored, pretrained or trained here, with their data and metrics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from onebyone.core.metrics import MetricFunction
from onebyone.core.randomness import seeded
from onebyone.core.settings.runs import TrainRunSettings
from onebyone.data import Data
from onebyone.data.splits import TensorSplit, held_out
from onebyone.pipeline.loading import load_source
from onebyone.pipeline.train import train_loaded
from onebyone.report.console import progress

sys.path.insert(0, str(Path(__file__).parent))
from cifar10_data import cifar10_imagenet_statistics, cifar10_nin_statistics
from dncnn import denoising, psnr
from kept_runs import run_once
from networks import (
    cifar10_nin,
    dncnn_sigma25,
    resnet18_low_rank,
    resnet20,
    resnet32,
)

TRAINED = Path("runs/trained")
EPOCHS = 30


def divided(data: Data, kept: int, seed: int) -> tuple[Data, TensorSplit]:
    """Return data without so many training examples, and these: nothing else may see them."""
    assert isinstance(data.train, TensorSplit)
    rest, unused = held_out(len(data.train), kept, seed=seed)
    return replace(data, train=data.train.part(rest)), data.train.part(unused)


def trained(name: str) -> Callable[[], nn.Module]:
    """Return a factory that trains a network on CIFAR-10 when first asked, and keeps it."""
    spec = f"{Path(__file__).with_name('networks.py')}:{name}"

    def train(**where: Any) -> None:
        with seeded(0), progress(name) as update:
            fresh = load_source(spec)
            settings = TrainRunSettings(epochs=EPOCHS, progress=update, **where)
            train_loaded(fresh.model, fresh.source, cifar10_imagenet_statistics(), settings)

    def load() -> nn.Module:
        run_once(TRAINED / name, train, epochs=EPOCHS)
        return load_source(TRAINED / name, original=spec).model

    return load


class Subject(NamedTuple):
    """A pretrained network, its data, and how it is scored."""

    network: Callable[[], nn.Module]
    data: Callable[[], Data]
    metric: str | MetricFunction
    examples: int  # to calibrate on, where timing is what takes long


SUBJECTS = {
    "resnet20": Subject(resnet20, cifar10_imagenet_statistics, "accuracy", 1024),
    "resnet32": Subject(resnet32, cifar10_imagenet_statistics, "accuracy", 1024),
    "resnet18": Subject(trained("cifar10_resnet18"), cifar10_imagenet_statistics, "accuracy", 512),
    "vgg16_bn": Subject(trained("cifar10_vgg16_bn"), cifar10_imagenet_statistics, "accuracy", 512),
    "nin": Subject(cifar10_nin, cifar10_nin_statistics, "accuracy", 256),
    # Untrained: of use for divergence and time alone.
    "resnet18_low_rank": Subject(resnet18_low_rank, cifar10_imagenet_statistics, "accuracy", 128),
    "dncnn": Subject(dncnn_sigma25, denoising, psnr, 96),
}
