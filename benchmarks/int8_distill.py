r"""Distillation in int8 after one in float32: accuracy of the deployed file before and after it.

    python benchmarks/int8_distill.py resnet20 --macs 50 30 --json resnet20.json

A network is rewritten for a share of its MACs and distilled in float32, without labels. Then it
is quantized by the closed forms, and distilled again with its rounding. Every figure is of an ONNX
file in ONNX Runtime on the 1,000 test images: the original, the rewritten network in float32, in
int8 by the closed forms, and in int8 after the distillation; with ``--more`` also in int8 by the
closed forms after as many more epochs in float32, from the same start. Divergence is the mean
Kullback-Leibler divergence from the original; its intervals, and those of the accuracy's difference
from the original's, are 95 %, by a bootstrap over the images. Times are ratios to the original in
float32, interleaved in one series of rounds, with one thread and a batch of 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import onebyone as obo
from onebyone.core.records import TrainLog
from onebyone.core.tables import Table
from onebyone.data import Data
from onebyone.networks.subnormals import flush_in_place
from onebyone.quantizing import quantize
from onebyone.report.console import print_table
from onebyone.runtimes import describe_machine
from onebyone.training.int8 import distill_int8

sys.path.insert(0, str(Path(__file__).parent))
from int8 import (
    SUBJECTS,
    divergences,
    interval,
    outputs_of_file,
    test_part,
    times,
    to_flexible,
)

JUDGED = 500  # validation images
CALIBRATION = 128
FITTED = 1024  # training images that rewritten weights are fitted on


@dataclass(frozen=True)
class Row:
    """A file's figures; the time is a ratio to the original in float32."""

    network: str
    macs: float
    contestant: str
    divergence: tuple[float, float, float]
    accuracy: float
    lost: tuple[float, float, float]  # points of accuracy, against the original
    agreement: float
    ratio: tuple[float, float, float]
    file_bytes: int
    remark: str = ""


def part_of(data: Data, examples: int) -> Data:
    """Return the data with fewer training images."""
    return Data(
        name=data.name,
        train=data.train.take(examples, 0),
        validation=data.validation.take(JUDGED, 0),
        test=data.test,
        classes=data.classes,
    )


def measure(name: str, macs: float, args: argparse.Namespace) -> list[Row]:
    """Return the figures of every file for one budget."""
    subject = SUBJECTS[name]
    network, whole = subject.network().eval(), subject.data()
    flush_in_place(network)
    data = part_of(whole, args.examples)
    images = next(iter(whole.train.take(CALIBRATION, 0).batches(CALIBRATION)))[0]
    small: nn.Module = network
    if macs < 100:
        plan = obo.plan(network, whole.train.take(FITTED, 0), budget=f"macs={macs}%")
        small = obo.apply(network, plan, whole.train.take(FITTED, 0)).eval()
    files = {"float32": to_flexible(network, images)}
    remarks = {}

    def told(text: str) -> None:
        print(time.strftime("%H:%M:%S"), name, macs, text, file=sys.stderr, flush=True)

    start = small
    if args.epochs and macs < 100:
        trained = obo.distill(start, data, teacher=network, epochs=args.epochs)
        small, remarks["rewritten"] = trained.model, _kept(trained.log, args.epochs)
        told(str(trained.log))
    if macs < 100:
        files["rewritten"] = to_flexible(small, images)
    closed = quantize(small, images)
    files["int8, closed forms"] = to_flexible(closed.network, images)
    made = distill_int8(closed, data, teacher=network, epochs=args.int8_epochs)
    told(f"{made.log} {made.before} {made.after}")
    files["int8, distilled"] = to_flexible(made.quantized.network, images)
    remarks["int8, distilled"] = (
        f"{_kept(made.log, args.int8_epochs)}, rate {made.log.learning_rate:.2g}, "
        f"validation {made.before:.3g} → {made.after:.3g}, {made.log.seconds:.0f} s"
    )
    if args.more:
        epochs = args.int8_epochs + (args.epochs if macs < 100 else 0)
        longer = obo.distill(start, data, teacher=network, epochs=epochs)
        key = "int8, closed forms, longer in float32"
        files[key] = to_flexible(quantize(longer.model, images).network, images)
        remarks[key] = _kept(longer.log, epochs)
    ratios = times(files, images[:1], "onnxruntime")
    inputs, targets = test_part(name, whole)
    exact = outputs_of_file(files["float32"], inputs)
    return [
        Row(
            network=name,
            macs=macs,
            contestant=each,
            **scores(exact, outputs_of_file(content, inputs), targets),
            ratio=ratios[each],
            file_bytes=len(content),
            remark=remarks.get(each, ""),
        )
        for each, content in files.items()
    ]


def _kept(log: TrainLog, epochs: int) -> str:
    return f"epoch {log.chosen_epoch} of {epochs}"


def scores(exact: Tensor, given: Tensor, targets: Tensor) -> dict[str, Any]:
    """Return what a file's outputs are worth, given the original's."""
    apart = divergences(exact, given)
    right, wanted = (each.argmax(1) == targets for each in (given, exact))
    lost = 100 * (wanted.double() - right.double()).numpy()
    return {
        "divergence": (float(np.mean(apart)), *interval(apart)),
        "accuracy": float(right.double().mean()),
        "lost": (float(lost.mean()), *interval(lost)),
        "agreement": float((given.argmax(1) == exact.argmax(1)).double().mean()),
    }


def table(rows: list[Row]) -> Table:
    """Return a file a line."""
    lines = [
        [
            row.network,
            f"{row.macs:g} %",
            row.contestant,
            " ".join(f"{1000 * value:.2f}" for value in row.divergence),
            f"{row.accuracy:.1%}",
            " ".join(f"{value:.1f}" for value in row.lost),
            f"{row.agreement:.1%}",
            " ".join(f"{value:.2f}" for value in row.ratio),
            str(row.file_bytes // 1000),
            row.remark,
        ]
        for row in rows
    ]
    return Table(
        columns=(
            "network", ">MACs", "file", ">divergence × 1000", ">accuracy", ">points lost",
            ">agreement", ">time", ">kB", "remark",
        ),
        rows=lines,
        title="Distilled in int8",
        notes=[f"{describe_machine()}."],
    )  # fmt: skip


def main() -> None:
    """Measure the networks that are named."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+", choices=["nin", "resnet20", "resnet32"])
    parser.add_argument("--macs", type=float, nargs="+", default=[50], help="100 rewrites nothing")
    parser.add_argument("--epochs", type=int, default=3, help="in float32")
    parser.add_argument("--int8-epochs", type=int, default=2)
    parser.add_argument("--examples", type=int, default=8000, help="training images")
    parser.add_argument("--more", action="store_true", help="as many more epochs in float32")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in args.networks:
        for macs in args.macs:
            rows += measure(name, macs, args)
            if args.json is not None:
                content = {
                    "machine": asdict(describe_machine()),
                    "options": {k: str(v) for k, v in vars(args).items()},
                    "rows": [asdict(row) for row in rows],
                }
                args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print_table(table(rows))


if __name__ == "__main__":
    main()
