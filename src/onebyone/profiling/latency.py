"""Latency: times callables in interleaved rounds, with quartiles and confidence intervals."""

from __future__ import annotations

import gc
import math
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

from onebyone.core.errors import OptionError
from onebyone.core.records import Ratio, Timing
from onebyone.core.rounds import limit, limited
from onebyone.core.shared_state import SharedChange
from onebyone.core.statistics import ratio_of

# A shorter sample is mostly clock and dispatch noise, so a sample repeats short calls.
SAMPLE_MS = 2.0
# Longest sample of a slower contender with as many calls as the fastest. So only contenders that
# differ by a factor of two or more get different numbers of calls.
MOST_SAMPLE_MS = 4 * SAMPLE_MS
# From this length on, a call is hardly affected by what others left in the caches, or by spinning
# threads.
LONG_MS = 100.0
# A wider spread (half the samples outside ±12 % of the median) means something else was running.
DISTURBED_SPREAD = 0.25
MAX_CALLS_A_SAMPLE = 1000
# With several threads, a round counts if it waited for a core at most this share of its time.
QUIET_WAIT = 0.02
# With fewer quiet rounds than this there is no verdict, and all rounds count.
FEWEST_QUIET_ROUNDS = 8

Milliseconds = NDArray[np.float64]


@dataclass(frozen=True)
class Samples:
    """Milliseconds per call of each contender, round by round, measured in turn.

    On a busy machine a call also waits for a processor, and the Linux kernel counts how long
    (``/proc/self/task/*/schedstat``). With one thread this wait is subtracted, but not below the
    processor time of the call: a runtime may have its own threads, of which one waits while another
    works. With several threads it cannot be subtracted. Then rounds with a wait are left out if
    enough others remain; otherwise all rounds count and are reported as disturbed.

    Attributes:
        ms: An array of shape ``(rounds,)`` for each contender.
        device: Where they ran.
        threads: Torch's number of threads.
        waited: Share of the time that a thread waited for a processor, in the same shapes; empty
            if the system does not report it.
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
        """Whether these contenders' measurements are too disturbed for a verdict."""
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

    def ratio(
        self, slow: str, fast: str, *, looks: int = 1, together: int = 1, seed: int = 0
    ) -> Ratio:
        """Return how many times faster ``fast`` is than ``slow``, paired round by round.

        Args:
            slow: The contender in the numerator.
            fast: The contender in the denominator.
            looks: How often, at most, a ratio decides whether more rounds follow.
            together: How many ratios are read together.
            seed: Random seed of the resampling.
        """
        kept = self.quiet(slow, fast)
        return ratio_of(
            self.ms[slow][kept], self.ms[fast][kept], looks=looks, together=together, seed=seed
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
    """Time callables in turn: A B, B A, A B, … so that a drift of the machine affects all alike.

    Before each sample its callable runs once without timing. This removes the effect of the
    previous callable on the caches, and of its threads that still spin. For callables of
    ``LONG_MS`` or more the effect is negligible: they get one call for warm-up, and every other
    call is timed.

    Callables of similar duration get the same number of calls per sample. The first call of a
    sample takes longer, because the kernel's counters were just read; its weight must be the same
    in all.

    Args:
        callables: The contenders, by name.
        rounds: Samples of each; fewer if :mod:`onebyone.core.rounds` sets a limit.
        warmup: Calls of each before the first sample.
        device: ``cpu``, or a CUDA device, which is synchronized before the clock is read.
        seconds: Stop after the first round that ends later than this, if there were 3.

    Raises:
        OptionError: If there are fewer than 3 rounds or nothing to time.
    """
    if rounds < 3 or not callables:
        raise OptionError(f"`rounds` must be 3 or more with something to time, got {rounds}.")
    rounds = limited(rounds)
    names = list(callables)
    samples: dict[str, list[_Sample]] = {name: [] for name in names}
    with _quiet_interpreter():
        paces = _paces({name: _first_ms(callables[name], warmup, device) for name in names})
        started = time.monotonic()
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                samples[name].append(_sampled(callables[name], paces[name], device))
            if seconds is not None and turn >= 2 and time.monotonic() - started > seconds:
                break
    return _collected(samples, device)


class _Sample(NamedTuple):
    """Milliseconds per call: wall time, wait for a processor, and processor time."""

    wall: float
    delay: float
    cpu: float


def _own_ms(wall: Milliseconds, delay: Milliseconds, cpu: Milliseconds) -> Milliseconds:
    """Return the wall time; with one thread, minus the wait for a processor."""
    if torch.get_num_threads() > 1 or np.isnan(delay).any():
        return wall
    return np.minimum(np.maximum(wall - delay, cpu), wall)


def _collected(samples: Mapping[str, list[_Sample]], device: str) -> Samples:
    threads = torch.get_num_threads()
    ms: dict[str, Milliseconds] = {}
    waited: dict[str, Milliseconds] = {}
    for name, each in samples.items():
        wall, delay, cpu = np.array(each).T
        ms[name], waited[name] = _own_ms(wall, delay, cpu), delay / np.maximum(wall, 1e-9)
    told = not any(np.isnan(values).any() for values in waited.values())
    return Samples(ms=ms, device=device, threads=threads, waited=waited if told else {})


@dataclass(frozen=True)
class _Pace:
    """How to take a sample: the number of calls, and whether an untimed call comes first."""

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
    # When a thread ends, its count disappears, so the difference may be negative.
    delay = max(run_delay_ns(tasks) - delayed, 0.0)
    return _Sample(*(ns / pace.calls / 1e6 for ns in (wall, delay, cpu)))


def run_delay_ns(tasks: str = "*") -> float:
    """Return how long this process's threads waited for a processor; NaN if not available.

    It is the sum over threads of the second number in ``schedstat``, in nanoseconds (Linux
    kernel, Documentation/scheduler/sched-stats.rst).

    Args:
        tasks: Which threads, as a pattern of their numbers; default: all.
    """
    total, told = 0, False
    for file in _TASKS.glob(f"{tasks}/schedstat"):
        try:
            total += int(file.read_bytes().split()[1])
            told = True
        except (OSError, ValueError, IndexError):
            continue  # the thread has ended
    return total if told else float("nan")


_TASKS = Path("/proc/self/task")


def _tasks_of(device: str) -> str:
    """Return a pattern of the threads whose wait for a processor delays a call."""
    # Only this thread launches work on a GPU. Reading the counts of the hundred other threads of
    # CUDA and torch would take longer than the calls themselves.
    return str(threading.get_native_id()) if device.startswith("cuda") else "*"


def _first_ms(function: Callable[[], object], warmup: int, device: str) -> float:
    """Warm a callable up, and return roughly how long it takes."""
    function()
    _wait_for(device)
    if limit() is not None:
        return LONG_MS
    first = _least_ms([_sampled(function, _Pace(settled=False), device)])
    if first >= LONG_MS:
        return first
    for _ in range(warmup - 2):
        function()
    _wait_for(device)
    return _least_ms([_sampled(function, _Pace(), device) for _ in range(3)])


def _least_ms(samples: list[_Sample]) -> float:
    return float(_own_ms(*np.array(samples).T).min())


def _paces(first_ms: Mapping[str, float]) -> dict[str, _Pace]:
    """Return the pace of each callable that makes its samples long enough for the clock.

    Callables of similar duration get the same pace, even if a limit lies between them.
    """
    fastest = max(min(first_ms.values()), 1e-6)
    wanted = min(math.ceil(SAMPLE_MS / fastest), MAX_CALLS_A_SAMPLE)
    long_ms = LONG_MS if fastest >= LONG_MS else 2 * LONG_MS
    return {
        name: _Pace(
            calls=max(1, min(wanted, int(MOST_SAMPLE_MS / max(ms, 1e-6)))), settled=ms < long_ms
        )
        for name, ms in first_ms.items()
    }


def _wait_for(device: str) -> None:
    # A CUDA call returns before its work is done, so the clock must wait for it.
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class _Cleaner:
    """Collects garbage, which may hold the memory of prepared networks, in a small share of time.

    A collection looks at every object of the process: beside torch it takes longer than most
    measurements, of which a plan makes hundreds.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._not_before = -math.inf

    def collect(self) -> None:
        """Collect, unless the last collection was only just."""
        started = time.perf_counter()
        if started < self._not_before:
            return
        gc.collect()
        ended = time.perf_counter()
        self._not_before = ended + (ended - started) / self._share


_cleaner = _Cleaner(share=0.05)


@contextmanager
def _no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    _cleaner.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


#: Turns off the garbage collector, so that it never runs during a sample.
_quiet_interpreter = SharedChange(_no_collector)


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Set torch's number of threads in this context and restore it afterwards; ``None`` keeps it.

    The number belongs to the whole process. If two Python threads are in this context at once, the
    last one to enter sets the number, and the last one to leave restores the original.
    """
    if count is not None and count < 1:
        raise OptionError(f"`threads` must be 1 or more, got {count}.")
    with _GUARD:
        before = torch.get_num_threads()
        _KEPT.append(before)
        if count is not None:
            torch.set_num_threads(count)
        asked = torch.get_num_threads()
    try:
        yield asked
    finally:
        with _GUARD:
            torch.set_num_threads(before if len(_KEPT) > 1 else _KEPT[0])
            # The first is the original number, from before any thread entered.
            _KEPT.pop()


_GUARD = threading.Lock()
_KEPT: list[int] = []
