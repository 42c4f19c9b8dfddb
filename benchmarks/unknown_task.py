"""What it costs not to tell `plan` the task: a classifier planned with and without it.

    OMP_NUM_THREADS=1 python benchmarks/unknown_task.py --networks resnet20 --seeds 0 1 2

Inputs alone do not tell that a network classifies: all differences of its outputs then count, each
output's squared error relative to its variance. The same inputs are planned and fitted on twice, as
a task that is not known and as classification, to the same shares of the MACs; no training follows.
Both networks are scored on the test images beside the original.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import onebyone as obo
from onebyone.core.tables import Table
from onebyone.data.splits import TensorSplit
from onebyone.evaluation.scores import score
from onebyone.evaluation.statistics import agreement, paired_difference
from onebyone.planning import Planner
from onebyone.report.console import print_table

sys.path.insert(0, str(Path(__file__).parent))
from subjects import SUBJECTS

TASKS = (None, "classification")


def rows(name: str, budgets: list[str], examples: int, seed: int) -> list[list[str]]:
    """Return a line of the table for each budget and task."""
    subject = SUBJECTS[name]
    network, data = subject.network(), subject.data()
    drawn = data.train.take(examples, seed)
    inputs = TensorSplit(torch.cat([batch for batch, _ in drawn.batches(250)]))
    made = []
    for task in TASKS:
        planner = Planner(network, inputs, task=task)
        for budget in budgets:
            plan = planner.plan([budget])
            made.append((budget, task or "not given", obo.apply(network, plan, inputs)))
    scored = score(
        [network, *(small for *_, small in made)],
        data.test,
        metric=subject.metric,
        task="classification",
    )
    lines = []
    before = scored.each[0]
    for (budget, task, _), after, nats in zip(
        made, scored.each[1:], scored.divergences[1:], strict=True
    ):
        same, changed = agreement(before, after), paired_difference(before, after)
        assert same is not None
        lines.append(
            [name, str(seed), budget, task, f"{100 * np.mean(after.scores):.1f}",
             f"{100 * changed.value:+.1f} [{100 * changed.low:+.1f}; {100 * changed.high:+.1f}]",
             f"{100 * same.value:.1f}", f"{nats:.4f}"]
        )  # fmt: skip
    return sorted(lines, key=lambda line: budgets.index(line[2]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20"])
    parser.add_argument("--budgets", nargs="+", default=["macs=50%", "macs=35%"])
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        line
        for name in args.networks
        for seed in args.seeds
        for line in rows(name, args.budgets, args.examples, seed)
    ]
    headers = ("network", "seed", "budget", "task", ">%", ">points", ">same", ">nats")
    note = (
        f"{args.examples:,} calibration inputs without labels, no training. % and points: accuracy "
        "on the test images, and its change with the 95 % interval. same: predictions like the "
        "original's, %. nats: mean Kullback-Leibler divergence from it."
    )
    print_table(Table(headers, lines, notes=(note,)))


if __name__ == "__main__":
    main()
