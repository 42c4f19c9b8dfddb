"""The page of a comparison of networks on the same data."""

from __future__ import annotations

import shlex
from pathlib import PurePath

from markupsafe import Markup

from onebyone.core.compared import Compared, Contender
from onebyone.core.records import Measured
from onebyone.core.tables import Table
from onebyone.core.units import format_bytes, format_count, format_ms, format_percent
from onebyone.report.charts import Interval, IntervalChart
from onebyone.report.components import chart, code, page, paragraph, quantity, section, table
from onebyone.report.section_verdict import (
    chance_words,
    interval,
    metric_interval,
    metric_value,
    ratio_interval,
    signed,
    size_words,
    speed_words,
)

LONGEST = 18  # characters of a name in a chart


def render_compared(record: Compared) -> str:
    """Return the page of a comparison: one HTML file, made from the record alone."""
    sections = [_verdict(record), _scores(record), _times(record), _costs(record), _how(record)]
    links = [
        ("scores", "Scores"),
        ("times", "Times"),
        ("costs", "Costs"),
        ("how", "How it was measured"),
    ]
    shown = [link for link, part in zip(links, sections[1:], strict=True) if part]
    count = len(record.contenders)
    data = "" if record.data is None else f" on {record.data.name}"
    return page(
        f"{record.first.name} and {'another' if count == 2 else f'{count - 1} others'}",
        Markup("\n").join(part for part in sections if part),
        subtitle=f"{count} networks{data}, on {record.machine}",
        kicker="comparison",
        description=" ".join(_sentence(record, each) for each in record.others),
        contents=shown,
        footer=f"Made by onebyone {record.onebyone} at {record.created}.",
        style="compared.css",
    )


# ---------------------------------------------------------------- in words


def _verdict(record: Compared) -> Markup:
    items = Markup("\n").join(
        Markup("<li>{}</li>").format(_sentence(record, each)) for each in record.others
    )
    against = f"Against {record.first.name}:"
    return section(
        "verdict",
        "Verdict",
        Markup('<p class="lead">{}</p>\n<ul class="against">\n{}\n</ul>').format(against, items),
        heading_shown=False,
    )


def _sentence(record: Compared, each: Contender) -> str:
    """Return a sentence that compares a network with the first."""
    first, other = record.first.measured, each.measured
    parts = []
    for runtime, ratio in each.latency_ratio.items():
        words = speed_words(ratio, too_wide=record.disturbed(each, runtime))
        shown = "no difference of speed shown" if words == "no difference shown" else words
        parts.append(f"{shown} in {runtime}")
    parts.append(_size(first.params, other.params, "parameters"))
    parts.append(_size(first.macs, other.macs, "MACs"))
    metric, difference = other.metric, each.difference
    if metric is not None and difference is not None:
        chance = chance_words(difference)
        parts.append(
            f"{signed(difference.value, metric)} of {metric.name} "
            f"({interval(difference, metric)}{f': {chance}' if chance else ''})"
        )
    if each.agreement is not None:
        parts.append(f"the same prediction for {format_percent(each.agreement.value)}")
    return f"{each.name}: {', '.join(parts)}."


def _size(before: int, after: int, what: str) -> str:
    words = size_words(before, after, less=f"fewer {what}", more=f"more {what}")
    return f"as many {what}" if before == after else words


# ---------------------------------------------------------------- scores


def _scores(record: Compared) -> Markup:
    metric = record.first.measured.metric
    if all(each.divergence is None for each in record.others):
        return Markup("")
    rows = []
    for each, p_value in zip(record.contenders, (None, *record.p_values()), strict=True):
        rows.append([each.name, *_score_cells(each, p_value)])
    unit = ", points" if metric is not None and metric.is_fraction else ""
    name = "score" if metric is None else metric.name
    columns = ["Network", f">Test {name}", f">Difference{unit}", ">p", ">Agreement"]
    columns += [">Divergence", ">Train less test", ">Calibration error"]
    kept = [place for place in range(len(columns)) if place == 0 or any(r[place] for r in rows)]
    content = Table(
        columns=tuple(columns[place] for place in kept),
        rows=[[row[place] for place in kept] for row in rows],
        notes=[
            record.score_note(),
            f"Divergence: {record.divergence_note()}",
            "Small figures: 95 % intervals.",
        ],
    )
    return section("scores", "Scores on the same examples", _score_chart(record), table(content))


def _score_cells(each: Contender, p_value: float | None) -> list[str]:
    metric, difference = each.measured.metric, each.difference
    gap, error = each.measured.generalization_gap, each.measured.calibration_error
    agreement = each.agreement
    return [
        ""
        if metric is None
        else quantity(metric.value, metric_value(metric), metric_interval(metric)),
        ""
        if difference is None or metric is None
        else quantity(
            difference.value,
            signed(difference.value, metric, unit=False),
            interval(difference, metric),
        ),
        "" if p_value is None else quantity(p_value, f"{p_value:.2g}"),
        ""
        if agreement is None
        else quantity(agreement.value, metric_value(agreement), metric_interval(agreement)),
        "" if each.divergence is None else quantity(each.divergence, f"{each.divergence:.4g}"),
        "" if gap is None or metric is None else quantity(gap, signed(gap, metric, unit=False)),
        "" if error is None else quantity(error, f"{error:.4f}"),
    ]


def _score_chart(record: Compared) -> Markup:
    metric = record.first.measured.metric
    rows = tuple(
        Interval(
            name=_short(each.name),
            value=each.difference.value,
            low=each.difference.low,
            high=each.difference.high,
            color=place,
        )
        for place, each in enumerate(record.contenders)
        if each.difference is not None
    )
    if metric is None or not rows:
        return Markup("")
    return chart(
        IntervalChart(
            title=f"Difference from {record.first.name}",
            x=f"{metric.name}, more is better",
            rows=rows,
            percent=metric.is_fraction,
            reference=0,
            caption="Paired on the same examples, with 95 % intervals. An interval that includes 0 "
            "shows no difference.",
        )
    )


def _short(name: str) -> str:
    """Return a name short enough for a chart: its start and its end."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 + 1 :]}"


# ---------------------------------------------------------------- times and costs


def _times(record: Compared) -> Markup:
    if not record.runtimes:
        return Markup("")
    rows = [
        [each.name, runtime, *_time_cells(record, each, runtime)]
        for runtime in record.runtimes
        for each in record.contenders
    ]
    content = Table(
        columns=("Network", "Runtime", ">Median", ">Against the first"),
        rows=rows,
        notes=[
            record.time_note(),
            *record.subnormal_notes(),
            "Small figures: quartiles of times, intervals of ratios.",
        ],
    )
    return section("times", "Times in the same rounds", _time_chart(record), table(content))


def _time_cells(record: Compared, each: Contender, runtime: str) -> list[str]:
    timing, ratio = each.measured.latency[runtime], each.latency_ratio.get(runtime)
    quartiles = f"{format_ms(timing.q1_ms)} … {format_ms(timing.q3_ms)}"
    cells: list[str] = [quantity(timing.median_ms, format_ms(timing.median_ms), quartiles), ""]
    if ratio is not None:
        words = speed_words(ratio, too_wide=record.disturbed(each, runtime))
        cells[1] = quantity(ratio.value, words, ratio_interval(ratio))
    return cells


def _time_chart(record: Compared) -> Markup:
    several = len(record.runtimes) > 1
    rows = tuple(
        Interval(
            name=f"{_short(each.name)}, {runtime}" if several else _short(each.name),
            value=each.latency_ratio[runtime].value,
            low=each.latency_ratio[runtime].low,
            high=each.latency_ratio[runtime].high,
            color=place,
        )
        for runtime in record.runtimes
        for place, each in enumerate(record.contenders)
        if runtime in each.latency_ratio
    )
    return chart(
        IntervalChart(
            title=f"Times faster than {record.first.name}",
            x="times faster",
            rows=rows,
            reference=1,
            caption="Median over the rounds; block bootstrap 95 % intervals: above 1 is faster.",
        )
    )


def _costs(record: Compared) -> Markup:
    rows = [[each.name, *_cost_cells(each.measured)] for each in record.contenders]
    columns = ("Network", ">Parameters", ">MACs", ">Weights", ">Peak of activations")
    return section("costs", "Costs", table(Table(columns=columns, rows=rows)))


def _cost_cells(measured: Measured) -> list[str]:
    peak = measured.peak_activation_bytes
    return [
        quantity(measured.params, format_count(measured.params)),
        quantity(measured.macs, format_count(measured.macs)),
        quantity(measured.file_bytes, format_bytes(measured.file_bytes)),
        "–" if peak is None else quantity(peak, format_bytes(peak)),
    ]


def _how(record: Compared) -> Markup:
    machine = record.machine
    rows = [[each.name, _origin(each)] for each in record.contenders if each.source is not None]
    if record.data is not None:
        data = record.data
        rows.append(["Data", f"{data.name}: {data.test:,} test examples, seed {data.seed}"])
    rows.append(["Machine", f"{machine.processor}, {machine.cores} cores, {machine.device}"])
    rows.append(["System", machine.system])
    versions = {"onebyone": record.onebyone, **machine.versions}
    rows.append(["Versions", ", ".join(f"{name} {value}" for name, value in versions.items())])
    parts = [table(Table(columns=("What", "Value"), rows=rows))]
    if record.command:
        command = shlex.join([PurePath(record.command[0]).name, *record.command[1:]])
        parts += [paragraph("To compare them again:"), code(command, wrap=True)]
    return section("how", "How it was measured", Markup("\n").join(parts))


def _origin(each: Contender) -> str:
    source = each.source
    if source is None or source.spec is None:
        return "made in memory"
    return source.spec + (f", weights {source.weights}" if source.weights else "")
