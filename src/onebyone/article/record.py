"""What was measured of the article on 1×1 convolutions: all that its page and tables read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from scipy import stats

from onebyone.records import (
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
)

# ---------------------------------------------------------------- 512 maps into 32

CROWDED = 1.25  # times as long with more threads than with one: they wait, they do not work
STUCK = 0.5  # of the median training accuracy: a run below it has learned next to nothing


@dataclass(frozen=True, kw_only=True)
class LayerTimes(Record):
    """The two layers at one batch size and number of threads, warm and in turn.

    Attributes:
        pointwise: Time of the 1×1 convolution.
        spatial: Time of the 3×3 convolution.
        floor: Time of a convolution of one pixel, one map to one: what a call costs at least.
        ratio: Time of the 3×3 / time of the 1×1.
    """

    batch: int
    pointwise: Timing
    spatial: Timing
    floor: Timing
    ratio: Ratio

    @property
    def disturbed(self) -> bool:
        """Whether either time spread too widely for a verdict."""
        return self.pointwise.disturbed or self.spatial.disturbed


@dataclass(frozen=True, kw_only=True)
class ColdCalls(Record):
    """One call of each layer in a process that had computed nothing before.

    Attributes:
        first: Which of the two was called first.
    """

    first: Literal["pointwise", "spatial"]
    pointwise_ms: float
    spatial_ms: float

    @property
    def ratio(self) -> float:
        """Time of the 3×3 / time of the 1×1, as the article took it."""
        return self.spatial_ms / self.pointwise_ms


@dataclass(frozen=True, kw_only=True)
class LayerComparison(Record):
    """A 1×1 and a 3×3 convolution from 512 maps to 32.

    Attributes:
        input_shape: Of one input, without the batch.
        output_shape: Of both layers, likewise.
        pointwise: Cost of the 1×1 convolution for one input.
        spatial: Cost of the 3×3 convolution for one input.
        times: A batch size and number of threads each.
        cold: A fresh process each.
    """

    input_shape: tuple[int, int, int]
    output_shape: tuple[int, int, int]
    pointwise: Cost
    spatial: Cost
    times: tuple[LayerTimes, ...]
    cold: tuple[ColdCalls, ...]

    def crowded(self, times: LayerTimes) -> bool:
        """Whether times are no basis for a verdict: disturbed, or slower than with one thread.

        Where other work takes the cores, threads wait for each other, steadily: the spread does
        not show it.
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
        train: Accuracy on training pictures as they are; ``None`` of a trial.
        test: Accuracy on test pictures; ``None`` of a trial.
    """

    network: str
    seed: int
    log: TrainLog
    train: Metric | None = None
    test: Metric | None = None

    @property
    def gap(self) -> float:
        """Training accuracy less test accuracy."""
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
        std: Standard deviation over the seeds; ``None`` of a single one.
    """

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class NetworkRuns(Record):
    """One network, trained from several seeds.

    Attributes:
        cost: For one input.
        latency: By batch size.
        trials: The learning rates that were tried, from a seed of their own.
        runs: A seed each, at the rate whose trial was best on validation data.
    """

    name: str
    cost: Cost
    latency: Mapping[int, Timing]
    trials: tuple[SeedRun, ...]
    runs: tuple[SeedRun, ...]

    @property
    def train(self) -> tuple[float, ...]:
        """Training accuracies, a seed each."""
        return tuple(run.train.value for run in self.runs if run.train is not None)

    @property
    def test(self) -> tuple[float, ...]:
        """Test accuracies, a seed each."""
        return tuple(run.test.value for run in self.runs if run.test is not None)

    @property
    def gap(self) -> tuple[float, ...]:
        """Training less test accuracy, a seed each."""
        return tuple(run.gap for run in self.runs)

    @property
    def stuck(self) -> int:
        """How many of the runs learned next to nothing."""
        return sum(value < STUCK * statistics.median(self.train) for value in self.train)

    @property
    def learning_rate(self) -> float:
        """The highest learning rate of the runs."""
        return self.runs[0].log.learning_rate

    def curve(self, value: Callable[[SeedRun, int], float]) -> tuple[Spread, ...]:
        """Return a quantity of each epoch over the seeds.

        Args:
            value: Takes a run and the epoch's position in its log.
        """
        epochs = min(len(run.log.epochs) for run in self.runs)
        return tuple(spread([value(run, place) for run in self.runs]) for place in range(epochs))


@dataclass(frozen=True, kw_only=True)
class Duel(Record):
    """Two networks, trained from the same seeds on the same data.

    Attributes:
        before: The one that the article starts from.
        after: The one that it proposes.
        latency_ratio: By batch size, time of ``before`` / time of ``after``.
    """

    before: NetworkRuns
    after: NetworkRuns
    latency_ratio: Mapping[int, Ratio]

    @property
    def test_difference(self) -> Difference | None:
        """Test accuracy after less before, paired over the seeds."""
        return paired(self.before.test, self.after.test, grain=self._grain)

    @property
    def train_difference(self) -> Difference | None:
        """Training accuracy after less before, paired over the seeds."""
        return paired(self.before.train, self.after.train, grain=self._grain)

    @property
    def gap_difference(self) -> Difference | None:
        """Generalization gap after less before, paired over the seeds."""
        return paired(self.before.gap, self.after.gap, grain=self._grain)

    @property
    def _grain(self) -> float:
        test = self.before.runs[0].test
        return 1 / test.n if test is not None else 0.0


def spread(values: tuple[float, ...] | list[float]) -> Spread:
    """Return the mean and standard deviation of values, one a seed."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), std=std, n=len(values))


def paired(
    before: tuple[float, ...], after: tuple[float, ...], *, grain: float = 0.0
) -> Difference | None:
    """Return the mean of ``after - before`` with Student's 95 % interval over the pairs.

    ``None`` of a single pair: it says nothing about how much chance there is in it.

    Args:
        before: A value each seed.
        after: Of the same seeds.
        grain: The step that the values move in, such as one example's share of an accuracy. The
            standard deviation is taken to be this at least: a few equal differences of counts
            are luck, not certainty.
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
        weight: Of the filter.
        network: Where the map is from, in words.
        image: The input, as a ``data:`` address.
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
    """Maps of a trained layer, and what a trained 1×1 convolution makes of them.

    Attributes:
        network: The layers, in words.
        test: The network's accuracy on test pictures.
        image: The input, as a ``data:`` address.
        before: Its maps before the 1×1 convolution, as one picture.
        after: Its maps after it.
        maps: Their numbers before and after.
        kept: Share of the variance of the maps before that the best linear reconstruction from
            the maps after explains, pixel by pixel.
        best: The same for the best maps there are of that number: the principal components.
        examples: Test pictures that the shares were taken over.
    """

    network: str
    test: Metric
    image: str
    before: str
    after: str
    maps: tuple[int, int]
    kept: float
    best: float
    examples: int


@dataclass(frozen=True, kw_only=True)
class ActivationMap(Record):
    """A test picture with the class activation maps of a prediction.

    Attributes:
        index: Position in the test data.
        label: The true class.
        predicted: The class with the highest score.
        image: As a ``data:`` address.
        predicted_map: Map of the predicted class over the picture.
        label_map: Map of the true class over it; empty where the prediction is right.
    """

    index: int
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
    """Every claim of the article, measured: prints as tables, and is what its page is made from.

    Attributes:
        heads: The classic network, then the one with only convolutions.
        nonlinearity: The network without, then with the extra 1×1 convolution and ReLU.
        seconds: Wall time by stage, in this run: stages taken from a folder count almost nothing.
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
    seconds: Mapping[str, float] = field(default_factory=dict)
    format: int = FORMAT

    def __str__(self) -> str:
        # Imported late: the tables' words are computed from this very record.
        from onebyone.article.tables import article_tables  # noqa: PLC0415

        return "\n\n".join(str(table) for table in article_tables(self))
