"""Settings of `train` and `distill`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onebyone.core.errors import OptionError
from onebyone.core.settings.common import CheckedSettings, DrawSettings, ScoreSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from onebyone.core.precision import Precision
    from onebyone.core.records import TrainLog
    from onebyone.core.task import Loss

Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class StepSettings(CheckedSettings):
    """How training steps are taken.

    Attributes:
        batch_size: Examples in a training step. By default 128, or fewer on small data.
        learning_rate: The highest learning rate. By default 0.004 at a batch of 128, scaled with
            the square root of the batch at others.
    """

    batch_size: int | None = None
    learning_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class FitSettings(StepSettings):
    """How weights are fitted to labels over epochs.

    Attributes:
        weight_decay: Weight decay of matrices and kernels, not of biases and norms.
        label_smoothing: Share of each label that goes to the other classes, from 0 up to 1.
        augment: Use the data set's augmentation. The last epochs go without.
        schedule: The learning rate after its warm-up: ``cosine`` lowers it to 0 along half a
            cosine; ``constant`` keeps it.
        ema: Decay of an exponential moving average of the weights, such as 0.999. The average is
            scored after each epoch and returned. By default there is none.
        accumulate: Parts that the batch of a step is computed in, one after the other. Their
            gradients add up, so more parts need less memory. Batch norms see each part alone.
        patience: Stop after this many epochs in a row without a better validation score, and return
            the weights of the best epoch. By default all epochs are trained and the last weights
            returned.
    """

    weight_decay: float = 0.02
    label_smoothing: float = 0.0
    augment: bool = True
    schedule: Schedule = "cosine"
    ema: float | None = None
    accumulate: int = 1
    patience: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing == 1:
            raise OptionError("`label_smoothing` must be from 0 up to 1, got 1.0.")
        if self.ema == 1:
            raise OptionError("`ema` must be below 1, got 1.0: the average would never move.")


@dataclass(frozen=True, kw_only=True)
class LearnSettings(ScoreSettings, DrawSettings, FitSettings):
    """Settings that `train` and `distill` share.

    Attributes:
        epochs: Passes over the training data.
        loss: A function ``(outputs, targets) -> scalar`` for the labels. By default the task's:
            cross-entropy of classes, binary cross-entropy of labels, mean squared error of
            numbers.
        precision: ``bf16`` computes under autocast, with weights in float32. ``auto`` does so if
            the device has bf16 instructions. ``float32`` is float32 on a GPU too, not TF32.
        device: Where to train. By default where the network is.
        checkpoint: A file that is written after every epoch. If it exists, training resumes from
            it; on a CPU the weights are the same as without the interruption.
        on_epoch: Called after each epoch with the :class:`TrainLog` so far.
    """

    epochs: int
    loss: Loss | None = None
    precision: Precision = "auto"
    device: torch.device | str | None = None
    checkpoint: str | Path | None = None
    on_epoch: Callable[[TrainLog], None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epochs(self.epochs)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LearnSettings):
    """How a network is trained on labels."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(CheckedSettings):
    """What a student learns from its teacher.

    Attributes:
        label_weight: Share of the labels in the distillation's loss, from 0 to 1; 0 needs no
            labels. A larger share helps an averaging head, which the teacher's outputs can hold
            back.
        mix: Share of the distillation's images in which a rectangle is replaced by another
            image's. The student learns the teacher's outputs for the mixture, which no label fits.
            By default half if images are augmented, outputs are class scores and labels have no
            weight; else none.
    """

    label_weight: float = 0.0
    mix: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix and self.label_weight:
            raise OptionError(
                "`mix` must be 0 where labels have a weight, since no label fits a mixture, got "
                f"{self.mix} and a `label_weight` of {self.label_weight}."
            )


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TeacherSettings, LearnSettings):
    """How a network is distilled from its teacher.

    Attributes:
        teacher: The network to imitate, run in evaluation mode. Not modified.
        temperature: Divides the scores before the softmax; above 0.
        features: Names of modules in both networks whose outputs are to match as well.
        feature_weight: Weight of the squared error of each of these modules, which is divided by
            its variance.
        learning_rate: The highest learning rate. By default three are tried, from 0.001 to 0.016 at
            a batch of 128 (scaled with the square root of other batches), for 100 steps each, or
            for 300 if the network is far from its teacher. The one that ends nearest on validation
            data is used; for far networks the lowest that ends about as near. A training too short
            for trials uses the lowest. A training on labels alone, and a far network that every
            rate leads farther away, use the highest rate whose divergence is at most 1.5 times the
            least.
        augment: Use the data set's augmentation; the teacher sees the same augmented inputs. If
            the loss is of labels alone, the last epochs go without.
        keep_statistics: Whether batch norms of a network in evaluation mode keep their running
            statistics. By default they do not, with one exception: if labels have no weight and
            every rate leads away from a near teacher, two rates are tried with frozen statistics,
            and used if one ends nearer. A network without batch norms then tries a lower rate.
        norms: Whether convolutions with a bias whose output goes only to an activation get a
            batch norm during training. It starts as the identity and is folded into them at the
            end. By default they do if the loss is of labels alone, or if the network is far from
            its teacher, with a mean divergence above 0.05.
    """

    teacher: nn.Module
    temperature: float = 4.0
    features: Sequence[str] = ()
    feature_weight: float = 1.0
    keep_statistics: bool | None = None
    norms: bool | None = None


def check_epochs(epochs: int) -> None:
    """Check that a training has at least one epoch.

    Raises:
        OptionError: If it has none.
    """
    if epochs < 1:
        raise OptionError(f"`epochs` must be 1 or more, got {epochs}.")
