"""The results of several runs: the figures of their verdicts, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from onebyone.core.records import Difference, Metric, Ratio, Record, RunRecord, State
from onebyone.core.tables import Table
from onebyone.report.section_verdict import metric_value, signed, verdict

_NONE = "–"


@dataclass(frozen=True, kw_only=True)
class RunSummary(Record):
    """The result of a run.

    Attributes:
        verdict: The report's sentence.
        budgets: The budgets as given.
        params_ratio: Parameters before / after; above 1 is smaller. The next two are alike.
        latency_ratio: For each runtime, time before / time after.
        disturbed: Runtimes whose timings vary too much for a verdict.
        metric: The metric of the rewritten or trained network on the test data.
        difference: The metric after minus before.
    """

    name: str
    network: str
    state: State
    verdict: str
    budgets: tuple[str, ...] = ()
    params_ratio: float | None = None
    macs_ratio: float | None = None
    file_ratio: float | None = None
    latency_ratio: Mapping[str, Ratio] | None = None
    disturbed: tuple[str, ...] = ()
    metric: Metric | None = None
    difference: Difference | None = None
    agreement: Metric | None = None


@dataclass(frozen=True, kw_only=True)
class Summary(Record):
    """The results of several runs."""

    runs: tuple[RunSummary, ...]

    def table(self) -> Table:
        """Return a table with a row for each run."""
        rows = [
            [
                run.name,
                _speed_text(run),
                _NONE if run.file_ratio is None else f"{run.file_ratio:.2f}×",
                _NONE if run.metric is None else metric_value(run.metric),
                _NONE
                if run.difference is None or run.metric is None
                else signed(run.difference.value, run.metric, unit=False),
                _NONE if run.agreement is None else metric_value(run.agreement),
            ]
            for run in self.runs
        ]
        name = next((run.metric.name for run in self.runs if run.metric), "metric")
        return Table(
            columns=("run", ">speed", ">smaller", f">{name}", ">change", ">agrees"),
            rows=rows,
            title="Runs",
            notes=[f"{run.name}: {run.verdict}" for run in self.runs],
        )


def summarize(records: Mapping[str, RunRecord]) -> Summary:
    """Return the result of each run, in the given order.

    Args:
        records: The record of each run by its name.
    """
    return Summary(runs=tuple(_summary(name, record) for name, record in records.items()))


def _summary(name: str, record: RunRecord) -> RunSummary:
    comparison = record.comparison
    alone = RunSummary(
        name=name,
        network=record.source.name,
        state=record.status.state,
        verdict=verdict(record).sentence,
        budgets=tuple(budget.asked for budget in record.plan.budgets) if record.plan else (),
        metric=record.after.metric if record.after else None,
    )
    if comparison is None:
        return alone
    before, after = comparison.before, comparison.after
    return replace(
        alone,
        params_ratio=_ratio(before.params, after.params),
        macs_ratio=_ratio(before.macs, after.macs),
        file_ratio=_ratio(before.file_bytes, after.file_bytes),
        latency_ratio=comparison.latency_ratio,
        disturbed=tuple(name for name in comparison.latency_ratio if comparison.disturbed(name)),
        metric=after.metric,
        difference=comparison.difference,
        agreement=comparison.agreement,
    )


def _ratio(before: int, after: int) -> float | None:
    return before / after if after else None


def _speed_text(run: RunSummary) -> str:
    runtime, ratio = next(iter((run.latency_ratio or {}).items()), (None, None))
    if ratio is None:
        return _NONE
    return "disturbed" if runtime in run.disturbed else str(ratio)
