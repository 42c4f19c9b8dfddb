"""A detector at half its time: mAP before, before fine-tuning, and after distilling without labels.

    python benchmarks/detector.py --keep runs/detector/detector.json

Trains a small SSD of torchvision on generated scenes (shapes of four classes on pictures), and
shrinks it up to its raw outputs. It is timed up to these: decoding and suppressing boxes are the
same before and after. Everything goes on where it stopped: the training, the plan and the
distillation are kept in the folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import onebyone as obo
from onebyone.data import Data, TensorSplit
from onebyone.report.console import progress

sys.path.insert(0, str(Path(__file__).parent))
from dense_results import add_options, figures, kept, shrink_options
from detector_network import BATCH, MEAN, SIDE, STD, trained
from kept_runs import run_once
from scenes import CLASSES, Backgrounds, scenes

VALIDATION = 150
# Scenes of different series have nothing in common; the training's own series has the seed 0.
FITTED, JUDGED, TESTED = 1000, 2000, 3000


def detection_data(count: int, test: int, seed: int) -> tuple[Data, str]:
    """Return unlabelled scenes to fit and distil on, and labelled ones to test on."""
    parts = []
    for series, size in ((FITTED, count), (JUDGED, VALIDATION), (TESTED, test)):
        backgrounds = Backgrounds(test=series == TESTED)
        part = scenes(size, side=SIDE, backgrounds=backgrounds, seed=series + seed)
        boxes = part.boxes if series == TESTED else None
        parts.append(TensorSplit(part.images, boxes, mean=MEAN, std=STD))
    train, validation, tested = parts
    classes = ("background", *CLASSES)
    whole = Data(
        name="scenes", train=train, validation=validation, test=tested, classes=classes
    )  # fmt: skip
    return whole, backgrounds.name


def main() -> None:
    """Train, shrink and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/detector"))
    parser.add_argument("--steps", type=int, default=1400, help=f"of {BATCH} scenes each (1400)")
    add_options(parser, scenes=800, epochs=6)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    detector = trained(args.folder / "original.pt", steps=args.steps, seed=args.seed)
    data, backgrounds = detection_data(args.scenes, args.test, args.seed)
    raw = obo.RawDetector(detector)

    def shrink(**where: Any) -> None:
        with progress("detector") as update:
            obo.shrink(raw, data, progress=update, **shrink_options(args), **where)

    record = run_once(
        args.folder / "shrunk", shrink,
        steps=args.steps, scenes=args.scenes, test=args.test, **shrink_options(args),
    )  # fmt: skip
    about = {
        "side": SIDE, "steps": args.steps, "training_scenes": args.steps * BATCH,
        "backgrounds": backgrounds,
    }  # fmt: skip
    kept(figures(record, "SSD, small residual backbone", about, args), args.keep)


if __name__ == "__main__":
    main()
