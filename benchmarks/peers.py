"""The same network by its peers and by us: accuracy, divergence and time at equal MACs.

    python -m venv peers
    peers/bin/pip install '.[onnx]' fasterai tensorly tensorly-torch torch-pruning aimet-torch
    peers/bin/python benchmarks/peers.py resnet20 --macs 50 --epochs 5
    peers/bin/python benchmarks/peers.py resnet20 --macs 60 50 --equal-divergence
    peers/bin/python benchmarks/peers.py --only-table --table docs/peers.md

Each peer (``benchmarks/peer_tools.py``) has one knob for all layers, which is set by bisection so
that torch's counter finds the share of the MACs; ours plans for the same share. With ``--epochs``
all are then distilled alike, by our defaults: the same data, seed, batch and trial of rates.

All are scored on the same test images and, for agreement and divergence, on training images that
neither calibration nor training sees, where ours is there beside ours; and timed in interleaved
rounds with the original. With ``--equal-divergence`` each peer is also set beside the fastest of
ours whose divergence on the test images is not above its own. Every network and every figure is
kept at once, and an interrupted distillation goes on from its last epoch: empty the folder after
changing code. A peer that is not installed, or fails, is said to.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

import onebyone
from onebyone import apply, distill
from onebyone.calibration.inputs import CalibrationData
from onebyone.core.errors import OneByOneError
from onebyone.core.records import Difference
from onebyone.core.tables import Table
from onebyone.core.units import format_count
from onebyone.core.write_files import write_text
from onebyone.evaluation.scores import score
from onebyone.evaluation.statistics import agreeing, agreement, paired_difference
from onebyone.planning import Planner
from onebyone.profiling.latency import interleave, threads
from onebyone.report.console import print_table, progress
from onebyone.runtimes import describe_machine, find_runtime

sys.path.insert(0, str(Path(__file__).parent))
from peer_tools import PEERS, Made, Task, at_share, count_macs
from subjects import SUBJECTS, divided

OURS = "onebyone"
ROUNDS = 20
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Row:
    """A network by a tool, scored; a line of the results."""

    network: str
    by: str
    version: str
    share: float  # of the MACs, asked
    epochs: int  # of distillation; 0 is one-shot
    macs: float  # share
    params: float  # share
    metric: str
    before: float
    after: float
    change: Interval
    n: int
    test: str  # of the difference
    agreement: float | None  # on the test data
    divergence: float  # on the test data
    held_out: int  # training images that were used for nothing else
    held_out_agreement: float | None
    held_out_divergence: float
    less: Interval | None  # than ours at this stage scores on the test data; none for ours
    less_agreement: Interval | None  # the same of the agreement on the held out
    calibration: int  # inputs that the tool saw
    examples: int  # an epoch
    rate: float  # of the distillation
    seed: int
    seconds: float  # of this stage
    runtime: str
    time: Interval | None  # share of the original's; none where the runtime cannot run it
    equal: bool  # whether ours of equal divergence was looked for
    faster: Interval | None  # its time over that of ours of equal divergence
    ours_divergence: float | None
    machine: str
    threads: int

    @property
    def key(self) -> tuple[object, ...]:
        """What tells one line from another."""
        return (
            self.network, self.by, self.share, self.epochs, self.examples, self.seed,
            self.runtime, self.equal,
        )  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A tool that gave no network."""

    network: str
    by: str
    version: str
    share: float
    epochs: int
    examples: int
    seed: int
    why: str

    @property
    def key(self) -> tuple[object, ...]:
        """What tells one line from another."""
        return self.network, self.by, self.share, self.epochs, self.examples, self.seed


class Bench:
    """One pretrained network and all that is done with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.subject = SUBJECTS[args.network]
        self.original = self.subject.network().eval()
        self.data, self.held_out = divided(self.subject.data(), args.held_out, args.seed)
        count = args.calibration or self.subject.examples
        self.inputs = self.data.train.take(count, args.seed)
        if args.train:
            self.data = replace(self.data, train=self.data.train.take(args.train, args.seed))
        self.folder: Path = args.folder / args.network
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task = Task(
            self.original,
            torch.zeros(1, *self.data.inputs.tensors[0].sample),
            self.inputs,
            self.folder / f"{count}-{args.seed}",
        )
        self.rows = {row.key: row for row in load(args.folder)[0]}
        self.ours: dict[str, nn.Module] = {}  # by budget

    @cached_property
    def calibration(self) -> CalibrationData:
        """What ours sees: the same inputs, and no labels."""
        return CalibrationData(self.inputs, self.data.name, self.args.seed)

    @cached_property
    def planner(self) -> Planner:
        """All our options with their harm, once for all shares."""
        timed = self.args.runtime if self.args.equal_divergence else None
        with progress("options") as update:
            return Planner(
                self.original,
                self.calibration,
                task="classification",
                runtime=timed,
                num_threads=1,
                progress=update,
            )

    def run(self) -> None:
        """Run what is asked for and not done yet."""
        args = self.args
        tools = sorted(args.by, key=lambda by: by != OURS)  # what the others are set beside
        for share in args.macs:
            for by in tools:
                small = None
                for epochs in (0, args.epochs) if args.epochs else (0,):
                    try:
                        made = self.made(share, by, small, epochs=epochs)
                    except Exception as error:  # whatever a tool fails by is said
                        if by == OURS:
                            raise
                        self._failed(share, by, epochs, error)
                        break
                    self._score(made, share, by, epochs=epochs)
                    small = made.model

    def made(self, share: float, by: str, small: nn.Module | None, *, epochs: int) -> Made:
        """Return the network after a stage, made now or before."""
        path = self._path(share, by, epochs)
        if path.exists():
            found: Made = torch.load(path, weights_only=False)  # written below
            return found
        rate = 0.0
        started = time.perf_counter()
        if small is not None:
            with progress(f"{by}, distilling") as update:
                model, log = distill(
                    small, self.data, teacher=self.original, epochs=epochs, seed=self.args.seed,
                    checkpoint=path.with_suffix(".checkpoint"), progress=update,
                )  # fmt: skip
            rate = log.learning_rate
        elif by == OURS:
            model = self._ours(f"macs={share:g}%")
        else:
            model = at_share(PEERS[by].make, self.task, share / 100)
        made = Made(model, rate, time.perf_counter() - started)
        whole = path.with_suffix(".part")
        torch.save(made, whole)
        whole.rename(path)  # an interrupted write leaves no network that looks made
        return made

    def _path(self, share: float, by: str, epochs: int) -> Path:
        seen = len(self.data.train) if epochs else 0
        name = f"{by}-{share:g}-{len(self.inputs)}-{epochs}-{seen}-{self.args.seed}"
        return self.folder / f"{name}.pt"

    def _ours(self, budget: str) -> nn.Module:
        if budget not in self.ours:
            plan = self.planner.plan([budget])
            self.ours[budget] = apply(self.original, plan, self.calibration)
        return self.ours[budget]

    def _failed(self, share: float, by: str, epochs: int, error: Exception) -> None:
        try:
            version = PEERS[by].version
        except importlib.metadata.PackageNotFoundError:
            version = ""
        why = f"{type(error).__name__}: {error}"
        print(f"{self.args.network} {share:g} % {by}, {epochs} epochs failed: {why}", flush=True)
        seen = len(self.data.train) if epochs else 0
        found = Failure(self.args.network, by, version, share, epochs, seen, self.args.seed, why)
        keep(self.args.folder / "failures.jsonl", found)

    def _score(self, made: Made, share: float, by: str, *, epochs: int) -> None:
        """Add the network's line to the results, if it is not there."""
        args = self.args
        equal = args.equal_divergence and not epochs and by != OURS
        seen = len(self.data.train) if epochs else 0
        key = (args.network, by, share, epochs, seen, args.seed, args.runtime, equal)
        if key in self.rows:
            return
        pair = [self.original, made.model]
        path = self._path(share, OURS, epochs)
        beside = by != OURS and path.exists()
        both = [*pair, self.made(share, OURS, None, epochs=epochs).model] if beside else pair
        test = score(both, self.data.test, metric=self.subject.metric)
        unused = score(both, self.held_out, metric=self.subject.metric)
        change = paired_difference(*test.each[:2])
        same, unused_same = agreement(*test.each[:2]), agreement(*unused.each[:2])
        less, less_same = None, None
        if beside:
            less = _interval(paired_difference(test.each[2], test.each[1]))
            ours, theirs = (agreeing(unused.each[0], unused.each[i]) for i in (2, 1))
            if ours is not None and theirs is not None:
                less_same = _interval(paired_difference(ours, theirs))
        macs = [count_macs(network, self.task.example) for network in pair]
        params = [sum(p.numel() for p in network.parameters()) for network in pair]
        faster, apart = (None, None)
        if equal:
            faster, apart = self._at_equal_divergence(made.model, test.divergences[1])
        row = Row(
            network=args.network,
            by=by,
            version=onebyone.__version__ if by == OURS else PEERS[by].version,
            share=share,
            epochs=epochs,
            macs=macs[1] / macs[0],
            params=params[1] / params[0],
            metric=test.each[0].metric,
            before=float(test.each[0].scores.mean()),
            after=float(test.each[1].scores.mean()),
            change=_interval(change),
            n=change.n,
            test=change.test,
            agreement=None if same is None else same.value,
            divergence=test.divergences[1],
            held_out=len(self.held_out),
            held_out_agreement=None if unused_same is None else unused_same.value,
            held_out_divergence=unused.divergences[1],
            less=less,
            less_agreement=less_same,
            calibration=len(self.inputs) if by == OURS or PEERS[by].sees_data else 0,
            examples=seen,
            rate=made.rate,
            seed=args.seed,
            seconds=made.seconds,
            runtime=args.runtime,
            time=self._time(made.model, self.original),
            equal=equal,
            faster=faster,
            ours_divergence=apart,
            machine=str(describe_machine("cpu")),
            threads=torch.get_num_threads(),
        )
        self.rows[row.key] = row
        keep(args.folder / "results.jsonl", row)
        print(f"{args.network} {share:g} % {by}, {epochs} epochs: {row.after:.4f}", flush=True)

    def _time(self, one: nn.Module, other: nn.Module) -> Interval | None:
        """Return a network's time over another's, in interleaved rounds, where both can run."""
        example = torch.randn(1, *self.data.inputs.tensors[0].sample)
        prepare = find_runtime(self.args.runtime).prepare
        with threads(1):
            try:
                both = {"one": prepare(one, example), "other": prepare(other, example)}
            except OneByOneError as error:
                print(f"not in {self.args.runtime}: {error}", flush=True)
                return None
            ratio = interleave(both, rounds=ROUNDS).ratio("one", "other")
        return ratio.value, ratio.low, ratio.high

    def _at_equal_divergence(
        self, peer: nn.Module, least: float
    ) -> tuple[Interval | None, float | None]:
        """Return a peer's time over that of ours at no more divergence, and that divergence."""
        best: tuple[nn.Module, float] | None = None
        for share in self.args.shares:
            try:
                small = self._ours(f"latency={share:g}%")
            except OneByOneError:  # so little time cannot be reached
                break
            pair = [self.original, small]
            apart = score(pair, self.data.test, metric=self.subject.metric).divergences[1]
            if apart > least:
                break
            best = small, apart
        return (None, None) if best is None else (self._time(peer, best[0]), best[1])


def _interval(difference: Difference) -> Interval:
    return difference.value, difference.low, difference.high


# ---------------------------------------------------------------- results


def keep(path: Path, record: Row | Failure) -> None:
    """Add a line to a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dataclasses.asdict(record)) + "\n")


def load(folder: Path) -> tuple[list[Row], list[Failure]]:
    """Return the last row of each kind, and the failures that no row has made up for."""
    rows = {row.key: row for row in (Row(**_tuples(r)) for r in _lines(folder / "results.jsonl"))}
    done = {key[:6] for key in rows}
    failures = {f.key: f for f in (Failure(**r) for r in _lines(folder / "failures.jsonl"))}
    return list(rows.values()), [f for key, f in failures.items() if key not in done]


def _lines(path: Path) -> list[dict[str, object]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _tuples(record: dict[str, object]) -> dict[str, object]:
    """Undo what JSON does to intervals, so that rows compare as they were."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}


# ---------------------------------------------------------------- tables


def tables(rows: Sequence[Row], failures: Sequence[Failure]) -> Iterator[Table]:
    """Yield a table for each network and share, one-shot before distilled, the best first."""
    places = dict.fromkeys((record.network, record.share) for record in (*rows, *failures))
    for network, share in sorted(places, key=lambda place: (place[0], -place[1])):
        mine = [row for row in rows if (row.network, row.share) == (network, share)]
        mine.sort(key=lambda row: (row.epochs, row.examples, row.held_out_divergence))
        lost = [f for f in failures if (f.network, f.share) == (network, share)]
        equal = any(row.equal for row in mine)
        yield Table(
            columns=(
                "by", "stage", ">MACs", ">params", ">score", ">change", ">than ours", ">agreement",
                ">than ours", ">KL", ">time",
                *((">its time ÷ ours at no more divergence",) if equal else ()),
            ),
            rows=[_cells(row, equal=equal) for row in mine],
            title=f"{network} at {share:g} % of its MACs",
            notes=[*_notes(mine), *(_failure(failure) for failure in lost)],
        )  # fmt: skip


def _cells(row: Row, *, equal: bool) -> list[str]:
    unit, digits = (100, 1) if row.metric == "accuracy" else (1, 3)
    same = row.held_out_agreement
    cells = [
        label(row.by, row.version),
        _stage(row),
        f"{100 * row.macs:.1f} %",
        f"{100 * row.params:.1f} %",
        f"{unit * row.after:.{digits}f}" + (" %" if row.metric == "accuracy" else ""),
        _signed(row.change, unit, digits),
        _signed(row.less, unit, digits),
        "–" if same is None else f"{100 * same:.1f} %",
        _signed(row.less_agreement, 100, 1),
        f"{row.held_out_divergence:.2g}",
        "–" if row.time is None else _percent(row.time),
    ]
    if equal:
        cells.append(_faster(row))
    return cells


def _signed(difference: Interval | None, unit: float, digits: int) -> str:
    if difference is None:
        return ""
    value, low, high = (f"{unit * x:+.{digits}f}" for x in difference)
    return f"{value} [{low} … {high}]"


def _stage(row: Row) -> str:
    if not row.epochs:
        return "one-shot"
    return f"{row.epochs} epochs of {format_count(row.examples)} images, rate {row.rate:.2g}"


def label(by: str, version: str) -> str:
    """Return a tool with its version, as the table has it."""
    return f"**{OURS}**" if by == OURS else PEERS[by].label.format(version or "(not installed)")


def _percent(share: Interval) -> str:
    value, low, high = (100 * x for x in share)
    return f"{value:.0f} % [{low:.0f}–{high:.0f}]"


def _faster(row: Row) -> str:
    if not row.equal:
        return ""
    if row.faster is None or row.ours_divergence is None:
        return "none of ours diverges less"
    value, low, high = row.faster
    return f"{value:.2f}× [{low:.2f}–{high:.2f}] at {row.ours_divergence:.3g}"


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    for first in rows[:1]:
        unit = " %" if first.metric == "accuracy" else ""
        before = 100 * first.before if first.metric == "accuracy" else first.before
        yield (
            f"{first.metric} of {first.n:,} test examples, {before:.1f}{unit} before; changes "
            f"paired, 95 % interval ({', '.join(sorted({row.test for row in rows}))}). Agreement "
            f"with the original and divergence from it: of {first.held_out:,} training examples "
            "that were used for nothing else. Than ours: the difference from ours at the same "
            "stage, on the same examples."
        )
        seen = sorted({row.calibration for row in rows if row.calibration})
        data = ", ".join(f"{count:,}" for count in seen)
        labelled = " (AIMET with, ours without their labels)" if len(rows) > 1 else ""
        yield (
            f"Inputs to choose by: {data or 'none'}{labelled}; the other tools look at none. "
            f"Time: of the original's in {first.runtime}, batch 1, interleaved."
        )
    if any(row.epochs for row in rows):
        yield (
            "Distilled without labels, the rate the best of three tried for each; the same "
            "training images, batch and seed for all."
        )
    for machine in dict.fromkeys(row.machine for row in rows):
        mine = [row for row in rows if row.machine == machine]
        yield f"{machine}, {_all(mine, 'threads')} thread(s), seed {_all(mine, 'seed')}."


def _failure(failure: Failure) -> str:
    stage = f"after {failure.epochs} epochs" if failure.epochs else "one-shot"
    return f"{label(failure.by, failure.version)} gave no network, {stage}: {failure.why}"


def _all(rows: Sequence[Row], name: str) -> str:
    return ", ".join(f"{value:,}" for value in sorted({getattr(row, name) for row in rows}))


def heading() -> str:
    """Return what stands above the tables: what this is, and the commands."""
    title, *rest = __doc__.splitlines()
    return "\n".join([f"# {title.rstrip('.')}", *rest, ""])


def main(argv: Sequence[str] | None = None) -> None:
    names = [name for name in SUBJECTS if name != "dncnn"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", nargs="?", choices=names)
    tools = [*PEERS, OURS]
    parser.add_argument("--by", nargs="+", choices=tools, default=tools, metavar="TOOL")
    parser.add_argument("--macs", nargs="+", type=float, default=[60, 50], help="in percent")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--calibration", type=int, metavar="N", help="inputs to choose by")
    parser.add_argument("--epochs", type=int, default=0, help="of distilling all alike")
    parser.add_argument("--train", type=int, metavar="N", help="images an epoch; all if not given")
    parser.add_argument("--held-out", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--equal-divergence", action="store_true")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[80, 70, 60, 52, 46, 40], help="of the time"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"))
    parser.add_argument("--only-table", action="store_true", help="of the results there are")
    parser.add_argument("--table", type=Path, help="also write the tables to this Markdown file")
    args = parser.parse_args(argv)
    if not args.only_table:
        if args.network is None:
            parser.error(f"NETWORK must be one of {', '.join(names)}")
        torch.set_num_threads(1)
        Bench(args).run()
    found = list(tables(*load(args.folder)))
    for table in found:
        print_table(table)
    if args.table:
        write_text(args.table, "\n".join([heading(), *(table.to_markdown() for table in found)]))


if __name__ == "__main__":
    main()
