"""The article's classic network on Fashion-MNIST, its head rewritten: accuracy over seeds.

    python benchmarks/fashion_mnist.py --seeds 3 --out runs/fashion

Trains the classic network for each seed, then shrinks it to 2 % of its parameters in two ways: the
head as 1×1 convolutions + global average pooling (``gap``), and the head as the same convolutions
(``exact``) factorized. Prints a table, writes ``fashion.json``. Finished runs are not run again;
unfinished ones go on where they stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onebyone.data import load_data
from onebyone.pipeline import (
    ShrinkSettings,
    TrainSettings,
    seeded,
    shrink_loaded,
    train_loaded,
)
from onebyone.profiling.latency import threads
from onebyone.records import RunRecord, write_text
from onebyone.report.console import print_table, progress
from onebyone.runs import is_run, load_source
from onebyone.tables import Table

BUDGET = "params=2%"


def run_once(folder: Path, go: Callable[..., Any]) -> RunRecord:
    """Return the record of a finished run, running or resuming it first if need be."""
    record = RunRecord.load(folder / "run.json") if is_run(folder) else None
    if record is None or record.status.state != "finished":
        go(out=folder, resume=record is not None)
        record = RunRecord.load(folder / "run.json")
    return record


def one_seed(out: Path, seed: int, args: argparse.Namespace, update: Any) -> dict[str, RunRecord]:
    data = load_data("fashion-mnist", seed=seed)
    common = {"seed": seed, "progress": update}
    with seeded(seed):
        classic = load_source("onebyone:classic")

    def train(**where: Any) -> None:
        settings = TrainSettings(epochs=args.epochs, **common, **where)
        train_loaded(classic.model, classic.source, data, settings)

    records = {"classic": run_once(out / f"classic-{seed}", train)}
    trained = load_source(out / f"classic-{seed}")
    for head in ("gap", "exact"):

        def shrink(head: Any = head, **where: Any) -> None:
            settings = ShrinkSettings(
                budget=BUDGET, head=head, epochs=args.distil, calibration_examples=2048, **common,
                **where,
            )  # fmt: skip
            shrink_loaded(trained.model, trained.source, data, settings)

        records[head] = run_once(out / f"{head}-{seed}", shrink)
    return records


def summary(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * spread:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--distil", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with threads(args.threads), progress("fashion-mnist") as update:
        each = [one_seed(args.out, seed, args, update) for seed in range(args.seeds)]
    rows, figures = [], {}
    original = each[0]["classic"].after
    assert original is not None
    for name in ("classic", "gap", "exact"):
        runs = [records[name] for records in each]
        test = [run.after.metric.value for run in runs]
        one_shot = [run.one_shot.metric.value for run in runs if run.one_shot is not None]
        params = [run.after.params for run in runs]
        figures[name] = {"test": test, "one_shot": one_shot, "params": params}
        rows.append(
            [
                name,
                f"{max(params):,}",
                f"{original.params / max(params):.1f}×",
                summary(one_shot) if one_shot else "–",
                summary(test),
            ]
        )
    write_text(args.out / "fashion.json", json.dumps(figures, indent=2) + "\n")
    n = original.metric.n
    print_table(
        Table(
            columns=("head", ">params", ">smaller", ">one-shot, %", ">test, %"),
            rows=rows,
            title="Fashion-MNIST, the classic network and its rewritten heads",
            notes=[
                f"Mean ± standard deviation over {args.seeds} seeds, {n:,} test images.",
                f"{args.epochs} epochs of training, {args.distil} of distilling, budget {BUDGET}.",
            ],
        )
    )


if __name__ == "__main__":
    main()
