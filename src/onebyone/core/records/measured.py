"""Records of what was measured of one network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onebyone.core.errors import RecordError
from onebyone.core.fields import Count, Share, Whole
from onebyone.core.records.base import Record, in_order
from onebyone.core.records.timing import Timing
from onebyone.core.units import format_percent

# Metrics that are shares of something counted: shown as percentages, their differences in points.
SHARES = frozenset({"accuracy", "agreement", "pixel accuracy", "mIoU", "mAP"})


@dataclass(frozen=True, kw_only=True)
class TaskInfo(Record):
    """What a network's outputs were taken to mean, and why.

    Attributes:
        name: ``classification``, ``multilabel``, ``regression``, ``segmentation``,
            ``sequence``, ``restoration``, ``embedding``, ``unknown``, or a user's own.
        how: ``given``, or why it is certain, or why it is not known.
        divergence: How far outputs are apart is measured in this.
        probabilities: Whether the outputs are probabilities already, as measured on examples.
        ignore_index: The label that is left out of every count and loss.
    """

    name: str
    how: str
    divergence: str
    probabilities: bool = False
    ignore_index: int | None = None

    @property
    def known(self) -> bool:
        """Whether the task is given or certain."""
        return self.name != "unknown"

    def __str__(self) -> str:
        left_out = (
            "" if self.ignore_index is None else f" Labels of {self.ignore_index} are left out."
        )
        if self.known:
            return f"Task: {self.name} ({self.how}).{left_out}"
        return (
            f"Task: not known ({self.how}). All differences of outputs count, by their "
            f"{self.divergence}. State it by `task` (--task).{left_out}"
        )


@dataclass(frozen=True, kw_only=True)
class Metric(Record):
    """A mean over examples, or a score of the whole set, with its 95 % interval.

    Attributes:
        low: Lower end of the interval.
        high: Upper end.
        interval: Name of the interval's method.
    """

    name: str
    value: float
    n: Whole
    low: float
    high: float
    interval: str = ""

    def check(self) -> None:
        """Check that the interval's ends are in order, and a fraction between 0 and 1."""
        in_order("low", self.low, "high", self.high)
        if self.is_fraction and not 0 <= self.value <= 1:
            raise RecordError(f"`value` of {self.name} must be from 0 to 1, got {self.value}.")

    def __str__(self) -> str:
        if self.is_fraction:
            return (
                f"{format_percent(self.value, 2)} "
                f"[{100 * self.low:.2f}–{100 * self.high:.2f}], n = {self.n:,}"
            )
        return f"{self.value:.4g} [{self.low:.4g}–{self.high:.4g}], n = {self.n:,}"

    @property
    def is_fraction(self) -> bool:
        """Whether the value is a share of what is counted, shown as a percentage."""
        return self.name in SHARES


@dataclass(frozen=True, kw_only=True)
class Measured(Record):
    """Everything measured of one network.

    Attributes:
        macs: For one input.
        file_bytes: Size of its weights as safetensors.
        peak_activation_bytes: Most bytes of activations alive at once in a forward pass of one
            input, each from the operation that writes it to the last that reads it.
        latency: Time of the whole network by runtime.
        metric: On test data; ``None`` where there is none.
        train_metric: On a sample of the training data.
        calibration_error: Expected calibration error of the confidence (15 equal bins), test data.
    """

    params: Count
    macs: Count
    file_bytes: Count
    latency: Mapping[str, Timing]
    metric: Metric | None = None
    train_metric: Metric | None = None
    calibration_error: Share | None = None
    peak_activation_bytes: Count | None = None

    @property
    def generalization_gap(self) -> float | None:
        """Training metric less test metric."""
        if self.metric is None or self.train_metric is None:
            return None
        return self.train_metric.value - self.metric.value


@dataclass(frozen=True, kw_only=True)
class Difference(Record):
    """The metric after less the metric before, on the same examples.

    Attributes:
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
        p_value: Of no difference.
        test: Name of the paired test and of the interval.
    """

    value: float
    low: float
    high: float
    n: Whole
    p_value: Share
    test: str

    def check(self) -> None:
        """Check that the interval's ends are in order."""
        in_order("low", self.low, "high", self.high)
