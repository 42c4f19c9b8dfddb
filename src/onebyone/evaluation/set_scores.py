"""Scores of sets of examples, such as mAP and mIoU, with bootstrap intervals over the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onebyone.core.errors import DataError
from onebyone.core.records import Difference, Metric
from onebyone.core.set_metrics import SetMetric

Array = NDArray[np.float64]

SETS = 1_000  # drawn for an interval
SEED = 0
ENDS = (2.5, 97.5)  # percentiles
METHOD = f"bootstrap over the examples, {SETS:,} sets, seed {SEED}, percentiles"


@dataclass(frozen=True)
class Pooled:
    """What a metric of sets counted in each example of one network's outputs.

    Attributes:
        metric: The metric.
        counts: For each example.
    """

    metric: SetMetric
    counts: Sequence[Any]

    @cached_property
    def value(self) -> float:
        """The score of all examples."""
        return float(self.metric.values(self.counts, np.ones((1, len(self.counts))))[0])

    @cached_property
    def resampled(self) -> Array:
        """The scores of ``SETS`` sets, each of as many examples, drawn with replacement.

        The draws depend on the number of examples alone, so those of two networks are paired.
        """
        n = len(self.counts)
        rng = np.random.default_rng(SEED)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=SETS).astype(np.float64)
        return self.metric.values(self.counts, weights)

    def summary(self) -> Metric:
        """Return the score with its 95 % interval."""
        low, high = np.percentile(self.resampled, ENDS)
        value = self.value
        return Metric(
            name=self.metric.name,
            value=value,
            n=len(self.counts),
            low=min(float(low), value),
            high=max(float(high), value),
            interval=METHOD,
        )

    def difference(self, after: Pooled) -> Difference:
        """Return another network's score minus this one's, on the same examples.

        The p-value is twice the share of sets whose difference has the other sign, where the
        difference itself counts as one of the sets.

        Raises:
            DataError: If the examples are not as many.
        """
        if len(after.counts) != len(self.counts):
            raise DataError(
                "Networks must be scored on the same examples to be compared, got "
                f"{len(self.counts):,} and {len(after.counts):,}."
            )
        drawn = after.resampled - self.resampled
        low, high = np.percentile(drawn, ENDS)
        value = after.value - self.value
        opposite = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        return Difference(
            value=value,
            low=min(float(low), value),
            high=max(float(high), value),
            n=len(self.counts),
            p_value=min(2 * (opposite + 1) / (SETS + 1), 1.0),
            test=f"paired {METHOD}",
        )
