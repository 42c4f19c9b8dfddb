"""Per-example scores of one batch of outputs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import DataError, OptionError
from onebyone.core.label_losses import (
    check_class_numbers,
    check_labels_there_or_not,
    labels_of_wrong_type,
)
from onebyone.core.metrics import (
    AnyMetric,
    MetricFunction,
    accuracy,
    f1,
    find_metric,
    pixel_accuracy,
)
from onebyone.core.set_metrics import MeanIoU, SetMetric
from onebyone.core.tensor_trees import tensors_in
from onebyone.core.units import capitalized
from onebyone.core.user_code import users_code
from onebyone.evaluation.statistics import AGREEMENT, Array
from onebyone.networks.outputs import Outputs, in_float32

# The score of outputs without decisions: 1 minus their divergence.
LIKENESS = "likeness"


def is_unlabelled(targets: Tensor) -> bool:
    """Whether a batch has no targets: a split then gives ``(batch, 0)``."""
    return targets.ndim == 2 and targets.shape[1] == 0


class Scoring:
    """Chooses the metric on the first batch, and checks labels.

    Args:
        meaning: What the first network's outputs mean.
        metric: The requested metric.
        targets: All targets, where they are known beforehand.
    """

    def __init__(
        self, meaning: Meaning, metric: str | AnyMetric | None, targets: Tensor | None
    ) -> None:
        self.meaning = meaning
        self.name = ""
        self.function: AnyMetric | None = None
        self.asked = metric
        self._targets = targets

    def of_batch(self, targets: Tensor, start: int) -> _Batch:
        """Return the scorer of a batch whose first example is at position ``start``."""
        if not self.name:
            self.name, self.function = self._chosen(targets)
        return _Batch(self, targets, start)

    def check(self, outputs: Outputs, targets: Tensor, start: int) -> None:
        """Check a batch's labels; on the first call all labels that are known."""
        check_labels(self.meaning, outputs, targets)
        if not start and self._targets is not None:
            check_labels(self.meaning, outputs, self._targets)

    def _chosen(self, targets: Tensor) -> tuple[str, AnyMetric | None]:
        meaning, metric = self.meaning, self.asked
        chosen = default_metric(meaning, targets) if metric is None else metric
        if chosen is None or (is_unlabelled(targets) and not callable(metric)):
            return (AGREEMENT if meaning.decides else LIKENESS), None
        name, function = find_metric(chosen)
        needed = _NEEDED.get(function)
        if needed is not None and meaning.task.name not in needed:
            raise OptionError(
                f"{capitalized(name)} needs the task {' or '.join(map(repr, needed))}, got "
                f"targets of shape {tuple(targets.shape)}. {meaning.info()} Give a `metric` of "
                "outputs and targets, or data without labels to compare the networks' outputs."
            )
        return name, function


def default_metric(meaning: Meaning, targets: Tensor) -> str | AnyMetric | None:
    """Return a task's metric; ``None`` if it has none or the targets are of another task."""
    whole = not targets.is_floating_point()
    if is_unlabelled(targets) or (meaning.task.name == "embedding" and whole):
        return None  # class labels cannot score embeddings
    return meaning.task.metric


# The tasks that each built-in metric applies to.
_NEEDED: dict[AnyMetric, tuple[str, ...]] = {
    accuracy: ("classification",),
    pixel_accuracy: ("segmentation",),
    MeanIoU(): ("segmentation",),
    f1: ("multilabel",),
}


@dataclass(frozen=True)
class _Batch:
    """Scores the outputs of one batch."""

    scoring: Scoring
    targets: Tensor
    start: int

    @property
    def positions(self) -> NDArray[np.int64]:
        """The positions in the data of the scored examples."""
        return self.start + np.flatnonzero(self._counts.cpu().numpy())

    @property
    def _counts(self) -> Tensor:
        """A mask ``(n,)`` of the scored examples: those with a label that is not ignored."""
        values = self._values
        if values is None:
            return torch.ones(len(self.targets), dtype=torch.bool)
        return values.reshape(len(values), -1).any(dim=1)

    @property
    def _values(self) -> Tensor | None:
        """A mask of the labels that are not ignored; ``None`` if none is."""
        ignored = self.scoring.meaning.ignore_index
        whole = self.targets.numel() and not self.targets.is_floating_point()
        labels = whole or self.scoring.meaning.task.measure.decides
        if ignored is None or is_unlabelled(self.targets) or not labels:
            return None
        return self.targets != ignored

    def scores(
        self,
        given: Any,
        outputs: Outputs,
        meaning: Meaning,
        reference: Outputs,
        apart: Array,
    ) -> dict[str, Array]:
        """Return one column a quantity, with a value for each scored example."""
        scoring = self.scoring
        if scoring.function is not None and not callable(scoring.asked):
            scoring.check(outputs, self.targets, self.start)
        columns: dict[str, Tensor] = {}
        if meaning.decides:
            columns |= _decided(meaning, scoring.meaning, outputs, reference)
        if scoring.name == AGREEMENT:
            columns["scores"] = columns["agrees"]
        elif scoring.function is None:
            columns["scores"] = torch.from_numpy(1.0 - apart)
        elif isinstance(scoring.function, SetMetric):
            return self._set_counts(scoring.function, given, outputs, meaning, columns)
        else:
            columns["scores"] = self._metric_scores(given, outputs, meaning)
        return self._counted(columns)

    def _counted(self, columns: dict[str, Tensor]) -> dict[str, Array]:
        counts = self._counts.cpu()
        return {name: _column(values.cpu()[counts]) for name, values in columns.items()}

    def _set_counts(
        self,
        metric: SetMetric,
        given: Any,
        outputs: Outputs,
        meaning: Meaning,
        columns: dict[str, Tensor],
    ) -> dict[str, Array]:
        """Return what a metric of sets counts in each example, beside the other columns."""
        scored = meaning.parts[0].scores(outputs[0]) if meaning.decides else in_float32(given)
        must = f"The metric {metric.name!r} must count in each example"
        with _metrics_code(must, given, self.targets):
            found = metric.counts(scored, self.targets, self.scoring.meaning.ignore_index)
        counts: NDArray[Any] = np.empty(len(found), dtype=object)
        for place, one in enumerate(found):
            counts[place] = one
        kept = counts[self._counts.cpu().numpy()]
        return {**self._counted(columns), "counts": kept}

    def _metric_scores(self, given: Any, outputs: Outputs, meaning: Meaning) -> Tensor:
        scoring, function = self.scoring, self.scoring.function
        assert function is not None
        assert not isinstance(function, SetMetric)
        values = self._values
        if function in (pixel_accuracy, f1):
            chosen = function(meaning.parts[0].scores(outputs[0]), self.targets, values)
        else:
            chosen = _own_scores(in_float32(given), self.targets, scoring.name, function)
        counts = self._counts.to(chosen.device)
        wrong = ~torch.isfinite(chosen) & counts
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            raise OptionError(
                f"The metric {scoring.name!r} must give a finite score for each example, got "
                f"{float(chosen[place])} for example {self.start + place}. Give a score for it, or "
                "drop the example."
            )
        return chosen


def _column(values: Tensor) -> NDArray[Any]:
    return values.numpy() if values.dtype == torch.int64 else values.double().numpy()


def _decided(
    meaning: Meaning, first: Meaning, outputs: Outputs, reference: Outputs
) -> dict[str, Tensor]:
    """Return the decisions of outputs, and the share that agrees with the first network's."""
    measure, scores = meaning.task.measure, meaning.parts[0].scores(outputs[0])
    mine = measure.decisions(scores)
    theirs = measure.decisions(first.parts[0].scores(reference[0]))
    same = (mine == theirs).reshape(len(mine), -1).double()
    # All labels of an example are one prediction; each pixel or position is one of its own.
    each = meaning.task.name in ("segmentation", "sequence")
    share = same.mean(dim=1) if each else same.amin(dim=1)
    columns = {"agrees": share}
    if meaning.classifies:
        best = scores.softmax(dim=1).max(dim=1)
        columns |= {"predictions": best.indices, "confidences": best.values}
    return columns


def check_labels(meaning: Meaning, outputs: Outputs, targets: Tensor) -> None:
    """Check that labels fit a network's task.

    Args:
        meaning: What its outputs mean.
        outputs: A batch of its outputs.
        targets: Some labels, or all that are known.

    Raises:
        DataError: If a label is not a class number, or has the wrong type or shape.
    """
    if len(outputs) != 1 or is_unlabelled(targets):
        return
    name, shape = meaning.task.name, tuple(outputs[0].shape)
    if name == "multilabel":
        if targets.shape[1:] != shape[1:]:
            raise DataError(
                f"Labels of the task 'multilabel' must be of shape {('n', *shape[1:])}, as the "
                f"outputs are, got {('n', *targets.shape[1:])}."
            )
        check_labels_there_or_not(targets, meaning.ignore_index)
    if name not in ("classification", "segmentation"):
        return
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise DataError(labels_of_wrong_type(targets))
    if targets.ndim != len(shape) - 1 or targets.shape[1:] != shape[2:]:
        wanted = f"(n{''.join(f', {size}' for size in shape[2:])}{'' if shape[2:] else ','})"
        raise DataError(
            f"Labels must be class numbers of shape {wanted}, got targets of shape "
            f"{tuple(targets.shape)}. Give their `argmax(1)` if they are one-hot, or a `metric` of "
            "outputs and targets."
        )
    check_class_numbers(targets, shape[1], meaning.ignore_index)


def _metrics_code(must: str, given: Any, targets: Tensor) -> AbstractContextManager[None]:
    """Name the shapes where the code of a metric fails."""
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(given))
    on = f"outputs {shapes} and targets {tuple(targets.shape)}"
    return users_code(must, "Check what it expects", on=on, raises=OptionError)


def _own_scores(given: Any, targets: Tensor, name: str, function: MetricFunction) -> Tensor:
    must = f"The metric {name!r} must give one score for each example"
    with _metrics_code(must, given, targets):
        scores = function(given, targets)
    shape = tuple(getattr(scores, "shape", ()))  # a user's function may give anything
    if shape != (len(targets),):
        came = shape or type(scores).__name__
        raise OptionError(
            f"{must}, shape ({len(targets)},), got {came}. Return one score for each example, not "
            "their mean."
        )
    return scores.double()
