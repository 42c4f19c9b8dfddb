"""What a pretrained network loses at shares of its MACs: one-shot, reconstructed, distilled.

    python benchmarks/accuracy.py resnet20
    python benchmarks/accuracy.py resnet20 --shares 32 --epochs 10
    python benchmarks/accuracy.py --only-table --table docs/accuracy.md

Labels are never used but to score. Of the training images some are held out from the start:
neither calibration nor training sees them; the agreement with the original and the divergence
from it are also counted there, because a thousand test images show only large differences. Every
network and every figure is kept at once, and an interrupted distillation goes on from its last
epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import onebyone as obo
from onebyone.calibration.inputs import CalibrationData
from onebyone.core.tables import Table
from onebyone.core.units import format_count
from onebyone.core.write_files import write_text
from onebyone.evaluation.scores import score
from onebyone.evaluation.statistics import agreement, paired_difference
from onebyone.planning import plan_from
from onebyone.planning.survey import Survey, survey
from onebyone.report.console import print_table, progress
from onebyone.runtimes import describe_machine
from onebyone.training.reconstruct import inputs_for

sys.path.insert(0, str(Path(__file__).parent))
from subjects import SUBJECTS, divided


@dataclass(frozen=True)
class Row:
    """A network, scored; a line of the results."""

    network: str
    metric: str
    share: float  # of the MACs, asked
    stage: str  # one-shot, one-shot +, distilled
    macs: float  # share
    params: float  # share
    before: float
    after: float
    change: float
    low: float
    high: float
    n: int
    test: str  # of the difference
    agreement: float | None  # on the test data
    held_out: int  # training images that were used for nothing else
    held_out_agreement: float | None
    held_out_divergence: float
    calibration: int
    steps: int  # of reconstruction
    epochs: int  # of distillation
    examples: int  # an epoch
    rate: float  # of the distillation
    seed: int
    seconds: float  # of this stage
    machine: str
    threads: int
    cpu_seconds: float | None = None  # of this stage

    @property
    def key(self) -> tuple[object, ...]:
        """What tells one line from another."""
        return (
            self.network, self.share, self.stage, self.calibration, self.steps, self.epochs,
            self.seed,
        )  # fmt: skip


class Seconds(NamedTuple):
    """What something took, by the wall and, where that is known, of all processors together."""

    wall: float
    cpu: float | None


class Clock:
    """Counts both from when it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def passed(self) -> Seconds:
        """Return what has passed since."""
        return Seconds(time.perf_counter() - self._wall, time.process_time() - self._cpu)


class Bench:
    """One pretrained network and all that is done with it."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.subject = SUBJECTS[name]
        self.original = self.subject.network().eval()
        self.data, self.held_out = divided(self.subject.data(), args.held_out, args.seed)
        self.calibration = CalibrationData(
            self.data.train.take(args.calibration, args.seed),
            self.data.name,
            args.seed,
            device=args.device,
        )
        self.folder: Path = args.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = {row.key: row for row in load(args.folder) if row.network == name}

    @cached_property
    def options(self) -> tuple[Survey, Seconds]:
        """All rewrites with their harm, once for all shares; and the seconds that took."""
        started = Clock()
        with progress("options") as update:
            found = survey(self.original, self.calibration, progress=update)
        return found, started.passed()

    def run(self) -> None:
        """Run what is asked for and not done yet."""
        args = self.args
        for share in args.shares:
            small = self._stage(share, "one-shot", None, steps=0, epochs=0)
            if args.reconstruct:
                small = self._stage(share, "one-shot +", small, steps=args.reconstruct, epochs=0)
            if args.epochs:
                self._stage(share, "distilled", small, steps=args.reconstruct, epochs=args.epochs)

    def _stage(
        self, share: float, stage: str, small: nn.Module | None, *, steps: int, epochs: int
    ) -> nn.Module:
        """Return the network after a stage, made now or before."""
        args = self.args
        name = f"{share:g}-{args.calibration}-{steps}-{epochs}-{args.seed}"
        path = self.folder / f"{name}.pt"
        key = (self.name, share, stage, args.calibration, steps, epochs, args.seed)
        if path.exists() and key in self.rows:
            made: nn.Module = torch.load(path, weights_only=False)  # written below
            return made
        started = Clock()
        rate = 0.0
        if small is None:
            found, surveyed = self.options
            started = Clock()
            plan = plan_from(
                found,
                f"macs={share:g}%",
                network=self.name,
                inputs=self.data.inputs,
                calibration=self.calibration.info(),
            )
            with progress(f"{share:g} %") as update:
                made = obo.apply(
                    self.original, plan, self.calibration, device=args.device, progress=update
                )
            passed = started.passed()
            seconds = Seconds(surveyed.wall + passed.wall, surveyed.cpu + passed.cpu)
        elif not epochs:
            with progress(f"{share:g} %, reconstruction") as update:
                made, log = obo.reconstruct(
                    small, teacher=self.original, steps=steps, seed=args.seed,
                    calibration=inputs_for(self.data.train, steps, args.seed),
                    device=args.device, progress=update,
                )  # fmt: skip
            rate, seconds = log.learning_rate, started.passed()
        else:
            checkpoint = self.folder / f"{name}.checkpoint"
            resumed = checkpoint.exists()
            with progress(f"{share:g} %, distilling") as update:
                made, trained = obo.distill(
                    small, self.data, teacher=self.original, epochs=epochs, seed=args.seed,
                    device=args.device, checkpoint=checkpoint, progress=update,
                )  # fmt: skip
            rate, seconds = trained.learning_rate, started.passed()
            if resumed:  # of the epochs before, the log knows the time, but not the processors'
                seconds = Seconds(trained.seconds, None)
        torch.save(made, path)
        row = self._scored(
            made, share, stage, steps=steps, epochs=epochs, rate=rate, seconds=seconds
        )
        self.rows[row.key] = row
        with (args.folder / "results.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dataclasses.asdict(row)) + "\n")
        print(f"{self.name} {share:g} % {stage}: {row.after:.4f} of {row.before:.4f}", flush=True)
        return made

    def _scored(
        self, made: nn.Module, share: float, stage: str, *, steps: int, epochs: int, rate: float,
        seconds: Seconds,
    ) -> Row:  # fmt: skip
        pair = [self.original, made]
        how = {"metric": self.subject.metric, "device": self.args.device}
        test = score(pair, self.data.test, **how)
        unused = score(pair, self.held_out, **how)
        change = paired_difference(*test.each)
        same, unused_same = agreement(*test.each), agreement(*unused.each)
        before, after = (
            obo.profile(network, inputs=self.data.inputs, timed=False) for network in pair
        )
        return Row(
            network=self.name,
            metric=test.each[0].metric,
            share=share,
            stage=stage,
            macs=after.macs / before.macs,
            params=after.params / before.params,
            before=float(test.each[0].scores.mean()),
            after=float(test.each[1].scores.mean()),
            change=change.value,
            low=change.low,
            high=change.high,
            n=change.n,
            test=change.test,
            agreement=None if same is None else same.value,
            held_out=len(self.held_out),
            held_out_agreement=None if unused_same is None else unused_same.value,
            held_out_divergence=unused.divergences[1],
            calibration=len(self.calibration.split),
            steps=steps,
            epochs=epochs,
            examples=len(self.data.train) if epochs else 0,
            rate=rate,
            seed=self.args.seed,
            seconds=seconds.wall,
            cpu_seconds=seconds.cpu,
            machine=str(describe_machine(self.args.device)),
            threads=torch.get_num_threads(),
        )


def load(folder: Path) -> list[Row]:
    """Return the rows that were measured so far, the last of each kind."""
    path = folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return list({row.key: row for row in rows}.values())


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Yield a table for each network."""
    order = ("one-shot", "one-shot +", "distilled")
    for network in dict.fromkeys(row.network for row in rows):
        mine = [row for row in rows if row.network == network]
        mine.sort(key=lambda row: (-row.share, order.index(row.stage), row.epochs, row.seed))
        first = mine[0]
        yield Table(
            columns=(
                ">MACs", ">params", "stage", ">score", ">change", ">agreement", ">KL", ">CPU s",
            ),
            rows=[_cells(row) for row in mine],
            title=f"{network}: {_score(first, first.before)} before",
            notes=[
                (f"{first.metric} of {first.n:,} test examples; changes paired, 95 % interval "
                f"({', '.join(sorted({row.test for row in mine}))})."),
                (f"Agreement and divergence (KL for classifiers, else relative squared error): of "
                f"{first.held_out:,} training examples that were used for nothing else."),
                (f"Calibration inputs {_all(mine, 'calibration')}, unlabelled; seeds "
                f"{_all(mine, 'seed')}. Steps (one-shot +): of reconstruction, on training "
                f"inputs, unlabelled too. Seconds of the processor are of the stage alone; those "
                f"of one-shot hold the survey of all options if it was not kept."),
                f"{first.machine}, {_all(mine, 'threads')} thread(s).",
            ],
        )  # fmt: skip


def _cells(row: Row) -> list[str]:
    stage = row.stage
    if row.epochs:
        stage += f", {row.epochs} epochs of {format_count(row.examples)}"
    elif row.steps:
        stage += f", {row.steps} steps"
    unit = 100 if row.metric == "accuracy" else 1
    digits = 1 if row.metric == "accuracy" else 3
    interval = f"[{unit * row.low:+.{digits}f} … {unit * row.high:+.{digits}f}]"
    same = row.held_out_agreement
    return [
        f"{100 * row.macs:.1f} %",
        f"{100 * row.params:.1f} %",
        stage,
        _score(row, row.after),
        f"{unit * row.change:+.{digits}f} {interval}",
        "–" if same is None else f"{100 * same:.1f} %",
        f"{row.held_out_divergence:.2g}",
        "–" if row.cpu_seconds is None else f"{row.cpu_seconds:.0f}",
    ]


def _score(row: Row, value: float) -> str:
    return f"{100 * value:.1f} %" if row.metric == "accuracy" else f"{value:.3f}"


def _all(rows: Sequence[Row], name: str) -> str:
    return ", ".join(f"{value:,}" for value in sorted({getattr(row, name) for row in rows}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(SUBJECTS))
    parser.add_argument("--shares", nargs="+", type=float, default=[60, 50, 40])
    parser.add_argument("--calibration", type=int, default=2048, metavar="N")
    parser.add_argument("--reconstruct", type=int, default=300, metavar="STEPS")
    parser.add_argument("--epochs", type=int, default=0, help="of distillation (0)")
    parser.add_argument("--held-out", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--folder", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--only-table", action="store_true", help="of the results there are")
    parser.add_argument("--table", type=Path, help="also write the tables to this Markdown file")
    args = parser.parse_args(argv)
    if not args.only_table and not args.networks:
        parser.error(f"at least one of {', '.join(SUBJECTS)}")
    if unknown := [name for name in args.networks if name not in SUBJECTS]:
        parser.error(f"networks must be of {', '.join(SUBJECTS)}, got {', '.join(unknown)}")
    if not args.only_table:
        for name in args.networks:
            Bench(name, args).run()
    found = list(tables(load(args.folder)))
    for table in found:
        print_table(table)
    if args.table:
        names = " ".join(dict.fromkeys(row.network for row in load(args.folder)))
        heading = (
            f"# {__doc__.splitlines()[0].rstrip('.')}\n\nMade by `python benchmarks/accuracy.py "
            f"{names}`, with the shares and stages that are in the table.\n"
        )
        write_text(args.table, "\n".join([heading, *(t.to_markdown() for t in found)]))


if __name__ == "__main__":
    main()
