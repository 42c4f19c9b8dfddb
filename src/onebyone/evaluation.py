"""Scores on data, and the paired statistics of two networks on the same examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from onebyone.data import Data, as_split
from onebyone.errors import DataError, ModelError, OptionError, UnknownNameError
from onebyone.outputs import (
    Outputs,
    comparable,
    in_float32,
    is_classifier_output,
    mean_divergence,
    the_one,
)
from onebyone.precision import float32_in, in_full
from onebyone.records import Difference, Metric
from onebyone.sites import as_device, as_network, in_evaluation_mode, in_type_of, run, tensors_in

Array = NDArray[np.float64]

# A metric takes outputs ``(n, …)``, or several in whatever the network gives them in, and targets
# ``(n, …)``, and gives a score for each example, shape ``(n,)``, higher is better; its value on a
# data set is the mean.
MetricFunction = Callable[[Any, Tensor], Tensor]

# What counts in accuracy's place where there are no labels: predictions like the first network's,
# or where there are no predictions how like the outputs are, which is 1 less their divergence.
AGREEMENT = "agreement"
LIKENESS = "likeness"
CALIBRATION_BINS = 15
LEVEL_Z = 1.959963984540054  # of the 95 % interval
RESAMPLES = 4_000
BOOTSTRAP_FROM = 30  # examples


@runtime_checkable
class Examples(Protocol):
    """Data as evaluation needs it: sized, in batches of inputs and targets."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, *, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs ``(batch, …)`` and targets ``(batch, …)`` in a fixed order."""
        ...


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 where the highest score is the target's, else 0.

    Args:
        outputs: Scores ``(n, classes)``.
        targets: Class numbers ``(n,)``.
    """
    return (outputs.argmax(dim=1) == targets).float()


METRICS: dict[str, MetricFunction] = {"accuracy": accuracy}


def find_metric(metric: str | MetricFunction) -> tuple[str, MetricFunction]:
    """Return a metric's name and function.

    Raises:
        UnknownNameError: If there is no built-in metric of that name.
    """
    if isinstance(metric, str):
        if metric not in METRICS:
            raise UnknownNameError("metric", metric, METRICS)
        return metric, METRICS[metric]
    return getattr(metric, "__name__", type(metric).__name__), metric


def is_unlabelled(targets: Tensor) -> bool:
    """Whether a batch has no targets: a split then gives ``(batch, 0)``."""
    return targets.ndim == 2 and targets.shape[1] == 0


def feature_error(ours: Tensor, theirs: Tensor, name: str) -> Tensor:
    """Return a module's mean squared error relative to the variance of what it should give.

    The variance, not the mean square: what a module gives on average must not hide what it tells.

    Args:
        ours: The module's outputs in the network that learns.
        theirs: In its teacher, of the same shape.
        name: The module's, for the error.

    Raises:
        ModelError: If the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ModelError(
            f"The outputs of {name!r} must be of one shape in the network and its teacher, got "
            f"{tuple(ours.shape)} and {tuple(theirs.shape)}. Leave it out of `features`."
        )
    wanted = in_full(theirs)
    return F.mse_loss(in_full(ours), wanted) / wanted.var().clamp_min(1e-12)


# ---------------------------------------------------------------- one network


@dataclass(frozen=True)
class Scores:
    """Scores of one network, an example each.

    Attributes:
        scores: Of the metric, shape ``(n,)``.
        predictions: Class numbers ``(n,)``; ``None`` unless a classifier.
        confidences: Probability of the predicted class ``(n,)``; ``None`` unless a classifier.
    """

    metric: str
    scores: Array
    predictions: NDArray[np.int64] | None = None
    confidences: Array | None = None

    def summary(self) -> Metric:
        """Return the mean with its 95 % interval."""
        return summarize(self.metric, self.scores)

    def calibration_error(self) -> float | None:
        """Return the expected calibration error, where scores are hits and misses."""
        if self.confidences is None or self.metric != "accuracy":
            return None
        return expected_calibration_error(self.confidences, self.scores)


def evaluate(
    model: nn.Module,
    data: object,
    *,
    metric: str | MetricFunction = "accuracy",
    batch_size: int = 250,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Metric:
    """Return a network's mean score on data, with its 95 % interval.

    Args:
        model: Not modified; where a module is in training mode a copy is run.
        data: A :class:`Data`, of which the test part is taken, or what
            :func:`onebyone.data.as_split` takes.
        metric: A built-in name, or a function ``(outputs, targets) -> scores (n,)``.
        batch_size: Examples a pass.
        device: Where to run.
        progress: Told of the examples done.

    Raises:
        DataError: If there are no examples, or they have no labels, or ones that are no classes.
        OptionError: If the metric does not give a score for each example.
        ModelError: If the network gives no tensors, or some without the batch.
    """
    split = examples_of(data)
    outputs = score(
        [model], split, metric=metric, batch_size=batch_size, device=device, progress=progress
    )
    if not outputs.labelled:
        raise DataError(
            "Accuracy needs labels, and the data has none. Give (inputs, targets), or `compare` "
            "the network with another, which counts where they agree."
        )
    return outputs.each[0].summary()


def examples_of(data: object) -> Examples:
    """Return what to evaluate on: of a :class:`Data` the test part, else the data as a split."""
    if isinstance(data, Data):
        return data.test
    return data if isinstance(data, Examples) else as_split(data)


@dataclass(frozen=True)
class Together:
    """Networks on the same examples.

    Attributes:
        each: The scores of each network, in the order given.
        divergences: Mean divergence of each from the first.
    """

    each: tuple[Scores, ...]
    divergences: tuple[float, ...]

    @property
    def labelled(self) -> bool:
        """Whether the scores say what is right, not merely what is as with the first."""
        return self.each[0].metric not in {AGREEMENT, LIKENESS}


@float32_in("float32")
def score(
    models: list[nn.Module],
    split: Examples,
    *,
    metric: str | MetricFunction = "accuracy",
    batch_size: int = 250,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Together:
    """Run networks side by side on the same batches and score every example.

    Where accuracy is asked and there are no labels, the agreement with the first is counted, or
    where outputs are no class scores how like its own they are.
    See :func:`evaluate` for the arguments and the errors.
    """
    name, function = find_metric(metric)
    if len(split) == 0:
        raise DataError("Data to evaluate on must have at least one example, got none.")
    place = as_device(device)
    networks = [
        in_evaluation_mode(as_network(model, scripted=True), device=place) for model in models
    ]
    parts: list[list[dict[str, Array]]] = [[] for _ in networks]
    apart: list[list[Array]] = [[] for _ in networks]
    done = 0
    with torch.inference_mode():
        for inputs, targets in split.batches(batch_size, device=device):
            reference: Outputs | None = None
            for index, network in enumerate(networks):
                given = the_one(run(network, in_type_of(network, inputs)))
                outputs = comparable(given, network, len(inputs))
                if reference is None:
                    reference = outputs
                    if metric == "accuracy":
                        name, targets = _classes(outputs, targets)  # noqa: PLW2901
                        if not done:
                            check_labels(outputs[0], getattr(split, "targets", None))
                far = mean_divergence(reference, outputs).double().cpu().numpy()
                apart[index].append(far)
                parts[index].append(
                    {"scores": 1.0 - far}
                    if name == LIKENESS
                    else _batch_scores(given, targets, name, function)
                )
            done += len(inputs)
            if progress is not None:
                progress(done, len(split), "evaluating")
    return Together(
        each=tuple(_joined(name, batches) for batches in parts),
        divergences=tuple(float(np.concatenate(values).mean()) for values in apart),
    )


def check_scorable(
    network: nn.Module, split: Examples, *, metric: str | MetricFunction, device: str = "cpu"
) -> None:
    """Check on two examples, and on all labels that are known, that :func:`score` will do.

    Args:
        network: Not modified.
        split: The data.
        metric: As for :func:`evaluate`.
        device: Where to run.

    Raises:
        OneByOneError: As :func:`evaluate`, but for missing labels.
    """
    score([network], _First(split), metric=metric, batch_size=2, device=device)


@dataclass(frozen=True)
class _First:
    """The first examples of others."""

    all: Examples

    @property
    def targets(self) -> Tensor | None:
        """Those of all of them."""
        return getattr(self.all, "targets", None)

    def __len__(self) -> int:
        return len(self.all)

    def batches(self, batch_size: int, *, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the first batch."""
        return itertools.islice(self.all.batches(batch_size, device=device), 1)


def _classes(outputs: Outputs, targets: Tensor) -> tuple[str, Tensor]:
    """Return what is counted where accuracy is asked, and the classes that are right.

    Without labels they are those that the network predicts, to be agreed with, if it predicts any.
    """
    unlabelled = is_unlabelled(targets)
    if len(outputs) > 1 or not is_classifier_output(outputs[0]):
        if unlabelled:
            return LIKENESS, targets
        shapes = ", ".join(str(tuple(each.shape)) for each in outputs)
        raise OptionError(
            "Accuracy needs a classifier's scores of shape (n, classes), got outputs of shape "
            f"{shapes} and targets of shape {tuple(targets.shape)}. Give a `metric` of outputs and "
            "targets, or data without labels: then it is counted how like the outputs are."
        )
    if unlabelled:
        return AGREEMENT, outputs[0].argmax(dim=1)
    if targets.ndim != 1:
        raise DataError(
            f"Labels must be class numbers of shape (n,), got targets of shape "
            f"{tuple(targets.shape)}. Give their `argmax(1)` if they are one-hot, or a `metric` of "
            "outputs and targets."
        )
    return "accuracy", targets


def check_labels(outputs: Tensor, targets: Tensor | None) -> None:
    """Check that a network has a score for every label.

    Args:
        outputs: Of the network.
        targets: All that are known, ``(n,)``; nothing is checked unless they are class numbers.
            Negative ones mark examples without a class.

    Raises:
        DataError: If a label is higher than the classes go.
    """
    if targets is None or targets.ndim != 1 or targets.is_floating_point():
        return
    if not is_classifier_output(outputs) or not len(targets):
        return
    classes, highest = outputs.shape[1], int(targets.max())
    if highest >= classes:
        count = int((targets >= classes).sum())
        raise DataError(
            f"Labels must be from 0 to {classes - 1}, as the network scores {classes} classes, got "
            f"{highest} ({count:,} of {len(targets):,} are too high). Number the classes from 0, "
            "or give the network a score for each."
        )


def _batch_scores(
    given: Any, targets: Tensor, name: str, function: MetricFunction
) -> dict[str, Array]:
    given = in_float32(given)
    try:
        scores = function(given, targets)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(given))
        raise OptionError(
            f"The metric {name!r} failed on outputs {shapes} and targets "
            f"{tuple(targets.shape)}: {error}"
        ) from error
    shape = tuple(getattr(scores, "shape", ()))  # a user's function may give anything
    if shape != (len(targets),):
        came = shape or type(scores).__name__
        raise OptionError(
            f"The metric {name!r} must give one score an example, shape ({len(targets)},), "
            f"got {came}. Return per-example scores; their mean is taken here."
        )
    values = {"scores": scores.double().cpu().numpy()}
    if isinstance(given, Tensor) and is_classifier_output(given):
        best = given.softmax(dim=1).max(dim=1)
        values["predictions"] = best.indices.cpu().numpy()
        values["confidences"] = best.values.double().cpu().numpy()
    return values


def _joined(name: str, batches: list[dict[str, Array]]) -> Scores:
    columns = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    predictions = columns.get("predictions")
    return Scores(
        metric=name,
        scores=columns["scores"],
        predictions=None if predictions is None else predictions.astype(np.int64),
        confidences=columns.get("confidences"),
    )


# ---------------------------------------------------------------- intervals and tests


def summarize(name: str, scores: Array) -> Metric:
    """Return a mean with its 95 % interval: Wilson's for hits and misses, else Student's."""
    n, mean = len(scores), float(scores.mean())
    if bool(np.isin(scores, (0.0, 1.0)).all()):
        low, high = wilson_interval(mean, n)
    else:
        spread = float(scores.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
        reach = float(stats.t.ppf(0.975, n - 1)) * spread if n > 1 else 0.0
        low, high = mean - reach, mean + reach
    return Metric(name=name, value=mean, n=n, low=low, high=high)


def wilson_interval(share: float, n: int, *, z: float = LEVEL_Z) -> tuple[float, float]:
    """Return the Wilson score interval of a share of ``n`` examples (Wilson 1927).

    Examples:
        >>> low, high = wilson_interval(0.5, 100)
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - reach), min(1.0, center + reach)


def expected_calibration_error(
    confidences: Array, hits: Array, *, bins: int = CALIBRATION_BINS
) -> float:
    """Return the expected calibration error in equal bins (Guo et al. 2017, section 2)."""
    places = np.minimum((confidences * bins).astype(int), bins - 1)
    total = 0.0
    for place in range(bins):
        inside = places == place
        if inside.any():
            total += float(abs(confidences[inside].mean() - hits[inside].mean())) * inside.sum()
    return float(total) / len(hits)


def agreement(first: Scores, second: Scores) -> Metric | None:
    """Return the share of examples with the same prediction; ``None`` unless classifiers."""
    same = agreeing(first, second)
    return None if same is None else same.summary()


def agreeing(first: Scores, second: Scores) -> Scores | None:
    """Return for each example whether the two predict the same; ``None`` unless classifiers."""
    if first.predictions is None or second.predictions is None:
        return None
    same = (first.predictions == second.predictions).astype(np.float64)
    return Scores(AGREEMENT, same)


def paired_difference(before: Scores, after: Scores) -> Difference:
    """Return the mean score after less that before, tested on the same examples.

    For hits and misses: the exact McNemar test, and the interval of Agresti and Min (2005),
    which adds half an example to each cell. For other scores the paired bootstrap, with a test
    that turns the signs of the differences at random; below 30 examples, where resampling is too
    sure of itself, Student's paired t.
    """
    both = np.stack([before.scores, after.scores])
    if bool(np.isin(both, (0.0, 1.0)).all()):
        return _hits_difference(before.scores, after.scores)
    differences = after.scores - before.scores
    n, value = len(differences), float(differences.mean())
    if n < 2 or float(differences.std()) <= 1e-12 * abs(value):
        # Without spread the statistic is 0/0, or infinite where every example moved alike.
        p_value = 0.0 if n >= 2 and value else 1.0
        return Difference(
            value=value, low=value, high=value, n=n, p_value=p_value, test="paired t test"
        )
    return _student_difference(differences) if n < BOOTSTRAP_FROM else _resampled(differences)


def _hits_difference(before: Array, after: Array) -> Difference:
    n = len(before)
    gained = int(((before == 0) & (after == 1)).sum())
    lost = int(((before == 1) & (after == 0)).sum())
    changed = gained + lost
    b, c, m = gained + 0.5, lost + 0.5, n + 2
    center = (b - c) / m
    reach = LEVEL_Z * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return Difference(
        value=(gained - lost) / n,
        low=max(center - reach, -1.0),
        high=min(center + reach, 1.0),
        n=n,
        p_value=float(stats.binomtest(gained, changed, 0.5).pvalue) if changed else 1.0,
        test="exact McNemar test, Agresti-Min interval",
    )


def _student_difference(differences: Array) -> Difference:
    result = stats.ttest_1samp(differences, 0.0)
    interval = result.confidence_interval(0.95)
    return Difference(
        value=float(differences.mean()),
        low=float(interval.low),
        high=float(interval.high),
        n=len(differences),
        p_value=float(result.pvalue),
        test="paired t test",
    )


def _resampled(differences: Array, *, seed: int = 0) -> Difference:
    """Return the mean with its percentile bootstrap interval, and a sign-flipping test."""
    n, value = len(differences), float(differences.mean())
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    flipped = np.empty(RESAMPLES)
    for place in range(RESAMPLES):
        means[place] = differences[rng.integers(0, n, n)].mean()
        flipped[place] = (differences * rng.choice((-1.0, 1.0), n)).mean()
    low, high = np.percentile(means, [2.5, 97.5])
    # The signs as they are count among those that could have come.
    extreme = int((np.abs(flipped) >= abs(value) * (1 - 1e-12)).sum())
    return Difference(
        value=value,
        low=float(low),
        high=float(high),
        n=n,
        p_value=(extreme + 1) / (RESAMPLES + 1),
        test=f"sign-flipping test, paired bootstrap interval, {RESAMPLES:,} resamples each",
    )
