"""The record of a comparison: several networks on the same data and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onebyone.core.errors import RecordError
from onebyone.core.fields import Whole
from onebyone.core.records import (
    Comparison,
    DataInfo,
    Difference,
    InputSpec,
    Machine,
    Measured,
    Metric,
    ModelSource,
    Ratio,
    Record,
    Subnormals,
    TaskInfo,
    subnormal_notes,
    timed_in,
)
from onebyone.core.tables import Table
from onebyone.core.units import (
    format_bytes,
    format_count,
    format_ms,
    format_percent,
    format_points,
    format_ratio,
)

FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class Contender(Record):
    """A network in a comparison, with its differences from the first network.

    Attributes:
        latency_ratio: For each runtime, the first network's time divided by this one's, round by
            round. Above 1 is faster.
        difference: This network's metric minus the first's, on the same examples.
        agreement: Share of examples with the first's prediction; ``None`` unless classifiers.
        divergence: Mean divergence of its outputs from the first's.
        subnormals: Its subnormal weights, which were set to zero for the timing.
        made_elsewhere: For an int8 file, how the processor that it was made on differs from this
            one; empty where it does not, or where that is not known.
    """

    name: str
    measured: Measured
    source: ModelSource | None = None
    latency_ratio: Mapping[str, Ratio] = field(default_factory=dict)
    difference: Difference | None = None
    agreement: Metric | None = None
    divergence: float | None = None
    subnormals: Subnormals | None = None
    made_elsewhere: str = ""


@dataclass(frozen=True, kw_only=True)
class Compared(Record):
    """Networks on the same test examples, and timed in the same interleaved rounds.

    Attributes:
        contenders: Two or more.
        inputs: The timed inputs, with the batch.
        rounds: Rounds of timing. In each round every network is timed once in each runtime.
        task: The task of the outputs; ``None`` without data.
    """

    contenders: tuple[Contender, ...]
    inputs: InputSpec
    rounds: Whole
    machine: Machine
    onebyone: str
    created: str
    data: DataInfo | None = None
    command: tuple[str, ...] = ()
    task: TaskInfo | None = None
    format: int = FORMAT

    def check(self) -> None:
        """Check that there are at least two networks, each timed and compared in each runtime.

        Raises:
            RecordError: If there are fewer, or one has no time or ratio.
        """
        if len(self.contenders) < 2:
            raise RecordError(
                f"`contenders` must be two networks or more, got {len(self.contenders)}."
            )
        for each in self.others:
            timed_in(f"latency of {each.name}", each.measured.latency, self.runtimes)
            timed_in(f"latency_ratio of {each.name}", each.latency_ratio, self.runtimes)
            timed_in(
                f"latency of {self.first.name}", self.first.measured.latency, each.latency_ratio
            )

    @property
    def first(self) -> Contender:
        """The network that the others are compared with."""
        return self.contenders[0]

    @property
    def others(self) -> tuple[Contender, ...]:
        """The networks that are compared with the first."""
        return self.contenders[1:]

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The runtimes in which the networks were timed."""
        return tuple(self.first.measured.latency)

    def pair(self, place: int = 1) -> Comparison:
        """Return the comparison of the first network with another one.

        Args:
            place: Position of the other one.
        """
        other = self.contenders[place]
        return Comparison(
            before=self.first.measured,
            after=other.measured,
            inputs=self.inputs,
            latency_ratio=other.latency_ratio,
            difference=other.difference,
            agreement=other.agreement,
            divergence=other.divergence,
            machine=self.machine,
            names=(self.first.name, other.name),
            task=self.task,
            subnormals=(self.first.subnormals, other.subnormals),
            made_elsewhere=(self.first.made_elsewhere, other.made_elsewhere),
        )

    def p_values(self) -> tuple[float | None, ...]:
        """Return the p-value of each network's difference from the first, after Holm (1979).

        With several networks, one may differ by chance. Holm's method keeps the probability of
        any false finding at the level of a single test.
        """
        raw = [each.difference.p_value if each.difference else None for each in self.others]
        known = sorted((value, place) for place, value in enumerate(raw) if value is not None)
        adjusted: list[float | None] = [None] * len(raw)
        highest = 0.0
        for rank, (value, place) in enumerate(known):
            highest = max(highest, min(1.0, value * (len(known) - rank)))
            adjusted[place] = highest
        return tuple(adjusted)

    def disturbed(self, other: Contender, runtime: str) -> bool:
        """Whether either timing varies too much for a verdict on speed."""
        timings = (self.first.measured.latency[runtime], other.measured.latency[runtime])
        return any(timing.disturbed for timing in timings)

    def tables(self) -> tuple[Table, ...]:
        """Return tables of costs, scores and times; two networks are shown side by side."""
        if len(self.contenders) == 2:
            return (self.pair().table(),)
        scored = self.first.measured.metric is not None
        parts = [self._cost_table(), self._score_table() if scored else None, self._time_table()]
        return tuple(part for part in parts if part is not None)

    def __str__(self) -> str:
        return "\n\n".join(str(table) for table in self.tables())

    def _cost_table(self) -> Table:
        rows = [
            [
                each.name,
                format_count(each.measured.params),
                format_count(each.measured.macs),
                format_bytes(each.measured.file_bytes),
            ]
            for each in self.contenders
        ]
        return Table(columns=("network", ">params", ">MACs", ">weights"), rows=rows, title="Cost")

    def _score_table(self) -> Table:
        rows = []
        for each, p_value in zip(self.contenders, (None, *self.p_values()), strict=True):
            metric = each.measured.metric
            difference, interval = "", ""
            if each.difference is not None and metric is not None:
                difference = signed(each.difference.value, metric)
                interval = interval_text(each.difference, metric)
            rows.append(
                [
                    each.name,
                    "–" if metric is None else metric_text(metric),
                    difference,
                    interval,
                    "" if p_value is None else f"{p_value:.2g}",
                    "" if each.agreement is None else format_percent(each.agreement.value, 2),
                    "" if each.divergence is None else f"{each.divergence:.3g}",
                ]
            )
        metric = self.first.measured.metric
        name = "score" if metric is None else metric.name
        unit = "points" if metric is not None and metric.is_fraction else "difference"
        columns = ["network", f">{name}", f">{unit}", ">95 %", ">p", ">agrees", ">apart"]
        if not any(each.agreement is not None for each in self.contenders):
            columns.pop(5)
            rows = [[*row[:5], row[6]] for row in rows]
        notes = [self.score_note(), f"Apart: {self.divergence_note()}"]
        others = (each for each in self.contenders if each.made_elsewhere)
        notes += [f"{each.name}: {each.made_elsewhere}" for each in others]
        return Table(columns=tuple(columns), rows=rows, title=f"Test {name}", notes=notes)

    def score_note(self) -> str:
        """Return a note on how differences of scores were tested."""
        difference = next((each.difference for each in self.others if each.difference), None)
        if difference is None:
            return ""
        holm = ", Holm-adjusted" if len(self.others) > 1 else ""
        return (
            f"Differences from {self.first.name} on the same {difference.n:,} test examples: "
            f"{difference.test}; p{holm}."
        )

    def divergence_note(self) -> str:
        """Return a note on what the divergence is."""
        measured_in = "" if self.task is None else f", {self.task.divergence}. {self.task}"
        note = f"mean divergence of the outputs from those of {self.first.name}{measured_in}"
        return note if note.endswith(".") else f"{note}."

    def _time_table(self) -> Table | None:
        rows = []
        for runtime in self.runtimes:
            for each in self.contenders:
                timing = each.measured.latency[runtime]
                ratio = each.latency_ratio.get(runtime)
                rows.append(
                    [
                        each.name,
                        runtime,
                        format_ms(timing.median_ms),
                        f"{format_ms(timing.q1_ms)}–{format_ms(timing.q3_ms)}",
                        "" if ratio is None else f"{_figure(ratio.value)}×",
                        "" if ratio is None else f"{_figure(ratio.low)}–{_figure(ratio.high)}",
                        "" if ratio is None else self.speed_verdict(each, runtime),
                    ]
                )
        if not rows:
            return None
        return Table(
            columns=("network", "runtime", ">median", ">quartiles", ">faster", ">95 %", "verdict"),
            rows=rows,
            title="Latency",
            notes=[self.time_note(), *self.subnormal_notes(), f"{self.machine}."],
        )

    def subnormal_notes(self) -> list[str]:
        """Return notes on networks timed without their subnormal weights, and the effect."""
        return subnormal_notes((each.name, each.subnormals) for each in self.contenders)

    def speed_verdict(self, other: Contender, runtime: str) -> str:
        """Return the verdict on a network's speed compared with the first."""
        if self.disturbed(other, runtime):
            return "disturbed"
        verdict = other.latency_ratio[runtime].verdict
        return "none shown" if verdict == "no difference shown" else verdict

    def time_note(self) -> str:
        """Return a note on how times were measured."""
        timing = next(iter(self.first.measured.latency.values()))
        threads = "1 thread" if timing.threads == 1 else f"{timing.threads} threads"
        several = ", which hold together" if len(self.others) > 1 else ""
        return (
            f"{self.rounds} rounds, each with all networks in turn, after a warm-up; "
            f"{timing.device}, {threads}, batch {timing.batch}. How many times faster than "
            f"{self.first.name}: round by round, with block bootstrap 95 % "
            f"intervals{several}."
        )


def _figure(ratio: float) -> str:
    """Return a ratio with two decimals; below 0.1 with two significant digits."""
    return format_ratio(ratio).removesuffix("×") if ratio >= 0.1 else f"{ratio:.2g}"


def metric_text(metric: Metric) -> str:
    """Return a metric's value as text."""
    return format_percent(metric.value, 2) if metric.is_fraction else f"{metric.value:.4g}"


def signed(value: float, metric: Metric) -> str:
    """Return a difference with its sign, in percentage points if the metric is a share."""
    return format_points(value) if metric.is_fraction else f"{value:+.4g}".replace("-", "−")


def interval_text(difference: Difference, metric: Metric) -> str:
    """Return the 95 % interval of a difference, in percentage points if the metric is a share."""
    return f"{signed(difference.low, metric)} … {signed(difference.high, metric)}"


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return unique names: a second ``net`` becomes ``net (2)``."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(result)
