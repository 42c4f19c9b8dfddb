"""The loss on labels: the task's, or a function of the caller's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import DataError, ModelError, OptionError, first_line
from onebyone.core.label_losses import labels_of_wrong_type
from onebyone.core.task import Loss, label_loss_of
from onebyone.core.tensor_trees import tensors_in
from onebyone.core.user_code import users_code
from onebyone.evaluation.batch_scores import check_labels, is_unlabelled
from onebyone.training.job import Job, forward


def check_classes(job: Job) -> None:
    """Check all labels that are known beforehand; a wrong one would make CUDA unusable.

    Raises:
        DataError: If a label does not fit the task.
    """
    train = job.examples.train
    inputs, targets = next(iter(train.batches(min(2, len(train)), device=job.device)))
    job.student.eval()
    with torch.no_grad():
        given = forward(job, inputs)
    if isinstance(given, Tensor) and not is_unlabelled(targets):
        known = targets if train.targets is None else train.targets
        check_labels(job.meaning, (given,), known)


def label_loss(
    outputs: Any, targets: Tensor, meaning: Meaning, *, loss: Loss | None, label_smoothing: float
) -> Tensor:
    """Return the loss of outputs against their targets.

    Args:
        outputs: The network's outputs.
        targets: Labels, one for each example, or values.
        meaning: What the outputs mean.
        loss: A function of the caller's, used instead of the task's.
        label_smoothing: Share of a label that goes to the other classes.

    Raises:
        DataError: If there are no targets, or they do not fit the outputs.
        ModelError: If the outputs are no tensor and there is no ``loss``.
        OptionError: If ``loss`` fails or does not give one number with a gradient.
    """
    if is_unlabelled(targets):
        raise DataError(
            "Training on labels needs targets, but the data has none. Give (inputs, targets), "
            "or distil from a teacher."
        )
    if loss is not None:
        return _own_loss(loss, outputs, targets)
    if meaning.task.loss is not None:
        return _own_loss(meaning.task.loss, outputs, targets)
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"Training on labels needs one tensor of outputs, got {type(outputs).__name__}. Give a "
            "`loss` of outputs and targets, or wrap the network in a module that returns the part "
            "to learn."
        )
    if not meaning.info().known:
        raise DataError(_why_not_learned(outputs, targets, meaning))
    part = meaning.parts[0]
    try:
        return label_loss_of(meaning.task)(
            part.scores(outputs), targets, meaning.ignore_index, label_smoothing
        )
    except IndexError as error:
        raise DataError(
            f"Labels must be from 0 to {outputs.shape[1] - 1}, as the network scores "
            f"{outputs.shape[1]} classes: {first_line(error)}. Number the classes from 0, or "
            "give the network a score for each."
        ) from error


def _why_not_learned(outputs: Tensor, targets: Tensor, meaning: Meaning) -> str:
    if targets.shape == outputs.shape:
        return (
            "Training on labels needs to know what they mean, but "
            f"{meaning.how}. Give a `task` (--task), or a `loss`."
        )
    if targets.ndim == 1 and outputs.ndim == 2 and outputs.shape[1] > 1:
        return labels_of_wrong_type(targets)
    return (
        f"Targets must have the shape of the outputs, {tuple(outputs.shape)}, or be classes of "
        f"shape {tuple(outputs.shape[:1])}, got {tuple(targets.shape)} of {targets.dtype}. "
        "Reshape them, or give a `loss`."
    )


def _own_loss(loss: Loss, outputs: Any, targets: Tensor) -> Tensor:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(outputs))
    with users_code(
        "The `loss` must give one number",
        "Check what it expects",
        on=f"outputs {shapes} and targets {tuple(targets.shape)}",
        raises=OptionError,
    ):
        found: object = loss(outputs, targets)
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
        came = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else found
        flat = isinstance(found, Tensor) and found.numel() == 1
        raise OptionError(
            "The `loss` must give a tensor of one number that depends on the outputs, got "
            f"{f'{came} without a gradient' if flat else came}. Take the mean over the examples, "
            "and do not detach the outputs."
        )
    return found.reshape(())
