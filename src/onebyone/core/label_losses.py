"""Losses on labels, and checks that labels fit the task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onebyone.core.errors import DataError


def class_loss(
    scores: Tensor, targets: Tensor, ignore_index: int | None, label_smoothing: float
) -> Tensor:
    """Return the cross-entropy of classes, for one label an example or one a position.

    Raises:
        DataError: If a label is no class of the network.
    """
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise DataError(labels_of_wrong_type(targets))
    targets = targets.long()
    if targets.ndim != scores.ndim - 1 or targets.shape[1:] != scores.shape[2:]:
        wanted = (len(scores), *scores.shape[2:])
        raise DataError(
            f"Labels must be class numbers of shape {wanted} for outputs of shape "
            f"{tuple(scores.shape)}, got {tuple(targets.shape)}. Reshape them, or give a `loss`."
        )
    if targets.device.type == "cpu":  # reading labels from a GPU would wait for it
        check_class_numbers(targets, scores.shape[1], ignore_index)
    if ignore_index is None:
        # By default torch ignores -100.
        return F.cross_entropy(
            scores, targets, label_smoothing=label_smoothing, ignore_index=_NO_LABEL
        )
    total = F.cross_entropy(
        scores,
        targets,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction="sum",
    )
    return total / (targets != ignore_index).sum().clamp_min(1)


_NO_LABEL = -(2**40)


def labels_loss(
    scores: Tensor, targets: Tensor, ignore_index: int | None, label_smoothing: float
) -> Tensor:
    """Return the binary cross-entropy of labels that are 0 or 1."""
    check_same_shape(scores, targets)
    wanted = targets.to(scores.dtype)
    counted = torch.ones_like(wanted)
    if ignore_index is not None:
        counted = (targets != ignore_index).to(scores.dtype)
        wanted = wanted * counted
    if targets.device.type == "cpu":
        check_labels_there_or_not(targets, ignore_index)
    wanted = wanted * (1 - label_smoothing) + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
    return (losses * counted).sum() / counted.sum().clamp_min(1)


def squared_loss(
    scores: Tensor, targets: Tensor, ignore_index: int | None, label_smoothing: float
) -> Tensor:
    """Return the mean squared error."""
    del ignore_index, label_smoothing
    check_same_shape(scores, targets)
    return F.mse_loss(scores, targets.to(scores.dtype))


def check_same_shape(outputs: Tensor, targets: Tensor) -> None:
    """Check that targets have the shape of the outputs.

    Raises:
        DataError: If they do not.
    """
    if targets.shape != outputs.shape:
        raise DataError(
            f"Targets must have the shape of the outputs, {tuple(outputs.shape)}, got "
            f"{tuple(targets.shape)}. Reshape them, or give a `loss`."
        )


def labels_of_wrong_type(targets: Tensor) -> str:
    """Return the error message for labels that are not integers."""
    cure = "Give `labels.long()`"
    if targets.ndim > 1:
        cure = "Give their `argmax(1)` if they are one-hot, task='multilabel' if several may hold"
    return (
        f"Labels must be class numbers of an integer dtype, got {targets.dtype} of shape "
        f"{tuple(targets.shape)}. {cure}, or a `metric` or `loss` of outputs and targets."
    )


def check_class_numbers(targets: Tensor, classes: int, ignore_index: int | None) -> None:
    """Check that labels are class numbers or ``ignore_index``.

    Raises:
        DataError: If some are outside the range of the classes; says how many.
    """
    counted = targets if ignore_index is None else targets[targets != ignore_index]
    if not counted.numel():
        return
    low, high = int(counted.min()), int(counted.max())
    if low >= 0 and high < classes:
        return
    count = int(((counted < 0) | (counted >= classes)).sum())
    came = str(high if high >= classes else low)
    if low < 0 and high >= classes:
        came = f"{low} and {high}"
    raise DataError(
        f"Labels must be from 0 to {classes - 1}, as the network scores {classes} classes, got "
        f"{came} ({count:,} of {targets.numel():,} are outside). Number the classes from 0, give "
        "the network a score for each, or leave out a number that marks no class by "
        f"`ignore_index` (--ignore-index {low if low < 0 else high})."
    )


def check_labels_there_or_not(targets: Tensor, ignore_index: int | None) -> None:
    """Check that labels are 0, 1 or ``ignore_index``.

    Raises:
        DataError: If some are not; says how many.
    """
    wrong = (targets != 0) & (targets != 1)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    if bool(wrong.any()):
        raise DataError(
            f"Labels of the task 'multilabel' must be 0 or 1, got {targets[wrong][0].item():g} "
            f"({int(wrong.sum()):,} of {targets.numel():,} are others). Mark labels that are not "
            "known by `ignore_index`."
        )
