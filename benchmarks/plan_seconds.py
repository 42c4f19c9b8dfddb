"""How long a plan takes, and where the time goes.

    python benchmarks/plan_seconds.py                          # ResNet-20 and ResNet-50
    python benchmarks/plan_seconds.py --cases resnet50:512 --threads 1 --again
    python benchmarks/plan_seconds.py --cases resnet20:1024 --runtimes none onnxruntime
    python benchmarks/plan_seconds.py --cases resnet20:512 --efforts quick normal thorough
    python benchmarks/plan_seconds.py --quality                  # the plans: see plan_quality.py

A case is a network and a number of calibration images. ``resnet20`` and ``resnet32`` are the
pretrained ones with CIFAR-10, ``resnet56`` and ``resnet110`` the same with more layers and random
weights; any other name is of torchvision, with random weights and images of noise, 224×224.
Every plan is made in a process of its own, for half of the MACs, its front included. Stages are
timed from outside, by wrapping the functions that they consist of; what a stage takes is without
the stages inside it. CPU seconds are of all threads, and tell more than wall seconds where the
machine does other work too. Results are appended to a file of JSON lines; what is there already is
not measured again, unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onebyone import apply, planning
from onebyone.calibration.inputs import CalibrationData
from onebyone.core.records import Plan
from onebyone.core.tables import Table
from onebyone.core.write_files import write_text
from onebyone.data.splits import TensorSplit
from onebyone.planning import choosing, layer_options, planner, probes, survey
from onebyone.planning.latency import planner as deployed
from onebyone.report.console import print_table
from onebyone.rewrites.registry import LAYER_REWRITES
from onebyone.runtimes import describe_machine

NONE = "none"
DEFAULT = "default"
# Blocks of each stage.
CIFAR_RESNETS = {"resnet20": 3, "resnet32": 5, "resnet56": 9, "resnet110": 18}
REST = "rest"


@dataclass
class Spent:
    """Seconds of a stage, without those of the stages inside it."""

    wall: float = 0.0
    cpu: float = 0.0
    calls: int = 0


class Stages:
    """Seconds of each stage of what runs inside; a function that is a stage is wrapped meanwhile.

    Example:
        >>> stages = Stages()
        >>> with stages.watching([(layer_options, "collect", "moments")]):
        ...     survey.survey(model, data)
        >>> stages.spent["moments"].cpu
    """

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = defaultdict(Spent)
        self._inside: list[str] = []
        self._since = (0.0, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs inside as this stage, up to the stages that it holds."""
        self._settle()
        self._inside.append(name)
        self.spent[name].calls += 1
        try:
            yield
        finally:
            self._settle()
            self._inside.pop()

    def _settle(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._inside:
            spent = self.spent[self._inside[-1]]
            spent.wall += now[0] - self._since[0]
            spent.cpu += now[1] - self._since[1]
        self._since = now

    @contextlib.contextmanager
    def watching(self, functions: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
        """Wrap functions, each given by its owner, its name there and its stage."""
        kept = [(owner, name, getattr(owner, name)) for owner, name, _ in functions]
        try:
            for owner, name, stage in functions:
                setattr(owner, name, self._wrapped(getattr(owner, name), stage))
            with self.stage(REST):
                yield
        finally:
            for owner, name, function in kept:
                setattr(owner, name, function)

    def _wrapped(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                return function(*args, **kwargs)

        return timed


def stages_of_a_plan() -> list[tuple[Any, str, str]]:
    """Return the functions that a plan consists of, each with its stage."""
    found: list[tuple[Any, str, str]] = [
        (survey, "trace_layers", "reading"),
        (survey, "reasons", "reading"),
        (layer_options, "collect", "moments"),
        (layer_options, "curvature_of", "curvature"),
        (layer_options, "problems_of", "regressions"),
        (layer_options, "pooled_harms", "fits"),
        (layer_options, "Probes", "probes"),
        (probes.Probes, "harm_with", "probes"),
        (survey, "fit_heads", "head"),
        (planner.Deployed, "survey", "timing"),
        (deployed.Deployed, "measure", "timing"),
        (choosing, "choose", "solving"),
    ]
    found += [(how, "errors", f"{name} errors") for name, how in LAYER_REWRITES.items()]
    return found


# ---------------------------------------------------------------- one plan


Key = tuple[str, int, str, int, str]


@dataclass(frozen=True)
class Row:
    """What a plan took; a line of the results."""

    network: str
    images: int
    runtime: str
    threads: int
    effort: str = DEFAULT
    wall: float = 0.0
    cpu: float = 0.0
    apply_cpu: float = 0.0
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    options: int = 0
    rewritten: int = 0
    macs: float = 0.0
    harm: float = 0.0
    peak_mb: int = 0
    machine: str = ""
    torch: str = ""

    @property
    def key(self) -> Key:
        """What was asked for."""
        return self.network, self.images, self.runtime, self.threads, self.effort


def subject(name: str, images: int) -> tuple[nn.Module, CalibrationData]:
    """Return a network and what it is calibrated on."""
    torch.manual_seed(0)
    if name in CIFAR_RESNETS:
        sys.path.insert(0, str(Path(__file__).parent))
        import networks
        from cifar10_data import cifar10_imagenet_statistics

        data = cifar10_imagenet_statistics()
        make = getattr(networks, name, lambda: networks.CifarResNet(CIFAR_RESNETS[name]))
        return make().eval(), CalibrationData(data.train.take(images, 0), data.name)
    import torchvision

    network = torchvision.models.get_model(name, weights=None).eval()
    noise = TensorSplit(torch.randn(images, 3, 224, 224), torch.zeros(images, dtype=torch.long))
    return network, CalibrationData(noise, "noise")


def measured(asked: Row) -> Row:
    """Make the plan and return what it took."""
    torch.set_num_threads(asked.threads)
    network, data = subject(asked.network, asked.images)
    stages = Stages()
    wall, cpu = time.perf_counter(), time.process_time()
    with stages.watching(stages_of_a_plan()):
        made: Plan = planning.plan(
            network,
            data,
            budget="macs=50%",
            task="classification",
            runtime=None if asked.runtime == NONE else asked.runtime,
            num_threads=asked.threads,
            cache=False,
            **({} if asked.effort == DEFAULT else {"effort": asked.effort}),  # type: ignore[arg-type]
        )
    planned = time.perf_counter() - wall, time.process_time() - cpu
    cpu = time.process_time()
    apply(network, made, data)
    return Row(
        **{
            **asdict(asked),
            "wall": planned[0],
            "cpu": planned[1],
            "apply_cpu": time.process_time() - cpu,
            "stages": {name: asdict(spent) for name, spent in stages.spent.items()},
            "rewritten": len(made.choices),
            "macs": made.after.macs / made.before.macs,
            "harm": made.harm or 0.0,
            "peak_mb": _peak_mb(),
            "machine": str(describe_machine("cpu")),
            "torch": str(torch.__version__),
        }
    )


def _peak_mb() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _in_a_process(asked: Row) -> Row:
    """Make the plan in a fresh process: neither its memory nor its caches are another plan's."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(asked))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


# ---------------------------------------------------------------- showing


def table(rows: Sequence[Row]) -> Table:
    """Return a plan a line, with the share of its CPU seconds that each stage took."""
    names = list(dict.fromkeys(name for row in rows for name in row.stages if name != REST))
    lines = [
        [
            row.network,
            f"{row.images:,}",
            row.runtime,
            str(row.threads),
            row.effort,
            f"{row.wall:.1f}",
            f"{row.cpu:.1f}",
            f"{row.apply_cpu:.1f}" if row.apply_cpu else "–",
            *(_share(row, name) for name in (*names, REST)),
            f"{row.peak_mb / 1024:.1f} GB",
        ]
        for row in rows
    ]
    machines = sorted({f"{row.machine}, torch {row.torch}" for row in rows})
    return Table(
        columns=(
            "network", ">images", "runtime", ">thr.", "effort", ">wall s", ">CPU s", ">apply",
            *(f">{name}" for name in (*names, REST)), ">peak",
        ),
        rows=lines,
        title="Seconds to a plan for half of the MACs",
        notes=[
            "Shares are of the CPU seconds, of all threads; a stage is without those inside it.",
            "apply: CPU seconds that carrying the plan out takes, with all weights fitted anew.",
            *(f"{machine}." for machine in machines),
        ],
    )  # fmt: skip


def _share(row: Row, name: str) -> str:
    spent = row.stages.get(name)
    return "–" if spent is None else f"{100 * spent['cpu'] / max(row.cpu, 1e-9):.0f} %"


def load(path: Path) -> dict[Key, Row]:
    """Return the results of a file, the last of each plan."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
    rows = [Row(**json.loads(line)) for line in lines]
    return {row.key: row for row in rows}


def asked_for(args: argparse.Namespace) -> list[Row]:
    """Return what to plan, in order."""
    found = []
    kinds = itertools.product(args.cases, args.runtimes, args.threads, args.efforts)
    for case, runtime, threads, effort in kinds:
        name, _, images = case.partition(":")
        found.append(Row(name, int(images or 512), runtime, threads, effort))
    return found


def _show_quality(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import plan_quality

    torch.set_num_threads(args.threads[0])
    path = args.results.with_name("plan_quality.jsonl")
    plan_quality.measure(path, args.label, args.networks, args.efforts, args.seeds)
    found = plan_quality.table(path)
    print_table(found)
    if args.table:
        write_text(args.table, found.to_markdown())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["resnet20:1024", "resnet20:2048", "resnet50:512"],
        metavar="NETWORK:IMAGES",
    )
    parser.add_argument("--runtimes", nargs="+", default=[NONE])
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--efforts", nargs="+", default=[DEFAULT])
    parser.add_argument("--again", action="store_true", help="measure also what is known")
    parser.add_argument("--results", type=Path, default=Path("runs/plan_seconds.jsonl"))
    parser.add_argument("--table", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--quality", action="store_true", help="of plans, not the time they take")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "nin", "dncnn"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--label", default="now", help="name of the version that is measured")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(asdict(measured(Row(**json.loads(args.one))))))
        return
    if args.quality:
        _show_quality(args)
        return
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = {} if args.again else load(args.results)
    for asked in asked_for(args):
        if asked.key in done:
            continue
        row = done[asked.key] = _in_a_process(asked)
        with args.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")
        print(asked.key, f"{row.wall:.1f} s, {row.cpu:.1f} CPU s", file=sys.stderr, flush=True)
    found = table([done[asked.key] for asked in asked_for(args)])
    print_table(found)
    if args.table:
        write_text(args.table, found.to_markdown())


if __name__ == "__main__":
    main()
