"""Honest timing: interleaved rounds, warm-up, synchronization, quartiles, bootstrap intervals."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from onebyone.errors import OptionError
from onebyone.records import Ratio, Timing

# A sample shorter than this is mostly clock and dispatch noise: short calls are repeated in it.
SAMPLE_MS = 2.0
# What is left in the caches by others, and threads that still spin, are no part of a call so long.
LONG_MS = 100.0
# Half the samples outside ±12 % of the median: something else was running.
DISTURBED_SPREAD = 0.25
MAX_CALLS_A_SAMPLE = 1000
# At several threads, a round counts if no more of its time than this went by waiting for a core.
QUIET_WAIT = 0.02
# With fewer quiet rounds than this there is no verdict, and all rounds are shown.
FEWEST_QUIET_ROUNDS = 8

Milliseconds = NDArray[np.float64]


@dataclass(frozen=True)
class Samples:
    """Milliseconds a call of each contender, round by round, measured in turn.

    On a busy machine a call also waits for a processor, and the kernel counts how long
    (``/proc/self/task/*/schedstat``). With one thread that wait is subtracted, down to the time
    that processors spent on the call: a runtime may have threads of its own, of which one waits
    while another works. With several it cannot be: there, rounds with a wait are left out if enough
    are without; otherwise all rounds count, and are said to be disturbed.

    Attributes:
        ms: An array of shape ``(rounds,)`` for each contender.
        waited: In what share of the time a thread waited for a processor, of the same shapes;
            empty where the system does not tell.
    """

    ms: Mapping[str, Milliseconds]
    device: str
    threads: int
    waited: Mapping[str, Milliseconds] = field(default_factory=dict)

    def only(self, *names: str) -> Samples:
        """Return the samples of some contenders."""
        waited = {name: self.waited[name] for name in names} if self.waited else {}
        return replace(self, ms={name: self.ms[name] for name in names}, waited=waited)

    def followed_by(self, other: Samples) -> Samples:
        """Return these rounds and then those of another measurement of the same contenders."""

        def joined(
            mine: Mapping[str, Milliseconds], theirs: Mapping[str, Milliseconds]
        ) -> dict[str, Milliseconds]:
            return {name: np.concatenate([mine[name], theirs[name]]) for name in mine}

        waited = joined(self.waited, other.waited) if self.waited and other.waited else {}
        return replace(self, ms=joined(self.ms, other.ms), waited=waited)

    def quiet(self, *names: str) -> NDArray[np.bool_]:
        """Return which rounds count for these contenders, an array of shape ``(rounds,)``."""
        rounds = len(next(iter(self.ms.values())))
        everything = np.ones(rounds, dtype=bool)
        if self.threads == 1 or not self.waited:
            return everything
        quiet = np.all([self.waited[name] <= QUIET_WAIT for name in names], axis=0)
        return quiet if quiet.sum() >= min(FEWEST_QUIET_ROUNDS, rounds) else everything

    def disturbed(self, *names: str) -> bool:
        """Whether what was measured of these contenders allows no verdict."""
        kept = self.quiet(*names)
        if any(_spread(self.ms[name][kept]) > DISTURBED_SPREAD for name in names):
            return True
        if self.threads == 1 or not self.waited:
            return False
        return any(bool(np.any(self.waited[name][kept] > QUIET_WAIT)) for name in names)

    def timing(self, name: str, *, runtime: str, batch: int) -> Timing:
        """Return the median and the quartiles of one contender."""
        samples = self.ms[name][self.quiet(name)]
        q1, median, q3 = (float(q) for q in np.percentile(samples, [25, 50, 75]))
        return Timing(
            runtime=runtime,
            device=self.device,
            threads=self.threads,
            batch=batch,
            repeats=len(samples),
            median_ms=median,
            q1_ms=q1,
            q3_ms=q3,
            disturbed=self.disturbed(name),
            waited=float(np.median(self.waited[name])) if self.waited else None,
        )

    def ratio(self, slow: str, fast: str, *, seed: int = 0, resamples: int = 2000) -> Ratio:
        """Return how many times faster ``fast`` is than ``slow``, paired round by round."""
        kept = self.quiet(slow, fast)
        ratios = self.ms[slow][kept] / self.ms[fast][kept]
        rng = np.random.default_rng(seed)
        picks = rng.integers(0, len(ratios), size=(resamples, len(ratios)))
        low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
        return Ratio(
            value=float(np.median(ratios)), low=float(low), high=float(high), rounds=len(ratios)
        )


def _spread(samples: Milliseconds) -> float:
    q1, median, q3 = np.percentile(samples, [25, 50, 75])
    return float((q3 - q1) / median)


def interleave(
    callables: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 3,
    device: str = "cpu",
    seconds: float | None = None,
) -> Samples:
    """Time callables in turn: A B, B A, A B, … so that a drift of the machine hits all alike.

    Before each sample its callable runs once without being timed: what the one before left in the
    caches, and threads of its pool that still spin, are not the callable's own. To one that takes
    ``LONG_MS`` or more they are nothing; it is warmed up once and always timed.

    Args:
        callables: What to time, by name.
        rounds: Samples of each.
        warmup: Calls of each before the first sample.
        device: ``cpu``, or a CUDA device, which is then waited for.
        seconds: Stop after the first round that ends later than this, if there were 3.

    Raises:
        OptionError: If there are fewer than 3 rounds or nothing to time.
    """
    if rounds < 3 or not callables:
        raise OptionError(f"`rounds` must be 3 or more with something to time, got {rounds}.")
    names = list(callables)
    samples: dict[str, list[_Sample]] = {name: [] for name in names}
    with _quiet_interpreter():
        paces = {name: _calibrated(callables[name], warmup, device) for name in names}
        started = time.monotonic()
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                samples[name].append(_sampled(callables[name], paces[name], device))
            if seconds is not None and turn >= 2 and time.monotonic() - started > seconds:
                break
    return _collected(samples, device)


class _Sample(NamedTuple):
    """Milliseconds of a call: on the clock, in the queue for a processor, and on processors."""

    wall: float
    delay: float
    cpu: float


def _collected(samples: Mapping[str, list[_Sample]], device: str) -> Samples:
    threads = torch.get_num_threads()
    ms: dict[str, Milliseconds] = {}
    waited: dict[str, Milliseconds] = {}
    for name, each in samples.items():
        wall, delay, cpu = np.array(each).T
        ms[name], waited[name] = wall, delay / np.maximum(wall, 1e-9)
        if threads == 1 and not np.isnan(delay).any():
            ms[name] = np.minimum(np.maximum(wall - delay, cpu), wall)
    told = not any(np.isnan(values).any() for values in waited.values())
    return Samples(ms=ms, device=device, threads=threads, waited=waited if told else {})


@dataclass(frozen=True)
class _Pace:
    """How a sample is taken: of so many calls, with or without one before it."""

    calls: int = 1
    settled: bool = True


def _sampled(function: Callable[[], object], pace: _Pace, device: str) -> _Sample:
    if pace.settled:
        function()
        _wait_for(device)
    tasks = _tasks_of(device)
    delayed, worked = run_delay_ns(tasks), time.process_time_ns()
    start = time.perf_counter_ns()
    for _ in range(pace.calls):
        function()
    _wait_for(device)
    wall = time.perf_counter_ns() - start
    cpu = time.process_time_ns() - worked
    # A thread that ended takes its count with it.
    delay = max(run_delay_ns(tasks) - delayed, 0.0)
    return _Sample(*(ns / pace.calls / 1e6 for ns in (wall, delay, cpu)))


def run_delay_ns(tasks: str = "*") -> float:
    """Return how long this process's threads were ready but had no processor; NaN if not told.

    The second number of each thread's ``schedstat``, in nanoseconds, summed (Linux kernel,
    Documentation/scheduler/sched-stats.rst).

    Args:
        tasks: Which threads, as a pattern of their numbers; all if not given.
    """
    total, told = 0, False
    for file in _TASKS.glob(f"{tasks}/schedstat"):
        try:
            total += int(file.read_bytes().split()[1])
            told = True
        except (OSError, ValueError, IndexError):
            continue  # the thread ended meanwhile
    return total if told else float("nan")


_TASKS = Path("/proc/self/task")


def _tasks_of(device: str) -> str:
    """Return the threads whose wait for a processor delays a call, as a pattern."""
    # What a GPU works on is launched by this thread alone, and reading the counts of the hundred
    # others that CUDA and torch bring would take longer than the calls themselves.
    return str(threading.get_native_id()) if device.startswith("cuda") else "*"


def _calibrated(function: Callable[[], object], warmup: int, device: str) -> _Pace:
    """Warm up, and return how samples are taken that are long enough for the clock."""
    function()
    _wait_for(device)
    if _sampled(function, _Pace(settled=False), device).wall >= LONG_MS:
        return _Pace(settled=False)
    for _ in range(warmup - 2):
        function()
    _wait_for(device)
    once = min(_sampled(function, _Pace(), device).wall for _ in range(3))
    return _Pace(int(np.clip(np.ceil(SAMPLE_MS / max(once, 1e-6)), 1, MAX_CALLS_A_SAMPLE)))


def _wait_for(device: str) -> None:
    # A CUDA call returns before its work is done; the clock must not be read until it is.
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@contextmanager
def _quiet_interpreter() -> Iterator[None]:
    """Keep the garbage collector from landing in one contender's sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Set torch's number of threads inside, and put it back after; ``None`` leaves it."""
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise OptionError(f"`threads` must be 1 or more, got {count}.")
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
