"""Tasks: what a network's outputs mean, and how they are compared and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onebyone.core.errors import OptionError, UnknownNameError
from onebyone.core.label_losses import class_loss, labels_loss, squared_loss
from onebyone.core.measures import Classes, Labels, Measure, Numbers, Own
from onebyone.core.metrics import AnyMetric

LabelLoss = Callable[[Tensor, Tensor, int | None, float], Tensor]
Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """What a network's outputs mean. It decides how networks are compared and scored.

    The built-in tasks are ``classification``, ``multilabel``, ``regression``, ``segmentation``,
    ``sequence``, ``restoration`` and ``embedding``. Create a ``Task`` for any other.

    Attributes:
        name: Its name in records and messages.
        divergence: ``(reference, outputs) -> (n,)``: how far each example's outputs are from the
            original's. It is 0 for equal outputs and above 0 otherwise, and differentiable,
            because networks are fitted with it.
        metric: The score on test data: a built-in name, or a function
            ``(outputs, targets) -> (n,)``; higher is better. Or a metric of a whole set of
            examples, such as :class:`onebyone.MeanAveragePrecision`.
        loss: ``(outputs, targets) -> scalar`` for training on labels.

    Examples:
        >>> def apart(reference, outputs):
        ...     return (reference - outputs).abs().flatten(1).mean(1)
        >>> Task("depth", divergence=apart).name
        'depth'
    """

    name: str
    divergence: Callable[[Tensor, Tensor], Tensor] | Measure
    metric: str | AnyMetric | None = None
    loss: Loss | None = None

    def __post_init__(self) -> None:
        name: Any = self.name
        if not isinstance(name, str) or not name.strip():
            raise OptionError(f"A task's `name` must be a text, got {self.name!r}.")
        if not isinstance(self.divergence, Measure):
            if self.name in _BUILT_IN_NAMES:
                raise OptionError(
                    f"A task of your own must have a name of its own, got {self.name!r}, which is "
                    "built in."
                )
            if not callable(self.divergence):
                raise OptionError(
                    "A task's `divergence` must be a function of the reference's outputs and "
                    f"others, got {type(self.divergence).__name__}."
                )

    @property
    def measure(self) -> Measure:
        """The measure that compares outputs."""
        if isinstance(self.divergence, Measure):
            return self.divergence
        return Own(self.divergence, self.name)

    @property
    def is_built_in(self) -> bool:
        """Whether it is one of onebyone's own tasks."""
        return self.name in _BUILT_IN_NAMES


_BUILT_IN_NAMES = frozenset(
    {
        "classification",
        "multilabel",
        "regression",
        "segmentation",
        "sequence",
        "restoration",
        "embedding",
        "unknown",
    }
)

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("classification", Classes(), metric="accuracy"),
        Task("multilabel", Labels(), metric="F1"),
        Task("regression", Numbers(each=True), metric="negative squared error"),
        Task("segmentation", Classes(), metric="pixel accuracy"),
        # Texts are not as long as the outputs, so its metric is the user's own.
        Task("sequence", Classes(last=True)),
        Task("restoration", Numbers(), metric="PSNR"),
        Task("embedding", Numbers(), metric="negative squared error"),
    )
}
"""The tasks that a user can name."""

UNKNOWN = Task("unknown", Numbers(each=True))
"""An unknown task: outputs are compared as numbers, which shows every difference."""

_LOSSES: Mapping[type, LabelLoss] = {
    Classes: class_loss,
    Labels: labels_loss,
    Numbers: squared_loss,
}


def label_loss_of(task: Task) -> LabelLoss:
    """Return a task's loss for labels.

    Raises:
        OptionError: If it is a user's task without a loss.
    """
    if task.loss is not None:
        given = task.loss
        return lambda outputs, targets, _ignored, _smoothed: given(outputs, targets)
    found = _LOSSES.get(type(task.measure))
    if found is None:
        raise OptionError(
            f"The task {task.name!r} has no `loss` for labels. Give it one, or give a `loss`."
        )
    return found


def find_task(task: str | Task | Callable[[Tensor, Tensor], Tensor]) -> Task:
    """Return a task by its name; make one from a divergence function; return a ``Task`` itself.

    Raises:
        UnknownNameError: If there is no task of that name.
        OptionError: If ``task`` is none of these.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, str):
        if task == UNKNOWN.name:
            return UNKNOWN
        if task not in TASKS:
            raise UnknownNameError("task", task, TASKS)
        return TASKS[task]
    given: Any = task
    is_class = isinstance(given, type)
    if callable(given) and not is_class:
        return Task(getattr(given, "__name__", type(given).__name__), given)
    raise OptionError(
        f"`task` must be one of {', '.join(TASKS)}, a Task, or a divergence function, got "
        f"{'the class ' + given.__name__ if is_class else 'a ' + type(given).__name__}."
    )
