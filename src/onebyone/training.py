"""Training and distillation: a copy of the network learns, at the processor's best speed."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onebyone.data import Data, Split, as_split
from onebyone.data.augment import cut_mixed
from onebyone.errors import DataError, ModelError, OptionError, OutputError, RecordError
from onebyone.evaluation import (
    AGREEMENT,
    MetricFunction,
    check_labels,
    evaluate,
    feature_error,
    find_metric,
    is_unlabelled,
)
from onebyone.outputs import (
    comparable,
    imitation_loss,
    in_float32,
    is_classifier_output,
    mean_divergence,
    one_tensor,
    the_one,
)
from onebyone.precision import Precision, float32_in, uses_bf16
from onebyone.randomness import seed_generators, seeded
from onebyone.records import Epoch, TrainLog
from onebyone.rewrites.composed import composed
from onebyone.rewrites.normed import AddedNorm, add_norms, take_in
from onebyone.sites import (
    as_device,
    as_network,
    copy_network,
    evaluation_copy,
    home_of,
    in_evaluation_mode,
    in_type_of,
    outputs_of_modules,
    run,
)

Progress = Callable[[int, int, str], None]
Loss = Callable[[Any, Tensor], Tensor]

WARM_UP = 0.1  # share of the steps
TRAIN_RATE = 4e-3  # at a batch of 128; see `_default_rate`
DISTILL_RATE = 1e-3
# Rates that a distillation tries, as multiples of that: a network that is close to its teacher
# already wants the low one, one with a new head a high one, and nothing told beforehand which.
TRIED = (1, 4, 16)
# Where all of these lead away from a teacher that is near, what a batch's own statistics add in
# noise is more than there is to learn: these are tried with the norms' kept.
TRIED_NEAR = (1 / 4, 1)
# So near, by the mean divergence. A network that is farther has to be led away at first, and a
# short trial favors low rates, which then take it nowhere: it is tried for longer. Such trials
# repeat themselves to some percent: of rates that end as near but for that the lowest is taken.
NEAR, ALIKE = 0.05, 1.04
# One that follows labels alone is as any that is trained: high rates, behind in a short trial, are
# ahead in the end, if it stands them at all. So is one that is far and that every trial leads
# farther away, such as an averaging head: it has been fitted, and has all the way still to go.
BEHIND = 1.5
TRIAL_STEPS, TRIAL_STEPS_FAR = 100, 300
TRIAL_SHARE = 0.07  # of the training's examples, for each rate
TRIAL_EXAMPLES = 1000  # that the rates are judged by
FIRST_EXAMPLES = 1000  # that norms which are added get their first statistics from
JUDGED_EXAMPLES = 5000  # that the network is, in the end
FEWEST_TRIAL_STEPS = 15
WEIGHT_DECAY = 0.02
BETAS = (0.9, 0.99)
# Norm of the whole gradient. Without it a deep network without batch norm dies in the warm-up: a
# NiN with ReLU after its last layer stayed at chance on the digits; with it, it learned.
CLIP = 1.0
STEPS_BEFORE_CAPTURE = 3
# Share of the images that a student sees with a rectangle of another one, if no other is asked.
MIXED = 0.5
# Share of the epochs, at the end, that see the images as they are: augmented ones are not quite
# what the network will meet. In more passes than a few it would learn them by heart. A teacher's
# answers to augmented images are right all the same.
PLAIN, MOST_PLAIN = 0.2, 5
CHECKPOINT_FORMAT = 1


class Trained(NamedTuple):
    """A network that was trained, in evaluation mode, and what the training did."""

    model: nn.Module
    log: TrainLog


@float32_in("float32")
def train(
    model: nn.Module,
    data: Data | Any,
    *,
    epochs: int,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float = WEIGHT_DECAY,
    label_smoothing: float = 0.0,
    loss: Loss | None = None,
    augment: bool = True,
    precision: Precision = "auto",
    capture: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    metric: str | MetricFunction | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a copy of a network on labelled data.

    AdamW with gradients clipped to norm 1, a linear warm-up over the first tenth of the steps,
    then a cosine down to 0. The last fifth of the epochs, five at most, sees the examples without
    augmentation.
    The weights after the last epoch are kept: choosing an epoch by its validation score would
    make that score look better than it is.

    Args:
        model: The network, with float32 weights. Not modified. Parameters that need no gradient
            stay as they are. Where it is in training mode, modules of it that are in evaluation
            mode stay so; where it is in evaluation mode, batch norms whose parameters are all
            frozen do.
        data: A :class:`Data`, scored on its validation part after each epoch; or what
            :func:`onebyone.data.as_split` takes, not scored.
        epochs: Passes over the training data.
        batch_size: Examples a step; 128, or less on small data.
        learning_rate: The highest one; 0.004 at a batch of 128, with its square root at others.
        weight_decay: Of matrices and kernels, not of biases and norms.
        label_smoothing: Share of the label that goes to the other classes, 0 up to 1.
        loss: ``(outputs, targets) -> scalar``; cross-entropy for classes and mean squared error
            for other targets where not given.
        augment: Whether to use the data set's augmentation, but at the end.
        precision: ``bf16`` computes under autocast, weights stay float32; ``auto`` does so where
            the device has bf16 instructions. ``float32`` is so on a GPU too, not TF32.
        capture: Whether to capture a step as a CUDA graph on a GPU, where it can be. Turn it off
            for a network whose own Python code does something else from call to call.
        seed: Of the order, the augmentation and dropout. The global random state is not changed.
        device: Where to train; the network's own where not given.
        metric: For validation; accuracy for classifiers where not given.
        checkpoint: A file that is written after every epoch. Where it exists already, training
            goes on from it, to the same weights on a CPU as without the interruption.
        progress: Called as ``progress(done_steps, total_steps, message)``.

    Returns:
        The trained copy, in evaluation mode, on the device of ``model``, and the log.

    Raises:
        OptionError: If an option is outside what it may be, the network has nothing to train,
            or the checkpoint was made with other settings.
        DataError: If the data is empty, has no targets, or targets of another shape.
        ModelError: If the network cannot be copied or run, or the loss is no longer finite.
        RecordError: If the checkpoint cannot be read.
        OutputError: If the checkpoint cannot be written.

    References:
        Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019. For the end without
        augmentation, He et al., "Data Augmentation Revisited", 2019, arXiv:1909.09148.
    """
    if not 0 <= label_smoothing < 1:
        raise OptionError(f"`label_smoothing` must be from 0 up to 1, got {label_smoothing}.")
    model = as_network(model)
    examples = _examples(data)
    options = _Options(
        epochs=epochs,
        batch_size=_default_batch(len(examples.train)) if batch_size is None else batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        augment=augment,
        ends_plain=True,
        precision=precision,
        capture=capture,
        seed=seed,
        metric=metric,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        progress=progress,
    )

    def objective(_: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return _label_loss(outputs, targets, loss=loss, label_smoothing=label_smoothing)

    name = "own loss" if loss is not None else "labels"
    if label_smoothing:
        name += f", smoothed by {label_smoothing:g}"
    job = _prepare(model, examples, options, default_rate=TRAIN_RATE, name=name, device=device)
    if loss is None:
        _check_classes(job)
    return _fit(job, objective)


@float32_in("float32")
def distill(
    model: nn.Module,
    data: Data | Any,
    *,
    teacher: nn.Module,
    epochs: int,
    temperature: float = 4.0,
    label_weight: float = 0.0,
    features: Sequence[str] = (),
    feature_weight: float = 1.0,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float = WEIGHT_DECAY,
    label_smoothing: float = 0.0,
    loss: Loss | None = None,
    augment: bool = True,
    mix: float | None = None,
    keep_statistics: bool | None = None,
    norms: bool | None = None,
    precision: Precision = "auto",
    capture: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    metric: str | MetricFunction | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a copy of a network to give a teacher's outputs; labels are not needed.

    For class scores the loss is the Kullback-Leibler divergence from the teacher's softened
    scores, times the temperature squared so that its gradients do not shrink with it; for other
    outputs the squared error relative to the teacher's mean square. The rest is as in
    :func:`train`, but for one thing: a network that was nearer to its teacher than it is after the
    last epoch, by the mean divergence on validation data, is returned as it was. A short
    training leads one away that is close already.

    Args:
        model: The network that learns. Not modified.
        data: As for :func:`train`; targets may be missing. Without them validation counts the
            agreement with the teacher.
        teacher: The network to imitate, run in evaluation mode. Not modified.
        epochs: Passes over the training data.
        temperature: Divides the scores before the softmax; above 0.
        label_weight: Share of the loss that the labels get, from 0 to 1.
        features: Names of modules in both networks whose outputs are to be alike as well.
        feature_weight: Weight of each such module's squared error relative to its variance.
        batch_size: As for :func:`train`.
        learning_rate: The highest one. By default three are tried, from 0.001 to 0.016 at a batch
            of 128 (with its square root at others), for 100 steps each, 300 where the network is
            far from its teacher, and the one is taken that comes nearest on validation data, of
            far networks the lowest that comes as near. A training too short for that takes the
            lowest. One that follows labels alone, and a far network that all rates lead farther
            away at first, takes the highest that it stands: that ends at most half as far again
            from the teacher as the nearest.
        weight_decay: As for :func:`train`.
        label_smoothing: As for :func:`train`, for the labels' share.
        loss: As for :func:`train`, for the labels' share.
        augment: Whether to use the data set's augmentation; the teacher sees the same augmented
            inputs. The end goes without, as in :func:`train`, where labels have all the weight.
        mix: Share of the images in which a rectangle is another one's; the teacher is asked about
            the mixture, which no label fits. By default half, where images are augmented, outputs
            are class scores and labels have no weight; else none.
        keep_statistics: Whether batch norms of a network in evaluation mode keep their running
            statistics. By default they do only where labels have no weight, all rates that are
            tried lead away from a near teacher otherwise, and one of two that are then tried with
            them ends nearer: for a network that is close already the noise of a batch's own
            statistics is too much. One without such norms is tried at a lower rate then.
        norms: Whether convolutions with a bias whose output goes to an activation alone get a
            batch norm while they are trained, which starts as the identity and is taken into them
            at the end. By default they do where labels have all the weight, and where the network
            is far from its teacher, by a mean divergence above 0.05.
        precision: As for :func:`train`.
        capture: As for :func:`train`.
        seed: As for :func:`train`.
        device: As for :func:`train`.
        metric: As for :func:`train`.
        checkpoint: As for :func:`train`.
        progress: As for :func:`train`.

    Returns:
        As :func:`train`; the log says of which epoch the weights are, 0 for those given.

    Raises:
        OptionError: As :func:`train`, and if a feature is not in both networks.
        DataError: As :func:`train`; missing targets only where labels have a weight.
        ModelError: As :func:`train`, and if the outputs of the two differ in shape.
        RecordError: If the checkpoint cannot be read.
        OutputError: If the checkpoint cannot be written.

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. For the
        mixtures, Yun et al., "CutMix", ICCV 2019, and Beyer et al., "Knowledge distillation: a good
        teacher is patient and consistent", CVPR 2022.
    """
    check_distillation(
        temperature=temperature, label_weight=label_weight, label_smoothing=label_smoothing, mix=mix
    )
    model, teacher = as_network(model), as_network(teacher, scripted=True)
    examples = _examples(data)
    mix = _share_mixed(mix, examples, teacher, augment=augment, label_weight=label_weight)
    batch = _default_batch(len(examples.train)) if batch_size is None else batch_size
    has_statistics = not model.training and any(isinstance(m, _BatchNorm) for m in model.modules())
    keep, how = bool(keep_statistics) and has_statistics, ""
    judge = (examples.validation or examples.train).take(TRIAL_EXAMPLES, seed)
    measured = partial(_distances, teacher, split=judge, device=device)
    settled = norms is not None or label_weight == 1
    at_start = math.inf if settled and learning_rate is not None else measured([model])[0]
    if norms is None:
        norms = label_weight == 1 or at_start > NEAR
    if learning_rate is None:
        again = partial(
            distill, model, teacher=teacher, temperature=temperature, label_weight=label_weight,
            features=features, feature_weight=feature_weight, batch_size=batch,
            weight_decay=weight_decay, label_smoothing=label_smoothing, loss=loss, augment=augment,
            mix=mix, norms=norms, precision=precision, capture=capture, seed=seed, device=device,
        )  # fmt: skip
        learning_rate, keep, how = _tried_rate(
            again,
            examples.train,
            measured,
            at_start=at_start,
            epochs=epochs,
            batch=batch,
            seed=seed,
            ways=[(rate, keep) for rate in TRIED],
            further=_further(
                keep_statistics=keep_statistics,
                label_weight=label_weight,
                has_statistics=has_statistics,
            ),
            guided=label_weight < 1,
        )
    options = _Options(
        epochs=epochs,
        batch_size=batch,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        augment=augment,
        ends_plain=label_weight == 1,
        norms=norms,
        mix=mix,
        precision=precision,
        capture=capture,
        seed=seed,
        metric=metric,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        progress=progress,
    )
    name = _named(
        temperature=temperature, label_weight=label_weight, label_smoothing=label_smoothing,
        features=features, feature_weight=feature_weight,
    )  # fmt: skip
    name += how + (", statistics of batch norms kept" if keep else "")
    job = _prepare(
        model, examples, options, default_rate=DISTILL_RATE, name=name, device=device,
        keeps_statistics=keep,
    )  # fmt: skip
    if label_weight and loss is None:
        _check_classes(job)
    # Always a copy: the layout of its weights changes with channels last.
    guide = evaluation_copy(teacher, device=job.device)
    guide.to(memory_format=torch.channels_last)
    job.settings["teacher"] = _fingerprint(guide)
    job.teacher = guide

    with (
        outputs_of_modules(job.student, features) as ours,
        outputs_of_modules(guide, features) as theirs,
    ):

        def objective(inputs: Tensor, given: Any, targets: Tensor) -> Tensor:
            total = torch.zeros((), device=inputs.device)
            if label_weight < 1 or features:
                with torch.no_grad(), job.autocast():
                    wanted = in_float32(guide(in_type_of(guide, inputs)))
            if label_weight < 1:
                both = (
                    comparable(wanted, guide, len(inputs)),
                    comparable(given, job.student, len(inputs)),
                )
                total = total + (1 - label_weight) * imitation_loss(*both, temperature)
            if label_weight:
                labels = _label_loss(given, targets, loss=loss, label_smoothing=label_smoothing)
                total = total + label_weight * labels
            for feature in features:
                error = feature_error(ours[feature], theirs[feature], feature)
                total = total + feature_weight * error
            return total

        trained = _fit(job, objective)
    if label_weight or examples.validation is None:
        return trained
    judge = examples.validation.take(JUDGED_EXAMPLES, seed)
    return _nearer(model, trained, teacher, judge, device=job.device)


def _named(
    *,
    temperature: float,
    label_weight: float,
    label_smoothing: float,
    features: Sequence[str],
    feature_weight: float,
) -> str:
    """Return what a distillation's loss is, in words."""
    name = "labels"
    if label_weight < 1:
        name = f"teacher's outputs, temperature {temperature:g}"
        name += f", {label_weight:.0%} labels" if label_weight else ""
    if label_weight and label_smoothing:
        name += f", smoothed by {label_smoothing:g}"
    if features:
        name += f", features of {', '.join(features)} × {feature_weight:g}"
    return name


def _nearer(
    start: nn.Module, trained: Trained, teacher: nn.Module, judge: Split, *, device: torch.device
) -> Trained:
    """Return the trained network, or the one it started as where that is nearer to the teacher."""
    before = evaluation_copy(start)
    at_start, at_end = _distances(teacher, [before, trained.model], judge, device=device)
    if at_end < at_start:
        return trained
    return Trained(before, replace(trained.log, chosen_epoch=0))


def _share_mixed(
    asked: float | None,
    examples: _Examples,
    teacher: nn.Module,
    *,
    augment: bool,
    label_weight: float,
) -> float:
    """Return the share of the images that are mixed."""
    images = len(examples.train.input_shape) == 3
    if asked is None:
        if label_weight or not images or not augment or examples.train.augmentation == "none":
            return 0.0
        guide = evaluation_copy(teacher)
        inputs, _ = next(iter(examples.train.batches(2, device=home_of(guide))))
        outputs = comparable(run(guide, in_type_of(guide, inputs)), guide, len(inputs))
        return MIXED if all(map(is_classifier_output, outputs)) else 0.0
    if asked and not images:
        raise OptionError(
            f"`mix` must be 0 for inputs that are no images of shape (channels, height, width), "
            f"got {asked} and inputs of shape {tuple(examples.train.input_shape)}."
        )
    return asked


def _further(
    *, keep_statistics: bool | None, label_weight: float, has_statistics: bool
) -> list[tuple[float, bool]]:
    """Return what is tried too where all else leads away from a near teacher."""
    if keep_statistics is not None or label_weight:  # with labels, nearness is not all that counts
        return []
    # Without statistics to keep, a rate that was tried already would be tried again.
    rates = [rate for rate in TRIED_NEAR if has_statistics or rate not in TRIED]
    return [(rate, has_statistics) for rate in rates]


def _tried_rate(
    again: Callable[..., Trained],
    train: Split,
    measured: Callable[[Sequence[nn.Module]], list[float]],
    *,
    at_start: float,
    epochs: int,
    batch: int,
    seed: int,
    ways: Sequence[tuple[float, bool]],
    further: Sequence[tuple[float, bool]],
    guided: bool,
) -> tuple[float | None, bool, str]:
    """Return what comes nearest to the teacher in a short trial.

    Args:
        again: Distils the student anew.
        train: What it is to learn from.
        measured: Gives each network's distance from the teacher.
        at_start: The student's as it is.
        epochs: Of the training that is to follow.
        batch: Examples a step.
        seed: Of what is drawn.
        ways: What is tried: multiples of the least rate, and whether batch norms keep their
            statistics; the rates rise.
        further: What is tried too if all of these lead away from a near teacher.
        guided: Whether the teacher has a share of the loss.

    Returns:
        The rate, whether batch norms keep their statistics, and how that was found.
    """
    total = len(train)
    affordable = TRIAL_SHARE * epochs * total
    if affordable < FEWEST_TRIAL_STEPS * batch:
        return None, ways[0][1], ""
    steps = TRIAL_STEPS_FAR if at_start > NEAR else TRIAL_STEPS
    seen = int(min(steps * batch, affordable))
    passes = max(1, round(seen / total))
    part = train.take(min(seen, total), seed)
    base = DISTILL_RATE * math.sqrt(batch / 128)

    def tried(ways: Sequence[tuple[float, bool]]) -> dict[tuple[float, bool], nn.Module]:
        students = {}
        for multiple, keep in ways:
            rate = base * multiple
            try:
                made = again(part, epochs=passes, learning_rate=rate, keep_statistics=keep)
            except ModelError:  # it diverged: too high, and so is what is higher
                break
            students[rate, keep] = made.model
        return students

    students = tried(ways)
    apart = measured([*students.values()])
    if further and at_start <= NEAR and min(apart, default=math.inf) > at_start:
        others = tried(further)
        students |= others
        apart += measured([*others.values()])
    if not students:
        return None, ways[0][1], ""
    (rate, keep), which = _chosen(
        dict(zip(students, apart, strict=True)), at_start=at_start, guided=guided
    )
    return rate, keep, f"; rate the {which} of {len(students)} tried"


def _chosen(
    apart: Mapping[tuple[float, bool], float], *, at_start: float, guided: bool
) -> tuple[tuple[float, bool], str]:
    """Return which way to go on, of some that ended a trial so far from the teacher, and why."""
    least = min(apart.values())
    if not guided or (at_start > NEAR and least > at_start):
        stands = [way for way in apart if apart[way] <= BEHIND * least]
        return stands[-1], "highest it stands"
    enough = least * (ALIKE if at_start > NEAR else 1.0)
    return next(way for way in apart if apart[way] <= enough), "best"


def _distances(
    teacher: nn.Module,
    students: Sequence[nn.Module],
    split: Split,
    *,
    device: torch.device | str | None,
) -> list[float]:
    """Return the mean divergence of each student's outputs from their teacher's.

    Args:
        teacher: Not modified; nor are the students.
        students: All run on the same batches.
        split: Whose inputs they get.
        device: Where they run; the teacher's own where not given.
    """
    guide = evaluation_copy(teacher, device=device)
    place = device or home_of(guide)
    each = [in_evaluation_mode(student, device=place) for student in students]
    totals = [0.0] * len(each)
    with torch.inference_mode():
        for inputs, _ in split.batches(250, device=place):
            wanted = comparable(run(guide, in_type_of(guide, inputs)), guide, len(inputs))
            for position, student in enumerate(each):
                given = run(student, in_type_of(student, inputs))
                outputs = comparable(given, student, len(inputs))
                totals[position] += float(mean_divergence(wanted, outputs).sum())
    return [total / len(split) if math.isfinite(total) else math.inf for total in totals]


# ---------------------------------------------------------------- the job


@dataclass(frozen=True, kw_only=True)
class _Options:
    epochs: int
    batch_size: int
    learning_rate: float | None
    weight_decay: float
    augment: bool
    ends_plain: bool
    norms: bool = False
    mix: float = 0.0
    precision: Precision
    capture: bool
    seed: int
    metric: str | MetricFunction | None
    checkpoint: Path | None
    progress: Progress | None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise OptionError(f"`{name}` must be at least 1, got {value}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise OptionError(f"`learning_rate` must be above 0, got {self.learning_rate}.")
        if not 0 <= self.weight_decay < math.inf:
            raise OptionError(f"`weight_decay` must be 0 or more, got {self.weight_decay}.")

    @property
    def plain_epochs(self) -> int:
        """How many epochs at the end see the examples without augmentation."""
        return min(int(PLAIN * self.epochs), MOST_PLAIN) if self.ends_plain else 0


class _Examples(NamedTuple):
    train: Split
    validation: Split | None


@dataclass(kw_only=True)
class _Job:
    """All that an epoch needs; ``settings`` must be the same for a checkpoint to be continued."""

    student: nn.Module
    examples: _Examples
    options: _Options
    rate: float
    device: torch.device
    home: torch.device
    bf16: bool
    captures: bool  # the steps, as a CUDA graph
    optimizer: torch.optim.Optimizer
    name: str
    settings: dict[str, Any]
    training_modes: dict[str, bool]
    added: tuple[AddedNorm, ...] = ()
    teacher: nn.Module | None = None
    log: list[Epoch] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps an epoch: all batches but a last one of a single example."""
        full, rest = divmod(len(self.examples.train), self.options.batch_size)
        return max(1, full + (rest > 1))

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are learned."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def enter_training(self) -> None:
        for name, module in self.student.named_modules():
            module.training = self.training_modes[name]


def _examples(data: Data | Any) -> _Examples:
    if isinstance(data, Data):
        return _Examples(data.train, data.validation)
    return _Examples(as_split(data), None)


def _prepare(
    model: nn.Module,
    examples: _Examples,
    options: _Options,
    *,
    default_rate: float,
    name: str,
    device: torch.device | str | None,
    keeps_statistics: bool = False,
) -> _Job:
    student = copy_network(model)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trained:
        raise OptionError(
            "The network must have parameters that need a gradient, and has none. "
            "Call `requires_grad_(True)` on what is to be trained."
        )
    for key, parameter in student.named_parameters():
        if parameter.dtype != torch.float32:
            raise OptionError(
                f"The network's parameters must be float32 to be trained, got {parameter.dtype} "
                f"in {key}. Give `model.float()`; `precision` sets what is computed in."
            )
    home = trained[0].device
    where = home if device is None else as_device(device)
    initial = _fingerprint(student)
    student.to(where)
    student.to(memory_format=torch.channels_last)
    added: tuple[AddedNorm, ...] = ()
    if options.norms:
        first = examples.train.take(FIRST_EXAMPLES, options.seed)
        inputs, _ = next(iter(first.batches(len(first), device=where, channels_last=True)))
        added = add_norms(student, inputs)
    rate = options.learning_rate
    if rate is None:
        rate = default_rate * math.sqrt(options.batch_size / 128)
    bf16 = uses_bf16(options.precision, where)
    captures = options.capture and where.type == "cuda"
    settings = {
        "objective": name,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": rate,
        "weight_decay": options.weight_decay,
        "augment": options.augment,
        "plain_epochs": options.plain_epochs,
        "mix": options.mix,
        "precision": "bf16" if bf16 else "float32",
        "seed": options.seed,
        "device": where.type,
        "examples": len(examples.train),
        "input_shape": list(examples.train.input_shape),
        "network": initial,
        "statistics": "kept" if keeps_statistics else "updated",
        "norms": [each.site for each in added],
    }
    if added:
        places = f"{len(added)} activations" if len(added) > 1 else "an activation"
        name += f"; batch norms before {places}, taken into the convolutions at the end"
    return _Job(
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
        added=added,
    )


def _default_batch(n: int) -> int:
    # At least some thirty steps an epoch on small data, 128 on large.
    return int(min(128, max(16, 2 ** math.floor(math.log2(max(1, n / 32))))))


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
    # A captured step reads the rate from where it lies.
    lies = torch.tensor(rate, device=captured_on)
    optimizer = torch.optim.AdamW(kept, lr=lies, betas=BETAS, fused=True, capturable=True)
    # The first steps are not captured, which torch would warn of as of a mistake.
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


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- losses


def check_distillation(
    *,
    temperature: float = 4.0,
    label_weight: float = 0.0,
    label_smoothing: float = 0.0,
    mix: float | None = None,
) -> None:
    """Refuse what a distillation cannot be asked for, before anything is computed."""
    if not 0 < temperature < math.inf:
        raise OptionError(f"`temperature` must be above 0, got {temperature}.")
    if not 0 <= label_weight <= 1:
        raise OptionError(f"`label_weight` must be from 0 to 1, got {label_weight}.")
    if not 0 <= label_smoothing < 1:
        raise OptionError(f"`label_smoothing` must be from 0 up to 1, got {label_smoothing}.")
    if mix is not None and not 0 <= mix <= 1:
        raise OptionError(f"`mix` must be from 0 to 1, got {mix}.")
    if mix and label_weight:
        raise OptionError(
            f"`mix` must be 0 where labels have a weight, for no label fits a mixture, got {mix} "
            f"and a `label_weight` of {label_weight}."
        )


def _check_classes(job: _Job) -> None:
    """Check that the network has a score for every label, before a GPU is told of one that is not.

    Raises:
        DataError: If it has none for one that is known beforehand.
    """
    train = job.examples.train
    inputs, _ = next(iter(train.batches(min(2, len(train)), device=job.device)))
    job.student.eval()
    with torch.no_grad():
        given = _forward(job, inputs)
    if isinstance(given, Tensor):
        check_labels(given, train.targets)


def _label_loss(
    outputs: Any, targets: Tensor, *, loss: Loss | None, label_smoothing: float
) -> Tensor:
    if is_unlabelled(targets):
        raise DataError(
            "Training on labels needs targets, and the data has none. Give (inputs, targets), "
            "or distil from a teacher."
        )
    if loss is not None:
        return loss(outputs, targets)
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"Training on labels needs one tensor of outputs, got {type(outputs).__name__}. Give a "
            "`loss` of outputs and targets, or wrap the network in a module that returns the part "
            "to learn."
        )
    if targets.dtype == torch.int64 and targets.ndim == outputs.ndim - 1:
        try:
            return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
        except IndexError as error:
            raise DataError(
                f"Labels must be from 0 to {outputs.shape[1] - 1}, as the network scores "
                f"{outputs.shape[1]} classes: {_first_line(error)}. Number the classes from 0, or "
                "give the network a score for each."
            ) from error
    if targets.shape != outputs.shape:
        raise DataError(
            f"Targets must have the shape of the outputs, {tuple(outputs.shape)}, or be classes "
            f"of shape {tuple(outputs.shape[:1])}, got {tuple(targets.shape)}. "
            "Reshape them, or give a `loss`."
        )
    return F.mse_loss(outputs, targets.to(outputs.dtype))


# ---------------------------------------------------------------- epochs


_Objective = Callable[[Tensor, Any, Tensor], Tensor]
_TakeStep = Callable[[Tensor, Tensor], Tensor]  # of inputs and targets: the loss


def _fit(job: _Job, objective: _Objective) -> Trained:
    options = job.options
    score = _validation(job)
    _resume(job)
    take_step: _TakeStep = partial(_step, job, objective)
    if job.captures:
        take_step = _CapturedStep(take_step, job.device)
    with seeded(options.seed, job.device):
        for epoch in range(len(job.log) + 1, options.epochs + 1):
            started = time.perf_counter()
            # Seeded anew each epoch: an epoch depends on nothing but the weights before it.
            seed = (options.seed * 1_000_003 + epoch) % 2**63
            seed_generators(seed, job.device)
            with composed(job.student, bf16=job.bf16, device=job.device):
                loss = _epoch(job, take_step, epoch, seed)
            trained_seconds = time.perf_counter() - started
            job.log.append(
                Epoch(
                    epoch=epoch,
                    loss=loss,
                    validation=None if score is None else score.measure(job),
                    learning_rate=_rate(job, (epoch - 1) * job.steps),
                    seconds=trained_seconds,
                )
            )
            _save(job)
    job.student.eval()
    take_in(job.student, job.added)
    job.student.to(job.home)
    job.student.to(memory_format=torch.contiguous_format)
    for parameter in job.student.parameters():
        parameter.grad = None
    return Trained(job.student, _log(job, "none" if score is None else score.name))


def _epoch(job: _Job, take_step: _TakeStep, epoch: int, seed: int) -> float:
    options, first = job.options, (epoch - 1) * job.steps
    total_steps = job.steps * options.epochs
    # A look at the loss waits for a GPU, so there it is rare.
    look = 1 if job.device.type == "cpu" else 16
    total = torch.zeros((), dtype=torch.float64, device=job.device)
    job.enter_training()
    batches = job.examples.train.batches(
        options.batch_size,
        seed=seed,
        augment=options.augment and epoch <= options.epochs - options.plain_epochs,
        device=job.device,
        channels_last=True,
    )
    generator = torch.Generator().manual_seed(seed)
    for step, (inputs, targets) in zip(range(1, job.steps + 1), batches, strict=False):
        _set_rate(job.optimizer, _rate(job, first + step - 1))
        seen = cut_mixed(inputs, options.mix, generator) if options.mix else inputs
        total += take_step(seen, targets)
        if step % look == 0 or step == job.steps:
            mean = float(total) / step
            _check_finite(mean, job, epoch, step)
            if options.progress is not None:
                message = f"epoch {epoch} of {options.epochs}, loss {mean:.4f}"
                options.progress(first + step, total_steps, message)
    return float(total) / job.steps


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _step(job: _Job, objective: _Objective, inputs: Tensor, targets: Tensor) -> Tensor:
    """Take a step of the optimizer; return the loss that it was taken from."""
    loss = objective(inputs, _forward(job, inputs), targets)
    job.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(job.trained, CLIP)
    job.optimizer.step()
    return loss.detach()


class _CapturedStep:
    """Takes steps on a GPU: the first ones kernel by kernel, the others from a CUDA graph.

    A step of a small network is a thousand kernels of a few microseconds, and the processor takes
    longer to launch one than the GPU to run it; a graph is launched at once. Batches of another
    shape, and steps that wait for the GPU, go kernel by kernel.
    """

    def __init__(self, take: _TakeStep, device: torch.device) -> None:
        self._take, self._device = take, device
        self._ahead = STEPS_BEFORE_CAPTURE
        self._waits = False  # for the device, within a step, which no graph can hold
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs = self._targets = self._loss = torch.empty(0)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take a step; the loss is valid until the next one."""
        with torch.cuda.device(self._device):
            if self._ahead > 0:
                self._ahead -= 1
                return self._beside(inputs, targets)
            if self._graph is None and not self._waits:
                self._capture(inputs, targets)
            alike = inputs.shape == self._inputs.shape and targets.shape == self._targets.shape
            if self._graph is None or not alike:
                return self._take(inputs, targets)
            self._inputs.copy_(inputs)
            self._targets.copy_(targets)
            self._graph.replay()
            return self._loss

    def _beside(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # What a library allocates in its first calls must not be in a graph, nor on its stream.
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream), _waits_noted() as waits:
            loss = self._take(inputs, targets)
        self._waits = self._waits or any(waits)
        current.wait_stream(stream)
        return loss

    def _capture(self, inputs: Tensor, targets: Tensor) -> None:
        self._inputs, self._targets = inputs.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = self._take(self._inputs, self._targets)
        except (
            RuntimeError,
            ModelError,
        ) as error:  # torch's generators and allocator are of no use after it
            raise ModelError(
                f"A training step could not be captured as a CUDA graph: {_first_line(error)}. "
                "Give `capture=False`, in a new process."
            ) from error
        self._graph = graph


@contextmanager
def _waits_noted() -> Iterator[list[bool]]:
    """Note whether the processor waits for a GPU inside; other warnings are passed on."""
    before = torch.cuda.get_sync_debug_mode()
    waits: list[bool] = []
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            waits += ["synchronizing CUDA operation" in str(each.message) for each in noted]
    for each, wait in zip(noted, waits, strict=True):
        if not wait:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _forward(job: _Job, inputs: Tensor) -> Any:
    try:
        with job.autocast():
            given = job.student(inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(
            f"The network must take inputs of shape {tuple(inputs.shape)}, and failed: "
            f"{_first_line(error)}. Check the data against the network's first layer."
        ) from error
    return the_one(in_float32(given))


def _check_finite(mean: float, job: _Job, epoch: int, step: int) -> None:
    if math.isfinite(mean):
        return
    other = ', `precision="float32"`' if job.bf16 else ""
    raise ModelError(
        f"The loss must stay finite, and became {mean} in epoch {epoch}, step {step} of "
        f"{job.steps}. Give a lower `learning_rate` than {job.rate:.2g}{other}, or check the "
        "network's weights and the targets for values that are too large."
    )


def _rate(job: _Job, step: int) -> float:
    total = job.steps * job.options.epochs
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return job.rate * (step + 1) / warm_up
    return job.rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


# ---------------------------------------------------------------- validation


@dataclass(frozen=True)
class _Score:
    name: str
    split: Split
    metric: str | MetricFunction | None  # None: agreement with the teacher

    def measure(self, job: _Job) -> float:
        job.student.eval()
        if self.metric is None:
            return _agreement(job, self.split)
        batch = max(250, job.options.batch_size)
        result = evaluate(
            job.student,
            self.split,
            metric=self.metric,
            batch_size=batch,
            device=str(job.device),
        )
        return result.value


def _validation(job: _Job) -> _Score | None:
    split, metric = job.examples.validation, job.options.metric
    if split is None:
        return None
    inputs, targets = next(iter(split.batches(min(2, len(split)), device=job.device)))
    agrees = job.teacher is not None and is_unlabelled(targets)
    if metric is not None and not (agrees and metric == "accuracy"):
        return _Score(find_metric(metric)[0], split, metric)
    job.student.eval()
    with torch.no_grad():
        outputs = _forward(job, inputs)
    if not isinstance(outputs, Tensor) or not is_classifier_output(outputs):
        return None
    if targets.ndim == 1 and targets.dtype == torch.int64:
        return _Score("accuracy", split, "accuracy")
    return _Score(AGREEMENT, split, None) if agrees else None


def _agreement(job: _Job, split: Split) -> float:
    assert job.teacher is not None
    same = 0
    with torch.no_grad():
        for inputs, _ in split.batches(250, device=job.device, channels_last=True):
            ours = one_tensor(job.student(inputs), job.student)
            theirs = one_tensor(job.teacher(in_type_of(job.teacher, inputs)), job.teacher)
            same += int((ours.argmax(1) == theirs.argmax(1)).sum())
    return same / len(split)


def _log(job: _Job, metric: str) -> TrainLog:
    options = job.options
    train_split = job.examples.train
    return TrainLog(
        objective=job.name,
        metric=metric,
        epochs=tuple(job.log),
        examples=len(train_split),
        batch_size=options.batch_size,
        learning_rate=job.rate,
        weight_decay=options.weight_decay,
        optimizer=f"AdamW, gradients clipped to norm {CLIP:g}",
        schedule=f"warm-up over {WARM_UP:.0%} of the steps, then cosine to 0",
        precision="bf16 autocast" if job.bf16 else "float32",
        augmentation=_augmentation(train_split, options),
        seed=options.seed,
        seconds=sum(epoch.seconds for epoch in job.log),
        chosen_epoch=options.epochs,
        device=str(job.device),
        threads=torch.get_num_threads(),
    )


def _augmentation(split: Split, options: _Options) -> str:
    usual = split.augmentation if options.augment else "none"
    if usual != "none" and (count := options.plain_epochs):
        usual += f", none in the last {count} epochs" if count > 1 else ", none in the last epoch"
    if not options.mix:
        return usual
    mixed = f"{options.mix:.0%} with a rectangle of another"
    return mixed if usual == "none" else f"{usual} + {mixed}"


# ---------------------------------------------------------------- checkpoints


def _save(job: _Job) -> None:
    path = job.options.checkpoint
    if path is None:
        return
    state = {
        "format": CHECKPOINT_FORMAT,
        "settings": job.settings,
        "model": job.student.state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "log": [epoch.to_json() for epoch in job.log],
    }
    try:
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OutputError(
            f"Cannot write the checkpoint {path}: {error.strerror}. Give a folder that exists "
            "and can be written to."
        ) from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            torch.save(state, stream)
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except OSError as error:
        Path(aside).unlink(missing_ok=True)
        raise OutputError(f"Cannot write the checkpoint {path}: {error.strerror}.") from error
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _resume(job: _Job) -> None:
    path = job.options.checkpoint
    if path is None or not path.exists():
        return
    advice = "Delete it to start anew, or give another path."
    try:
        state = torch.load(path, map_location=job.device, weights_only=True)
        settings, log = state["settings"], [Epoch.from_json(text) for text in state["log"]]
        if state["format"] != CHECKPOINT_FORMAT:
            raise RecordError(f"The checkpoint {path} is of another version. {advice}")
    except (
        OSError,
        EOFError,
        KeyError,
        TypeError,
        RuntimeError,
        pickle.UnpicklingError,
        msgspec.MsgspecError,
    ) as error:
        # torch's own text advises to run whatever code the file holds: it is not passed on.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and numbers" if unsafe else _first_line(error)
        raise RecordError(f"{path} cannot be read as a checkpoint: {reason}. {advice}") from error
    different = [
        f"{key} {settings.get(key)!r} instead of {job.settings.get(key)!r}"
        for key in sorted({*settings, *job.settings})
        if settings.get(key) != job.settings.get(key)
    ]
    if different:
        raise OptionError(
            f"The checkpoint {path} must come from the same training, and has "
            f"{', '.join(different)}. Give the same options, or another path, or delete it."
        )
    job.student.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    job.log.extend(log)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
