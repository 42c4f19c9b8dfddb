"""The record of two networks on the same data and machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onebyone.core.records.base import FORMAT, Record
from onebyone.core.records.inputs import InputSpec
from onebyone.core.records.measured import Difference, Measured, Metric, TaskInfo
from onebyone.core.records.profile import Subnormals, subnormal_notes
from onebyone.core.records.timing import Machine, Ratio, Timing, timed_in
from onebyone.core.tables import Table
from onebyone.core.units import (
    format_bytes,
    format_count,
    format_ms,
    format_percent,
    format_points,
    format_ratio,
    plural,
)


@dataclass(frozen=True, kw_only=True)
class Comparison(Record):
    """Two networks on the same test examples and on the same machine, interleaved.

    Attributes:
        agreement: Share of examples with the same prediction; ``None`` unless classifiers.
        divergence: Mean divergence of the outputs, in what the task measures it in.
        latency_ratio: By runtime, time before / time after: above 1 is faster.
        inputs: The timed inputs, with the batch.
        task: What the outputs were taken to mean; ``None`` without data.
        subnormals: The weights of each that were set to zero while both were timed.
        made_elsewhere: For int8 files, how the processors that they were made on differ from this
            one.
    """

    before: Measured
    after: Measured
    inputs: InputSpec
    latency_ratio: Mapping[str, Ratio]
    difference: Difference | None = None
    agreement: Metric | None = None
    divergence: float | None = None
    machine: Machine | None = None
    names: tuple[str, str] = ("before", "after")
    task: TaskInfo | None = None
    subnormals: tuple[Subnormals | None, Subnormals | None] = (None, None)
    made_elsewhere: tuple[str, str] = ("", "")
    format: int = FORMAT

    def check(self) -> None:
        """Check that both networks were timed in each runtime that there is a ratio for."""
        for name, measured in (("before", self.before), ("after", self.after)):
            timed_in(f"{name}.latency", measured.latency, self.latency_ratio)

    def table(self) -> Table:
        """Return before, after and how they compare, a quantity a line."""
        rows = [
            _count_row("params", self.before.params, self.after.params, format_count),
            _count_row("MACs", self.before.macs, self.after.macs, format_count),
            _count_row("weights", self.before.file_bytes, self.after.file_bytes, format_bytes),
        ]
        peaks = self.before.peak_activation_bytes, self.after.peak_activation_bytes
        if peaks[0] is not None and peaks[1] is not None:
            rows.append(_count_row("activations, peak", peaks[0], peaks[1], format_bytes))
        for runtime, ratio in self.latency_ratio.items():
            first, second = self.before.latency[runtime], self.after.latency[runtime]
            rows.append(
                [
                    f"latency, {runtime}",
                    format_ms(first.median_ms),
                    format_ms(second.median_ms),
                    f"{ratio} disturbed" if self.disturbed(runtime) else ratio.change,
                ]
            )
        rows += self._metric_rows()
        timing = next(iter(self.before.latency.values()), None)
        notes = (
            [f"Ratios of latency: {_latency_note(timing, self.latency_ratio)}"] if timing else []
        )
        if any(self.disturbed(runtime) for runtime in self.latency_ratio):
            notes.append(
                "Disturbed: other programs ran meanwhile, and times varied too much for a verdict."
            )
        notes += subnormal_notes(zip(self.names, self.subnormals, strict=True))
        if self.difference is not None:
            notes.append(
                f"{self.difference.test}: p = {self.difference.p_value:.2g} "
                f"({self.difference.n:,} test examples)."
            )
        if self.divergence is not None and self.task is not None:
            notes.append(f"Divergence: {self.task.divergence}. {self.task}")
        pairs = zip(self.names, self.made_elsewhere, strict=True)
        notes += [f"{name}: {said}" for name, said in pairs if said]
        if self.machine is not None:
            notes.append(f"{self.machine}.")
        return Table(
            columns=("", f">{self.names[0]}", f">{self.names[1]}", "change"),
            rows=rows,
            title="Measured",
            notes=notes,
        )

    def disturbed(self, runtime: str) -> bool:
        """Whether either timing spread too widely for a verdict on speed."""
        timings = (self.before.latency.get(runtime), self.after.latency.get(runtime))
        return any(timing.disturbed for timing in timings if timing is not None)

    def _metric_rows(self) -> list[list[str]]:
        rows = []
        first, second = self.before.metric, self.after.metric
        if first is not None and second is not None:
            rows.append(
                [f"test {first.name}", _value(first), _value(second), self._difference_text(first)]
            )
        train_first, train_second = self.before.train_metric, self.after.train_metric
        if train_first is not None and train_second is not None:
            rows.append(
                [f"train {train_first.name}", _value(train_first), _value(train_second), ""]
            )
        gaps = self.before.generalization_gap, self.after.generalization_gap
        if gaps[0] is not None and gaps[1] is not None and first is not None and first.is_fraction:
            rows.append(["gap, points", format_points(gaps[0]), format_points(gaps[1]), ""])
        errors = self.before.calibration_error, self.after.calibration_error
        if errors[0] is not None and errors[1] is not None:
            rows.append(["calibration error", f"{errors[0]:.4f}", f"{errors[1]:.4f}", ""])
        if self.agreement is not None:
            rows.append(["agreement", "", _value(self.agreement), ""])
        if self.divergence is not None:
            rows.append(["divergence", "", f"{self.divergence:.4g}", ""])
        return rows

    def _difference_text(self, metric: Metric) -> str:
        if self.difference is None:
            return ""
        if metric.is_fraction:
            low, high = format_points(self.difference.low), format_points(self.difference.high)
            return f"{format_points(self.difference.value)} points [{low} … {high}]"
        difference = self.difference
        return f"{difference.value:+.4g} [{difference.low:+.4g} … {difference.high:+.4g}]"

    def __str__(self) -> str:
        return str(self.table())


def _count_row(name: str, before: int, after: int, form: Any) -> list[str]:
    change = "the same"
    if after < before and after:
        change = f"{format_ratio(before / after)} smaller"
    elif after > before and before:
        change = f"{format_ratio(after / before)} larger"
    return [name, form(before), form(after), change]


def _latency_note(timing: Timing, ratios: Mapping[str, Ratio]) -> str:
    rounds = next(iter(ratios.values())).rounds if ratios else timing.repeats
    return (
        f"{rounds} interleaved rounds after a warm-up, {timing.device}, "
        f"{plural(timing.threads, 'thread')}, batch {timing.batch}, block bootstrap 95 % interval."
    )


def _value(metric: Metric) -> str:
    return format_percent(metric.value, 2) if metric.is_fraction else f"{metric.value:.4g}"
