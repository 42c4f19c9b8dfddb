"""Finds the task of a network's outputs: the given one, or one that is certain.

The shape alone proves nothing: outputs of shape ``(n, k)`` may be class scores, coordinates or an
embedding. A task is inferred only if labels, probabilities or the network's library make it
certain. Otherwise the task is unknown, and every difference of outputs counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from onebyone.calibration.meaning import Meaning, TaskLike, joined, parts_of
from onebyone.core.errors import DataError, ModelError
from onebyone.core.measures import is_distribution
from onebyone.core.records import ModelSource
from onebyone.core.task import TASKS, UNKNOWN, Task, find_task
from onebyone.core.tensor_trees import batch_size
from onebyone.data import Data, Split
from onebyone.networks.detectors import RawDetector
from onebyone.networks.halving import Halving
from onebyone.networks.held import any_to_run
from onebyone.networks.outputs import Outputs, check_finite_outputs, comparable, paired, the_one
from onebyone.networks.surgery import as_network, in_type_of

# The number of examples to inspect outputs on.
LOOKED_AT = 64
# How much a second run may differ, relative to the largest output: the order of sums may change.
REPEATS = 1e-3
REPEATS_ROUGHLY = 0.05  # in half precision
BATCH_VALUES = 1_250_000  # most input values per batch
# If chance hits this many labels with at most this probability, the outputs are class scores.
SURE = 1e-3
# Packages of torchvision whose networks do not classify.
_TORCHVISION_OTHERS = ("segmentation", "detection", "optical_flow", "feature_extraction")
_SEGMENTERS = "torchvision.models.segmentation"
# What transformers calls the tasks of a network for images with several labels.
_PROBLEMS = {
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
}
_LIBRARY_CLASSES = (1000, 21_843, 21_841, 11_821, 365)


@dataclass(frozen=True)
class Known:
    """Facts about a task other than the network and its examples.

    Attributes:
        classes: Number of the data's classes; 0 if there are none.
        spec: The name that the network was loaded by, such as ``timm:resnet18``.
        task: The task in the record of the network's run.
        learns: Whether the network will learn the labels; its outputs now are then no evidence.
        asks_accuracy: Whether the user asks for accuracy, which needs classes.
    """

    classes: int = 0
    spec: str | None = None
    task: str | None = None
    learns: bool = False
    asks_accuracy: bool = False

    @classmethod
    def of(cls, source: ModelSource | None, **also: Any) -> Known:
        """Return the facts in a network's source, and the others."""
        if source is None:
            return cls(**also)
        return cls(spec=source.spec, task=source.task, **also)


def meaning_of(
    model: nn.Module,
    data: Any,
    task: TaskLike | Meaning | None = None,
    *,
    known: Known | None = None,
    ignore_index: int | None = None,
    device: torch.device | str = "cpu",
) -> Meaning:
    """Return what a network's outputs mean, measured on some examples.

    Args:
        model: Not modified.
        data: A :class:`Data`, a split, or anything with ``batches``; labels are used if there are
            any.
        task: The task. The default is the data's task; else one that is certain; else unknown. A
            :class:`Meaning` is returned unchanged.
        known: Other facts.
        ignore_index: The label that every count and loss ignores.
        device: Where to run.

    Raises:
        UnknownNameError: If there is no such task.
        ModelError: If the network cannot be run, its outputs are not finite, or their shape does
            not fit the task.
    """
    if isinstance(task, Meaning):
        return task.to(device)
    known = known or Known()
    if isinstance(data, Data):
        task = data.task if task is None else task
        ignore_index = data.ignore_index if ignore_index is None else ignore_index
        known = replace(known, classes=known.classes or len(data.classes))
        data = data.train
    given = None if task is None else find_task(task)
    seen = look_at(model, data, device=device)
    if given is not None:
        _check_fits(given, seen.outputs)
        found, how = given, "given"
    else:
        found, how = _inferred(as_network(model, scripted=True), seen, known, ignore_index)
    parts = parts_of(found, seen.outputs)
    if len(parts) == 1 and parts[0].form == "probabilities" and given is not None:
        how += ", its outputs are probabilities"
    return Meaning(found, how, parts, ignore_index)


def _check_fits(task: Task, outputs: Outputs) -> None:
    if any(task.measure.fits(each) for each in joined(task, outputs)):
        return
    shapes = ", ".join(str(tuple(each.shape)) for each in outputs)
    wanted = "(n, …, classes)" if task.name == "sequence" else "(n, classes, …)"
    raise ModelError(
        f"The task {task.name!r} needs outputs of shape {wanted}, two classes or more, got "
        f"{shapes}. Give another `task` (--task)."
    )


@dataclass(frozen=True)
class Seen:
    """Some examples and a network's outputs for them.

    Attributes:
        inputs: The examples; ``None`` if a network takes more than a tensor.
        outputs: The network's outputs.
        targets: The targets of these examples; ``None`` without labels.
        all_targets: The targets of all examples, if known.
    """

    inputs: Tensor | None
    outputs: Outputs
    targets: Tensor | None
    all_targets: Tensor | None


def look_at(model: nn.Module, data: Any, *, device: torch.device | str = "cpu") -> Seen:
    """Run a network on some examples, drawn at random if possible.

    Raises:
        ModelError: If the network cannot be run, or its outputs are not finite.
        DataError: If there is no example.
    """
    network = any_to_run(as_network(model, scripted=True), device=device)
    split = getattr(data, "split", data)  # calibration data has one
    part = split.take(LOOKED_AT, 0) if isinstance(split, Split) else split
    inputs, targets = [], []
    given: list[Outputs] = []
    count = 0
    size = LOOKED_AT
    runs = Halving(warns=False)
    if isinstance(split, Split):
        size = max(1, min(LOOKED_AT, BATCH_VALUES // max(split.inputs.values, 1)))
    for batch, labels in part.batches(size, device=str(device)):
        typed = in_type_of(network, batch)
        size_now = batch_size(batch)
        outputs = comparable(the_one(runs(network, typed)), network, size_now)
        check_finite_outputs(outputs, network, typed)
        if not given:
            again = comparable(the_one(runs(network, typed)), network, size_now)
            _check_repeats(network, outputs, again)
        if isinstance(batch, Tensor):
            inputs.append(batch)
        targets.append(labels)
        given.append(outputs)
        count += size_now
        if count >= LOOKED_AT:
            break
    if not count:
        raise DataError("Data must have at least one example, got none.")
    joined = tuple(_joined(column) for column in zip(*given, strict=True))
    labels = _joined(targets)
    unlabelled = labels.ndim == 2 and labels.shape[1] == 0
    return Seen(
        inputs=_joined(inputs) if inputs else None,
        outputs=joined,
        targets=None if unlabelled else labels,
        all_targets=getattr(split, "targets", None),
    )


def _check_repeats(network: nn.Module, outputs: Outputs, again: Outputs) -> None:
    """Check that two runs on the same inputs gave the same outputs, except for rounding.

    Args:
        network: The network, for the error.
        outputs: Outputs of the first run.
        again: Outputs of the second run.

    Raises:
        ModelError: If they differ.
    """
    for first, second in paired(outputs, again):
        exact = first.dtype in (torch.float32, torch.float64)
        largest = float(first.abs().max()) if first.numel() else 0.0
        if first.shape != second.shape or not bool(torch.isfinite(second).all()):
            apart = math.inf
        else:
            apart = float((first - second).abs().max()) if first.numel() else 0.0
        if apart > (REPEATS if exact else REPEATS_ROUGHLY) * largest:
            raise ModelError(
                "A network must give the same outputs each time that it is run on the same inputs, "
                f"but those of {type(network).__name__} differ by {apart / largest:.1e} of the "
                "largest in a second run. In evaluation mode its forward must not depend on a "
                "counter, the time, or random numbers of NumPy, Python or a GPU."
            )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the batches as one; only the first batch if the examples differ in size."""
    alike = all(part.shape[1:] == parts[0].shape[1:] for part in parts)
    return torch.cat(list(parts)) if alike else parts[0]


def _inferred(
    network: nn.Module, seen: Seen, known: Known, ignore_index: int | None
) -> tuple[Task, str]:
    """Return the task and why it is certain, or the unknown task and why none is certain."""
    shape = tuple(seen.outputs[0].shape[1:])
    recorded = _of_record(seen.outputs, known)
    of_detector = network.task if isinstance(network, RawDetector) else None
    if of_detector is not None:
        return of_detector, "the network gives a detector's raw outputs"
    if len(seen.outputs) > 1:
        return recorded or (UNKNOWN, f"the network gives {len(seen.outputs)} tensors")
    outputs = seen.outputs[0]
    doubt = f"the data has no labels, and outputs of shape {_shape(shape)} may mean anything"
    if seen.targets is not None:
        found = _of_targets(outputs, seen, known, ignore_index)
        if isinstance(found, tuple):
            return found
        doubt = found
    vector = outputs.ndim == 2 and outputs.shape[1] > 1
    return (
        recorded
        or (_of_what_is_known(network, outputs, seen, known) if vector else None)
        or _of_segmenters(network, outputs)
        or _of_transformers(network, outputs)
        or _of_probabilities(outputs)
        or (UNKNOWN, doubt)
    )


def _of_record(outputs: Outputs, known: Known) -> tuple[Task, str] | None:
    """Return the task in the run's record, if it is a known one that fits the outputs."""
    task = TASKS.get(known.task or "")
    if task is None or not any(task.measure.fits(each) for each in outputs):
        return None
    return task, "as the network's run says"


def _of_what_is_known(
    network: nn.Module, outputs: Tensor, seen: Seen, known: Known
) -> tuple[Task, str] | None:
    """Return classification if the data, the library or the user says so."""
    if 1 < known.classes <= outputs.shape[1] and seen.targets is None:
        return TASKS["classification"], f"the data has {known.classes} classes"
    library = _library_of(network, outputs.shape[1], known.spec)
    if library is None and known.asks_accuracy:
        return TASKS["classification"], "accuracy is asked for"
    return library


def _of_segmenters(network: nn.Module, outputs: Tensor) -> tuple[Task, str] | None:
    """Return segmentation for torchvision's segmentation networks."""
    home = type(network).__module__
    if outputs.ndim == 4 and outputs.shape[1] > 1 and home.startswith(_SEGMENTERS):
        return TASKS["segmentation"], "a segmentation network of torchvision"
    return None


def _of_transformers(network: nn.Module, outputs: Tensor) -> tuple[Task, str] | None:
    """Return the task of Hugging Face's networks for images, if their configuration says it."""
    kind, config = type(network), getattr(network, "config", None)
    labels = getattr(config, "num_labels", 0)
    if not kind.__module__.startswith("transformers.models.") or labels < 2:
        return None
    if outputs.ndim < 2 or outputs.shape[1] != labels:
        return None
    if kind.__name__.endswith("ForSemanticSegmentation") and outputs.ndim == 4:
        return TASKS["segmentation"], "a segmentation network of transformers"
    if not kind.__name__.endswith("ForImageClassification") or outputs.ndim != 2:
        return None
    problem = getattr(config, "problem_type", None) or "single_label_classification"
    name = _PROBLEMS.get(problem)
    return None if name is None else (TASKS[name], f"transformers says {problem}")


def _of_probabilities(outputs: Tensor) -> tuple[Task, str] | None:
    """Return the task if the outputs are class probabilities or their logarithms."""
    kind = _probabilities(outputs)
    if kind is not None:
        name = "classification" if outputs.ndim == 2 else "segmentation"
        return TASKS[name], f"the outputs are {kind}: in each example they sum to one"
    kind = _probabilities(outputs.movedim(-1, 1)) if outputs.ndim == 3 else None
    if kind is not None:
        return TASKS["sequence"], f"the outputs are {kind}: at each position they sum to one"
    return None


def _probabilities(outputs: Tensor) -> str | None:
    """Return what outputs are whose second dimension has class probabilities."""
    if is_distribution(outputs):
        return "probabilities"
    return "logarithms of probabilities" if _are_logarithms(outputs) else None


def _shape(shape: tuple[int, ...]) -> str:
    return f"(n, {', '.join(map(str, shape))})" if shape else "(n,)"


def _are_logarithms(outputs: Tensor) -> bool:
    if outputs.ndim < 2 or outputs.shape[1] < 2 or float(outputs.max()) > 1e-6:
        return False
    return is_distribution(outputs.double().exp())


def _of_targets(
    outputs: Tensor, seen: Seen, known: Known, ignore_index: int | None
) -> tuple[Task, str] | str:
    """Return the task that the targets make certain, or why they do not."""
    targets = seen.targets
    assert targets is not None
    doubt = (
        f"targets of {str(targets.dtype).removeprefix('torch.')} and shape "
        f"{_shape(tuple(targets.shape[1:]))} beside outputs of shape "
        f"{_shape(tuple(outputs.shape[1:]))} may mean several things"
    )
    whole = not targets.is_floating_point() and targets.dtype != torch.bool
    if whole and targets.ndim == outputs.ndim - 1 and targets.shape[1:] == outputs.shape[2:]:
        if outputs.shape[1] < 2:
            return doubt
        if outputs.ndim > 2:
            return TASKS["segmentation"], "the targets are maps of integers"
        return _of_class_numbers(outputs, seen, known, ignore_index)
    if targets.shape != outputs.shape:
        return doubt
    found = _of_alike(outputs, seen.inputs, targets, ignore_index)
    if found is None and outputs.ndim == 2 and _sum_to_one(targets):
        return (
            "the targets may be classes as one-hot rows (give their `argmax(1)`), labels of which "
            "several can hold (task='multilabel') or numbers (task='regression')"
        )
    return found or doubt


def _of_class_numbers(
    outputs: Tensor, seen: Seen, known: Known, ignore_index: int | None
) -> tuple[Task, str] | str:
    """Return classification, unless the outputs may be an embedding instead of class scores."""
    assert seen.targets is not None
    classes = outputs.shape[1]
    every = seen.targets if seen.all_targets is None else seen.all_targets
    every = every.flatten() if every.ndim == 1 else seen.targets
    labels = every[every != ignore_index] if ignore_index is not None else every
    highest = int(labels.max()) if len(labels) else -1
    count = max(known.classes, highest + 1)
    why = f"the labels are integers, of {count} classes, and there are {classes} outputs"
    if known.learns or 2 * count > classes:
        return TASKS["classification"], why
    library = _library_of(nn.Identity(), classes, known.spec)
    if library is not None or _hits_labels(outputs, seen.targets):
        return TASKS["classification"], f"{why}, whose highest is the label's"
    return (
        f"{why}, whose highest is not the label's more often than by chance: they may be an "
        "embedding"
    )


def _hits_labels(outputs: Tensor, targets: Tensor) -> bool:
    """Whether the highest score belongs to the label more often than by chance."""
    predicted = outputs.argmax(dim=1).cpu()
    labels = targets.cpu()
    hits = int((predicted == labels).sum())
    # The rate of hits if labels and predictions were paired at random.
    kinds = torch.unique(torch.cat([predicted, labels]))
    shares = [((predicted == k).double().mean() * (labels == k).double().mean()) for k in kinds]
    chance = min(max(float(sum(shares)), 1 / len(labels) ** 2), 1.0)
    return float(stats.binom.sf(hits - 1, len(labels), chance)) < SURE if hits else False


def _of_alike(
    outputs: Tensor, inputs: Tensor | None, targets: Tensor, ignore_index: int | None
) -> tuple[Task, str] | None:
    """Return the task for targets in the outputs' shape, if it is certain."""
    counted = targets if ignore_index is None else targets[targets != ignore_index]
    values = counted.double()
    binary = bool(((values == 0) | (values == 1)).all())
    both = binary and bool((values == 0).any()) and bool((values == 1).any())
    if targets.dtype == torch.bool:
        return TASKS["multilabel"], "the targets are true or false for each output"
    if outputs.ndim == 2 and both and not _sum_to_one(targets):
        return TASKS["multilabel"], "the targets are 0 or 1 for each output"
    if binary or not targets.is_floating_point():
        return None  # one-hot classes, masks, pixels of two values, counts
    if outputs.ndim == 2 and is_distribution(targets):
        return None  # probabilities of classes, or shares
    if inputs is not None and inputs.shape == outputs.shape and inputs.ndim > 2:
        return TASKS["restoration"], "inputs, outputs and targets are of one shape"
    return TASKS["regression"], "the targets are numbers, one for each output"


def _sum_to_one(targets: Tensor) -> bool:
    return targets.shape[1] > 1 and bool((targets.double().sum(dim=1) == 1).all())


def _library_of(network: nn.Module, outputs: int, spec: str | None) -> tuple[Task, str] | None:
    """Return classification if the network's library says that it classifies."""
    prefix = (spec or "").partition(":")[0]
    home = type(network).__module__
    scores = TASKS["classification"]
    if home.startswith("onebyone.networks.zoo") or prefix == "onebyone":
        return scores, "a classifier of onebyone"
    if home.startswith("timm.") or prefix == "timm":
        classes = getattr(network, "num_classes", outputs if prefix == "timm" else 0)
        own = (getattr(network, "pretrained_cfg", None) or {}).get("num_classes")
        if classes == outputs and (prefix == "timm" or own == outputs):
            return scores, f"timm says that its {outputs} outputs are classes"
        return None
    torchvision = home.startswith("torchvision.models") or prefix == "torchvision"
    if not torchvision or any(f".{each}" in home for each in _TORCHVISION_OTHERS):
        return None
    if prefix == "torchvision" or outputs in _LIBRARY_CLASSES:
        return scores, "a classifier of torchvision"
    return None
