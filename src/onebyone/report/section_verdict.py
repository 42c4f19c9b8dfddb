"""The verdict of a run: one sentence and up to four figures, computed from the record."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from onebyone.core.records import Comparison, Difference, Metric, Ratio, RunRecord, Timing
from onebyone.core.units import (
    capitalized,
    format_bytes,
    format_count,
    format_ms,
    format_percent,
    format_points,
    format_ratio,
)
from onebyone.report.components import Figure

_STOPPED = {
    "failed": "failed",
    "interrupted": "was interrupted",
    "running": "has not finished",
}
# Tasks that decide at several places in each example, and the word for these.
_DECIDED = {"segmentation": "pixels", "sequence": "positions"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a run.

    Attributes:
        sentence: The result in one sentence.
        figures: At most four figures.
        conditions: How the figures were measured, in sentences.
    """

    sentence: str
    figures: tuple[Figure, ...] = ()
    conditions: tuple[str, ...] = ()


def verdict(record: RunRecord) -> Verdict:
    """Return the verdict; if an interval includes no difference, it says so."""
    comparison = record.comparison
    if comparison is None:
        return Verdict(sentence=_no_verdict(record))
    unit = examples_word(record)
    task = "" if record.task is None else record.task.name
    found = [
        _speed_figure(comparison),
        _size_figure(comparison),
        _metric_figure(comparison, unit),
        _agreement_figure(comparison, unit),
        _macs_figure(comparison),
        _params_figure(comparison),
    ]
    return Verdict(
        sentence=_sentence(
            comparison,
            unit,
            agreeing=_DECIDED.get(task, unit),
            in_int8=record.deployed is not None,
        ),
        figures=tuple(figure for figure in found if figure is not None)[:4],
        conditions=tuple(_conditions(record, comparison, unit)),
    )


def examples_word(record: RunRecord) -> str:
    """Return the word for examples: inputs of channels, height and width are images."""
    return "images" if record.data and record.data.inputs.is_image else "examples"


def when(record: RunRecord) -> str:
    """Return the start time of a run: ``2026-05-04 12:31 UTC``."""
    try:
        started = datetime.fromisoformat(record.created).astimezone(UTC)
    except ValueError:
        return record.created
    return f"{started:%Y-%m-%d %H:%M} UTC"


def speed_words(ratio: Ratio, *, too_wide: bool = False) -> str:
    """Return ``2.30× faster``, ``1.20× slower``, or that no difference is shown."""
    if too_wide:
        return "no verdict: disturbed"
    if ratio.verdict == "faster":
        return f"{format_ratio(ratio.value)} faster"
    if ratio.verdict == "slower":
        return f"{format_ratio(1 / ratio.value)} slower"
    return "no difference shown"


def ratio_interval(ratio: Ratio, *, too_wide: bool = False) -> str:
    """Return the interval of a ratio; with the ratio if :func:`speed_words` gives no figure."""
    around = f"{ratio.low:.2f} … {ratio.high:.2f}×"
    if too_wide or ratio.verdict == "no difference shown":
        return f"{ratio.value:.2f}× ({around})"
    return around if ratio.verdict == "faster" else f"{1 / ratio.high:.2f} … {1 / ratio.low:.2f}×"


def size_words(before: float, after: float, *, less: str, more: str) -> str:
    """Return ``8.10× smaller`` or ``1.20× larger``, with the given words, or ``the same``."""
    if after < before and after > 0:
        return f"{format_ratio(before / after)} {less}"
    if after > before > 0:
        return f"{format_ratio(after / before)} {more}"
    return "the same" if after == before else "none left" if before else "none before"


def signed(value: float, metric: Metric, *, unit: bool = True) -> str:
    """Return a difference of the metric with its sign, in percentage points for a fraction."""
    if metric.is_fraction:
        return format_points(value) + (" points" if unit else "")
    return f"{value:+.4g}".replace("-", "−")


def interval(difference: Difference, metric: Metric) -> str:
    """Return a difference's interval: ``−0.70 … +0.30``."""
    low, high = (signed(end, metric, unit=False) for end in (difference.low, difference.high))
    return f"{low} … {high}"


def metric_value(metric: Metric) -> str:
    """Return a metric's value as text; a fraction becomes a percentage."""
    return format_percent(metric.value, 2) if metric.is_fraction else f"{metric.value:.4g}"


def metric_interval(metric: Metric) -> str:
    """Return the ends of a metric's interval in the unit of its value."""
    if metric.is_fraction:
        return f"{100 * metric.low:.2f} … {100 * metric.high:.2f}"
    return f"{metric.low:.4g} … {metric.high:.4g}"


# ---------------------------------------------------------------- the sentence


def _no_verdict(record: RunRecord) -> str:
    if record.status.state == "finished" and record.plan is None and record.after is not None:
        metric = record.after.metric
        if metric is None:
            return "The network was trained; there was no test data."
        return (
            f"The network was trained: {metric_value(metric)} {metric.name} on {metric.n:,} test "
            f"{examples_word(record)} (95 % interval {metric_interval(metric)})."
        )
    if record.status.state == "finished":
        return "No verdict: this run did not compare the two networks."
    stopped = _STOPPED[record.status.state]
    return f"No verdict: the run {stopped}, and the two networks were not compared."


def _sentence(comparison: Comparison, unit: str, *, agreeing: str, in_int8: bool) -> str:
    comparatives, clauses = _costs(comparison)
    clauses += _quality(comparison, unit, agreeing)
    what = "The file in int8" if in_int8 else "The rewritten network"
    head = f"{what} is {' and '.join(comparatives)}" if comparatives else ""
    text = "; ".join(part for part in [head, *clauses] if part)
    return capitalized(text) + "."


def _costs(comparison: Comparison) -> tuple[list[str], list[str]]:
    comparatives, clauses = [], []
    primary = _primary(comparison)
    if primary is not None:
        runtime, ratio = primary
        if comparison.disturbed(runtime):
            clauses.append("the timings were too disturbed for a verdict on speed")
        elif ratio.verdict == "no difference shown":
            clauses.append("no difference in speed is shown")
        else:
            comparatives.append(speed_words(ratio))
    before, after = comparison.before.file_bytes, comparison.after.file_bytes
    size = size_words(before, after, less="smaller", more="larger")
    comparatives.append("of the same size" if size == "the same" else size)
    return comparatives, clauses


def _quality(comparison: Comparison, unit: str, agreeing: str) -> list[str]:
    clauses = []
    metric, difference = comparison.before.metric, comparison.difference
    if metric is not None and difference is not None:
        clauses.append(_difference_clause(metric, difference, unit))
    if comparison.agreement is not None:
        share = format_percent(comparison.agreement.value, 2)
        clauses.append(f"it agrees with the original on {share} of the {agreeing}")
    return clauses


def chance_words(difference: Difference) -> str:
    """Return ``may be chance`` or ``the same here``; nothing if a difference is shown."""
    if difference.low > 0 or difference.high < 0:
        return ""
    return "may be chance" if difference.value else "the same here"


def _difference_clause(metric: Metric, difference: Difference, unit: str) -> str:
    around = f"95 % interval {interval(difference, metric)}"
    examples = f"{difference.n:,} {unit}"
    size = signed(abs(difference.value), metric).removeprefix("+")
    found = f"its {metric.name} is {size} {'higher' if difference.value > 0 else 'lower'}"
    chance = chance_words(difference)
    if not chance:
        return f"{found} ({around}, {examples})"
    if difference.value == 0:
        return f"its {metric.name} is the same on these {examples} ({around})"
    return f"{found} here, which may be chance with {examples} ({around})"


def _primary(comparison: Comparison) -> tuple[str, Ratio] | None:
    """Return the first runtime, which is the one that the run was made for, and its ratio."""
    return next(iter(comparison.latency_ratio.items()), None)


# ---------------------------------------------------------------- the figures


def _speed_figure(comparison: Comparison) -> Figure | None:
    primary = _primary(comparison)
    if primary is None:
        return None
    runtime, ratio = primary
    times = _times(comparison, runtime)
    if comparison.disturbed(runtime):
        return Figure(
            value="No verdict", label="on speed: timings disturbed", detail=times, in_words=True
        )
    if ratio.verdict == "slower":
        return Figure(
            value=format_ratio(1 / ratio.value),
            label=f"slower, {runtime}",
            detail=_joined(ratio_interval(ratio), times),
            raw=ratio.value,
        )
    faster = ratio.verdict == "faster"
    return Figure(
        value=format_ratio(ratio.value),
        label=f"faster, {runtime}" if faster else f"the speed, {runtime}: no difference shown",
        detail=_joined(f"{ratio.low:.2f} … {ratio.high:.2f}×", times),
        raw=ratio.value,
    )


def _times(comparison: Comparison, runtime: str) -> str:
    before = comparison.before.latency.get(runtime)
    after = comparison.after.latency.get(runtime)
    if before is None or after is None:
        return ""
    return f"{format_ms(before.median_ms)} → {format_ms(after.median_ms)}"


def _size_figure(comparison: Comparison) -> Figure | None:
    before, after = comparison.before.file_bytes, comparison.after.file_bytes
    detail = f"{format_bytes(before)} → {format_bytes(after)}"
    return _count_figure(before, after, ("smaller file", "larger file"), detail)


def _macs_figure(comparison: Comparison) -> Figure | None:
    before, after = comparison.before.macs, comparison.after.macs
    detail = f"{format_count(before)} → {format_count(after)}"
    return _count_figure(before, after, ("fewer MACs", "more MACs"), detail)


def _params_figure(comparison: Comparison) -> Figure | None:
    before, after = comparison.before.params, comparison.after.params
    detail = f"{format_count(before)} → {format_count(after)}"
    return _count_figure(before, after, ("fewer parameters", "more parameters"), detail)


def _count_figure(before: int, after: int, words: tuple[str, str], detail: str) -> Figure | None:
    if not before or not after:
        return None
    ratio = before / after
    if ratio < 1:
        return Figure(value=format_ratio(1 / ratio), label=words[1], detail=detail, raw=ratio)
    return Figure(value=format_ratio(ratio), label=words[0], detail=detail, raw=ratio)


def _metric_figure(comparison: Comparison, unit: str) -> Figure | None:
    metric, difference = comparison.before.metric, comparison.difference
    if metric is None or difference is None:
        return None
    chance = chance_words(difference)
    value = signed(difference.value, metric, unit=False)
    points = "points of " if metric.is_fraction else "in "
    around = f"95 % interval {interval(difference, metric)}, {difference.n:,} {unit}"
    return Figure(
        value=value,
        label=f"{points}{metric.name}{f': {chance}' if chance else ''}",
        detail=around,
        raw=difference.value,
    )


def _agreement_figure(comparison: Comparison, unit: str) -> Figure | None:
    agreement, divergence = comparison.agreement, comparison.divergence
    if agreement is not None:
        return Figure(
            value=format_percent(agreement.value, 2),
            label="agreement with the original",
            detail=f"95 % interval {metric_interval(agreement)}, {agreement.n:,} {unit}",
            raw=agreement.value,
        )
    if divergence is not None:
        return Figure(
            value=f"{divergence:.3g}",
            label="relative squared error against the original’s outputs",
            raw=divergence,
        )
    return None


# ---------------------------------------------------------------- how it was measured


def _conditions(record: RunRecord, comparison: Comparison, unit: str) -> list[str]:
    lines = []
    primary = _primary(comparison)
    if primary is not None:
        machine = comparison.machine or record.machine
        timing = comparison.after.latency.get(primary[0])
        lines.append(
            f"Speed: {_timing_words(primary[0], timing)}{primary[1].rounds} interleaved rounds "
            "after a warm-up, the median of their ratios with its block bootstrap 95 % interval; "
            f"{machine.processor}, {machine.threads} of {machine.cores} cores."
        )
    if record.deployed is not None:
        lines += record.deployed.notes()
    others = list(comparison.latency_ratio.items())[1:]
    for runtime, ratio in others:
        too_wide = comparison.disturbed(runtime)
        words = speed_words(ratio, too_wide=too_wide)
        lines.append(f"In {runtime}: {words}, {ratio_interval(ratio, too_wide=too_wide)}.")
    if record.subnormals is not None and record.subnormals.flushed:
        alone = [f"{ratio} in {name}" for name, ratio in record.subnormals.ratio.items()]
        gave = f", which alone gave {' and '.join(alone)}" if alone else ""
        lines.append(
            "Subnormal weights of the original were set to zero first, which is not a gain of the "
            f"rewrites{gave}. Both networks were timed without them."
        )
    metric, difference = comparison.before.metric, comparison.difference
    if metric is not None and difference is not None:
        lines.append(
            f"{capitalized(metric.name)}: both networks on the same {difference.n:,} test {unit}; "
            f"{difference.test}, p = {difference.p_value:.2g}."
        )
    return lines


def _timing_words(runtime: str, timing: Timing | None) -> str:
    if timing is None:
        return f"{runtime}, "
    threads = "1 thread" if timing.threads == 1 else f"{timing.threads} threads"
    return f"{runtime} on {timing.device}, {threads}, batch {timing.batch}, "


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
