"""Records of the machine, and of times on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onebyone.core.errors import RecordError
from onebyone.core.fields import Amount, Positive, Whole
from onebyone.core.records.base import Record, in_order
from onebyone.core.units import format_ms, format_ratio, plural


@dataclass(frozen=True, kw_only=True)
class Machine(Record):
    """Where numbers were obtained."""

    processor: str
    cores: Whole
    threads: Whole
    device: str
    system: str
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.threads} of {self.cores} cores, {self.device}, "
            f"torch {self.versions.get('torch', '?')}"
        )


@dataclass(frozen=True, kw_only=True)
class Timing(Record):
    """Milliseconds of one call, over repeated calls after a warm-up.

    Attributes:
        repeats: Samples that the median and the quartiles are of.
        disturbed: Whether the spread, or the wait for a processor, was too large for a verdict.
        waited: Share of the time in which a thread was ready but had no processor, the median of
            all samples; ``None`` where the system does not tell. With one thread it is subtracted.
    """

    runtime: str
    device: str
    threads: Whole
    batch: Whole
    repeats: Whole
    median_ms: Amount
    q1_ms: Amount
    q3_ms: Amount
    disturbed: bool = False
    waited: Amount | None = None

    def check(self) -> None:
        """Check that the quartiles are in order."""
        in_order("q1_ms", self.q1_ms, "q3_ms", self.q3_ms)

    def __str__(self) -> str:
        return f"{format_ms(self.median_ms)} [{format_ms(self.q1_ms)}–{format_ms(self.q3_ms)}]"

    @property
    def conditions(self) -> str:
        """How the figure was obtained, in words."""
        return (
            f"{self.runtime}, {self.device}, {plural(self.threads, 'thread')}, "
            f"batch {self.batch}, median of {self.repeats}"
        )


@dataclass(frozen=True, kw_only=True)
class Ratio(Record):
    """How many times faster: paired, interleaved rounds, with a block bootstrap interval.

    Attributes:
        value: Median over rounds of time before / time after.
        low: Lower end of the 95 % interval of that median.
        high: Upper end.
        rounds: Number of interleaved rounds.
        looks: How often at most such an interval decided whether to measure more: it is wide
            enough for all of them together.
        together: How many such intervals are read together; likewise.
    """

    value: Positive
    low: Positive
    high: Positive
    rounds: Whole
    looks: Whole = 1
    together: Whole = 1

    def check(self) -> None:
        """Check that the interval's ends are in order."""
        in_order("low", self.low, "high", self.high)

    def __str__(self) -> str:
        return f"{format_ratio(self.value)} [{self.low:.2f}–{self.high:.2f}]"

    @property
    def change(self) -> str:
        """With the verdict: ``1.84× [1.79–1.89] faster``, ``1.39× [1.32–1.49] slower``."""
        if self.verdict == "slower":
            return f"{format_ratio(1 / self.value)} [{1 / self.high:.2f}–{1 / self.low:.2f}] slower"
        return f"{self} {self.verdict}"

    @property
    def verdict(self) -> str:
        """``faster``, ``slower``, or ``no difference shown``: this alone decides what is said."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference shown"


def timed_in(name: str, latency: Mapping[Any, Timing | Ratio], keys: Iterable[object]) -> None:
    """Check that there is a time, or a ratio, in each runtime or batch size.

    Raises:
        RecordError: If one is missing.
    """
    missing = [key for key in keys if key not in latency]
    if missing:
        raise RecordError(f"`{name}` must have a time in {missing[0]!r}, got {list(latency)}.")
