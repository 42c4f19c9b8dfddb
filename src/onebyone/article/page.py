"""The article's page: each claim beside its measurement, in one self-contained file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from markupsafe import Markup

from onebyone.article import verdicts
from onebyone.article.record import (
    ActivationMap,
    ArticleRecord,
    Duel,
    NetworkRuns,
    SeedRun,
    Spread,
    spread,
)
from onebyone.article.tables import (
    HEADS,
    NONLINEARITY,
    claims_table,
    duel_table,
    layer_table,
    trials_table,
)
from onebyone.core.tables import Table
from onebyone.core.units import format_percent, format_points, format_ratio, format_seconds
from onebyone.report.charts import Interval, IntervalChart, LineChart, Series
from onebyone.report.components import (
    Figure,
    chart,
    disclosure,
    figures,
    gallery,
    page,
    paragraph,
    picture,
    section,
    table,
)


def render_article(record: ArticleRecord) -> str:
    """Return the page of the article's measurements: one HTML file, from the record alone."""
    sections = (
        ("claims", "Claims", _claims),
        ("reduce", "512 maps into 32", _reduce),
        ("weighting", "What a 1×1 does", _pictures),
        ("non-linearity", "Extra non-linearity", _nonlinearity),
        ("heads", "Over-fitting", _heads),
        ("maps", "Where classes are seen", _activations),
        ("method", "Method", _method),
    )
    data = record.data
    return page(
        "What is a 1×1 convolution good for?",
        Markup("\n").join([_verdict(record), *(make(record) for _, _, make in sections)]),
        subtitle=(
            f"An article's claims, measured on {data.name}: {data.train:,} pictures to train, "
            f"{data.test:,} to test, {_seeds(record.heads)}. {record.machine}."
        ),
        kicker="the article, measured",
        description=verdicts.summary(record),
        contents=[(anchor, label) for anchor, label, _ in sections],
        footer=f"Made by onebyone {record.onebyone} from the measurements of {record.created}.",
    )


# ---------------------------------------------------------------- the top


def _verdict(record: ArticleRecord) -> Markup:
    lead = Markup('<p class="lead">{}</p>').format(_together(verdicts.summary(record)))
    return section("verdict", "Verdict", lead, figures(_top_figures(record)), heading_shown=False)


def _top_figures(record: ArticleRecord) -> list[Figure]:
    heads = record.heads
    before, after = heads.before.cost, heads.after.cost
    speed = next((t for t in record.layer.times if not record.layer.crowded(t)), None)
    gap, test = heads.gap_difference, heads.test_difference
    found = [
        Figure(
            value=format_ratio(before.params / after.params),
            label="fewer parameters without fully connected layers",
            detail=f"{before.params:,} → {after.params:,}; the article: {verdicts.FEWER}×",
            raw=before.params / after.params,
        )
    ]
    if speed is not None:
        found.append(
            Figure(
                value=format_ratio(speed.ratio.value),
                label="3×3 against 1×1, time of 512 maps into 32",
                detail=(
                    f"warm, batch {speed.batch}, "
                    f"{verdicts.plural(speed.pointwise.threads, 'thread')}; "
                    f"the article: {verdicts.FASTER}×"
                ),
                raw=speed.ratio.value,
            )
        )
    for label, difference in (
        ("points: gap of train and test accuracy, without fully connected layers", gap),
        ("points: test accuracy, without fully connected layers", test),
    ):
        if difference is not None:
            found.append(
                Figure(
                    value=format_points(difference.value),
                    label=label,
                    detail=_together(verdicts.around(difference)),
                    raw=difference.value,
                )
            )
    return found


def _claims(record: ArticleRecord) -> Markup:
    return section(
        "claims",
        "Claim by claim",
        "A claim holds if the figures show it, and fails if they show the opposite. It is not "
        "shown either way if the interval over the seeds includes both.",
        table(_claims_table(record), stack=True),
    )


def _claims_table(record: ArticleRecord) -> Table:
    colors = {True: "good", False: "bad", None: "muted"}
    rows = [
        [
            claim.said,
            claim.measured,
            Markup('<span class="{}">{}</span>').format(colors[claim.holds], claim.verdict),
        ]
        for claim in verdicts.claims(record)
    ]
    return Table(columns=claims_table(record).columns, rows=rows)


# ---------------------------------------------------------------- 512 maps into 32


def _reduce(record: ArticleRecord) -> Markup:
    layer = record.layer
    shape = "×".join(map(str, layer.input_shape))
    explained = Markup("").join(
        Markup("<li>{}</li>").format(_together(verdicts.warm_speed(times, layer)))
        for times in layer.times
    )
    return section(
        "reduce",
        "512 maps into 32: how much is saved",
        f"The article reduces a feature map of {shape} to "
        f"{'×'.join(map(str, layer.output_shape))} by a 1×1 convolution, and measures it as "
        f"{verdicts.FASTER} times faster than a 3×3 one.",
        table(dataclasses.replace(layer_table(layer), title="")),
        chart(
            IntervalChart(
                title="How many times longer the 3×3 takes, warm",
                x="time of 3×3 / time of 1×1",
                rows=tuple(
                    Interval(
                        name=(
                            f"batch {times.batch}, "
                            f"{verdicts.plural(times.pointwise.threads, 'thread')}"
                        ),
                        value=times.ratio.value,
                        low=times.ratio.low,
                        high=times.ratio.high,
                        color=5 if layer.crowded(times) else 0,
                    )
                    for times in layer.times
                ),
                reference=layer.spatial.macs / layer.pointwise.macs,
                caption=(
                    "Dashed: the ratio of the MACs. Median with its 95 % interval; gray rows were "
                    "disturbed."
                ),
            )
        ),
        Markup("<h3>A cold call</h3>"),
        _together(verdicts.cold_speed(layer)),
        Markup("<h3>Why the ratio is not that of the MACs</h3>"),
        Markup("<ul>{}</ul>").format(explained),
        _together(verdicts.traffic(layer)),
    )


# ---------------------------------------------------------------- pictures


def _pictures(record: ArticleRecord) -> Markup:
    weighting, reduction = record.weighting, record.reduction
    low, high = weighting.before_range
    new_low, new_high = weighting.after_range
    many, few = reduction.maps
    return section(
        "weighting",
        "What a 1×1 convolution does to maps",
        Markup("<h3>One map, one weight</h3>"),
        f"A 1×1 filter over a single map is one weight, {weighting.weight:g} here: each pixel is "
        f"multiplied by it, independently of its neighbors.",
        gallery(
            [
                picture(weighting.image, alt="The test picture", caption="test picture 0"),
                picture(
                    weighting.before,
                    alt="The feature map before the filter",
                    caption=f"{weighting.network}: {_range(low, high)}",
                ),
                picture(
                    weighting.after,
                    alt="The same map four times as strong",
                    caption=f"times {weighting.weight:g}: {_range(new_low, new_high)}; both maps "
                    f"on one scale",
                ),
            ]
        ),
        Markup("<h3>{}</h3>").format(f"{many} maps summarized in {few}"),
        f"Real maps of a network trained here: {reduction.network} "
        f"({format_percent(reduction.test.value, 1)} right on {reduction.test.n:,} test pictures). "
        f"Each of the {few} is a weighted sum of all {many}, pixel by pixel. The best linear "
        f"reconstruction of the {many} from these {few} explains "
        f"{format_percent(reduction.kept)} of their variance over {reduction.examples:,} test "
        f"pictures; no {few} sums could explain more than {format_percent(reduction.best)}.",
        picture(
            reduction.before,
            alt=f"{many} feature maps of one test picture",
            caption=f"The {many} maps of test picture 0, after their ReLU; each scaled by itself.",
        ),
        picture(
            reduction.after,
            alt=f"The {few} maps that the 1×1 convolution makes of them",
            caption=f"The {few} maps that the 1×1 convolution makes of them, after its ReLU.",
        ),
    )


def _together(text: str) -> str:
    # Lines must not break inside an interval or between a number and its unit.
    for joined in (" … ", " %", " points", " ms", " µs", " k MACs", " GMAC/s"):
        text = text.replace(joined, joined.replace(" ", "\u00a0"))
    return text


def _range(low: float, high: float) -> str:
    return f"{low:.2f} … {high:.2f}".replace("-", "−")


# ---------------------------------------------------------------- networks over seeds


def _nonlinearity(record: ArticleRecord) -> Markup:
    duel = record.nonlinearity
    return section(
        "non-linearity",
        "A 1×1 convolution as an extra non-linearity",
        "The article puts a 1×1 convolution with 8 maps and a ReLU after two 3×3 convolutions. "
        "Its network ends there. Here a linear layer follows in both networks, with and without "
        "the 1×1 convolution, so that they can be trained.",
        table(duel_table(duel, names=NONLINEARITY, title="")),
        _together(verdicts.nonlinearity(duel)),
        _curves(duel, NONLINEARITY),
    )


def _heads(record: ArticleRecord) -> Markup:
    duel = record.heads
    return section(
        "heads",
        "Fully connected layers, or averaged class maps",
        "The classic network ends in two fully connected layers; the other in two 1×1 convolutions "
        "that make a map for each class, averaged. The convolutions before them are the same.",
        table(duel_table(duel, names=HEADS, title="")),
        *(_together(sentence) for sentence in verdicts.overfitting(duel)),
        _together(verdicts.cost(duel)),
        chart(_accuracies(duel)),
        _curves(duel, HEADS),
        Markup("<h3>What the paper found</h3>"),
        _together(verdicts.PAPER),
    )


def _accuracies(duel: Duel) -> IntervalChart:
    rows = [
        _interval(f"{name}, {part}", spread(values), color=color)
        for color, (name, network) in enumerate(zip(HEADS, (duel.before, duel.after), strict=True))
        for part, values in (("train", network.train), ("test", network.test))
    ]
    return IntervalChart(
        title="Training and test accuracy",
        x="accuracy",
        rows=tuple(rows),
        percent=True,
        caption=f"Mean over {_seeds(duel)}, and one standard deviation to either side.",
    )


def _interval(name: str, over: Spread, *, color: int) -> Interval:
    std = over.std or 0.0
    return Interval(
        name=name, value=over.mean, low=over.mean - std, high=over.mean + std, color=color
    )


def _curves(duel: Duel, names: tuple[str, str]) -> Markup:
    caption = f"Mean over {_seeds(duel)}, and one standard deviation to either side."
    charts = [
        chart(
            LineChart(
                title=title,
                x="epoch",
                y=y,
                series=tuple(
                    _series(name, network, value, color=color)
                    for color, (name, network) in enumerate(
                        zip(names, (duel.before, duel.after), strict=True)
                    )
                ),
                percent=percent,
                caption=caption,
            )
        )
        for title, y, value, percent in (
            ("Loss on training pictures", "cross-entropy", _loss, False),
            ("Accuracy on validation pictures", "accuracy", _validation, True),
        )
    ]
    return Markup('<div class="charts">{}</div>').format(Markup("\n").join(charts))


def _series(
    name: str, network: NetworkRuns, value: Callable[[SeedRun, int], float], *, color: int
) -> Series:
    curve = network.curve(value)
    stds = [point.std or 0.0 for point in curve]
    return Series(
        name=name,
        x=tuple(float(place) for place in range(1, len(curve) + 1)),
        y=tuple(point.mean for point in curve),
        low=tuple(point.mean - std for point, std in zip(curve, stds, strict=True)),
        high=tuple(point.mean + std for point, std in zip(curve, stds, strict=True)),
        color=color,
    )


def _loss(run: SeedRun, place: int) -> float:
    return run.log.epochs[place].loss


def _validation(run: SeedRun, place: int) -> float:
    return run.log.epochs[place].validation or 0.0


def _seeds(duel: Duel) -> str:
    return verdicts.plural(len(duel.before.runs), "seed")


# ---------------------------------------------------------------- class activation maps


_ACTIVATION_WORDS = (
    "Before it is averaged, the map of a class shows where the evidence for it is. Bright pixels "
    "are evidence for the class, each map on its own scale; evidence against it is not shown. The "
    "maps are of the network of convolutions alone, trained from seed 0."
)


def _activations(record: ArticleRecord) -> Markup:
    right = [example for example in record.activations if example.right]
    wrong = [example for example in record.activations if not example.right]
    parts: list[str | Markup] = [_ACTIVATION_WORDS]
    if right:
        parts += [
            Markup("<h3>The first right answer of each class</h3>"),
            gallery([_activation(example) for example in right]),
        ]
    if wrong:
        parts += [
            Markup("<h3>The first mistakes</h3>"),
            gallery([_activation(example) for example in wrong]),
        ]
    return section("maps", "Where classes are seen", *parts)


def _activation(example: ActivationMap) -> Markup:
    pictures = [
        (example.image, f"test picture {example.index}"),
        (example.predicted_map, f"map of the predicted class {example.predicted}"),
    ]
    if example.label_map:
        pictures.append((example.label_map, f"map of the true class {example.label}"))
    shown = Markup("").join(
        Markup('<img src="{}" alt="{}" title="{}">').format(source, words, words)
        for source, words in pictures
    )
    caption = (
        example.label
        if example.right
        else f"maps of {example.predicted} (predicted) and {example.label} (true)"
    )
    return Markup(
        '<figure><div class="pictures">{}</div><figcaption>{}</figcaption></figure>'
    ).format(shown, caption)


# ---------------------------------------------------------------- method


def _method(record: ArticleRecord) -> Markup:
    rows = [
        ["Data", _data_words(record)],
        ["Training", _training_words(record)],
        ["Learning rate", _RATE_WORDS],
        ["Scores", _SCORE_WORDS],
        ["MACs", _MAC_WORDS],
        ["Limits", _LIMIT_WORDS],
        ["Machine", _machine_words(record)],
    ]
    return section(
        "method",
        "How it was measured",
        table(Table(columns=("", ""), rows=[[_unbroken(name), text] for name, text in rows])),
        disclosure(
            "The learning rates that were tried",
            table(dataclasses.replace(trials_table(record), title="")),
        ),
        paragraph(_REFERENCES, note=True),
    )


def _unbroken(words: str) -> Markup:
    return Markup('<span style="white-space: nowrap">{}</span>').format(words)


_RATE_WORDS = (
    "Each network uses the best of three on validation pictures, in a trial from a separate seed."
)
_SCORE_WORDS = (
    "The article returns the sigmoid of the scores; these networks return the scores themselves "
    "and are trained by cross-entropy."
)
_MAC_WORDS = (
    "One multiplication with its addition, of convolutions and linear layers, for one picture."
)
_LIMIT_WORDS = (
    "Another recipe, longer training or other data may give other results. Intervals of accuracies "
    "are over seeds; they do not include the choice of the test pictures."
)
_REFERENCES = (
    "References: Lin, Chen, Yan, Network In Network, 2013, arXiv:1312.4400. Zhou et al., Learning "
    "Deep Features for Discriminative Localization, CVPR 2016, for the reading of the maps."
)


def _data_words(record: ArticleRecord) -> str:
    data, train = record.data, record.heads.before.runs[0].train
    sample = train.n if train is not None else 0
    return (
        f"{data.name}: {data.train:,} pictures to train, {data.validation:,} to choose a learning "
        f"rate by, {data.test:,} to test; divided by seed {data.seed}. Accuracies on training "
        f"pictures are of {sample:,} of them."
    )


def _training_words(record: ArticleRecord) -> str:
    log = record.heads.before.runs[0].log
    return (
        f"{log.optimizer}, {log.schedule}, batch {log.batch_size}, {len(log.epochs)} epochs, "
        f"weight decay {log.weight_decay:g}, {log.precision}, "
        f"{verdicts.plural(log.threads, 'thread')}; no augmentation and no dropout. The weights "
        f"after the last epoch are used."
    )


def _machine_words(record: ArticleRecord) -> str:
    machine = record.machine
    versions = ", ".join(f"{name} {number}" for name, number in sorted(machine.versions.items()))
    seconds = ", ".join(f"{name} {format_seconds(value)}" for name, value in record.seconds.items())
    return f"{machine}; {machine.system}; {versions}. It took: {seconds}."
