#!/usr/bin/env python3
"""Interrupt small runs in every way, and check that nothing is lost.

Runs of train and shrink are killed (SIGINT, SIGTERM, SIGKILL) at random moments, twice in a row;
the disk is made full at every single write, also of a resumed run; files may not grow beyond a
size; memory is limited; two processes begin or resume the same run. After each, no file may be
torn, and the resumed run must give the weights of a run that was never interrupted, bit for bit.

    scripts/faults                          # some minutes
    scripts/faults --kills 100 --seed 7
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sklearn.datasets
import torch
import torch._dynamo  # what commands import late, once for all children

import onebyone.pipeline.shrink
import onebyone.report.console
from onebyone import cli
from onebyone.core import write_files
from onebyone.core.errors import OneByOneError
from onebyone.core.records import RunRecord
from onebyone.networks.zoo import read_weights, save_weights
from onebyone.profiling import latency

NET = """
from torch import nn
def make():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=3), nn.ReLU(), nn.Conv2d(6, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
"""
DATA = ["--data", "digits", "--limit", "96", "--threads", "1"]
RUNS = {
    "train": ["train", "net.py:make", *DATA, "--epochs", "4"],
    "shrink": [
        *["shrink", "net.py:make", "--weights", "w.safetensors", *DATA, "--budget", "macs=60%"],
        *["--epochs", "4", "--reconstruct", "4", "--calibration", "48"],
    ],
}
KNOWN = {
    *["run.json", "plan.json", "report.html", "log.csv", "run.log", "checkpoint.pt"],
    *["model.safetensors", "original.safetensors", "one-shot.safetensors"],
}
MEGABYTE = 2**20
PRELOADED = (sklearn.datasets, torch._dynamo, onebyone.pipeline.shrink, onebyone.report.console)  # noqa: SLF001


class BrokenError(Exception):
    """Something was lost."""


# ---------------------------------------------------------------- a run in a process of its own


def start(kind: str, out: Path, *options: str, before: Callable[[], None] | None = None) -> int:
    """Fork a process that does a run, and return its id."""
    # The parent has never computed anything, so that its children can.
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        latency.SAMPLE_MS = 0.01  # what is timed here is of no interest
        if before is not None:
            before()
        status = cli.main([*RUNS[kind], "--out", str(out), *options])
    except BaseException as error:  # noqa: BLE001 - it goes into the log, and the process ends
        os.write(2, f"escaped: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)  # nothing of the parent's is to run in the child


def ended(process: int) -> int:
    """Wait for a process; return its status, below 0 where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def finish(kind: str, expected: dict[str, torch.Tensor], out: Path) -> None:
    """Resume a run to its end, and compare its weights."""
    check_whole(out)
    finished = (out / "run.json").exists() and state(out) == "finished"
    if not finished and (status := ended(start(kind, out, "--resume"))):
        raise BrokenError(f"the resumed run ended with status {status}")
    if state(out) != "finished":
        raise BrokenError(f"the record says {state(out)}")
    found = read_weights(out / "model.safetensors")
    same = found.keys() == expected.keys()
    if not same or not all(torch.equal(found[name], expected[name]) for name in found):
        raise BrokenError("the weights are not those of an uninterrupted run")
    left = {path.name for path in out.iterdir() if not path.name.startswith(".")} - KNOWN
    if left:
        raise BrokenError(f"there is {', '.join(left)}")


def state(out: Path) -> str:
    """Return the state that a record tells."""
    return RunRecord.load(out / "run.json").status.state


def content(out: Path) -> bytes:
    """Return the record as it is on the disk; nothing if there is none."""
    path = out / "run.json"
    return path.read_bytes() if path.exists() else b""


def check_whole(out: Path) -> None:
    """Check that every file there is can be read."""
    try:
        if (out / "run.json").exists():
            RunRecord.load(out / "run.json")
        for path in out.glob("*.safetensors"):
            read_weights(path)
        if (out / "checkpoint.pt").exists():
            torch.load(out / "checkpoint.pt", weights_only=True)
    except (OneByOneError, RuntimeError, OSError) as error:
        raise BrokenError(f"a file is torn: {error}") from error


# ---------------------------------------------------------------- faults


def killed(kind: str, seconds: float, chance: random.Random, out: Path) -> str:
    """Kill a run twice at random moments."""
    told = []
    for options in ((), ("--resume",)):
        number = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
        before = content(out)
        process = start(kind, out, *options)
        time.sleep(chance.uniform(0, seconds))
        os.kill(process, number)
        status = ended(process)
        recorded = state(out) if (out / "run.json").exists() else "none"
        told.append(f"{number.name} {status} {recorded}")
        # One that had not yet begun leaves the record of the one that was killed before.
        began = content(out) != before
        if number == signal.SIGTERM and status == 143 and recorded == "running" and began:
            raise BrokenError("the record does not say that the run was interrupted")
    return told[0].split()[0]


def full_at(place: int) -> Callable[[], None]:
    """Return what makes the disk full at one of the writes: half of the file is written."""

    def patch() -> None:
        written, count = write_files._written, 0  # noqa: SLF001 - the one place of all writes

        def fails(write: Callable[[Path], object], aside: Path) -> None:
            nonlocal count
            count += 1
            written(write, aside)
            if count >= place:  # and it stays full
                os.truncate(aside, aside.stat().st_size // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write_files._written = fails  # noqa: SLF001

    return patch


def short_of_memory(spare: int) -> Callable[[], None]:
    """Return what limits the memory to what the process has already, and so many bytes."""

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        size = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    return limit


def without_room(kind: str, place: int, out: Path) -> str:
    """Do a run on a disk that is full from its so many-th write on."""
    status = ended(start(kind, out, before=full_at(place)))
    if status not in (0, 1):
        raise BrokenError(f"status {status} with a full disk")
    return "disk full" if status else "disk full after the end"


def interrupted(kind: str, seconds: float, chance: random.Random, out: Path) -> None:
    """Kill a run once at a random moment."""
    process = start(kind, out)
    time.sleep(chance.uniform(0.2, 1) * seconds)
    os.kill(process, signal.SIGKILL)
    ended(process)


def resumed_without_room(kind: str, seconds: float, chance: random.Random, out: Path) -> str:
    """Kill a run, then resume it on a disk that is full from some write on."""
    interrupted(kind, seconds, chance, out)
    status = ended(start(kind, out, "--resume", before=full_at(chance.randrange(1, 12))))
    if status not in (0, 1):
        raise BrokenError(f"status {status} where a run was resumed on a full disk")
    return "disk full when resumed" if status else "disk full after the resumed end"


def small_files(most: int) -> Callable[[], None]:
    """Return what makes the system refuse every file above a size, whoever writes it."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return limit


def with_small_files(kind: str, chance: random.Random, out: Path) -> str:
    """Do a run where no file may grow beyond a size, not even a library's."""
    most = int(10 ** chance.uniform(2, 5.5))
    status = ended(start(kind, out, before=small_files(most)))
    if status not in (0, 1):
        raise BrokenError(f"status {status} where files may have {most} bytes")
    return "file size limit" if status else "file size limit not reached"


def without_memory(kind: str, chance: random.Random, out: Path) -> str:
    """Do a run with little memory."""
    spare = chance.randrange(1, 80) * MEGABYTE
    status = ended(start(kind, out, before=short_of_memory(spare)))
    return "memory limit" if status else "memory limit not reached"


def at_once(kind: str, out: Path) -> str:
    """Begin one run in two processes: one does it, the other is refused."""
    statuses = sorted(ended(each) for each in [start(kind, out), start(kind, out)])
    if statuses != [0, 1]:
        raise BrokenError(f"two processes ended with {statuses}")
    return "two at once"


def resumed_at_once(kind: str, seconds: float, chance: random.Random, out: Path) -> str:
    """Kill a run, then resume it in two processes: one does it, the other is refused."""
    interrupted(kind, seconds, chance, out)
    both = [start(kind, out, "--resume"), start(kind, out, "--resume")]
    statuses = sorted(ended(each) for each in both)
    # A run that had ended already is refused twice, or to the one that comes after the other.
    if statuses != [0, 1] and not (statuses == [1, 1] and state(out) == "finished"):
        raise BrokenError(f"two processes that resumed a run ended with {statuses}")
    return "two resumed at once"


# ---------------------------------------------------------------- all of them


class Trials:
    """Counts what was tried and what broke."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.broken: list[str] = []

    def one(
        self, name: str, fault: Callable[[Path], str | None], end: Callable[[Path], None]
    ) -> None:
        """Try a fault on a new folder, then see that the run can be finished."""
        print(f"\r{sum(self.tried.values()):5} tried", end="", file=sys.stderr, flush=True)
        out = Path("run")
        shutil.rmtree(out, ignore_errors=True)
        Path("log.txt").unlink(missing_ok=True)
        try:
            detail = fault(out)
            self.tried[f"{name} {detail or ''}".strip()] += 1
            end(out)
        except BrokenError as error:
            log = Path("log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-4:]
            self.broken.append(f"{name}: {error}\n    " + "\n    ".join(log))
            print(f"\n{self.broken[-1]}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Counts:
    """How much of each fault is tried."""

    kills: int
    memory: int
    pairs: int
    resumed: int
    writes: int


def run_all(kind: str, counts: Counts, chance: random.Random, trials: Trials) -> None:
    """Try all faults on one kind of run."""
    reference, began = Path(f"{kind}-reference"), time.perf_counter()
    if status := ended(start(kind, reference)):
        text = Path("log.txt").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"the reference ended with {status}: {text}")
    seconds = time.perf_counter() - began
    print(f"{kind}: a whole run takes {seconds:.1f} s", file=sys.stderr)
    end = partial(finish, kind, read_weights(reference / "model.safetensors"))
    for _ in range(counts.kills):
        trials.one(kind, partial(killed, kind, seconds, chance), end)
    for place in range(1, counts.writes + 1):
        trials.one(kind, partial(without_room, kind, place), end)
        if trials.tried[f"{kind} disk full after the end"]:
            break
    for _ in range(counts.memory):
        trials.one(kind, partial(without_memory, kind, chance), end)
    for _ in range(counts.pairs):
        trials.one(kind, partial(at_once, kind), end)
        trials.one(kind, partial(resumed_at_once, kind, seconds, chance), end)
    for _ in range(counts.resumed):
        trials.one(kind, partial(resumed_without_room, kind, seconds, chance), end)
        trials.one(kind, partial(with_small_files, kind, chance), end)


def main() -> int:
    """Try the faults that are asked for, and print what broke."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command (20), twice each")
    parser.add_argument("--memory", type=int, default=5, help="memory limits of each command (5)")
    parser.add_argument("--pairs", type=int, default=3, help="of processes at once (3)")
    parser.add_argument("--resumed", type=int, default=5, help="on a full disk, small files (5)")
    parser.add_argument("--writes", type=int, default=1000, help="at which the disk is full (all)")
    parser.add_argument("--runs", action="append", choices=[*RUNS], help="train or shrink (both)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    before = Path.cwd()
    gc.freeze()  # what is imported here need not be searched again in every child
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("net.py").write_text(NET, encoding="utf-8")
        torch.manual_seed(0)
        scope: dict[str, Callable[[], torch.nn.Module]] = {}
        exec(NET, scope)
        save_weights(scope["make"](), "w.safetensors")
        chance = random.Random(args.seed)
        counts = Counts(args.kills, args.memory, args.pairs, args.resumed, args.writes)
        trials = Trials()
        try:
            for kind in args.runs or RUNS:
                run_all(kind, counts, chance, trials)
        except KeyboardInterrupt:
            print("\nstopped: this is what was tried until then", file=sys.stderr)
        finally:
            os.chdir(before)
    for name, count in sorted(trials.tried.items()):
        print(f"{count:5} {name}")
    print(f"{sum(trials.tried.values()):5} tried, {len(trials.broken)} broken")
    for each in trials.broken:
        print(each)
    return 1 if trials.broken else 0


if __name__ == "__main__":
    sys.exit(main())
