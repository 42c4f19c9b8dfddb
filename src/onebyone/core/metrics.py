"""Metrics by name: a score for each example, or of a whole set; higher is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onebyone.core.errors import UnknownNameError
from onebyone.core.label_losses import check_same_shape
from onebyone.core.measures import by_example
from onebyone.core.set_metrics import MeanIoU, SetMetric


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 where the highest score is the target's, else 0.

    Args:
        outputs: Scores ``(n, classes)``.
        targets: Class numbers ``(n,)``.
    """
    return (outputs.argmax(dim=1) == targets).float()


def pixel_accuracy(outputs: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the share of each example's positions whose highest score is the target's.

    Args:
        outputs: Scores ``(n, classes, …)``.
        targets: Class numbers ``(n, …)``.
        counted: A mask ``(n, …)`` of the positions that count. The default is all.
    """
    right = by_example((outputs.argmax(dim=1) == targets).double())
    weights = torch.ones_like(right) if counted is None else by_example(counted.double())
    return (right * weights).sum(dim=1) / weights.sum(dim=1)


def f1(outputs: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return each example's F1 over the labels; 1 if no label is true and none is predicted.

    Args:
        outputs: Scores ``(n, labels)``; above 0 a label is predicted.
        targets: 1 for a true label, else 0.
        counted: A mask of the labels that count. The default is all.
    """
    there, said = (by_example(each > 0).double() for each in (targets, outputs))
    weights = torch.ones_like(there) if counted is None else by_example(counted).double()
    found = (there * said * weights).sum(dim=1)
    both = ((there + said) * weights).sum(dim=1)
    return torch.where(both > 0, 2 * found / both.clamp_min(1), 1.0)


def negative_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each example's mean squared error, negated so that higher is better."""
    check_same_shape(outputs, targets)
    return -by_example((outputs - targets).double().square()).mean(dim=1)


def psnr(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return each example's peak signal-to-noise ratio in dB, for a peak of 1."""
    error = -negative_squared_error(outputs, targets)
    return -10 * error.clamp_min(1e-12).log10()


MetricFunction = Callable[[Any, Tensor], Tensor]
"""A function of outputs ``(n, …)``, or of the network's structure of several, and targets
``(n, …)``. It returns a score for each example, shape ``(n,)``; higher is better. The metric's
value on a data set is the mean."""

AnyMetric = MetricFunction | SetMetric
"""A metric whose value on a data set is the mean over its examples, or one of the whole set."""

METRICS: dict[str, AnyMetric] = {
    "accuracy": accuracy,
    "pixel accuracy": pixel_accuracy,
    "mIoU": MeanIoU(),
    "F1": f1,
    "negative squared error": negative_squared_error,
    "PSNR": psnr,
}


def find_metric(metric: str | AnyMetric) -> tuple[str, AnyMetric]:
    """Return a metric's name, and its function or the metric of sets itself.

    Raises:
        UnknownNameError: If there is no built-in metric of that name.
    """
    if isinstance(metric, str):
        if metric not in METRICS:
            raise UnknownNameError("metric", metric, METRICS)
        return metric, METRICS[metric]
    if isinstance(metric, SetMetric):
        return metric.name, metric
    return getattr(metric, "__name__", type(metric).__name__), metric
