"""A segmenter at half its time: mIoU before, before fine-tuning, and after distilling.

    python benchmarks/segmenter.py --keep runs/segmenter/segmenter.json

Trains a small U-Net on the scenes of ``detector.py``, by the class of each pixel, and shrinks it.
Distilling uses no labels. Everything goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import onebyone as obo
from onebyone.core.randomness import seeded
from onebyone.core.settings.runs import TrainRunSettings
from onebyone.data import Data, TensorSplit
from onebyone.pipeline.loading import load_source
from onebyone.pipeline.train import train_loaded
from onebyone.report.console import progress

sys.path.insert(0, str(Path(__file__).parent))
from dense_results import add_options, figures, kept, shrink_options
from detector_network import Block, conv
from kept_runs import run_once
from scenes import CLASSES, Backgrounds, scenes

SIDE = 96
MEAN, STD = (0.485, 0.456, 0.406), (0.25, 0.25, 0.25)
VALIDATION = 150
LEARNED, JUDGED, TESTED = 4000, 5000, 6000  # series of scenes


class UNet(nn.Module):
    """A U-Net of residual blocks on half the picture's resolution (Ronneberger et al. 2015)."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        self.input_shape = (1, 3, SIDE, SIDE)
        first, second, third = widths
        self.stem = nn.Sequential(conv(3, first, 2), Block(first))
        self.down = nn.Sequential(conv(first, second, 2), Block(second))
        self.bottom = nn.Sequential(conv(second, third, 2), Block(third), Block(third))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.middle = nn.Sequential(conv(third + second, second), conv(second, second))
        self.top = nn.Sequential(conv(second + first, first), conv(first, first))
        self.classes = nn.Conv2d(first, len(CLASSES) + 1, 1)
        self.whole = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 3, h, w)`` to scores ``(n, 5, h, w)``; sides are multiples of 8."""
        first = self.stem(x)
        second = self.down(first)
        middle = self.middle(torch.cat([self.up(self.bottom(second)), second], dim=1))
        top = self.top(torch.cat([self.up(middle), first], dim=1))
        return self.whole(self.classes(top))


def make() -> nn.Module:
    """Return an untrained U-Net."""
    return UNet()


def segmentation_data(count: int, test: int, seed: int) -> tuple[Data, str]:
    """Return scenes with the class of each pixel."""
    parts = []
    for series, size in ((LEARNED, count), (JUDGED, VALIDATION), (TESTED, test)):
        backgrounds = Backgrounds(test=series == TESTED)
        part = scenes(size, side=SIDE, backgrounds=backgrounds, seed=series + seed)
        parts.append(TensorSplit(part.images, part.pixels, mean=MEAN, std=STD))
    train, validation, tested = parts
    whole = Data(
        name="scenes", train=train, validation=validation, test=tested,
        classes=("background", *CLASSES), task="segmentation",
    )  # fmt: skip
    return whole, backgrounds.name


def main() -> None:
    """Train, shrink and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/segmenter"))
    parser.add_argument("--training", type=int, default=16, help="epochs of training (16)")
    add_options(parser, scenes=800, epochs=6)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data, backgrounds = segmentation_data(args.scenes, args.test, args.seed)
    spec = f"{Path(__file__)}:make"

    def train(**where: Any) -> None:
        with seeded(args.seed), progress("U-Net") as update:
            fresh = load_source(spec)
            settings = TrainRunSettings(
                epochs=args.training, batch_size=32, metric="mIoU", seed=args.seed,
                progress=update, num_threads=args.threads, **where,
            )  # fmt: skip
            train_loaded(fresh.model, fresh.source, data, settings)

    def shrink(**where: Any) -> None:
        with progress("U-Net") as update:
            options = shrink_options(args)
            obo.shrink(network, data, metric="mIoU", progress=update, **options, **where)

    original = {"training": args.training, "scenes": args.scenes}
    run_once(args.folder / "original", train, seed=args.seed, **original)
    network = obo.load_model(args.folder / "original", original=spec)
    record = run_once(
        args.folder / "shrunk", shrink, test=args.test, **shrink_options(args), **original
    )
    about = {
        "side": SIDE, "training_epochs": args.training, "training_scenes": args.scenes,
        "backgrounds": backgrounds,
    }  # fmt: skip
    kept(figures(record, "U-Net", about, args), args.keep)


if __name__ == "__main__":
    main()
