"""Metrics of a whole set of examples that are no means over them, such as mAP and mIoU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebyone.core.errors import OptionError

Array = NDArray[np.float64]


class SetMetric(ABC):
    """A score of a set of examples, computed from what is counted in each of them.

    Its interval comes from sets of the same size, whose examples are drawn from this one.
    """

    name: str

    @abstractmethod
    def counts(self, outputs: Any, targets: Tensor, ignore_index: int | None) -> Sequence[Any]:
        """Return what each example contributes.

        Args:
            outputs: What a network gave on a batch ``(n, …)``, in its own structure.
            targets: The targets of the batch.
            ignore_index: A label that is left out of every count.
        """

    @abstractmethod
    def values(self, counts: Sequence[Any], weights: Array) -> Array:
        """Return the score of several sets, shape ``(sets,)``; higher is better.

        Args:
            counts: What each of ``n`` examples contributes.
            weights: How many times each example is in each set, shape ``(sets, n)``.
        """

    def each(self, counts: Sequence[Any]) -> Array:
        """Return the score of every example by itself, shape ``(n,)``."""
        once = np.ones((1, 1))
        return np.array([self.values([one], once)[0] for one in counts])

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class MeanIoU(SetMetric):
    """Intersection over union of predicted and true pixels, averaged over the classes.

    Intersections and unions are added up over all images before they are divided. A class that is
    in no label and in no prediction is left out of the mean.

    References:
        Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective",
        IJCV 2015, section 4.3.
    """

    name: str = "mIoU"

    def counts(self, outputs: Any, targets: Tensor, ignore_index: int | None) -> list[Array]:
        """Return each image's intersections and unions, shape ``(2, classes)``.

        Args:
            outputs: Scores ``(n, classes, …)``.
            targets: Class numbers ``(n, …)``.
            ignore_index: The class of pixels that are not counted.
        """
        if not isinstance(outputs, Tensor) or outputs.shape[0:1] + outputs.shape[2:] != (
            targets.shape
        ):
            came = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise OptionError(
                "mIoU needs scores of shape (n, classes, …) and class numbers of shape (n, …), got "
                f"{came} and {tuple(targets.shape)}."
            )
        classes = outputs.shape[1]
        predicted = outputs.argmax(dim=1)
        found = []
        for mine, true in zip(predicted, targets, strict=True):
            kept = torch.ones_like(true, dtype=torch.bool)
            if ignore_index is not None:
                kept = true != ignore_index
            pairs = classes * true[kept].long() + mine[kept]
            table = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
            both = table.diagonal()
            either = table.sum(0) + table.sum(1) - both
            found.append(torch.stack([both, either]).double().cpu().numpy())
        return found

    def values(self, counts: Sequence[Any], weights: Array) -> Array:
        """Return the mean over the classes for each set; 0 for a set without any pixel."""
        stacked = np.stack(counts)  # (n, 2, classes)
        both, either = (weights @ stacked[:, part] for part in (0, 1))
        there = either > 0
        shares = np.divide(both, either, out=np.zeros_like(both), where=there)
        means: Array = shares.sum(axis=1) / np.maximum(there.sum(axis=1), 1)
        return means
