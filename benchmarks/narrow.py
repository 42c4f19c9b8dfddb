"""What fewer channels are worth: plans with and without ``narrow``, from one survey.

    python benchmarks/narrow.py resnet20 --runtime eager --shares 80 60
    python benchmarks/narrow.py resnet20 --shares 50             # of the MACs
    python benchmarks/narrow.py nin dncnn --runtime eager --shares 50
    python benchmarks/narrow.py resnet20 --shares 50 --first 90 80
    python benchmarks/narrow.py resnet20 --uniform 75 50 25 --runtimes eager onnxruntime compile

The options' harm is measured once, and each option timed once. For each budget one plan may choose
among all rewrites, another among all but ``narrow``; where a layer reads one group and writes the
next, a third may narrow only one of the two. With ``--first`` groups are narrowed by a plan of its
own, and a second plan rewrites the layers that it leaves. All are carried out before any
fine-tuning, scored on the same test examples, and timed in turns with the original and with each
other. Where a budget cannot be met the nearest plan is shown. With ``--uniform`` nothing is
planned: each group of layers keeps that share of its channels, and the network is timed in several
runtimes. 1 thread, batch 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

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


@dataclass(frozen=True)
class Made:
    """A network that was planned and carried out, perhaps by two plans one after the other."""

    network: nn.Module
    plans: tuple[Plan, ...]
    met: bool

    @property
    def macs(self) -> float:
        """The share of the MACs that is left."""
        return math.prod(plan.after.macs / plan.before.macs for plan in self.plans)

    @property
    def narrowed(self) -> str:
        """How many of the choices are narrower groups."""
        choices = [option for plan in self.plans for option in plan.choices]
        return f"{sum(map(is_narrow, choices))} of {len(choices)}"


def made_of(planner: Planner, budget: str, calibration: CalibrationData) -> Made:
    """Return the network of a planner's plan for a budget."""
    plan, met = planned(planner, budget)
    return Made(obo.apply(planner.model, plan, calibration), (plan,), met)


def two_rounds(
    every: Planner, first: int, args: argparse.Namespace, calibration: CalibrationData
) -> Callable[[int], Made]:
    """Return what makes a network of two plans for a share of the budgeted quantity.

    The first plan narrows groups to ``first`` percent, the second rewrites what they left by all
    but ``narrow``: so a layer can be narrowed and factorized.
    """
    start = made_of(
        among(every, args.runtime, is_narrow, links=True), f"{args.quantity}={first}%", calibration
    )
    (plan,) = start.plans
    again = Planner(start.network, calibration, runtime=args.runtime, num_threads=1)
    again = among(again, args.runtime, lambda option: not is_narrow(option), links=False)
    reached = plan.after.macs / plan.before.macs
    if plan.latency is not None:
        reached = 1 / plan.latency.ratio.value

    def made(share: int) -> Made:
        rest = min(100.0, share / reached)
        then = made_of(again, f"{args.quantity}={rest:.2f}%", calibration)
        return Made(then.network, (plan, *then.plans), start.met and then.met)

    return made


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
    ways: dict[str, Callable[[int], Made]] = {
        words: lambda share, planner=planner: made_of(
            planner, f"{args.quantity}={share}%", calibration
        )
        for words, planner in planners.items()
    }
    for first in args.first:
        ways[f"narrow to {first} %, then the rest"] = two_rounds(every, first, args, calibration)
    example = example_of(network, data.inputs.with_batch(1), blank=True)
    prepare = find_runtime(args.runtime or "eager").prepare
    lines = []
    for share in args.shares:
        made = {words: way(share) for words, way in ways.items()}
        networks = {"": every.model} | {words: each.network for words, each in made.items()}
        scored = score(list(networks.values()), data.test, metric=subject.metric)
        with threads(1):
            ready = {words: prepare(each, example) for words, each in networks.items()}
            times = interleave(ready, rounds=ROUNDS, seconds=SECONDS)
        own = scored.each[list(networks).index("all but narrow")]
        for (words, each), after in zip(made.items(), scored.each[1:], strict=True):
            ratio = times.ratio("", words)
            lines.append(
                [
                    name,
                    args.runtime or "MACs",
                    f"{share} %" + ("" if each.met else ", nearest"),
                    words,
                    f"{100 / ratio.value:.1f} % [{100 / ratio.high:.1f}–{100 / ratio.low:.1f}]",
                    format_percent(each.macs),
                    each.narrowed,
                    f"{sum(plan.harm for plan in each.plans):.4f}",
                    in_points(paired_difference(scored.each[0], after)),
                    "" if after is own else in_points(paired_difference(own, after)),
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
    parser.add_argument(
        "--first", type=int, nargs="+", default=[], help="percent to narrow to in a first plan"
    )
    parser.add_argument("--uniform", type=int, nargs="+", help="percent of channels; no plan")
    parser.add_argument("--runtimes", nargs="+", default=["eager"], help="to time these in")
    args = parser.parse_args(argv)
    args.quantity = "macs" if args.runtime is None else "latency"
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
                ">harm", ">score × 100, difference", ">to all but narrow",
            ),
            rows=lines,
            title="With and without fewer channels",
            notes=[str(describe_machine("cpu"))],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
