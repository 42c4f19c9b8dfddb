"""The article's classic network on Fashion-MNIST, its head rewritten: accuracy over seeds.

    python benchmarks/fashion_mnist.py --seeds 0 1 2 --out runs/fashion
    python benchmarks/fashion_mnist.py --seeds 0 1 2 3 4 --shares 2 5 10 --heads exact

Trains the classic network for each seed, then shrinks it to shares of its parameters: the head as
1×1 convolutions + global average pooling (``gap``), or as the same convolutions (``exact``),
factorized. Prints a table with the differences from the classic network of the same seed, and
writes ``fashion.json``. Finished runs are not run again; unfinished ones go on where they stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from onebyone.core.randomness import seeded
from onebyone.core.records import RunRecord
from onebyone.core.settings.runs import ShrinkSettings, TrainRunSettings
from onebyone.core.tables import Table
from onebyone.core.write_files import write_text
from onebyone.data import load_data
from onebyone.pipeline.loading import load_source
from onebyone.pipeline.shrink import shrink_loaded
from onebyone.pipeline.train import train_loaded
from onebyone.profiling.latency import threads
from onebyone.report.console import print_table, progress

sys.path.insert(0, str(Path(__file__).parent))
from kept_runs import run_once

HEADS = ("gap", "exact")


def one_seed(out: Path, seed: int, args: argparse.Namespace, update: Any) -> dict[str, RunRecord]:
    data = load_data("fashion-mnist", seed=seed)
    common = {"seed": seed, "progress": update}
    with seeded(seed):
        classic = load_source("onebyone:classic")

    def train(**where: Any) -> None:
        settings = TrainRunSettings(epochs=args.epochs, **common, **where)
        train_loaded(classic.model, classic.source, data, settings)

    records = {"classic": run_once(out / f"classic-{seed}", train, epochs=args.epochs)}
    trained = load_source(out / f"classic-{seed}")
    for form, share in itertools.product(args.heads, args.shares):

        def shrink(form: Any = form, share: float = share, **where: Any) -> None:
            settings = ShrinkSettings(
                budget=f"params={share:g}%", head=form, epochs=args.distil,
                label_weight=args.label_weight, mix=args.mix, **common, **where,
            )  # fmt: skip
            shrink_loaded(trained.model, trained.source, data, settings)

        name = f"{form} {share:g} %"
        records[name] = run_once(
            out / f"{form}-{share:g}-{seed}", shrink,
            training=args.epochs, epochs=args.distil, label_weight=args.label_weight, mix=args.mix,
        )  # fmt: skip
    return records


def summary(values: list[float], *, sign: str = "") -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):{sign}.2f} ± {100 * spread:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--distil", type=int, default=20)
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[2], help="of the parameters, %%"
    )
    parser.add_argument("--heads", nargs="+", default=HEADS, choices=HEADS)
    parser.add_argument("--label-weight", type=float, default=0.0, help="share of the loss (0)")
    parser.add_argument("--mix", type=float, help="share of mixed images (half without labels)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with threads(args.threads), progress("fashion-mnist") as update:
        each = [one_seed(args.out, seed, args, update) for seed in args.seeds]
    rows, figures = [], {}
    original = each[0]["classic"].after
    assert original is not None
    classics = [records["classic"].after.metric.value for records in each]
    for name in each[0]:
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
                summary([a - b for a, b in zip(test, classics, strict=True)], sign="+"),
            ]
        )
    write_text(args.out / "fashion.json", json.dumps(figures, indent=2) + "\n")
    n = original.metric.n
    mixed = "as many as by default" if args.mix is None else f"{args.mix:.0%}"
    print_table(
        Table(
            columns=("head", ">params", ">smaller", ">one-shot, %", ">test, %", ">change"),
            rows=rows,
            title="Fashion-MNIST, the classic network and its rewritten heads",
            notes=[
                f"Mean ± standard deviation over {len(args.seeds)} seeds, {n:,} test images.",
                "Changes are from the classic network of the same seed.",
                f"{args.epochs} epochs of training, {args.distil} of distilling.",
                f"The labels have {args.label_weight:.0%} of the distilling's loss.",
                f"Of its images {mixed} are mixed.",
            ],
        )
    )


if __name__ == "__main__":
    main()
