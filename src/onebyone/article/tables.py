"""The article's measurements as tables, for the console and for the page."""

from __future__ import annotations

import statistics

from onebyone.article.record import ArticleRecord, Duel, LayerComparison, spread
from onebyone.article.verdicts import claims, interval, plural, ratio_range
from onebyone.core.records import Difference
from onebyone.core.tables import Table
from onebyone.core.units import format_ms, format_percent, format_ratio

HEADS = ("Classic", "Convolutions")
NONLINEARITY = ("Without", "With 1×1 + ReLU")


def article_tables(record: ArticleRecord) -> tuple[Table, ...]:
    """Return all the tables, the claims first."""
    return (
        claims_table(record),
        layer_table(record.layer),
        duel_table(
            record.heads, names=HEADS, title="Fully connected layers, or averaged class maps"
        ),
        duel_table(
            record.nonlinearity, names=NONLINEARITY, title="The extra 1×1 convolution and its ReLU"
        ),
    )


def claims_table(record: ArticleRecord) -> Table:
    """Return a table of each claim beside its measurement."""
    rows = [[claim.said, claim.measured, claim.verdict] for claim in claims(record)]
    data, seeds = record.data, plural(len(record.heads.before.runs), "seed")
    pictures = f"{data.train:,} pictures to train, {data.test:,} to test"
    return Table(
        columns=("the article says", "measured here", "verdict"),
        rows=rows,
        title="The article on 1×1 convolutions, measured",
        notes=[f"{data.name}: {pictures}; {seeds}. {record.machine}."],
    )


def layer_table(layer: LayerComparison) -> Table:
    """Return the 1×1 beside the 3×3 convolution."""
    pointwise, spatial = layer.pointwise, layer.spatial
    rows = [
        [
            "parameters",
            f"{pointwise.params:,}",
            f"{spatial.params:,}",
            format_ratio(spatial.params / pointwise.params),
        ],
        [
            "MACs",
            f"{pointwise.macs:,}",
            f"{spatial.macs:,}",
            format_ratio(spatial.macs / pointwise.macs),
        ],
    ]
    for times in layer.times:
        ratio = times.ratio
        words = f"{format_ratio(ratio.value)} [{ratio.low:.2f}–{ratio.high:.2f}]"
        rows.append(
            [
                f"warm, batch {times.batch}, {plural(times.pointwise.threads, 'thread')}",
                format_ms(times.pointwise.median_ms),
                format_ms(times.spatial.median_ms),
                "disturbed" if layer.crowded(times) else words,
            ]
        )
    for first, name in (("spatial", "3×3"), ("pointwise", "1×1")):
        calls = [cold for cold in layer.cold if cold.first == first]
        if calls:
            rows.append(
                [
                    f"cold, the {name} first",
                    format_ms(statistics.median(cold.pointwise_ms for cold in calls)),
                    format_ms(statistics.median(cold.spatial_ms for cold in calls)),
                    ratio_range(layer.cold_ratios(first)),
                ]
            )
    repeats = layer.times[0].pointwise.repeats
    return Table(
        columns=("", ">1×1", ">3×3", ">3×3 / 1×1"),
        rows=rows,
        title=f"{layer.input_shape[0]} maps into {layer.output_shape[0]}, "
        f"{layer.input_shape[1]}×{layer.input_shape[2]} pixels",
        notes=[
            f"Warm: eager, inference mode, median of {repeats} samples in turn after a warm-up.",
            "Ratios: of medians over the samples, with a block bootstrap 95 % interval.",
            "Cold: one plain call of each layer in a fresh process; median time, range of ratios.",
        ],
    )


def duel_table(duel: Duel, *, names: tuple[str, str], title: str) -> Table:
    """Return two networks over seeds, and how they differ."""
    before, after = duel.before, duel.after
    rows = [
        _counts("parameters", before.cost.params, after.cost.params),
        _counts("MACs", before.cost.macs, after.cost.macs),
    ]
    for batch, ratio in duel.latency_ratio.items():
        first, second = before.latency[batch], after.latency[batch]
        disturbed = first.disturbed or second.disturbed
        words = {
            "faster": f"{format_ratio(ratio.value)} faster",
            "slower": f"{format_ratio(1 / ratio.value)} slower",
        }.get(ratio.verdict, "no difference shown")
        rows.append(
            [
                f"time, batch {batch}",
                format_ms(first.median_ms),
                format_ms(second.median_ms),
                "disturbed" if disturbed else words,
            ]
        )
    for label, old, new, difference in (
        ("train accuracy", before.train, after.train, duel.train_difference),
        ("test accuracy", before.test, after.test, duel.test_difference),
        ("gap, train less test", before.gap, after.gap, duel.gap_difference),
    ):
        rows.append([label, over_seeds(old), over_seeds(new), difference_words(difference)])
    threads = next(iter(before.latency.values())).threads
    seeds = plural(len(before.runs), "seed")
    return Table(
        columns=("", f">{names[0]}", f">{names[1]}", ">change"),
        rows=rows,
        title=title,
        notes=[
            f"Accuracies: mean ± standard deviation over {seeds}.",
            "Change: in points, with a 95 % interval (paired t). If it includes 0, none is shown.",
            f"Times: medians of samples in turn, eager, {plural(threads, 'thread')}.",
        ],
    )


def trials_table(record: ArticleRecord) -> Table:
    """Return a table of the learning rates tried, and the one used."""
    rows, notes = [], []
    for duel in (record.heads, record.nonlinearity):
        for network in (duel.before, duel.after):
            tried = [trial.log.learning_rate for trial in network.trials]
            if len(tried) > 1 and network.learning_rate in (min(tried), max(tried)):
                end = "lowest" if network.learning_rate == min(tried) else "highest"
                notes.append(f"{network.name}: the {end} that was tried is the best of them.")
            rows += [
                [
                    network.name,
                    f"{trial.log.learning_rate:.2g}",
                    format_percent(trial.validation, 2),
                    "taken" if trial.log.learning_rate == network.learning_rate else "",
                ]
                for trial in network.trials
            ]
    return Table(
        columns=("network", ">learning rate", ">validation accuracy", ""),
        rows=rows,
        title="Learning rates",
        notes=notes,
    )


def over_seeds(values: tuple[float, ...]) -> str:
    """Return the mean and standard deviation of fractions over seeds: ``98.70 ± 0.21 %``."""
    found = spread(values)
    mean = f"{100 * found.mean:.2f}".replace("-", "−")
    return f"{mean} %" if found.std is None else f"{mean} ± {100 * found.std:.2f} %"


def difference_words(difference: Difference | None) -> str:
    """Return a paired difference with its interval."""
    return "one seed" if difference is None else interval(difference)


def _counts(name: str, before: int, after: int) -> list[str]:
    if after == before:
        change = "the same"
    elif after < before:
        change = f"{format_ratio(before / after)} fewer"
    else:
        change = f"{format_ratio(after / before)} more"
    return [name, f"{before:,}", f"{after:,}", change]
