"""Honest timing: interleaved rounds, warm-up, synchronization, quartiles, bootstrap intervals."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from onebyone.errors import OptionError
from onebyone.records import Ratio, Timing

# A sample shorter than this is mostly clock and dispatch noise: short calls are repeated in it.
SAMPLE_MS = 2.0
# Half the samples outside ±12 % of the median: something else was running.
DISTURBED_SPREAD = 0.25
MAX_CALLS_A_SAMPLE = 1000


@dataclass(frozen=True)
class Samples:
    """Milliseconds a call of each contender, round by round, measured in turn.

    Attributes:
        ms: An array of shape ``(rounds,)`` for each contender.
    """

    ms: Mapping[str, NDArray[np.float64]]
    device: str
    threads: int

    def timing(self, name: str, *, runtime: str, batch: int) -> Timing:
        """Return the median and the quartiles of one contender."""
        samples = self.ms[name]
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
            disturbed=(q3 - q1) > DISTURBED_SPREAD * median,
        )

    def ratio(self, slow: str, fast: str, *, seed: int = 0, resamples: int = 2000) -> Ratio:
        """Return how many times faster ``fast`` is than ``slow``, paired round by round."""
        ratios = self.ms[slow] / self.ms[fast]
        rng = np.random.default_rng(seed)
        picks = rng.integers(0, len(ratios), size=(resamples, len(ratios)))
        low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
        return Ratio(
            value=float(np.median(ratios)), low=float(low), high=float(high), rounds=len(ratios)
        )


def interleave(
    callables: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 3,
    device: str = "cpu",
) -> Samples:
    """Time callables in turn: A B, B A, A B, … so that a drift of the machine hits all alike.

    Args:
        callables: What to time, by name.
        rounds: Samples of each.
        warmup: Calls of each before the first sample.
        device: ``cpu``, or a CUDA device, which is then waited for.

    Raises:
        OptionError: If there are fewer than 3 rounds or nothing to time.
    """
    if rounds < 3 or not callables:
        raise OptionError(f"`rounds` must be 3 or more with something to time, got {rounds}.")
    wait = _waiter(device)
    names = list(callables)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _quiet_interpreter():
        calls = {name: _calibrated(callables[name], warmup, wait) for name in names}
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                samples[name].append(_sample(callables[name], calls[name], wait))
    return Samples(
        ms={name: np.asarray(values) for name, values in samples.items()},
        device=device,
        threads=torch.get_num_threads(),
    )


def _sample(function: Callable[[], object], calls: int, wait: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        function()
    wait()
    return (time.perf_counter_ns() - start) / calls / 1e6


def _calibrated(function: Callable[[], object], warmup: int, wait: Callable[[], None]) -> int:
    """Warm up, and return how many calls make a sample long enough for the clock."""
    for _ in range(max(warmup, 1)):
        function()
    wait()
    once = min(_sample(function, 1, wait) for _ in range(3))
    return int(np.clip(np.ceil(SAMPLE_MS / max(once, 1e-6)), 1, MAX_CALLS_A_SAMPLE))


def _waiter(device: str) -> Callable[[], None]:
    # A CUDA call returns before its work is done; the clock must not be read until it is.
    if device.startswith("cuda"):
        return torch.cuda.synchronize
    return lambda: None


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
