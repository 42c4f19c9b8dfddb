"""What fewer channels are worth: plans with and without ``narrow``, from one survey.

    python benchmarks/narrow.py resnet20 --runtime eager --shares 80 60
    python benchmarks/narrow.py resnet20 --shares 50             # of the MACs
    python benchmarks/narrow.py nin dncnn --runtime eager --shares 50
    python benchmarks/narrow.py resnet20 --uniform 75 50 25 --runtimes eager onnxruntime compile

The options' harm is measured once, and each option timed once. For each budget one plan may choose
among all rewrites, another among all but ``narrow``; where a layer reads one group and writes the
next, a third may narrow only one of the two. All are carried out before any fine-tuning,
scored on the same test examples, and timed in turns with the original and with each other. Where a
budget cannot be met the nearest plan is shown. With ``--uniform`` nothing is planned: each group of
layers keeps that share of its channels, and the network is timed in several runtimes. 1 thread,
batch 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch

import onebyone as obo
from onebyone.calibration.inputs import CalibrationData
from onebyone.core.errors import BudgetError
from onebyone.core.records import Difference, Option, Plan
from onebyone.core.tables import Table
from onebyone.core.units import format_percent
from onebyone.evaluation.scores import score
from onebyone.evaluation.statistics import paired_difference
from onebyone.networks.examples import example_of
from onebyone.planning.links import is_link, is_narrow
from onebyone.planning.planner import Planner
from onebyone.profiling.latency import interleave, threads
from onebyone.profiling.trace import trace_layers
from onebyone.report.console import print_table, progress
from onebyone.runtimes import describe_machine, find_runtime

sys.path.insert(0, str(Path(__file__).parent))
from group_plans import plan_of_widths
from subjects import SUBJECTS

ROUNDS, SECONDS = 25, 30.0
SEED = 0


def among(
    planner: Planner, runtime: str | None, kept: Callable[[Option], bool], *, links: bool
) -> Planner:
    """Return a planner of some of the same options, with or without links between groups."""
    other = copy(planner)
    found = planner._surveyed  # noqa: SLF001
    options = tuple(o for o in found.options if kept(o) and (links or not is_link(o)))
    other._surveyed = replace(  # noqa: SLF001
        found, options=options, links=found.links if links else None
    )
    if runtime is None:
        other._found = other._surveyed  # noqa: SLF001
        return other
    return other.for_runtime(runtime, num_threads=1)


def planned(planner: Planner, budget: str) -> tuple[Plan, bool]:
    """Return a plan for a budget, and whether it is met; else the nearest."""
    try:
        return planner.plan([budget]), True
    except BudgetError:
        return planner.plan([budget], closest=True), False


def compare(name: str, args: argparse.Namespace) -> list[list[str]]:
    """Return a line for each budget and each way to plan."""
    subject = SUBJECTS[name]
    network, data = subject.network(), subject.data()
    calibration = CalibrationData(data.train.take(args.examples, SEED), data.name, SEED)
    with progress(name) as update:
        every = Planner(network, calibration, runtime=args.runtime, num_threads=1, progress=update)
    planners = {"all": every}
    if any(is_link(option) for option in every._surveyed.options):  # noqa: SLF001
        planners["all, no links"] = among(every, args.runtime, lambda _: True, links=False)
    planners["all but narrow"] = among(
        every, args.runtime, lambda option: not is_narrow(option), links=False
    )
    quantity = "macs" if args.runtime is None else "latency"
    prepare = find_runtime(args.runtime or "eager").prepare
    lines = []
    for share in args.shares:
        made, small = {}, {}
        for words, planner in planners.items():
            with progress(f"{name} {share}% {words}") as update:
                made[words] = planned(planner, f"{quantity}={share}%")
                small[words] = obo.apply(network, made[words][0], calibration, progress=update)
        scored = score([planners["all"].model, *small.values()], data.test, metric=subject.metric)
        example = example_of(network, data.inputs.with_batch(1), blank=True)
        with threads(1):
            ready = {w: prepare(n, example) for w, n in {"": every.model, **small}.items()}
            times = interleave(ready, rounds=ROUNDS, seconds=SECONDS)
        for (words, (plan, met)), after in zip(made.items(), scored.each[1:], strict=True):
            ratio = times.ratio("", words)
            narrowed = sum("narrow" in option.rewrites for option in plan.choices)
            lines.append(
                [
                    name,
                    args.runtime or "MACs",
                    f"{share} %" + ("" if met else ", nearest"),
                    words,
                    f"{100 / ratio.value:.1f} % [{100 / ratio.high:.1f}–{100 / ratio.low:.1f}]",
                    format_percent(plan.after.macs / plan.before.macs),
                    f"{narrowed} of {len(plan.choices)}",
                    f"{plan.harm:.4f}",
                    in_points(paired_difference(scored.each[0], after)),
                ]
            )
            print(*lines[-1], sep=" | ", flush=True)
    return lines


def uniform(name: str, args: argparse.Namespace) -> list[list[str]]:
    """Return a line for each share of channels that every group keeps."""
    subject = SUBJECTS[name]
    network, data = subject.network().eval(), subject.data()
    calibration = CalibrationData(data.train.take(args.examples, SEED), data.name, SEED)
    example = example_of(network, data.inputs.with_batch(1), blank=True)
    costs = trace_layers(network, example)
    plans = [
        plan_of_widths(network, example, costs, lambda n, share=share: round(n * share / 100))
        for share in args.uniform
    ]
    with progress(f"{name}, fitted") as update:
        small = [obo.apply(network, plan, calibration, progress=update) for plan in plans]
    scored = score([network, *small], data.test, metric=subject.metric)
    lines = [
        [name, f"{share} %", format_percent(plan.after.macs / plan.before.macs),
         in_points(paired_difference(scored.each[0], after))]
        for share, plan, after in zip(args.uniform, plans, scored.each[1:], strict=True)
    ]  # fmt: skip
    for runtime in args.runtimes:
        prepare = find_runtime(runtime).prepare
        with threads(1):
            ready = {str(i): prepare(n, example) for i, n in enumerate((network, *small))}
            times = interleave(ready, rounds=ROUNDS, seconds=SECONDS)
        for place, line in enumerate(lines):
            ratio = times.ratio("0", str(place + 1))
            line.append(f"{100 / ratio.value:.0f} % [{100 / ratio.high:.0f}–{100 / ratio.low:.0f}]")
    return lines


def in_points(difference: Difference) -> str:
    """Return a difference of scores with its interval; of accuracies in points."""
    values = [100 * each for each in (difference.value, difference.low, difference.high)]
    return "{:+.1f} [{:+.1f} to {:+.1f}]".format(*values)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=["resnet20"], choices=SUBJECTS)
    parser.add_argument("--runtime", help="budget its time; MACs by default")
    parser.add_argument("--shares", type=int, nargs="+", default=[50], help="percent (50)")
    parser.add_argument("--examples", type=int, default=512, help="calibration inputs (512)")
    parser.add_argument("--uniform", type=int, nargs="+", help="percent of channels; no plan")
    parser.add_argument("--runtimes", nargs="+", default=["eager"], help="to time these in")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.uniform:
        print_table(
            Table(
                columns=(
                    "network",
                    ">channels",
                    ">MACs",
                    ">score × 100, difference",
                    *args.runtimes,
                ),
                rows=[line for name in args.networks for line in uniform(name, args)],
                title="Each group of layers keeps the same share of its channels",
                notes=[f"Times are shares of the original's. {describe_machine('cpu')}"],
            )
        )
        return
    lines = [line for name in args.networks for line in compare(name, args)]
    print_table(
        Table(
            columns=(
                "network", "budget of", "asked", "rewrites", ">time", ">MACs", ">narrowed",
                ">harm", ">score × 100, difference",
            ),
            rows=lines,
            title="With and without fewer channels",
            notes=[str(describe_machine("cpu"))],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
