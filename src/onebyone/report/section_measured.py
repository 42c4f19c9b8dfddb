"""The section with all measurements: before, one-shot, after, and the change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from onebyone.core.records import Difference, Measured, Metric, RunRecord
from onebyone.core.tables import Table
from onebyone.core.units import format_bytes, format_count, format_ms
from onebyone.report.components import quantity, section, table
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

_NONE = "–"
_COUNTS: tuple[tuple[str, str, str, Callable[[float], str], tuple[str, str]], ...] = (
    ("Parameters", "", "params", format_count, ("fewer", "more")),
    ("Weights file", "safetensors", "file_bytes", format_bytes, ("smaller", "larger")),
    ("MACs", "for one input", "macs", format_count, ("fewer", "more")),
    (
        "Peak activations",
        "alive at once, one input",
        "peak_activation_bytes",
        format_bytes,
        ("less", "more"),
    ),
)


def measured_section(record: RunRecord) -> Markup:
    """Return the table of all measurements: before, before fine-tuning, and after."""
    columns = _columns(record)
    if not columns:
        return Markup("")
    networks = [measured for _, measured in columns]
    rows = [*_count_rows(networks), *_latency_rows(record, networks)]
    rows += _quality_rows(record, columns)
    headings = ["", *(f">{name}" for name, _ in columns), ">Change"]
    if len(columns) == 1 or columns[0][0] != "Before":  # nothing to compare with
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    intro = (
        "One-shot is the rewritten network before fine-tuning."
        if record.one_shot is not None
        else ""
    )
    notes = ["Small figures: quartiles of times, 95 % intervals of everything else."]
    notes += [] if record.subnormals is None else record.subnormals.lines()
    if any(measured.peak_activation_bytes is not None for _, measured in columns):
        notes.append(
            "Peak activations: each tensor counts from the operation that writes it to the last "
            "one that reads it, in the network’s own order. Weights and the kernels’ workspace are "
            "not included."
        )
    content = Markup('<div class="even">{}</div>').format(
        table(Table(columns=tuple(headings), rows=rows, notes=notes))
    )
    return section("measured", "Before and after", intro, content)


def _columns(record: RunRecord) -> list[tuple[str, Measured]]:
    comparison = record.comparison
    before = record.before or (comparison.before if comparison else None)
    after = record.after or (comparison.after if comparison else None)
    columns = (("Before", before), ("One-shot", record.one_shot), ("After", after))
    return [(name, measured) for name, measured in columns if measured is not None]


def _count_rows(networks: Sequence[Measured]) -> list[list[str]]:
    rows = []
    for name, small, field, form, words in _COUNTS:
        values: list[int | None] = [getattr(network, field) for network in networks]
        if all(value is None for value in values):
            continue
        first, last = values[0], values[-1]
        change = ""
        if first is not None and last is not None:
            change = size_words(first, last, less=words[0], more=words[1])
        cells = [_NONE if value is None else quantity(value, form(value)) for value in values]
        rows.append([_headed(name, small) if small else name, *cells, change])
    return rows


def _latency_rows(record: RunRecord, networks: Sequence[Measured]) -> list[list[str]]:
    runtimes = dict.fromkeys(name for network in networks for name in network.latency)
    rows = []
    for runtime in runtimes:
        cells = []
        for network in networks:
            timing = network.latency.get(runtime)
            if timing is None:
                cells.append(_NONE)
                continue
            quartiles = f"{format_ms(timing.q1_ms)} … {format_ms(timing.q3_ms)}"
            cells.append(quantity(timing.median_ms, format_ms(timing.median_ms), quartiles))
        name = Markup("Latency<small>{}</small>").format(runtime)
        rows.append([name, *cells, _ratio_cell(record, runtime)])
    return rows


def _ratio_cell(record: RunRecord, runtime: str) -> str:
    comparison = record.comparison
    ratio = comparison.latency_ratio.get(runtime) if comparison else None
    if comparison is None or ratio is None:
        return ""
    too_wide = comparison.disturbed(runtime)
    words = speed_words(ratio, too_wide=too_wide)
    around = ratio_interval(ratio, too_wide=too_wide)
    return quantity(ratio.value, words, f"{around}, {ratio.rounds} rounds")


def _quality_rows(record: RunRecord, columns: Sequence[tuple[str, Measured]]) -> list[list[str]]:
    networks = [measured for _, measured in columns]
    rows = _metric_rows(record, columns)
    example = next((network.metric for network in networks if network.metric), None)
    gaps = [network.generalization_gap for network in networks]
    if example is not None and any(gap is not None for gap in gaps):
        cells = [_NONE if gap is None else quantity(gap, signed(gap, example)) for gap in gaps]
        rows.append([_headed("Generalization gap", "train less test"), *cells, ""])
    errors = [network.calibration_error for network in networks]
    if any(error is not None for error in errors):
        cells = [_NONE if error is None else quantity(error, f"{error:.4f}") for error in errors]
        rows.append([_headed("Calibration error", "of the confidence, test"), *cells, ""])
    return rows + _fidelity_rows(record, [name for name, _ in columns])


def _metric_rows(record: RunRecord, columns: Sequence[tuple[str, Measured]]) -> list[list[str]]:
    rows = []
    tests = [measured.metric for _, measured in columns]
    example = next((metric for metric in tests if metric), None)
    if example is not None:
        differences = {"One-shot": record.one_shot_difference}
        cells = [
            _metric_cell(metric, differences.get(name))
            for (name, _), metric in zip(columns, tests, strict=True)
        ]
        change = _difference_cell(
            record.comparison.difference if record.comparison else None, example
        )
        rows.append([_headed(f"Test {example.name}", f"n = {example.n:,}"), *cells, change])
    trains = [measured.train_metric for _, measured in columns]
    example = next((metric for metric in trains if metric), None)
    if example is not None:
        cells = [_metric_cell(metric, None) for metric in trains]
        rows.append([_headed(f"Train {example.name}", f"n = {example.n:,}"), *cells, ""])
    return rows


def _metric_cell(metric: Metric | None, difference: Difference | None) -> str:
    if metric is None:
        return _NONE
    small = metric_interval(metric)
    cell = quantity(metric.value, metric_value(metric), small)
    if difference is None:
        return cell
    against = f"change {signed(difference.value, metric)}"
    return cell + Markup("<small>{}</small><small>{}</small>").format(
        against, interval(difference, metric)
    )


def _difference_cell(difference: Difference | None, metric: Metric) -> str:
    if difference is None:
        return ""
    chance = chance_words(difference)
    small = interval(difference, metric) + (f": {chance}" if chance else "")
    return quantity(difference.value, signed(difference.value, metric), small)


def _fidelity_rows(record: RunRecord, names: Sequence[str]) -> list[list[str]]:
    comparison = record.comparison
    agreements = {
        "One-shot": record.one_shot_agreement,
        "After": comparison.agreement if comparison else None,
    }
    divergences = {
        "One-shot": record.one_shot_divergence,
        "After": comparison.divergence if comparison else None,
    }
    rows = []
    if any(agreements.values()):
        cells = [_metric_cell(agreements.get(name), None) for name in names]
        rows.append([_headed("Agreement", "same prediction as the original"), *cells, ""])
    if any(value is not None for value in divergences.values()):
        classifier = any(agreements.values())
        what = "from its outputs: KL, nats" if classifier else "relative squared error"
        values = [divergences.get(name) for name in names]
        cells = [_NONE if value is None else quantity(value, f"{value:.4g}") for value in values]
        rows.append([_headed("Divergence", what), *cells, ""])
    return rows


def _headed(text: str, small: str) -> Markup:
    return Markup("{}<small>{}</small>").format(text, small)
