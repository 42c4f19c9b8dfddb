"""Scores of examples, their confidence intervals, and paired tests of two networks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from onebyone.core.errors import DataError
from onebyone.core.records import Difference, Metric
from onebyone.core.statistics import mean_interval, share_interval, sign_flip_test
from onebyone.evaluation.set_scores import Pooled

Array = NDArray[np.float64]

# The score without labels: the share of decisions equal to the first network's.
AGREEMENT = "agreement"
CALIBRATION_BINS = 15
LEVEL_Z = 1.959963984540054  # of the 95 % interval


@dataclass(frozen=True)
class Scores:
    """One network's scores, one for each example.

    Attributes:
        scores: The metric's values, shape ``(n,)``; none for a metric of the whole set.
        predictions: Class numbers ``(n,)``; ``None`` unless a classifier.
        confidences: Probability of the predicted class ``(n,)``; ``None`` unless a classifier.
        agrees: Share of each example's decisions that equal the first network's, ``(n,)``;
            ``None`` if outputs make no decisions.
        pooled: What a metric of the whole set counted; ``None`` for a mean over examples.
    """

    metric: str
    scores: Array
    predictions: NDArray[np.int64] | None = None
    confidences: Array | None = None
    agrees: Array | None = None
    pooled: Pooled | None = None

    def summary(self) -> Metric:
        """Return the mean, or the score of the whole set, with its 95 % interval."""
        if self.pooled is not None:
            return self.pooled.summary()
        return summarize(self.metric, self.scores)

    def calibration_error(self) -> float | None:
        """Return the expected calibration error; ``None`` unless the metric is accuracy."""
        if self.confidences is None or self.metric != "accuracy":
            return None
        return expected_calibration_error(self.confidences, self.scores)


def summarize(name: str, scores: Array) -> Metric:
    """Return a mean with its 95 % interval: Wilson's for hits and misses, else Student's or Hall's.

    Raises:
        DataError: If there are no scores, or some are not finite.
    """
    _check_finite(name, scores)
    n, mean = len(scores), float(scores.mean())
    if _are_hits(scores):
        low, high = share_interval(int(scores.sum()), n)
        method = "Wilson"
    else:
        low, high, method = mean_interval(scores, reach=_reach(scores))
    return Metric(name=name, value=mean, n=n, low=low, high=high, interval=method)


def _are_hits(scores: Array) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _check_finite(name: str, scores: Array) -> None:
    if not len(scores):
        raise DataError(f"A mean of {name!r} needs at least one example, got none.")
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        raise DataError(
            f"Scores of {name!r} must be finite numbers, got {scores[wrong[0]]} for example "
            f"{wrong[0]} ({len(wrong):,} of {len(scores):,}). Fix the metric or drop the example."
        )


def _reach(scores: Array) -> float:
    """Return the range that two examples' scores are assumed to differ by at most."""
    return float(np.ptp(scores)) or float(np.abs(scores).max())


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
    """Return the share of equal decisions; ``None`` if outputs make no decisions."""
    same = agreeing(first, second)
    return None if same is None else same.summary()


def agreeing(first: Scores, second: Scores) -> Scores | None:
    """Return the agreement on each example; ``None`` if outputs make no decisions.

    Args:
        first: Scores of a network; of the first one scored, unless both predict classes.
        second: Scores of another network.
    """
    if first.predictions is None or second.predictions is None:
        if first.agrees is None or second.agrees is None:
            return None
        return Scores(AGREEMENT, second.agrees)
    same = (first.predictions == second.predictions).astype(np.float64)
    return Scores(AGREEMENT, same)


def paired_difference(before: Scores, after: Scores) -> Difference:
    """Return the score after minus the score before, with a paired test.

    Hits and misses use the exact McNemar test, and the interval of Agresti and Min (2005),
    which adds half an example to each cell. Other scores use a sign-flip test, exact for few
    examples, and the interval of :func:`onebyone.core.statistics.mean_interval`. Metrics of a
    whole set, such as mAP, use a bootstrap over the examples.

    Raises:
        DataError: If there are no scores, or some are not finite.
    """
    if before.pooled is not None and after.pooled is not None:
        return before.pooled.difference(after.pooled)
    both = np.stack([before.scores, after.scores])
    for scores in both:
        _check_finite(before.metric, scores)
    if _are_hits(both):
        return _hits_difference(before.scores, after.scores)
    differences = after.scores - before.scores
    low, high, interval = mean_interval(differences, reach=_reach(both))
    p_value, test = sign_flip_test(differences)
    return Difference(
        value=float(differences.mean()),
        low=low,
        high=high,
        n=len(differences),
        p_value=p_value,
        test=f"{test}; {interval}",
    )


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
