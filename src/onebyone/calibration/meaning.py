"""What a network's outputs mean: how to read them, and how far apart two networks' outputs are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onebyone.core.errors import ModelError, PlanError
from onebyone.core.measures import Classes, Form, Numbers
from onebyone.core.records import TaskInfo
from onebyone.core.task import TASKS, UNKNOWN, Task, find_task
from onebyone.networks.outputs import Outputs, paired

# What a temperature leaves to the most probable class on average, found on so many examples.
LEAST_CERTAIN = 0.5
SOFTENED, HALVINGS = 16, 8

TaskLike = str | Task | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """How to read one of a network's output tensors.

    Attributes:
        task: The task that it is compared by.
        form: Whether it holds scores or probabilities, as measured.
        scale: The unit of its errors.
        vector: Whether it has several numbers per example, and no positions.
    """

    task: Task
    form: Form
    scale: Tensor
    vector: bool = False

    @classmethod
    def of(cls, task: Task, outputs: Tensor) -> Part:
        """Return how to read the outputs that a network gave on examples."""
        # If a network gives several tensors, the task may not fit some of them.
        fitting = task if task.measure.fits(outputs) else UNKNOWN
        form = fitting.measure.form_of(outputs)
        scale = fitting.measure.scale_of(_wide(outputs))
        return cls(fitting, form, scale, vector=outputs.ndim == 2 and outputs.shape[1] > 1)

    def scores(self, outputs: Tensor) -> Tensor:
        """Return outputs as scores, in float32 or better."""
        return self.task.measure.scores(_wide(outputs), self.form)

    def divergence(self, reference: Tensor, outputs: Tensor, theirs: Part | None = None) -> Tensor:
        """Return the divergence of outputs from the reference's, per example; never below 0.

        Args:
            reference: Outputs of the network that this part belongs to.
            outputs: Another network's outputs, of the same shape.
            theirs: How to read those; default: the same.

        Raises:
            ModelError: If the shapes differ.
        """
        check_shapes(reference, outputs)
        other = (theirs or self).scores(outputs)
        return self.task.measure.apart(self.scores(reference), other, self.scale)

    def imitation_loss(
        self, reference: Tensor, outputs: Tensor, temperature: float, theirs: Part | None = None
    ) -> Tensor:
        """Return the mean divergence as a loss, at a temperature."""
        check_shapes(reference, outputs)
        other = (theirs or self).scores(outputs)
        measure = self.task.measure
        return measure.imitation(self.scores(reference), other, self.scale, temperature)

    def sampled_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random scalar whose gradient's covariance is the divergence's curvature."""
        return self.task.measure.sampled(self.scores(outputs), self.scale, generator)


@dataclass(frozen=True)
class Meaning:
    """What a network's outputs mean, and why that is known.

    Attributes:
        task: The network's.
        how: ``given``, or why it is certain or unknown, in words.
        parts: How to read each output tensor.
        ignore_index: The label that every count and loss ignores.
    """

    task: Task
    how: str
    parts: tuple[Part, ...]
    ignore_index: int | None = None

    @classmethod
    def measured(cls, task: TaskLike, outputs: Outputs) -> Meaning:
        """Return the meaning of outputs for a given task."""
        found = find_task(task)
        return cls(found, "given", parts_of(found, outputs))

    @property
    def decides(self) -> bool:
        """Whether the outputs are one tensor of decisions, so that agreement can be counted."""
        return len(self.parts) == 1 and self.parts[0].task.measure.decides

    @property
    def answers_once(self) -> bool:
        """Whether the output for each example is a vector, such as class scores."""
        names = (TASKS["classification"].name, UNKNOWN.name)
        return self.task.name in names and all(part.vector for part in self.parts)

    @property
    def classifies(self) -> bool:
        """Whether each example gets one class."""
        return self.task is TASKS["classification"] and self.decides

    def divergence(
        self, reference: Outputs, outputs: Outputs, theirs: Meaning | None = None
    ) -> Tensor:
        """Return the divergence per example: the mean over the tensors, equally weighted.

        Args:
            reference: Outputs of the network whose meaning this is.
            outputs: Outputs of another network.
            theirs: The other network's meaning; default: the same.

        Raises:
            ModelError: If the number of tensors or a shape differs.
        """
        each = [
            part.divergence(*pair, other)
            for part, pair, other in self._triples(reference, outputs, theirs)
        ]
        return torch.stack(each).mean(0)

    def imitation_loss(
        self,
        reference: Outputs,
        outputs: Outputs,
        temperature: float,
        theirs: Meaning | None = None,
    ) -> Tensor:
        """Return the mean divergence at a temperature as a scalar loss.

        For class scores it is multiplied by the squared temperature, so that its gradients keep
        their size (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
        section 2).

        Raises:
            ModelError: If the number of tensors or a shape differs.
        """
        each = [
            part.imitation_loss(*pair, temperature, other)
            for part, pair, other in self._triples(reference, outputs, theirs)
        ]
        return torch.stack(each).mean()

    def sampled_loss(self, outputs: Outputs, generator: torch.Generator) -> Tensor:
        """Return a random scalar whose gradient's covariance is the divergence's curvature."""
        # The draws are independent, so products of two tensors' gradients average to zero. The
        # squared gradient is then the mean of the tensors' own.
        each = [p.sampled_loss(o, generator) for p, o in self._with(outputs)]
        return torch.stack(each).sum() / math.sqrt(len(each))

    def sensitivity(self, outputs: Outputs) -> Tensor:
        """Return for each example how far a small change of its outputs moves the divergence."""
        each = [part.task.measure.sensitivity(part.scores(o)) for part, o in self._with(outputs)]
        return torch.stack(each).mean(0)

    def temperature(self, outputs: Outputs, most: float) -> float:
        """Return the highest temperature at which softened answers are still the network's own.

        At a high one the softened probabilities of thousands of classes are mostly those of the
        others. So it is lowered, to 1 at least, until the highest probability is one half on
        average.

        Args:
            outputs: The network's, on some examples.
            most: The highest temperature. Outputs that are not classes keep it.
        """
        first = [(p, o[:SOFTENED]) for p, o in self._with(outputs)]
        classes = [p.scores(o) for p, o in first if isinstance(p.task.measure, Classes)]
        return min((_temperature(scores, most) for scores in classes), default=most)

    def of_other(self, outputs: Outputs) -> Meaning:
        """Return the meaning of another network's outputs for the same task."""
        return replace(self, parts=parts_of(self.task, outputs))

    def to(self, device: torch.device | str) -> Meaning:
        """Return the same with its scales on a device, which avoids transfers later."""
        parts = (replace(part, scale=part.scale.to(device)) for part in self.parts)
        return replace(self, parts=tuple(parts))

    def info(self) -> TaskInfo:
        """Return its record."""
        forms = {part.form for part in self.parts}
        return TaskInfo(
            name=self.task.name,
            how=self.how,
            divergence=self.task.measure.unit,
            probabilities="probabilities" in forms,
            ignore_index=self.ignore_index,
        )

    def _with(self, outputs: Outputs) -> list[tuple[Part, Tensor]]:
        outputs = joined(self.task, outputs)
        if len(outputs) != len(self.parts):
            raise ModelError(
                f"Networks must give the same number of tensors to be compared, got "
                f"{len(self.parts)} and {len(outputs)}."
            )
        return list(zip(self.parts, outputs, strict=True))

    def _triples(
        self, reference: Outputs, outputs: Outputs, theirs: Meaning | None
    ) -> list[tuple[Part, tuple[Tensor, Tensor], Part | None]]:
        pairs = paired(joined(self.task, reference), joined(self.task, outputs))
        others = [None] * len(self.parts) if theirs is None else theirs.parts
        if len(pairs) != len(self.parts):
            raise ModelError(
                f"The network must give {len(self.parts)} tensors, as it did before, got "
                f"{len(pairs)}."
            )
        return list(zip(self.parts, pairs, others, strict=True))


def _temperature(scores: Tensor, most: float) -> float:
    def keeps(temperature: float) -> bool:
        best = (scores / temperature).softmax(dim=1).amax(dim=1)
        return float(best.mean()) >= LEAST_CERTAIN

    if most <= 1 or keeps(most):
        return most
    low, high = 1.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def parts_of(task: Task, outputs: Outputs) -> tuple[Part, ...]:
    """Return how to read each tensor of a network's outputs."""
    return tuple(Part.of(task, each) for each in joined(task, outputs))


def joined(task: Task, outputs: Outputs) -> Outputs:
    """Return outputs as one tensor if the task compares them together, along the last dimension.

    Raises:
        ModelError: If they cannot be joined.
    """
    if len(outputs) == 1 or not task.measure.joins:
        return outputs
    shapes = {tuple(each.shape[:-1]) for each in outputs}
    if len(shapes) > 1:
        raise ModelError(
            f"The outputs of the task {task.name!r} must have the same shape but for their last "
            f"size, got {', '.join(str(tuple(each.shape)) for each in outputs)}."
        )
    return (torch.cat(outputs, dim=-1),)


def check_shapes(reference: Tensor, outputs: Tensor) -> None:
    """Check that two networks' outputs have the same shape.

    Raises:
        ModelError: If they do not.
    """
    if reference.shape != outputs.shape:
        raise ModelError(
            f"Outputs must have the shape of the reference's, {tuple(reference.shape)}, got "
            f"{tuple(outputs.shape)}. Compare networks with the same classes."
        )


def _wide(outputs: Tensor) -> Tensor:
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def check_same_task(planned: TaskInfo | None, task: TaskLike | Meaning | None) -> None:
    """Check that a given task is the one that the plan was made for.

    Raises:
        PlanError: If it is not.
    """
    if planned is None or task is None:
        return
    name = (task.task if isinstance(task, Meaning) else find_task(task)).name
    if planned.known and name != planned.name:
        raise PlanError(
            f"The plan was made for the task {planned.name!r} ({planned.how}), got {name!r}. Plan "
            "again for that task, or leave `task` out."
        )


def planned_task(planned: TaskInfo | None, task: TaskLike | Meaning | None) -> Any:
    """Return the task for applying a plan: the given one, or the plan's own.

    Raises:
        PlanError: If they differ.
    """
    check_same_task(planned, task)
    if task is not None or planned is None:
        return task
    names: Mapping[str, Task] = {**TASKS, UNKNOWN.name: UNKNOWN}
    # A record cannot hold a user's own task, a function. Its outputs are compared as numbers.
    return names.get(planned.name, replace(UNKNOWN, name=planned.name, divergence=Numbers()))
