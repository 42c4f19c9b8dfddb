"""The record of the article's measurements, which its page and tables are made from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta
from scipy import stats

from onebyone.core.errors import RecordError
from onebyone.core.fields import Amount, Count, Positive, Whole
from onebyone.core.records import (
    FORMAT,
    Cost,
    DataInfo,
    Difference,
    Machine,
    Metric,
    Ratio,
    Record,
    Timing,
    TrainLog,
    timed_in,
)

# ---------------------------------------------------------------- 512 maps into 32

CROWDED = 1.25  # slowdown with several threads above which other work disturbed the timing
STUCK = 0.5  # share of the median training accuracy below which a run has hardly learned


@dataclass(frozen=True, kw_only=True)
class LayerTimes(Record):
    """Warm, interleaved times of the two layers at one batch size and number of threads.

    Attributes:
        pointwise: Time of the 1×1 convolution.
        spatial: Time of the 3×3 convolution.
        floor: Time of a convolution of one pixel and one map: the fixed cost of a call.
        ratio: Time of the 3×3 / time of the 1×1.
    """

    batch: Whole
    pointwise: Timing
    spatial: Timing
    floor: Timing
    ratio: Ratio

    @property
    def disturbed(self) -> bool:
        """Whether either time varies too much for a verdict."""
        return self.pointwise.disturbed or self.spatial.disturbed


@dataclass(frozen=True, kw_only=True)
class ColdCalls(Record):
    """One call of each layer in a fresh process.

    Attributes:
        first: The layer that was called first.
    """

    first: Literal["pointwise", "spatial"]
    pointwise_ms: Positive
    spatial_ms: Positive

    @property
    def ratio(self) -> float:
        """Time of the 3×3 / time of the 1×1, as measured in the article."""
        return self.spatial_ms / self.pointwise_ms


@dataclass(frozen=True, kw_only=True)
class LayerComparison(Record):
    """A 1×1 and a 3×3 convolution from 512 maps to 32.

    Attributes:
        input_shape: Shape of one input, without the batch.
        output_shape: Shape of both layers' output, without the batch.
        pointwise: Cost of the 1×1 convolution for one input.
        spatial: Cost of the 3×3 convolution for one input.
        times: Times for each batch size and number of threads.
        cold: Cold calls, one record for each fresh process.
    """

    input_shape: tuple[Whole, Whole, Whole]
    output_shape: tuple[Whole, Whole, Whole]
    pointwise: Cost
    spatial: Cost
    times: Annotated[tuple[LayerTimes, ...], Meta(min_length=1)]
    cold: Annotated[tuple[ColdCalls, ...], Meta(min_length=1)]

    def check(self) -> None:
        """Check that one input, and each other batch size, was timed with one thread.

        Raises:
            RecordError: If one was not.
        """
        alone = {times.batch for times in self.times if times.pointwise.threads == 1}
        for batch in (1, *(times.batch for times in self.times)):
            if batch not in alone:
                raise RecordError(f"`times` must have batch {batch} with one thread.")

    def crowded(self, times: LayerTimes) -> bool:
        """Whether times are unfit for a verdict: disturbed, or slower than with one thread.

        If other work uses the cores, threads wait for each other. This slows all rounds alike, so
        the spread does not show it.
        """
        alone = next(
            one for one in self.times if one.batch == times.batch and one.pointwise.threads == 1
        )
        return times.disturbed or any(
            many.median_ms > CROWDED * few.median_ms
            for many, few in ((times.pointwise, alone.pointwise), (times.spatial, alone.spatial))
        )

    def cold_ratios(self, first: str) -> tuple[float, ...]:
        """Return the ratios of the processes in which that layer was called first, sorted."""
        return tuple(sorted(calls.ratio for calls in self.cold if calls.first == first))


# ---------------------------------------------------------------- networks over seeds


@dataclass(frozen=True, kw_only=True)
class SeedRun(Record):
    """One training of a network.

    Attributes:
        train: Accuracy on training pictures; ``None`` for a trial.
        test: Accuracy on test pictures; ``None`` for a trial.
    """

    network: str
    seed: int
    log: TrainLog
    train: Metric | None = None
    test: Metric | None = None

    @property
    def gap(self) -> float:
        """Training accuracy minus test accuracy."""
        assert self.train is not None
        assert self.test is not None
        return self.train.value - self.test.value

    @property
    def validation(self) -> float:
        """Validation accuracy after the last epoch."""
        return self.log.epochs[-1].validation or 0.0


@dataclass(frozen=True, kw_only=True)
class Spread(Record):
    """A quantity over seeds.

    Attributes:
        std: Standard deviation over the seeds; ``None`` for a single seed.
    """

    mean: float
    std: Amount | None
    n: Whole


@dataclass(frozen=True, kw_only=True)
class NetworkRuns(Record):
    """One network, trained from several seeds.

    Attributes:
        cost: Cost for one input.
        latency: Latency by batch size.
        trials: One training for each learning rate tried, from a separate seed.
        runs: One training for each seed, at the rate of the best trial on validation data.
    """

    name: str
    cost: Cost
    latency: Annotated[Mapping[Whole, Timing], Meta(min_length=1)]
    trials: tuple[SeedRun, ...]
    runs: Annotated[tuple[SeedRun, ...], Meta(min_length=1)]

    def check(self) -> None:
        """Check that each run has accuracies and epochs, and each trial has epochs.

        Raises:
            RecordError: If one has none.
        """
        for name, runs in (("runs", self.runs), ("trials", self.trials)):
            for place, each in enumerate(runs):
                if not each.log.epochs:
                    raise RecordError(f"`{name}[{place}].log` must have an epoch.")
        for place, each in enumerate(self.runs):
            if each.train is None or each.test is None:
                raise RecordError(f"`runs[{place}]` must have `train` and `test`.")

    @property
    def train(self) -> tuple[float, ...]:
        """Training accuracies, one for each seed."""
        return tuple(run.train.value for run in self.runs if run.train is not None)

    @property
    def test(self) -> tuple[float, ...]:
        """Test accuracies, one for each seed."""
        return tuple(run.test.value for run in self.runs if run.test is not None)

    @property
    def gap(self) -> tuple[float, ...]:
        """Training minus test accuracy, one for each seed."""
        return tuple(run.gap for run in self.runs)

    @property
    def stuck(self) -> int:
        """The number of runs that hardly learned."""
        return sum(value < STUCK * statistics.median(self.train) for value in self.train)

    @property
    def learning_rate(self) -> float:
        """The highest learning rate of the runs."""
        return self.runs[0].log.learning_rate

    def curve(self, value: Callable[[SeedRun, int], float]) -> tuple[Spread, ...]:
        """Return the spread of a quantity over the seeds, for each epoch.

        Args:
            value: Takes a run and the epoch's position in its log.
        """
        epochs = min(len(run.log.epochs) for run in self.runs)
        return tuple(spread([value(run, place) for run in self.runs]) for place in range(epochs))


@dataclass(frozen=True, kw_only=True)
class Duel(Record):
    """Two networks, trained from the same seeds on the same data.

    Attributes:
        before: The network that the article starts from.
        after: The network that the article proposes.
        latency_ratio: For each batch size, time of ``before`` / time of ``after``.
    """

    before: NetworkRuns
    after: NetworkRuns
    latency_ratio: Mapping[Whole, Ratio]

    def check(self) -> None:
        """Check that both networks have the same number of runs, and a time for each batch size.

        Raises:
            RecordError: If not.
        """
        if len(self.before.runs) != len(self.after.runs):
            raise RecordError(
                f"`before` and `after` must have the same number of runs, got "
                f"{len(self.before.runs)} and {len(self.after.runs)}."
            )
        for name, network in (("before", self.before), ("after", self.after)):
            timed_in(f"{name}.latency", network.latency, self.latency_ratio)

    @property
    def test_difference(self) -> Difference | None:
        """Test accuracy after minus before, paired over the seeds."""
        return paired(self.before.test, self.after.test, grain=self._grain)

    @property
    def train_difference(self) -> Difference | None:
        """Training accuracy after minus before, paired over the seeds."""
        return paired(self.before.train, self.after.train, grain=self._grain)

    @property
    def gap_difference(self) -> Difference | None:
        """Generalization gap after minus before, paired over the seeds."""
        return paired(self.before.gap, self.after.gap, grain=self._grain)

    @property
    def _grain(self) -> float:
        test = self.before.runs[0].test
        return 1 / test.n if test is not None else 0.0


def spread(values: tuple[float, ...] | list[float]) -> Spread:
    """Return the mean and standard deviation of values, one for each seed."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), std=std, n=len(values))


def paired(
    before: tuple[float, ...], after: tuple[float, ...], *, grain: float = 0.0
) -> Difference | None:
    """Return the mean of ``after - before`` with Student's 95 % interval over the pairs.

    Returns ``None`` for a single pair, which does not show the effect of chance.

    Args:
        before: One value for each seed.
        after: Values of the same seeds.
        grain: The resolution of the values, such as one example's share of an accuracy. It is the
            least standard deviation: a few equal differences may be luck.
    """
    changes = [new - old for old, new in zip(before, after, strict=True)]
    n = len(changes)
    if n < 2:
        return None
    mean, deviation = statistics.fmean(changes), max(grain, statistics.stdev(changes))
    error = deviation / n**0.5
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    if error > 0:
        p_value = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    else:
        p_value = 1.0 if mean == 0 else 0.0
    return Difference(
        value=mean,
        low=mean - reach,
        high=mean + reach,
        n=n,
        p_value=p_value,
        test=f"paired t test over {n} seeds",
    )


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True, kw_only=True)
class Weighting(Record):
    """One feature map before and after a 1×1 filter of a single weight.

    Attributes:
        weight: Weight of the filter.
        network: A description of the map's network and layer.
        image: The input, as a ``data:`` URL.
        before: The map, on the scale of ``after``.
        after: The filter's output.
        before_range: Least and greatest value of the map.
        after_range: Least and greatest value of the output.
    """

    weight: float
    network: str
    image: str
    before: str
    after: str
    before_range: tuple[float, float]
    after_range: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Reduction(Record):
    """Maps of a trained layer before and after a trained 1×1 convolution.

    Attributes:
        network: A description of the layers.
        test: The network's accuracy on test pictures.
        image: The input, as a ``data:`` URL.
        before: Its maps before the 1×1 convolution, as one picture.
        after: Its maps after the 1×1 convolution, as one picture.
        maps: The numbers of maps before and after.
        kept: Share of the variance of the maps before that the best linear reconstruction from
            the maps after explains, pixel by pixel.
        best: The largest possible share for that number of maps: that of principal components.
        examples: The number of test pictures for the shares.
    """

    network: str
    test: Metric
    image: str
    before: str
    after: str
    maps: tuple[Whole, Whole]
    kept: float
    best: float
    examples: Whole


@dataclass(frozen=True, kw_only=True)
class ActivationMap(Record):
    """A test picture with the class activation maps of a prediction.

    Attributes:
        index: Position in the test data.
        label: The true class.
        predicted: The class with the highest score.
        image: The picture, as a ``data:`` URL.
        predicted_map: Map of the predicted class over the picture.
        label_map: Map of the true class over it; empty if the prediction is right.
    """

    index: Count
    label: str
    predicted: str
    image: str
    predicted_map: str
    label_map: str = ""

    @property
    def right(self) -> bool:
        """Whether the prediction is the label."""
        return self.label == self.predicted


# ---------------------------------------------------------------- the whole


@dataclass(frozen=True, kw_only=True)
class ArticleRecord(Record):
    """Measurements of every claim of the article; prints as tables.

    Attributes:
        heads: The classic network and the one with only convolutions.
        nonlinearity: The network without and with the extra 1×1 convolution and ReLU.
        seconds: Wall time by stage, in this run. Stages loaded from a folder take almost none.
    """

    onebyone: str
    created: str
    data: DataInfo
    machine: Machine
    layer: LayerComparison
    nonlinearity: Duel
    heads: Duel
    weighting: Weighting
    reduction: Reduction
    activations: tuple[ActivationMap, ...]
    seconds: Mapping[str, Amount] = field(default_factory=dict)
    format: int = FORMAT

    def __str__(self) -> str:
        # Imported late, since the tables module imports this one.
        from onebyone.article.tables import article_tables  # noqa: PLC0415

        return "\n\n".join(str(table) for table in article_tables(self))
