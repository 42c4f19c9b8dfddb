"""Training speed: our step against eager NCHW float32, our batches against PIL in a DataLoader.

Run with ``python benchmarks/training_speed.py``. Rounds are interleaved in one process, so that a
neighbor disturbs both sides alike; each ratio is the median over rounds with its quartiles. Time
is the processor time of one thread. P9: one step at batch 128 (forward, backward, AdamW), goals 2,
2.5 and 2. P10: one augmented, normalized image, goals 12 and 5. The last one is of the pretrained
ResNet-20 with 40 % of its MACs, one-shot, and needs CIFAR-10.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import networks
import onebyone as obo
from cifar10_data import cifar10_imagenet_statistics
from onebyone.core.errors import OneByOneError
from onebyone.data import Augmentation, TensorSplit
from onebyone.networks.zoo.article import classic, convolution_only
from onebyone.networks.zoo.nin import nin
from onebyone.training import fused_chains as composed
from onebyone.training.train import train

BATCH = 128


def eager_step(model: nn.Module, split: TensorSplit) -> Callable[[], None]:
    """Return a plain PyTorch epoch: NCHW, float32, the same data and optimizer."""
    network = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def run() -> None:
        for inputs, targets in split.batches(BATCH, seed=0, augment=True):
            loss = F.cross_entropy(network(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def our_step(model: nn.Module, split: TensorSplit, precision: str) -> Callable[[], None]:
    """Return one epoch of :func:`onebyone.training.train.train`, its own overhead included."""

    def run() -> None:
        train(model, split, epochs=1, batch_size=BATCH, learning_rate=1e-4, precision=precision)

    return run


class Pictures(Dataset):
    """What most training scripts do: an image at a time, by PIL."""

    def __init__(self, images: Tensor, transform: Callable) -> None:
        arrays = images.permute(0, 2, 3, 1).squeeze(-1).numpy()
        self.images, self.transform = np.ascontiguousarray(arrays), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), index % 10


def images(n: int, channels: int, size: int) -> TensorSplit:
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, size, size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    how = (
        Augmentation.named("crop-flip", shift=4)
        if channels == 3
        else Augmentation(shift=1, flip=True)
    )
    statistic = (0.5,) * channels
    return TensorSplit(
        pixels, torch.arange(n) % 10, mean=statistic, std=statistic, augmentation=how
    )


def interleaved(sides: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Return the seconds of each side in each round, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for side, kept in zip(sides, seconds, strict=True):
            started = time.process_time()
            side()
            if turn:
                kept.append(time.process_time() - started)
    return seconds


def ratio(first: list[float], second: list[float]) -> str:
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:5.2f} [{low:.2f}–{high:.2f}]"


def training(rounds: int) -> Iterator[str]:
    yield "P9: eager NCHW float32 ÷ ours, a step at batch 128   (ours in float32)"
    cases = {
        "ResNet-20": (networks.CifarResNet(3), 3, 32, 4),
        "NiN": (nin(), 3, 32, 1),
        "classic": (classic(), 1, 28, 80),
        "1×1 network": (convolution_only(), 1, 28, 80),
    }
    for name, (model, channels, size, steps) in cases.items():
        split = images(BATCH * steps, channels, size)
        sides = [
            eager_step(model, split),
            our_step(model, split, "auto"),
            our_step(model, split, "float32"),
        ]
        eager, ours, plain = interleaved(sides, rounds)
        per_step = 1e3 * statistics.median(ours) / steps
        ratios = f"{ratio(eager, ours)}   ({ratio(eager, plain)})"
        yield f"  {name:12} {ratios}   {per_step:6.1f} ms a step"


def feeding(rounds: int) -> Iterator[str]:
    yield "P10: PIL in a DataLoader ÷ ours, processor time of an image"
    for name, channels, size in (("Fashion-MNIST", 1, 28), ("CIFAR-10", 3, 32)):
        split = images(4096, channels, size)
        statistic = (0.5,) * channels
        transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=4 if channels == 3 else 1),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(statistic, statistic),
            ]
        )
        loader = DataLoader(
            Pictures(split._inputs, transform),  # noqa: SLF001
            batch_size=BATCH,
            shuffle=True,
        )

        def pil(loader: DataLoader = loader) -> None:
            for _ in loader:
                pass

        def ours(split: TensorSplit = split) -> None:
            for _ in split.batches(BATCH, seed=0, augment=True, channels_last=True):
                pass

        first, second = interleaved([pil, ours], rounds)
        each = 1e6 * statistics.median(second) / len(split)
        yield f"  {name:14} {ratio(first, second)}   {each:5.2f} µs an image"


def factors(rounds: int) -> Iterator[str]:
    yield "Chains of factors as they are ÷ as one convolution, a step at batch 128"
    try:
        calibration = cifar10_imagenet_statistics().train.take(256, 0)
        network = networks.resnet20().eval()
    except OneByOneError as error:
        yield f"  left out: {error}"
        return
    small = obo.restructure(network, obo.plan(network, calibration, budget="macs=40%"))
    split = images(BATCH * 4, 3, 32)
    for precision in ("auto", "float32"):
        step = our_step(small, split, precision)
        first, second = interleaved([as_they_are(step), step], rounds)
        yield f"  ResNet-20, {precision:8} {ratio(first, second)}"


def as_they_are(step: Callable[[], None]) -> Callable[[], None]:
    """Return a step in which no chain is computed as one convolution."""

    def run() -> None:
        with mock.patch.object(composed.Composition, "is_quicker", return_value=False):
            step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = max(2, parser.parse_args().rounds)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, 1 thread, {rounds} rounds, median [quartiles]")
    for lines in (feeding(rounds), training(rounds), factors(rounds)):
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
