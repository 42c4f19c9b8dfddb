"""Scores of one or more networks on the same data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onebyone.calibration.infer_task import Known, meaning_of
from onebyone.calibration.meaning import Meaning, TaskLike
from onebyone.core.arguments import checked
from onebyone.core.errors import DataError
from onebyone.core.metrics import AnyMetric, find_metric
from onebyone.core.precision import float32_in
from onebyone.core.records import Metric
from onebyone.core.set_metrics import SetMetric
from onebyone.core.tensor_trees import Inputs
from onebyone.core.torch_state import ordinary_torch
from onebyone.data import Data, as_split
from onebyone.evaluation.batch_scores import LIKENESS, Scoring
from onebyone.evaluation.set_scores import Pooled
from onebyone.evaluation.statistics import AGREEMENT, Array, Scores
from onebyone.networks.halving import Halving
from onebyone.networks.held import any_to_run
from onebyone.networks.outputs import Outputs, check_finite_outputs, comparable, the_one
from onebyone.networks.surgery import as_device, as_network, in_type_of


@runtime_checkable
class Examples(Protocol):
    """Data for evaluation: has a length, and yields batches of inputs and targets."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, *, device: str = "cpu") -> Iterator[tuple[Inputs, Tensor]]:
        """Yield inputs ``(batch, …)`` and targets ``(batch, …)`` in a fixed order."""
        ...


@checked
@ordinary_torch()
def evaluate(
    model: nn.Module,
    data: object,
    *,
    metric: str | AnyMetric | None = None,
    task: TaskLike | Meaning | None = None,
    ignore_index: int | None = None,
    batch_size: int = 250,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Metric:
    """Return a network's score on data, with its 95 % interval.

    Args:
        model: Not modified; a copy is run.
        data: A :class:`Data`, whose test part is used, or what
            :func:`onebyone.data.as_split` takes.
        metric: A built-in name, or a function ``(outputs, targets) -> scores (n,)``, or a metric
            of the whole set, such as :class:`onebyone.MeanAveragePrecision`. The default is the
            task's.
        task: What the outputs mean: the name of a task or a :class:`onebyone.Task`. The default is
            what the data makes certain.
        ignore_index: A label that is left out of every count.
        batch_size: Examples in one forward pass.
        device: Where to run.
        progress: Called with the number of examples done.

    Warns:
        UserWarning: If a batch does not fit into memory and is run in halves.

    Raises:
        DataError: If there are no examples, no labels, or labels that are not class numbers.
        OptionError: If the metric does not give a finite score for each example, or no metric
            follows from the task.
        ModelError: If the network returns no tensors, tensors without the batch dimension, or
            values that are not finite.
    """
    split = examples_of(data)
    outputs = score(
        [model],
        split,
        metric=metric,
        task=_task_in(data, task),
        ignore_index=_ignored_in(data, ignore_index),
        known=known_of(data),
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    if not outputs.labelled:
        meaning = outputs.meaning
        raise DataError(
            "A score needs labels and a metric for them, but the data has no labels or the task "
            f"no metric. {meaning.info()} Give (inputs, targets), a `task` or a `metric`, or "
            "`compare` the network with another, which counts their agreement."
        )
    return outputs.each[0].summary()


def examples_of(data: object) -> Examples:
    """Return the examples to evaluate on: the test part of a :class:`Data`, else all the data."""
    if isinstance(data, Data):
        return data.test
    return data if isinstance(data, Examples) else as_split(data)


def known_of(data: object) -> Known:
    """Return what a data set states about its task, apart from its examples."""
    return Known(classes=len(data.classes)) if isinstance(data, Data) else Known()


def _task_in(data: object, task: TaskLike | Meaning | None) -> TaskLike | Meaning | None:
    return data.task if task is None and isinstance(data, Data) else task


def _ignored_in(data: object, ignore_index: int | None) -> int | None:
    return data.ignore_index if ignore_index is None and isinstance(data, Data) else ignore_index


@dataclass(frozen=True)
class Together:
    """Scores of several networks on the same examples.

    Attributes:
        each: The scores of each network, in the order given.
        apart: Divergence of each from the first, for every example of the data.
        counted: Positions in the data of the scored examples: all except those whose label is
            left out.
        meaning: What the first network's outputs mean.
    """

    each: tuple[Scores, ...]
    apart: tuple[Array, ...]
    counted: NDArray[np.int64]
    meaning: Meaning

    @property
    def divergences(self) -> tuple[float, ...]:
        """Mean divergence of each from the first, over all examples."""
        return tuple(float(values.mean()) for values in self.apart)

    @property
    def labelled(self) -> bool:
        """Whether the scores come from labels, not from agreement with the first network."""
        return self.each[0].metric not in {AGREEMENT, LIKENESS}


@float32_in("float32")
def score(
    models: list[nn.Module],
    split: Examples,
    *,
    metric: str | AnyMetric | None = None,
    task: TaskLike | Meaning | None = None,
    ignore_index: int | None = None,
    known: Known | None = None,
    batch_size: int = 250,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
    copied: bool = False,
) -> Together:
    """Run networks side by side on the same batches and score every example.

    Without labels the score is the agreement with the first network; for outputs without
    decisions it is 1 minus the divergence from the first network's.
    See :func:`evaluate` for the arguments and the errors; ``copied`` says that the networks are
    copies from :func:`copies_to_score`, which may be run themselves.
    """
    if metric is not None:
        find_metric(metric)
    if len(split) == 0:
        raise DataError("Data to evaluate on must have at least one example, got none.")
    place = as_device(device)
    networks = models if copied else copies_to_score(models, place)
    if metric == "accuracy":
        known = replace(known or Known(), asks_accuracy=True)
    meaning = meaning_of(
        networks[0], split, task, known=known, ignore_index=ignore_index, device=device
    )
    scoring = Scoring(meaning, metric, getattr(split, "targets", None))
    parts: list[list[dict[str, Array]]] = [[] for _ in networks]
    apart: list[list[Array]] = [[] for _ in networks]
    counted: list[NDArray[np.int64]] = []
    meanings: list[Meaning] = []
    done, runs = 0, Halving()
    # Not inference mode: the user's data and metric may keep the tensors that they create.
    with torch.no_grad():
        for inputs, targets in split.batches(batch_size, device=device):
            scored = scoring.of_batch(targets, done)
            reference: Outputs | None = None
            for index, network in enumerate(networks):
                typed = in_type_of(network, inputs)
                given = the_one(runs(network, typed))
                outputs = comparable(given, network, len(targets))
                check_finite_outputs(outputs, network, typed)
                reference = outputs if reference is None else reference
                if len(meanings) == index:
                    meanings.append(meaning.of_other(outputs) if index else meaning)
                far = meaning.divergence(reference, outputs, meanings[index])
                apart[index].append(far.double().cpu().numpy())
                parts[index].append(
                    scored.scores(given, outputs, meanings[index], reference, apart[index][-1])
                )
            counted.append(scored.positions)
            done += len(targets)
            if progress is not None:
                progress(done, len(split), "evaluating")
    positions = np.concatenate(counted)
    if not len(positions):
        raise DataError(
            f"Data to evaluate on must have a label that counts, got {done:,} examples that all "
            f"have the label {meaning.ignore_index}, which is left out."
        )
    return Together(
        each=tuple(_joined(scoring.name, scoring.function, batches) for batches in parts),
        apart=tuple(np.concatenate(values) for values in apart),
        counted=positions,
        meaning=meaning,
    )


def copies_to_score(models: Sequence[nn.Module], device: torch.device | str) -> list[nn.Module]:
    """Return copies of networks on a device, which serve for any number of splits."""
    return [any_to_run(as_network(model, scripted=True), device=device) for model in models]


def check_scorable(
    network: nn.Module,
    split: Examples,
    *,
    metric: str | AnyMetric | None,
    task: TaskLike | Meaning | None = None,
    ignore_index: int | None = None,
    device: str = "cpu",
) -> None:
    """Check with two examples and all known labels that :func:`score` will succeed.

    Args:
        network: Not modified.
        split: The data.
        metric: As for :func:`evaluate`.
        task: As for :func:`evaluate`.
        ignore_index: As for :func:`evaluate`.
        device: Where to run.

    Raises:
        OneByOneError: Like :func:`evaluate`, except for missing labels.
    """
    if not isinstance(task, Meaning):
        task = meaning_of(network, split, task, ignore_index=ignore_index, device=device)
    if task.ignore_index is not None:
        return  # the first labels may be ignored ones while later ones count
    score([network], _First(split), metric=metric, task=task, batch_size=2, device=device)


def counted_metric(meaning: Meaning, split: Examples, metric: str | AnyMetric | None) -> str:
    """Return the name of the metric that :func:`score` uses on this data."""
    _, targets = next(iter(split.batches(1)))
    scoring = Scoring(meaning, metric, None)
    scoring.of_batch(targets, 0)
    return scoring.name


@dataclass(frozen=True)
class _First:
    """The first batch of other examples."""

    all: Examples

    @property
    def targets(self) -> Tensor | None:
        """The targets of all the examples, not only the first."""
        return getattr(self.all, "targets", None)

    def __len__(self) -> int:
        return len(self.all)

    def batches(self, batch_size: int, *, device: str = "cpu") -> Iterator[tuple[Inputs, Tensor]]:
        """Yield the first batch."""
        return itertools.islice(self.all.batches(batch_size, device=device), 1)


def _joined(name: str, function: AnyMetric | None, batches: list[dict[str, Array]]) -> Scores:
    columns = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    predictions, pooled = columns.get("predictions"), None
    if isinstance(function, SetMetric):
        pooled = Pooled(function, list(columns["counts"]))
    return Scores(
        metric=name,
        scores=columns["scores"] if pooled is None else np.zeros(0),
        pooled=pooled,
        predictions=None if predictions is None else predictions.astype(np.int64),
        confidences=columns.get("confidences"),
        agrees=columns.get("agrees"),
    )
