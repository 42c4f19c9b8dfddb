"""The page of several runs: their verdicts, trade-offs and latencies side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from markupsafe import Markup

from onebyone.core.records import Comparison, Measured, Metric, Quantity, RunRecord
from onebyone.core.tables import Table
from onebyone.core.units import format_bytes, format_count, format_ms
from onebyone.report.charts import (
    COLORS,
    Axis,
    Chart,
    Interval,
    IntervalChart,
    Point,
    ScatterChart,
    Series,
)
from onebyone.report.components import chart, notice, page, quantity, section, table
from onebyone.report.section_tradeoff import NAMES, counted, floor_of, front_axes, front_line
from onebyone.report.section_use import reproduction
from onebyone.report.section_verdict import (
    interval,
    metric_interval,
    metric_value,
    ratio_interval,
    signed,
    size_words,
    speed_words,
    verdict,
)

_NONE = "–"


def render_runs(records: Mapping[str, RunRecord]) -> str:
    """Return the page of several runs: one HTML file, made from their records alone.

    Args:
        records: The record of each run by its name, in the order of the page.
    """
    shown = [(anchor, label, part) for anchor, label, make in SECTIONS if (part := make(records))]
    body = [unlike_notice(records), *(part for _, _, part in shown)]
    networks = dict.fromkeys(record.source.name for record in records.values())
    return page(
        f"{len(records)} runs side by side",
        Markup("\n").join(part for part in body if part),
        subtitle=", ".join(networks),
        kicker="report of several runs",
        contents=[(anchor, label) for anchor, label, _ in shown],
    )


def _original(rewritten: set[str], record: RunRecord) -> object:
    # A training has its network as the result; runs that rewrote it have it as the original.
    if record.plan is None and record.source.name in rewritten:
        return None
    return record.source.spec, record.source.name, record.source.weights


def unlike_notice(records: Mapping[str, RunRecord]) -> Markup:
    """Return a notice of the conditions in which the runs differ; empty if there are none."""
    rewritten = {record.source.name for record in records.values() if record.plan is not None}
    facts: dict[str, Callable[[RunRecord], object]] = {
        "the original network": partial(_original, rewritten),
        "the data": lambda r: r.data and (r.data.name, r.data.test, r.data.seed),
        "the machine": lambda r: (r.machine.processor, r.machine.device),
        "the threads": _machine_threads,
        "the timed batch": lambda r: r.comparison and r.comparison.inputs,
    }
    packages = sorted({name for record in records.values() for name in record.machine.versions})
    for package in packages:
        facts[f"the version of {package}"] = partial(_version, package)
    unlike = [
        name for name, of in facts.items() if len({of(r) for r in records.values()} - {None}) > 1
    ]
    if not unlike:
        return Markup("")
    return notice(
        "These runs are not alike",
        f"They differ in {_and(unlike)}. In each run, before and after were measured together. "
        "Figures of different runs can be compared only if these differences do not matter.",
    )


def _version(package: str, record: RunRecord) -> str | None:
    return record.machine.versions.get(package)


def _machine_threads(record: RunRecord) -> int | None:
    timings = record.comparison.after.latency.values() if record.comparison else ()
    return next((timing.threads for timing in timings), None)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---------------------------------------------------------------- verdicts


def _verdicts(records: Mapping[str, RunRecord]) -> Markup:
    rows = [_verdict_row(name, record) for name, record in records.items()]
    columns = ("Run", ">Speed", ">Weights file", ">Score", ">Change", ">Agreement")
    notes = [
        "Small figures: 95 % intervals; speed in the first runtime that the run was timed in.",
        "Score, change and agreement are on the test data.",
    ]
    content = Markup('<div class="runs">{}</div>').format(
        table(Table(columns=columns, rows=rows, notes=notes))
    )
    return section("verdicts", "The verdicts", content)


def _verdict_row(name: str, record: RunRecord) -> list[str]:
    head = Markup("{}<small>{}</small>").format(name, _made_of(record))
    comparison = record.comparison
    if comparison is None:
        metric = record.after.metric if record.after else None
        return [head, _NONE, _NONE, _metric_cell(metric), _NONE, _NONE]
    metric = comparison.after.metric
    return [
        head,
        _speed_cell(comparison),
        _size_cell(comparison),
        _metric_cell(metric),
        _change_cell(comparison),
        _metric_cell(comparison.agreement),
    ]


def _made_of(record: RunRecord) -> str:
    budgets = [budget.asked for budget in record.plan.budgets] if record.plan else []
    state = [] if record.status.state == "finished" else [_state_words(record)]
    return ", ".join([record.source.name, *budgets, *state])


def _state_words(record: RunRecord) -> str:
    if record.status.state == "finished":
        return ""
    return f"{record.status.state} at {record.status.stage}"


def _speed_cell(comparison: Comparison) -> str:
    runtime, ratio = next(iter(comparison.latency_ratio.items()), (None, None))
    if runtime is None or ratio is None:
        return _NONE
    too_wide = comparison.disturbed(runtime)
    words = speed_words(ratio, too_wide=too_wide)
    return quantity(ratio.value, words, f"{ratio_interval(ratio, too_wide=too_wide)}, {runtime}")


def _size_cell(comparison: Comparison) -> str:
    before, after = comparison.before.file_bytes, comparison.after.file_bytes
    words = size_words(before, after, less="smaller", more="larger")
    return quantity(after, words, f"{format_bytes(before)} → {format_bytes(after)}")


def _metric_cell(metric: Metric | None) -> str:
    if metric is None:
        return _NONE
    return quantity(metric.value, metric_value(metric), metric_interval(metric))


def _change_cell(comparison: Comparison) -> str:
    difference, metric = comparison.difference, comparison.before.metric
    if difference is None or metric is None:
        return _NONE
    return quantity(
        difference.value, signed(difference.value, metric), interval(difference, metric)
    )


# ---------------------------------------------------------------- trade-offs


def _tradeoffs(records: Mapping[str, RunRecord]) -> Markup:
    charts = [_speed_chart(records), _front_chart(records, "macs"), _front_chart(records, "params")]
    drawn = Markup("").join(chart(each) for each in charts if each is not None)
    if not drawn:
        return Markup("")
    return section(
        "tradeoffs", "The trade-offs", Markup('<div class="charts">{}</div>').format(drawn)
    )


def _speed_chart(records: Mapping[str, RunRecord]) -> Chart | None:
    """Return the change of the metric against speed, or against MACs if nothing was timed."""
    points, runtimes = [], set()
    example = None
    for place, (name, record) in enumerate(records.items()):
        comparison = record.comparison
        if comparison is None or comparison.difference is None or comparison.before.metric is None:
            continue
        runtime, ratio = next(iter(comparison.latency_ratio.items()), (None, None))
        if runtime is None or ratio is None:
            continue
        example = comparison.before.metric
        runtimes.add(runtime)
        difference = comparison.difference
        points.append(
            Point(
                name=name,
                x=ratio.value,
                y=difference.value,
                x_interval=(ratio.low, ratio.high),
                y_interval=(difference.low, difference.high),
                color=place % COLORS,
                label=name,
            )
        )
    if example is None:
        return None
    unit = " points" if example.is_fraction else ""
    return ScatterChart(
        title=f"Change of {example.name} against speed",
        x=Axis(
            name=f"times as fast, {' or '.join(sorted(runtimes))}",
            log=True,
            reference=1.0,
            unit="×",
        ),
        y=Axis(
            name=f"{example.name}, {'points' if unit else 'difference'}",
            percent=example.is_fraction,
            signed=True,
            reference=0.0,
            unit=unit,
        ),
        points=tuple(points),
        caption="Lines: 95 % intervals. Right is faster, up is better; dashed, no change.",
        height=360,
    )


def _front_chart(records: Mapping[str, RunRecord], bounded: Quantity) -> Chart | None:
    """Return the predicted fronts of the plans that bound a quantity, and the measured results."""
    lines, points = [], []
    for place, (name, record) in enumerate(records.items()):
        plan, comparison = record.plan, record.comparison
        if plan is None or not plan.budgets or counted(plan.budgets[0].quantity) != bounded:
            continue
        lines += [front_line(plan, name, place % COLORS)] if plan.front else []
        harm = None if comparison is None else comparison.divergence
        if harm is not None:
            share = plan.after.amount(bounded) / (plan.before.amount(bounded) or 1)
            measured = f"{name}, measured"
            points.append(Point(name=measured, x=share, y=harm, color=place % COLORS, label=name))
    if not lines:
        return None
    floor = floor_of([*(y for line in lines for y in line.y), *(point.y for point in points)])
    x, y = front_axes(bounded, floor)
    return ScatterChart(
        title=f"Harm against {NAMES[bounded]}",
        x=x,
        y=y,
        points=tuple(points),
        lines=tuple(_distinct(lines)),
        caption="Lines: predicted for other budgets. Dots: measured on the test data, at the end.",
        height=360,
    )


def _distinct(lines: Sequence[Series]) -> list[Series]:
    """Return the lines without those that another line covers, such as of runs of one survey."""
    kept: dict[tuple[tuple[float, ...], tuple[float, ...]], Series] = {}
    for line in lines:
        first = kept.get((line.x, line.y))
        name = line.name if first is None else f"{first.name}, {line.name}"
        color = line.color if first is None else first.color
        kept[line.x, line.y] = Series(name=name, x=line.x, y=line.y, color=color)
    return list(kept.values())


# ---------------------------------------------------------------- latency and cost


def _latencies(records: Mapping[str, RunRecord]) -> Markup:
    rows, intervals = [], []
    for place, (name, record) in enumerate(records.items()):
        comparison = record.comparison
        if comparison is None:
            continue
        for runtime, ratio in comparison.latency_ratio.items():
            first, second = comparison.before.latency[runtime], comparison.after.latency[runtime]
            too_wide = comparison.disturbed(runtime)
            words = speed_words(ratio, too_wide=too_wide)
            rows.append(
                [
                    Markup("{}<small>{}</small>").format(name, first.conditions),
                    _time_cell(first.median_ms, first.q1_ms, first.q3_ms),
                    _time_cell(second.median_ms, second.q1_ms, second.q3_ms),
                    quantity(ratio.value, words, ratio_interval(ratio, too_wide=too_wide)),
                ]
            )
            row = Interval(
                name=f"{name}, {runtime}",
                value=ratio.value,
                low=ratio.low,
                high=ratio.high,
                color=place % COLORS,
            )
            intervals.append(row)
    if not rows:
        return Markup("")
    drawn = IntervalChart(
        title="Speed by runtime",
        x="times as fast as the original",
        rows=tuple(intervals),
        reference=1.0,
        log=True,
        caption="95 % intervals of interleaved rounds; dashed, as fast as the original.",
    )
    columns = ("Run", ">Before", ">After", ">Change")
    notes = ["Small figures: quartiles of times, 95 % intervals of the change."]
    listed = table(Table(columns=columns, rows=rows, notes=notes))
    return section("latency", "Latency by runtime", chart(drawn), listed)


def _time_cell(median: float, q1: float, q3: float) -> str:
    return quantity(median, format_ms(median), f"{format_ms(q1)} … {format_ms(q3)}")


def _costs(records: Mapping[str, RunRecord]) -> Markup:
    rows = []
    for name, record in records.items():
        measured = record.after or (record.comparison.after if record.comparison else None)
        first = record.before or (record.comparison.before if record.comparison else None)
        if measured is not None:
            rows.append([name, *_cost_cells(first, measured)])
    if not rows:
        return Markup("")
    columns = ("Run", ">Parameters", ">MACs", ">Peak activations", ">Calibration error")
    notes = ["Values of each run's result; small figures: values of its original."]
    return section("costs", "Cost", table(Table(columns=columns, rows=rows, notes=notes)))


def _cost_cells(before: Measured | None, after: Measured) -> list[str]:
    cells = []
    fields: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("params", format_count),
        ("macs", format_count),
        ("peak_activation_bytes", format_bytes),
        ("calibration_error", "{:.4f}".format),
    )
    for name, form in fields:
        value = getattr(after, name)
        small = None if before is None else getattr(before, name)
        cells.append(
            _NONE
            if value is None
            else quantity(value, form(value), "" if small is None else form(small))
        )
    return cells


def _how(records: Mapping[str, RunRecord]) -> Markup:
    parts: list[str | Markup] = []
    for name, record in records.items():
        parts += [
            Markup("<h3>{}</h3>").format(name),
            verdict(record).sentence,
            *reproduction(record),
        ]
    return section("runs", "Each run", *parts)


SECTIONS: tuple[tuple[str, str, Callable[[Mapping[str, RunRecord]], Markup]], ...] = (
    ("verdicts", "Verdicts", _verdicts),
    ("tradeoffs", "Trade-offs", _tradeoffs),
    ("latency", "Latency", _latencies),
    ("costs", "Cost", _costs),
    ("runs", "Each run", _how),
)
