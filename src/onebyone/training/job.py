"""The state of a training: the network, its data, its optimizer and its settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onebyone.calibration.infer_task import Known, meaning_of
from onebyone.calibration.meaning import Meaning, TaskLike
from onebyone.core import processes
from onebyone.core.errors import DataError, NotComparableError, OptionError
from onebyone.core.metrics import AnyMetric
from onebyone.core.precision import Precision, uses_bf16
from onebyone.core.records import Epoch, TrainLog
from onebyone.core.settings.common import Progress
from onebyone.core.settings.training import LearnSettings, Schedule
from onebyone.core.task import UNKNOWN
from onebyone.core.tensor_trees import Inputs, fresh
from onebyone.data import Data, Split, as_split
from onebyone.data.hashing import hash_split
from onebyone.networks.hashing import hash_weights
from onebyone.networks.outputs import in_float32, the_one
from onebyone.networks.surgery import (
    as_device,
    call,
    copy_network,
    home_of,
    lay_channels_last,
)
from onebyone.training.temporary_norms import AddedNorm, add_norms
from onebyone.training.weight_average import WeightAverage

FIRST_EXAMPLES = 1000  # for the first statistics of added batch norms
BETAS = (0.9, 0.99)
# The share of the epochs, at the end, without augmentation: the network will meet images without
# it. More than a few such epochs would overfit. A distillation keeps the augmentation, since the
# teacher's answers to augmented images are valid targets.
PLAIN, MOST_PLAIN = 0.2, 5


class Trained(NamedTuple):
    """A trained network, in evaluation mode, and the log of its training."""

    model: nn.Module
    log: TrainLog

    def __str__(self) -> str:
        return str(self.log)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of the loop over epochs, with defaults filled in from the data."""

    epochs: int
    batch_size: int
    learning_rate: float | None
    schedule: Schedule
    weight_decay: float
    ema: float | None
    accumulate: int
    patience: int | None
    augment: bool
    ends_plain: bool
    norms: bool
    mix: float
    precision: Precision
    capture: bool
    seed: int
    metric: str | AnyMetric | None
    checkpoint: Path | None
    on_epoch: Callable[[TrainLog], None] | None
    progress: Progress | None

    @classmethod
    def of(
        cls,
        asked: LearnSettings,
        examples: Examples,
        *,
        ends_plain: bool,
        learning_rate: float | None,
        norms: bool = False,
        mix: float = 0.0,
    ) -> LoopSettings:
        """Return the given settings, with defaults filled in from the data."""
        batch = asked.batch_size
        return cls(
            epochs=asked.epochs,
            batch_size=default_batch(len(examples.train)) if batch is None else batch,
            learning_rate=learning_rate,
            schedule=asked.schedule,
            weight_decay=asked.weight_decay,
            ema=asked.ema,
            accumulate=asked.accumulate,
            patience=asked.patience,
            augment=asked.augment,
            ends_plain=ends_plain,
            norms=norms,
            mix=mix,
            precision=asked.precision,
            capture=asked.capture,
            seed=asked.seed,
            metric=asked.metric,
            checkpoint=None if asked.checkpoint is None else Path(asked.checkpoint),
            on_epoch=asked.on_epoch,
            progress=asked.progress,
        )

    @property
    def plain_epochs(self) -> int:
        """The number of epochs at the end without augmentation."""
        return min(int(PLAIN * self.epochs), MOST_PLAIN) if self.ends_plain else 0


class Examples(NamedTuple):
    """The training data, and the validation data for the score after each epoch."""

    train: Split
    validation: Split | None


class Decision(NamedTuple):
    """The outcome of the trials before a training; a resumed training does not repeat them."""

    learning_rate: float | None  # where the settings give none
    keeps_statistics: bool
    how: str
    norms: bool


@dataclass(kw_only=True)
class Job:
    """All that an epoch needs. A checkpoint can be resumed only with the same ``settings``."""

    student: nn.Module
    examples: Examples
    options: LoopSettings
    rate: float
    device: torch.device
    home: torch.device
    bf16: bool
    captures: bool  # whether steps are captured as CUDA graphs
    optimizer: torch.optim.Optimizer
    name: str
    settings: dict[str, Any]
    training_modes: dict[str, bool]
    meaning: Meaning
    average: WeightAverage | None = None
    best: dict[str, Tensor] | None = None  # weights of the best epoch, if that is returned
    judge: Callable[[nn.Module], float] | None = None  # returns the divergence from the teacher
    added: tuple[AddedNorm, ...] = ()
    teacher: nn.Module | None = None
    decision: Decision | None = None
    guides: Meaning | None = None  # what the teacher's outputs mean
    log: list[Epoch] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps in an epoch: all batches, except a last one of a single example."""
        full, rest = divmod(len(self.examples.train), self.options.batch_size)
        return max(1, full + (rest > 1))

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def best_epoch(self) -> int:
        """The first epoch that is best on validation data; 0 before there is one.

        The best has the least divergence where that is measured, else the highest score.
        """
        if self.judge is not None:
            apart = [(e.divergence, e.epoch) for e in self.log if e.divergence is not None]
            return min(apart)[1] if apart else 0
        scores = [(epoch.validation, -epoch.epoch) for epoch in self.log if _is_number(epoch)]
        return -max(scores)[1] if scores else 0

    @property
    def is_done(self) -> bool:
        """Whether all epochs are trained, or too many passed without a better score."""
        if len(self.log) >= self.options.epochs:
            return True
        return self.stops_early

    @property
    def stops_early(self) -> bool:
        """Whether `patience` epochs in a row were no better on validation data."""
        patience = self.options.patience
        return patience is not None and len(self.log) - self.best_epoch >= patience

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the student has the average of its weights, if one is kept."""
        return nullcontext() if self.average is None else self.average.in_place()

    def autocast(self) -> torch.autocast:
        """Return the autocast context that networks run in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def enter_training(self) -> None:
        """Set the modules that are trained to training mode."""
        for name, module in self.student.named_modules():
            module.training = self.training_modes[name]


def _is_number(epoch: Epoch) -> bool:
    return epoch.validation is not None and not math.isnan(epoch.validation)


def examples_of(data: Data | Any) -> Examples:
    """Return the parts of the data that a training uses."""
    if isinstance(data, Data):
        return Examples(data.train, data.validation)
    return Examples(as_split(data), None)


def default_batch(n: int) -> int:
    """Return the default batch size for ``n`` examples."""
    # Small data gives about 32 steps an epoch; the batch size is at most 128.
    return int(min(128, max(16, 2 ** math.floor(math.log2(max(1, n / 32))))))


def meaning_to_learn(
    network: nn.Module,
    data: Data | Any,
    examples: Examples,
    task: TaskLike | Meaning | None,
    ignore_index: int | None,
    *,
    learns: bool,
    device: torch.device | str | None,
) -> Meaning:
    """Return what the outputs of a student or of its teacher mean."""
    source = data if isinstance(data, Data) else examples.train
    ignored = getattr(source, "ignore_index", None) if ignore_index is None else ignore_index
    if learns:
        _check_some_count(examples.train, ignored)
    place = home_of(network) if device is None else as_device(device)
    known = Known(learns=learns)
    how: dict[str, Any] = {"known": known, "ignore_index": ignore_index, "device": place}
    try:
        return meaning_of(network, source, task, **how)
    except NotComparableError:
        if not learns:
            raise
        # It can still be trained with a loss of the caller's that accepts its outputs.
        return Meaning(UNKNOWN, "the network gives no tensors with the batch first", ())


def _check_some_count(split: Split, ignore_index: int | None) -> None:
    """Check that at least one label is not ignored, if all labels are known."""
    targets = getattr(split, "targets", None)
    if ignore_index is None or not isinstance(targets, Tensor) or not targets.numel():
        return
    if bool((targets == ignore_index).all()):
        raise DataError(
            f"Data to train on must have a label that counts, got {len(targets):,} examples that "
            f"all have the label {ignore_index}, which is left out. Give another `ignore_index`."
        )


def prepare(
    model: nn.Module,
    examples: Examples,
    options: LoopSettings,
    *,
    default_rate: float,
    name: str,
    device: torch.device | str | None,
    meaning: Meaning,
    keeps_statistics: bool = False,
) -> Job:
    """Copy a network, put it on its device, and set up its optimizer.

    Args:
        model: Not modified.
        examples: Its training and validation data.
        options: Settings of the loop.
        default_rate: The learning rate at a batch of 128 if ``options`` has none.
        name: A description of the objective, for the log.
        device: Where to train. The default is the network's device.
        meaning: What its outputs mean.
        keeps_statistics: Whether its batch norms keep their running statistics.

    Raises:
        OptionError: If the network has no parameter to train, or one that is not float32.
    """
    student = copy_network(model)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trained:
        raise OptionError(
            "The network must have parameters that need a gradient, but has none. "
            "Call `requires_grad_(True)` on the layers to train."
        )
    for key, parameter in student.named_parameters():
        if parameter.dtype != torch.float32:
            raise OptionError(
                f"The network's parameters must be float32 to be trained, got {parameter.dtype} "
                f"in {key}. Give `model.float()`; to compute in bf16, set `precision`."
            )
    home = trained[0].device
    where = home if device is None else as_device(device)
    initial = hash_weights(student)
    student.to(where)
    lay_channels_last(student)
    added: tuple[AddedNorm, ...] = ()
    if options.norms:
        first = examples.train.take(FIRST_EXAMPLES, options.seed)
        inputs, _ = next(iter(first.batches(len(first), device=where, channels_last=True)))
        added = add_norms(student, inputs)
    # Processors of several kinds may have rounded in their own ways.
    processes.copy_from_main([*student.parameters(), *student.buffers()])
    rate = options.learning_rate
    if rate is None:
        rate = default_rate * math.sqrt(options.batch_size / 128)
    bf16 = uses_bf16(options.precision, where)
    # What several processes add up within a step is not captured.
    captures = options.capture and where.type == "cuda" and processes.count() == 1
    settings = {
        "objective": name,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": rate,
        "schedule": options.schedule,
        "ema": options.ema,
        "accumulate": options.accumulate,
        "patience": options.patience,
        "weight_decay": options.weight_decay,
        "augment": options.augment,
        "plain_epochs": options.plain_epochs,
        "mix": options.mix,
        "precision": "bf16" if bf16 else "float32",
        "seed": options.seed,
        "device": where.type,
        "examples": len(examples.train),
        "inputs": str(examples.train.inputs),
        "data": None if options.checkpoint is None else hash_split(examples.train),
        "network": initial,
        "statistics": "kept" if keeps_statistics else "updated",
        "task": meaning.task.name,
        "ignore_index": meaning.ignore_index,
        "norms": [each.site for each in added],
    }
    if added:
        places = f"{len(added)} activations" if len(added) > 1 else "an activation"
        name += f"; batch norms before {places}, folded into the convolutions at the end"
    return Job(
        student=student,
        examples=examples,
        options=options,
        rate=rate,
        device=where,
        home=home,
        bf16=bf16,
        captures=captures,
        optimizer=_optimizer(
            student, rate, options.weight_decay, captured_on=where if captures else None
        ),
        name=name,
        settings=settings,
        training_modes=_training_modes(student, keeps_statistics=keeps_statistics),
        average=None if options.ema is None else WeightAverage(student, options.ema),
        added=added,
        meaning=meaning.to(where),
    )


def _optimizer(
    student: nn.Module,
    rate: float,
    weight_decay: float,
    *,
    captured_on: torch.device | None = None,
) -> torch.optim.Optimizer:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    kept = [group for group in groups if group["params"]]
    if captured_on is None:
        return torch.optim.AdamW(kept, lr=rate, betas=BETAS, fused=True)
    # A captured step reads the rate from this tensor.
    lies = torch.tensor(rate, device=captured_on)
    optimizer = torch.optim.AdamW(kept, lr=lies, betas=BETAS, fused=True, capturable=True)
    # The first steps are not captured; this turns off torch's warning about it.
    optimizer._warned_capturable_if_run_uncaptured = True  # noqa: SLF001
    return optimizer


def _training_modes(student: nn.Module, *, keeps_statistics: bool) -> dict[str, bool]:
    if student.training:
        return {name: module.training for name, module in student.named_modules()}
    return {
        name: not (isinstance(module, _BatchNorm) and (keeps_statistics or _is_frozen(module)))
        for name, module in student.named_modules()
    }


def _is_frozen(norm: nn.Module) -> bool:
    parameters = list(norm.parameters(recurse=False))
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def forward(job: Job, inputs: Inputs) -> Any:
    """Return the student's outputs in float32."""
    with job.autocast():
        given = call(job.student, fresh(inputs))
    return the_one(in_float32(given))
