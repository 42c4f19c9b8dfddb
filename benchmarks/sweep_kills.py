"""A sweep of 24 trials in which a process, a node and the command itself are killed.

    python benchmarks/sweep_kills.py
    python benchmarks/sweep_kills.py --trials 6 --folder /tmp/kills

Two sweeps, each of tiny networks with random weights on scikit-learn's digits: it is about what is
lost, not about the networks.

``cluster``: three local Ray nodes. With a quarter of the trials finished, the process that measures
one is killed (SIGKILL); with half of them, a node is.

``command``: an embedded Ray. With a third of the trials finished, the command is killed (SIGKILL);
once its processes are gone or not, it is given again with ``--resume``.

Counted afterwards: trials, results, results that were made twice (a run's log then has a second
``compare`` that finished), starts, and whether the page and the table are there. The figures are
printed, and kept as JSON beside the sweeps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from onebyone.core.errors import RecordError
from onebyone.core.records import SweepRecord
from onebyone.core.rounds import ENVIRONMENT as ROUNDS
from onebyone.core.tables import Table
from onebyone.core.write_files import write_text
from onebyone.report.console import print_table
from onebyone.runtimes import describe_machine

NETWORKS = """
import torch
from torch import nn

def _made(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 16, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )

def _seeded(width):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _made(width).eval()

def narrow(): return _seeded(8)
def middle(): return _seeded(12)
def wide(): return _seeded(16)
"""
BUDGETS = ("macs=80%", "macs=60%", "macs=40%", "params=60%")
SEEDS = ("0", "1")
NAMES = ("narrow", "middle", "wide")
WAIT_SECONDS = 1800.0


@dataclass(frozen=True)
class Figures:
    """What was left of a sweep.

    Attributes:
        twice: Results that were made more than once.
        starts: Of all trials together.
        killed: What was killed, and after how many results.
    """

    sweep: str
    trials: int
    results: int
    twice: int
    starts: int
    page: bool
    lines: int
    seconds: float
    killed: tuple[str, ...]


class Sweep:
    """The command of a sweep, and what can be seen of it from outside."""

    def __init__(self, folder: Path, trials: int, *more: str) -> None:
        self.out = folder / "sweep"
        self.trials = trials
        folder.mkdir(parents=True)
        file = folder / "net.py"
        file.write_text(NETWORKS, encoding="utf-8")
        axes = [*(f"--budget={each}" for each in BUDGETS), *(f"--seed={each}" for each in SEEDS)]
        models = [f"{file}:{name}" for name in NAMES[: trials // (len(BUDGETS) * len(SEEDS)) or 1]]
        if trials < len(BUDGETS) * len(SEEDS):
            axes = [*(f"--budget={each}" for each in BUDGETS[: max(1, trials // 2)]), "--seed=0,1"]
        how = ["--data=digits", "--limit=64", "--calibration=32", "--epochs=0", "--threads=1"]
        self.command = [
            *(sys.executable, "-m", "onebyone", "sweep", *models, *axes, *how),
            f"--out={self.out}", *more,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        """Start the command."""
        few = {ROUNDS: "3"}  # the times are of no interest
        self.process = subprocess.Popen([*self.command, *more], env={**os.environ, **few})

    def finished(self) -> int:
        """Return how many trials have a result."""
        try:
            return SweepRecord.load(self.out / "sweep.json").counted("finished")
        except RecordError:  # not there yet
            return 0

    def wait(self, until: Callable[[], object]) -> object:
        """Wait until something holds, and return it."""
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            found = until()
            if found:
                return found
            assert self.process is not None
            if self.process.poll() is not None:
                raise SystemExit(f"The sweep ended before that, with {self.process.returncode}.")
            time.sleep(0.1)
        raise SystemExit("The sweep took too long.")

    def measuring(self) -> int | None:
        """Return the process that carries out a trial now: it holds the lock of its run."""
        for holder in self.out.glob("trials/*/.onebyone-holder"):
            try:
                return int(json.loads(holder.read_text(encoding="utf-8"))["process"])
            except (OSError, ValueError, KeyError):
                continue
        return None

    def end(self) -> None:
        """Wait for the command to end well."""
        assert self.process is not None
        if self.process.wait(WAIT_SECONDS):
            raise SystemExit(f"The sweep failed with status {self.process.returncode}.")

    def figures(self, name: str, seconds: float, killed: list[str]) -> Figures:
        """Return what is left of it."""
        record = SweepRecord.load(self.out / "sweep.json")
        logs = [
            (self.out / "trials" / trial.name / "run.log").read_text(encoding="utf-8")
            for trial in record.trials
            if trial.state == "finished"
        ]
        made = [sum("compare" in line and "finished" in line for line in log.splitlines())
                for log in logs]  # fmt: skip
        table = (self.out / "trials.csv").read_text(encoding="utf-8").splitlines()
        return Figures(
            sweep=name,
            trials=len(record.trials),
            results=sum(count >= 1 for count in made),
            twice=sum(count > 1 for count in made),
            starts=sum(trial.starts for trial in record.trials),
            page=(self.out / "report.html").is_file(),
            lines=len(table) - 1,
            seconds=round(seconds, 1),
            killed=tuple(killed),
        )


def on_cluster(folder: Path, trials: int) -> Figures:
    """Kill a process and a node of a cluster of three."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    nodes = [cluster.add_node(**small) for _ in range(2)]
    killed = []
    start = time.perf_counter()
    sweep = Sweep(folder / "cluster", trials, f"--address={cluster.address}")
    try:
        sweep.start()
        sweep.wait(lambda: sweep.finished() >= trials // 4)
        process = sweep.wait(sweep.measuring)
        assert isinstance(process, int)
        os.kill(process, signal.SIGKILL)
        killed.append(f"a process after {sweep.finished()} results")
        sweep.wait(lambda: sweep.finished() >= trials // 2)
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed.append(f"a node after {sweep.finished()} results")
        sweep.end()
    finally:
        if sweep.process is not None and sweep.process.poll() is None:
            sweep.process.kill()
        cluster.shutdown()
        ray.shutdown()
    return sweep.figures("cluster", time.perf_counter() - start, killed)


def on_command(folder: Path, trials: int) -> Figures:
    """Kill the command, and resume the sweep."""
    start = time.perf_counter()
    sweep = Sweep(folder / "command", trials)
    sweep.start()
    try:
        sweep.wait(lambda: sweep.finished() >= trials // 3)
        sweep.wait(sweep.measuring)
        assert sweep.process is not None
        sweep.process.kill()
        sweep.process.wait()
        killed = [f"the command after {sweep.finished()} results"]
        sweep.start("--resume")
        sweep.end()
    finally:
        if sweep.process is not None and sweep.process.poll() is None:
            sweep.process.kill()
    return sweep.figures("command", time.perf_counter() - start, killed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=Path("runs/sweep-kills"))
    parser.add_argument("--only", choices=("cluster", "command"))
    args = parser.parse_args()
    made = []
    for name, go in (("cluster", on_cluster), ("command", on_command)):
        if args.only in (None, name):
            shutil.rmtree(args.folder / name, ignore_errors=True)
            made.append(go(args.folder, args.trials))
    machine = describe_machine()
    content = {"machine": str(machine), "figures": [asdict(each) for each in made]}
    write_text(args.folder / "figures.json", json.dumps(content, indent=2) + "\n")
    rows = [
        [each.sweep, str(each.trials), str(each.results), str(each.twice), str(each.starts),
         str(each.lines), "yes" if each.page else "no", f"{each.seconds:.0f} s"]
        for each in made
    ]  # fmt: skip
    columns = ("sweep", ">trials", ">results", ">twice", ">starts", ">lines", "page", ">time")
    notes = [f"{each.sweep}: killed {' and '.join(each.killed)}." for each in made]
    print_table(Table(columns=columns, rows=rows, title="Kills", notes=[*notes, f"{machine}."]))


if __name__ == "__main__":
    main()
