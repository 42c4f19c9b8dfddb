"""How long a report takes, and how large it is: 50 layers, 10,000 test images.

    python benchmarks/report_size.py
    python benchmarks/report_size.py --layers 200 --classes 1000 --side 224
    python benchmarks/report_size.py --images 100 --side 640 --task segmentation

The record is made up, of the size that a run makes it: every layer rewritten, as many pictures as a
run keeps, in the form that it keeps them, and for classifiers the confusion of random predictions.
What is timed is what `onebyone report` does: read run.json, make the page, write it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from onebyone.core.records import DataInfo, InputSpec, RunRecord
from onebyone.data import as_split
from onebyone.evaluation.disagreements import count_confusions, find_disagreements
from onebyone.evaluation.pictures.outputs import picture_outputs
from onebyone.evaluation.scores import score
from onebyone.networks.layers import GlobalAverageHead
from onebyone.report.html import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "report"))
from run_records import run_record  # the records that the tests of the page use

MOST_SECONDS, MOST_BYTES = 5.0, 3_000_000


def differing(images: int, classes: int, side: int):
    """Return the disagreements and the confusion of two networks on random pictures."""
    random = np.random.default_rng(0)
    # Noise is the worst that can happen to a compressed picture; blocks of it are nearer to photos.
    blocks = random.integers(0, 256, (256, 3, side // 4, side // 4), dtype=np.uint8)
    pictures = torch.from_numpy(blocks.repeat(4, axis=2).repeat(4, axis=3))
    targets = torch.from_numpy(random.integers(0, classes, images))
    rows = torch.from_numpy(random.integers(0, len(pictures), images))
    split = as_split((pictures[rows], targets))
    torch.manual_seed(0)
    networks = [
        nn.Sequential(nn.AvgPool2d(side // 8), nn.Conv2d(3, 8, 1), GlobalAverageHead(8, classes))
        for _ in range(2)
    ]
    scored = score(networks, split)
    return find_disagreements(*networks, split, scored), count_confusions(split, scored)


def side_by_side(task: str, images: int, classes: int, side: int):
    """Return the pictures of two random segmenters or restorers on random images."""
    torch.manual_seed(0)
    inputs = torch.rand(images, 3, side // 8, side // 8).repeat_interleave(8, 2)
    inputs = inputs.repeat_interleave(8, 3) + 0.1 * torch.rand(images, 3, side, side)
    outputs = classes if task == "segmentation" else 3
    networks = [nn.Conv2d(3, outputs, 1), nn.Conv2d(3, outputs, 1)]
    targets = torch.randint(0, classes, (images, side // 8, side // 8))
    targets = targets.repeat_interleave(8, 1).repeat_interleave(8, 2)
    split = as_split((inputs, inputs.clone() if task == "restoration" else targets))
    return picture_outputs(*networks, split, score(networks, split, task=task, batch_size=10))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--side", type=int, default=32, help="of a picture, in pixels")
    parser.add_argument(
        "--task",
        default="classification",
        choices=("classification", "segmentation", "restoration"),
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    disagreements, confusion, pictures = (), None, None
    if args.task == "classification":
        disagreements, confusion = differing(args.images, args.classes, args.side)
    else:
        pictures = side_by_side(args.task, args.images, args.classes, args.side)
    data = DataInfo(
        name="random",
        train=50_000,
        validation=5_000,
        test=args.images,
        classes=tuple(f"class number {index}" for index in range(args.classes)),
        inputs=InputSpec.of_shape((1, 3, args.side, args.side)),
        seed=0,
    )
    record = run_record(args.layers).with_(
        data=data, disagreements=disagreements, confusion=confusion, pictures=pictures
    )
    with tempfile.TemporaryDirectory() as folder:
        source, page = Path(folder) / "run.json", Path(folder) / "report.html"
        record.save(source)
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            write_report(RunRecord.load(source), page)
            seconds.append(time.perf_counter() - start)
        size, read = page.stat().st_size, source.stat().st_size
    print(
        f"{args.layers} layers, {args.images:,} test images, {args.classes} classes, "
        f"{len(pictures.examples if pictures else disagreements)} examples shown, of "
        f"{args.side}×{args.side} pixels"
    )
    print(
        f"seconds: first {seconds[0]:.2f}, median of {args.repeats} {np.median(seconds):.2f} "
        f"(limit {MOST_SECONDS:g})"
    )
    print(f"bytes: {size:,} from a run.json of {read:,} (limit {MOST_BYTES:,})")
    return 0 if max(seconds) < MOST_SECONDS and size < MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
