"""Verdicts on the article's claims: sentences computed from the figures and their spread."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from onebyone.article.record import ArticleRecord, Duel, LayerComparison, LayerTimes, spread
from onebyone.core.records import Difference
from onebyone.core.units import format_count, format_ms, format_percent, format_points, format_ratio

# What the article says.
PARAMETERS = (16_416, 147_488)
FASTER = 23
FEWER = 75

# source: Lin, Chen, Yan, "Network In Network", 2013, arXiv:1312.4400, section 4.6 and its table.
PAPER = (
    "The paper that proposed the averaging head measured it in two places. At the end of Network "
    "in Network it erred less on CIFAR-10 (10.41 %) than a fully connected layer did (11.59 %; "
    "10.88 % with dropout). At the end of a conventional convolutional network it did better than "
    "a bare fully connected layer (16.46 % against 17.56 %), but worse than one with dropout "
    "(15.99 %). The article's network is of the second kind."
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the article beside its measurement.

    Attributes:
        said: The article's claim.
        measured: The measurement here.
        verdict: The verdict in a few words.
        holds: Whether the claim holds; ``None`` if the figures do not show it either way.
    """

    said: str
    measured: str
    verdict: str
    holds: bool | None


def claims(record: ArticleRecord) -> tuple[Claim, ...]:
    """Return the article's claims, each beside its measurement."""
    return (
        _shape_claim(record.layer),
        _parameter_claim(record.layer),
        _speed_claim(record.layer),
        _fewer_claim(record.heads),
        _nonlinearity_claim(record.nonlinearity),
        _overfitting_claim(record.heads),
    )


def summary(record: ArticleRecord) -> str:
    """Return a summary of two sentences."""
    found = claims(record)
    held, failed = (sum(claim.holds is value for claim in found) for value in (True, False))
    unshown = len(found) - held - failed
    count = [f"{held} of the article's {len(found)} claims hold here"]
    if failed:
        count.append(f"{failed} {'does' if failed == 1 else 'do'} not")
    if unshown:
        count.append(f"{unshown} {'is' if unshown == 1 else 'are'} not shown either way")
    sentence = "; ".join(count) + "."
    return f"{sentence} {overfitting(record.heads)[0]}"


# ---------------------------------------------------------------- 512 maps into 32


def _shape_claim(layer: LayerComparison) -> Claim:
    shape = "×".join(map(str, layer.output_shape))
    return Claim(
        said="A 1×1 convolution summarizes 512 maps of 12×12 in 32",
        measured=f"output {shape}",
        verdict="holds" if layer.output_shape == (32, 12, 12) else "does not hold",
        holds=layer.output_shape == (32, 12, 12),
    )


def _parameter_claim(layer: LayerComparison) -> Claim:
    here = (layer.pointwise.params, layer.spatial.params)
    return Claim(
        said=f"It has {PARAMETERS[0]:,} parameters, a 3×3 one {PARAMETERS[1]:,}",
        measured=f"{here[0]:,} and {here[1]:,}",
        verdict="holds" if here == PARAMETERS else "does not hold",
        holds=here == PARAMETERS,
    )


def _speed_claim(layer: LayerComparison) -> Claim:
    warm = [times.ratio.value for times in layer.times]
    cold = [calls.ratio for calls in layer.cold]
    said = f"It is {FASTER} times faster than a 3×3 one"
    measured = f"warm {ratio_range(warm)}, cold {ratio_range(cold)}"
    steady = [times for times in layer.times if not layer.crowded(times)]
    if any(times.ratio.low <= FASTER <= times.ratio.high for times in steady):
        return Claim(said=said, measured=measured, verdict="holds", holds=True)
    if min(cold) <= FASTER <= max(cold):
        verdict = "only in a single cold call"
    elif not steady:
        verdict = "the times were disturbed"
        return Claim(said=said, measured=measured, verdict=verdict, holds=None)
    elif all(times.ratio.verdict == "faster" for times in steady):
        verdict = f"faster, but not {FASTER} times"
    else:
        verdict = "does not hold here"
    return Claim(said=said, measured=measured, verdict=verdict, holds=False)


def warm_speed(times: LayerTimes, layer: LayerComparison) -> str:
    """Explain the warm ratio of times by MACs, the fixed cost of a call, and the kernels' speed.

    The ratio of times differs from that of MACs for two reasons: each call has a fixed cost, and
    one kernel computes more MACs a second than the other. The text gives figures for both.
    """
    fewer = layer.spatial.macs / layer.pointwise.macs
    pointwise, spatial = times.pointwise.median_ms, times.spatial.median_ms
    floor, ratio = times.floor.median_ms, times.ratio.value
    head = (
        f"Batch {times.batch}, {plural(times.pointwise.threads, 'thread')}: the 3×3 takes "
        f"{format_ratio(ratio)} as long for {format_ratio(fewer)} as many MACs. A convolution of a "
        f"single pixel takes {format_ms(floor)}, which is {_share(floor / pointwise)} of the 1×1's "
        f"time and {_share(floor / spatial)} of the 3×3's"
    )
    caution = " Other work used the processor at that time: these times show nothing."
    end = caution if layer.crowded(times) else ""
    if floor >= min(pointwise, spatial):
        return head + ": only this fixed cost is visible." + end
    without = (spatial - floor) / (pointwise - floor)
    rates = [
        cost.macs * times.batch / (ms - floor) / 1e6
        for cost, ms in ((layer.pointwise, pointwise), (layer.spatial, spatial))
    ]
    faster, slower = ("3×3", "1×1") if rates[1] > rates[0] else ("1×1", "3×3")
    return (
        f"{head}; without this fixed cost the ratio is {format_ratio(without)}. The rest of the "
        f"difference from {format_ratio(fewer)} is the speed of the kernels: {rates[0]:.0f} GMAC/s "
        f"in the 1×1 and {rates[1]:.0f} GMAC/s in the 3×3, so the {faster} is "
        f"{format_ratio(max(rates) / min(rates))} as fast as the {slower}."
        f"{end}"
    )


def traffic(layer: LayerComparison) -> str:
    """Describe how much memory the two layers access for each MAC."""
    per_macs = []
    for cost in (layer.pointwise, layer.spatial):
        values = _size(layer.input_shape) + _size(layer.output_shape) + cost.params
        per_macs.append(1000 * 4 * values / cost.macs)
    return (
        f"Both read and write the same maps. With its weights the 1×1 needs at least "
        f"{per_macs[0]:.0f} bytes of memory for every thousand MACs and the 3×3 {per_macs[1]:.0f}, "
        f"at batch 1: {format_ratio(per_macs[0] / per_macs[1])} as many bytes for the same work."
    )


def cold_speed(layer: LayerComparison) -> str:
    """Describe what a single cold call, as in the article, measures."""
    medians, parts = {}, []
    for first, name in (("spatial", "3×3"), ("pointwise", "1×1")):
        ratios = layer.cold_ratios(first)
        if ratios:
            medians[first] = statistics.median(ratios)
            parts.append(f"{ratio_range(ratios)} where the {name} was called first")
    text = (
        f"The article timed one first call of each layer. In "
        f"{plural(len(layer.cold), 'fresh process', 'fresh processes')} the 3×3 took, as against "
        f"the 1×1, {' and '.join(parts)}; {FASTER}× is {_place(FASTER, layer)}."
    )
    firsts = [
        calls.spatial_ms if calls.first == "spatial" else calls.pointwise_ms for calls in layer.cold
    ]
    warm = next(times for times in layer.times if times.batch == 1)
    start = statistics.median(firsts)
    if start > 2 * max(warm.pointwise.median_ms, warm.spatial.median_ms):
        text += (
            f" The layer called first took {format_ms(start)} (median). Once warm, the 1×1 takes "
            f"{format_ms(warm.pointwise.median_ms)} and the 3×3 "
            f"{format_ms(warm.spatial.median_ms)}: the rest is the start of the library, which the "
            f"article's figure includes too."
        )
    if len(medians) == 2 and medians["spatial"] > 1.5 * medians["pointwise"]:
        text += (
            f" So the order matters as much as the layers: {format_ratio(medians['spatial'])} with "
            f"the 3×3 first, {format_ratio(medians['pointwise'])} with the 1×1 first (medians)."
        )
    return text


def _place(figure: float, layer: LayerComparison) -> str:
    ratios = [calls.ratio for calls in layer.cold]
    if figure > max(ratios):
        return "above all of them"
    return "below all of them" if figure < min(ratios) else "among them"


def _size(shape: tuple[int, int, int]) -> int:
    channels, height, width = shape
    return channels * height * width


# ---------------------------------------------------------------- the two heads


def _fewer_claim(heads: Duel) -> Claim:
    before, after = heads.before.cost, heads.after.cost
    fewer = before.params / after.params
    return Claim(
        said=f"The network of convolutions alone has {FEWER} times fewer parameters",
        measured=f"{before.params:,} → {after.params:,}: {fewer:.1f} times fewer",
        verdict="holds" if round(fewer) == FEWER else "does not hold",
        holds=round(fewer) == FEWER,
    )


def cost(duel: Duel) -> str:
    """Say whether the network with fewer parameters is also faster."""
    before, after = duel.before.cost, duel.after.cost
    parameters = _change(before.params, after.params, "parameters")
    macs = _change(before.macs, after.macs, "MACs")
    parts = [f"The {duel.after.name} network has {parameters} and {macs}"]
    for batch, ratio in duel.latency_ratio.items():
        timings = duel.before.latency[batch], duel.after.latency[batch]
        if any(timing.disturbed for timing in timings):
            words = "its time was too disturbed for a verdict"
        elif ratio.verdict == "no difference shown":
            words = "no difference in time is shown"
        elif ratio.verdict == "faster":
            words = f"it is {format_ratio(ratio.value)} faster"
        else:
            words = f"it is {format_ratio(1 / ratio.value)} slower"
        parts.append(f"at batch {batch} {words} ({ratio.low:.2f} … {ratio.high:.2f})")
    text = "; ".join(parts) + "."
    if after.params < before.params and "slower" in text:
        text += " Smaller is not faster here."
    return text


def _overfitting_claim(heads: Duel) -> Claim:
    said = "Averaged class maps instead of fully connected layers reduce over-fitting"
    gap, test = heads.gap_difference, heads.test_difference
    before, after = spread(heads.before.gap), spread(heads.after.gap)
    measured = f"gap {points(before.mean)} → {points(after.mean)} points"
    if gap is None or test is None:
        return Claim(said=said, measured=measured, verdict="one seed shows nothing", holds=None)
    measured += f"; test accuracy {format_points(test.value)} points"
    if direction(gap) >= 0:
        grown = direction(gap) > 0
        return Claim(
            said=said,
            measured=measured,
            verdict="the gap grows" if grown else "no difference of the gaps is shown",
            holds=False if grown else None,
        )
    if direction(test) < 0:
        # A smaller gap but a worse network: it fits all pictures less, also the training pictures.
        return Claim(said=said, measured=measured, verdict="smaller gap, worse net", holds=False)
    return Claim(said=said, measured=measured, verdict="holds", holds=True)


def overfitting(heads: Duel) -> tuple[str, ...]:
    """Say whether the gap between training and test accuracy shrinks, and at what cost."""
    gap, test, train = heads.gap_difference, heads.test_difference, heads.train_difference
    before, after = spread(heads.before.gap), spread(heads.after.gap)
    figures = f"{points(before.mean)} to {points(after.mean)} points"
    if gap is None or test is None or train is None:
        words = "a single seed does not show how much of that is chance"
        return (f"The gap between training and test accuracy goes from {figures}; {words}.",)
    sentences = []
    if direction(gap) == 0:
        sentences.append(
            f"No difference in over-fitting is shown: the gap between training and test accuracy "
            f"goes from {figures} ({around(gap)}), and {_test_clause(test)}."
        )
    else:
        word = "shrinks" if direction(gap) < 0 else "grows"
        sentences.append(
            f"Without the fully connected layers the gap between training and test accuracy {word} "
            f"from {figures} ({around(gap)}), and {_test_clause(test)}."
        )
    if direction(gap) < 0 and direction(train) < 0 and direction(test) < 0:
        sentences.append(
            f"The gap is smaller because the training pictures are fitted less "
            f"({_accuracy(heads.before.train)} → {_accuracy(heads.after.train)}), not because the "
            f"test pictures are recognized better: that is less fitting, not a cure."
        )
    elif direction(gap) < 0 and direction(test) >= 0:
        sentences.append(
            f"Training accuracy goes from {_accuracy(heads.before.train)} to "
            f"{_accuracy(heads.after.train)}: here the article's remedy works."
        )
    sentences += [words for words in (unfinished(heads), stuck(heads)) if words]
    if after.mean <= 0 or before.mean <= 0:
        sentences.append("A gap of zero or below means that there was no over-fitting.")
    return tuple(sentences)


def unfinished(duel: Duel) -> str:
    """Say that the second network fits its training pictures less after the same epochs."""
    train = duel.train_difference
    if train is None or direction(train) >= 0:
        return ""
    losses = [
        statistics.fmean(run.log.epochs[-1].loss for run in network.runs)
        for network in (duel.before, duel.after)
    ]
    return (
        f"After {len(duel.after.runs[0].log.epochs)} epochs the training loss of the "
        f"{duel.after.name} network is {_loss(losses[1])}, against {_loss(losses[0])}: it learns "
        f"more slowly, and longer training may bring it closer."
    )


def stuck(duel: Duel) -> str:
    """Name the trainings that hardly learned, if any: a single one changes a mean a lot."""
    parts = [
        f"{network.stuck} of {len(network.runs)} trainings of the {network.name} network"
        for network in (duel.before, duel.after)
        if network.stuck
    ]
    if not parts:
        return ""
    return f"{' and '.join(parts)} hardly learned anything; the figures include them."


def _test_clause(test: Difference) -> str:
    if direction(test) == 0:
        value = format_points(test.value)
        return f"no difference in test accuracy is shown ({value} points, {around(test)})"
    word = "rises" if direction(test) > 0 else "falls"
    return f"test accuracy {word} by {points(abs(test.value))} points ({around(test)})"


# ---------------------------------------------------------------- the extra non-linearity


def _nonlinearity_claim(duel: Duel) -> Claim:
    test = duel.test_difference
    said = "A 1×1 convolution and a ReLU add a non-linearity that helps"
    if test is None:
        measured = "one seed each"
        return Claim(said=said, measured=measured, verdict="one seed shows nothing", holds=None)
    words = {1: "holds", 0: "no gain is shown", -1: "it harms here"}
    holds = {1: True, 0: None, -1: False}
    return Claim(
        said=said,
        measured=f"test accuracy {format_points(test.value)} points",
        verdict=words[direction(test)],
        holds=holds[direction(test)],
    )


def nonlinearity(duel: Duel) -> str:
    """Say what the extra layer costs and how it changes the accuracy."""
    more = duel.after.cost - duel.before.cost
    head = (
        f"The layer adds {more.params:,} parameters and {format_count(more.macs)} MACs "
        f"({format_percent(more.macs / duel.before.cost.macs, 1)} more)."
    )
    test = duel.test_difference
    if test is None:
        return f"{head} A single seed does not show its effect."
    clause = _test_clause(test)
    text = f"{head} With it, {clause}: {plural(test.n, 'seed')}, the same for both. {stuck(duel)}"
    return text.rstrip()


# ---------------------------------------------------------------- words


def direction(difference: Difference) -> int:
    """Return 1 or −1 if the 95 % interval excludes 0, else 0."""
    return 1 if difference.low > 0 else -1 if difference.high < 0 else 0


def interval(difference: Difference) -> str:
    """Return a difference of fractions with its interval, in points."""
    low, high = format_points(difference.low), format_points(difference.high)
    return f"{format_points(difference.value)} [{low} … {high}]"


def around(difference: Difference) -> str:
    """Return the interval of a difference of fractions, in points."""
    return f"95 % interval {format_points(difference.low)} … {format_points(difference.high)}"


def points(fraction: float) -> str:
    """Return a fraction in points, with a sign only below zero."""
    return f"{100 * fraction:.2f}".replace("-", "−")


def plural(count: int, one: str, many: str = "") -> str:
    """Return a number with its noun."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def ratio_range(ratios: list[float] | tuple[float, ...]) -> str:
    """Return the least and the greatest of the ratios; one if they are equal."""
    low, high = format_ratio(min(ratios)), format_ratio(max(ratios))
    return low if low == high else f"{low.removesuffix('×')}–{high}"


def _loss(value: float) -> str:
    return "under 0.001" if value < 0.001 else f"{value:.2g}"


def _share(fraction: float) -> str:
    return "under 1 %" if fraction < 0.01 else format_percent(fraction, 0)


def _accuracy(values: tuple[float, ...]) -> str:
    return format_percent(spread(values).mean, 1)


def _change(before: int, after: int, noun: str) -> str:
    if after < before:
        return f"{format_ratio(before / after)} fewer {noun}"
    return f"{format_ratio(after / before)} more {noun}" if after > before else f"as many {noun}"
