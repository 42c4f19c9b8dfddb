"""The figures of a sweep, a row for each trial: as comma-separated values, and as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

from onebyone.core.records import (
    Comparison,
    Measured,
    Metric,
    RunRecord,
    SweepRecord,
    SweepTrial,
    Timing,
)
from onebyone.core.tables import Table
from onebyone.core.units import format_percent, plural
from onebyone.report.section_verdict import metric_value, signed

_NONE = "–"
Cells = dict[str, object]


def csv_of(sweep: SweepRecord, runs: Mapping[str, RunRecord]) -> str:
    """Return a line for each trial, with its figures where it finished.

    Args:
        sweep: Its trials, in the order of the lines.
        runs: The records of the finished runs by name.
    """
    rows = [row_of(trial, runs.get(trial.name)) for trial in sweep.trials]
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def row_of(trial: SweepTrial, run: RunRecord | None) -> Cells:
    """Return the cells of a trial by the name of their column; an unknown value is empty."""
    row: Cells = {
        "trial": trial.name,
        "network": trial.network,
        "data": trial.data,
        "budget": trial.budget,
        "runtime": trial.runtime,
        "seed": trial.seed,
        "precision": trial.precision,
        "effort": trial.effort,
        "status": trial.state,
        "error": " ".join(trial.error.split()),
    }
    comparison = None if run is None else run.comparison
    before, after = (comparison.before, comparison.after) if comparison else (None, None)
    row |= _timed(comparison, trial.runtime)
    row |= _costs("before", before) | _costs("after", after)
    row["metric"] = after.metric.name if after and after.metric else None
    row |= _score("score_before", before.metric if before else None)
    row |= _score("score_after", after.metric if after else None)
    difference = comparison.difference if comparison else None
    row["score_change"] = difference.value if difference else None
    row["score_change_low"] = difference.low if difference else None
    row["score_change_high"] = difference.high if difference else None
    agreement = comparison.agreement if comparison else None
    row["agreement"] = agreement.value if agreement else None
    row["divergence"] = comparison.divergence if comparison else None
    row |= {"seconds": trial.seconds, "starts": trial.starts, "host": trial.host}
    return row | _machine(run, trial.runtime)


def _timed(comparison: Comparison | None, runtime: str) -> Cells:
    times = {"before": comparison.before, "after": comparison.after} if comparison else {}
    cells: Cells = {}
    for name in ("before", "after"):
        timing = times[name].latency.get(runtime) if times else None
        cells |= _time(f"latency_{name}", timing)
    ratio = comparison.latency_ratio.get(runtime) if comparison else None
    cells["speed_up"] = ratio.value if ratio else None
    cells["speed_up_low"] = ratio.low if ratio else None
    cells["speed_up_high"] = ratio.high if ratio else None
    cells["disturbed"] = comparison.disturbed(runtime) if comparison else None
    return cells


def _time(name: str, timing: Timing | None) -> Cells:
    return {
        f"{name}_ms": timing.median_ms if timing else None,
        f"{name}_q1_ms": timing.q1_ms if timing else None,
        f"{name}_q3_ms": timing.q3_ms if timing else None,
    }


def _costs(name: str, measured: Measured | None) -> Cells:
    return {
        f"macs_{name}": measured.macs if measured else None,
        f"params_{name}": measured.params if measured else None,
        f"file_bytes_{name}": measured.file_bytes if measured else None,
    }


def _score(name: str, metric: Metric | None) -> Cells:
    return {
        name: metric.value if metric else None,
        f"{name}_low": metric.low if metric else None,
        f"{name}_high": metric.high if metric else None,
    }


def _machine(run: RunRecord | None, runtime: str) -> Cells:
    timing = run.comparison.after.latency.get(runtime) if run and run.comparison else None
    return {
        "processor": run.machine.processor if run else None,
        "cores": run.machine.cores if run else None,
        "device": timing.device if timing else None,
        "threads": timing.threads if timing else None,
        "batch": timing.batch if timing else None,
    }


def table_of(sweep: SweepRecord, runs: Mapping[str, RunRecord]) -> Table:
    """Return a table with a row for each trial.

    Args:
        sweep: Its trials, in the order of the rows.
        runs: The records of the finished runs by name.
    """
    rows = [[trial.name, *_shown(trial, runs.get(trial.name))] for trial in sweep.trials]
    metrics = (run.after.metric for run in runs.values() if run.after and run.after.metric)
    name = next((metric.name for metric in metrics), "score")
    notes = [
        f"{trial.name} failed: {trial.error}" for trial in sweep.trials if trial.state == "failed"
    ]
    finished = sweep.counted("finished")
    return Table(
        columns=("trial", ">faster", ">MACs", f">{name}", ">change"),
        rows=rows,
        title=f"{finished} of {plural(len(sweep.trials), 'trial')} finished",
        notes=notes,
    )


def _shown(trial: SweepTrial, run: RunRecord | None) -> list[str]:
    comparison = None if run is None else run.comparison
    if comparison is None:
        return [trial.state, _NONE, _NONE, _NONE]
    ratio = comparison.latency_ratio.get(trial.runtime)
    speed = _NONE if ratio is None else f"{ratio.value:.2f}× [{ratio.low:.2f}–{ratio.high:.2f}]"
    before, after = comparison.before, comparison.after
    metric, difference = after.metric, comparison.difference
    return [
        "disturbed" if comparison.disturbed(trial.runtime) else speed,
        format_percent(after.macs / before.macs) if before.macs else _NONE,
        _NONE if metric is None else metric_value(metric),
        _NONE
        if metric is None or difference is None
        else signed(difference.value, metric, unit=False),
    ]
