"""The front of latency against accuracy before fine-tuning, in each runtime.

    python benchmarks/latency_front.py resnet20 --runtimes onnxruntime openvino
    python benchmarks/latency_front.py dncnn --shares 70 50

One survey of harm for all runtimes; for each share of the latency a plan, whose network is built
and measured in turns with the original, fitted to the calibration data, and scored on the test
data, paired with the original.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from onebyone import apply
from onebyone.calibration.inputs import CalibrationData
from onebyone.cli.output import progress
from onebyone.core.errors import BudgetError
from onebyone.core.tables import Table
from onebyone.data import Data
from onebyone.evaluation.scores import score
from onebyone.evaluation.statistics import agreement, paired_difference
from onebyone.planning import Planner
from onebyone.report.console import print_table
from onebyone.runtimes import describe_machine

sys.path.insert(0, str(Path(__file__).parent))
from subjects import SUBJECTS, Subject


def fronts(subject: Subject, args: argparse.Namespace) -> Iterator[list[str]]:
    """Yield a line for each runtime and share of the latency."""
    network, data = subject.network().eval(), subject.data()
    examples = args.examples or subject.examples
    calibration = CalibrationData(data.train.take(examples, args.seed), data.name, args.seed)
    where: dict[str, Any] = {"batch": args.batch, "num_threads": args.threads, "cache": False}
    planner: Planner | None = None
    for runtime in args.runtimes:
        if planner is None:
            with progress("options") as update:
                planner = Planner(network, calibration, runtime=runtime, progress=update, **where)
        else:
            planner = planner.for_runtime(runtime, **where)
        for share in args.shares:
            row = [runtime, f"{share:g} %", *_point(planner, share, subject, data, calibration)]
            print(*row, file=sys.stderr, flush=True)
            yield row


def _point(
    planner: Planner, share: float, subject: Subject, data: Data, calibration: CalibrationData
) -> list[str]:
    try:
        made = planner.plan([f"latency={share:g}%"])
    except BudgetError as error:
        return [str(error), *[""] * 6]
    small = apply(planner.model, made, calibration)
    both = score([planner.model, small], data.test, metric=subject.metric)
    loss, latency = paired_difference(*both.each), made.latency
    assert latency is not None
    same = agreement(*both.each)
    return [
        f"{100 / latency.ratio.value:.1f} % "
        f"[{100 / latency.ratio.high:.1f}–{100 / latency.ratio.low:.1f}]"
        + (" disturbed" if latency.after.disturbed else ""),
        f"{100 * latency.error:.1f} %",
        f"{100 * made.after.macs / made.before.macs:.0f} %",
        str(both.each[1].summary()),
        f"{loss.value:+.4f} [{loss.low:+.4f} … {loss.high:+.4f}], n = {loss.n}",
        "–" if same is None else str(same),
        f"{both.divergences[1]:.4g}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime"])
    parser.add_argument("--shares", nargs="+", type=float, default=[90, 80, 70, 60])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--examples", type=int, help="calibration inputs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    subject = SUBJECTS[args.subject]
    rows = list(fronts(subject, args))
    name = subject.metric if isinstance(subject.metric, str) else subject.metric.__name__
    conditions = (
        f"{args.examples or subject.examples} calibration inputs, seed {args.seed}, batch "
        f"{args.batch}, {args.threads} thread(s)."
    )
    print_table(
        Table(
            columns=(
                "runtime", ">asked", ">time reached", ">pred. off", ">MACs", f">{name}",
                ">change", ">agreement", ">divergence",
            ),
            rows=rows,
            title=f"{args.subject}: latency against {name}, before fine-tuning",
            notes=[f"{conditions} {describe_machine('cpu')}."],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
