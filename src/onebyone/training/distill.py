"""Distillation: train a copy of a network to give a teacher's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onebyone.calibration.infer_task import look_at
from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import OptionError
from onebyone.core.precision import float32_in
from onebyone.core.processes import on_main
from onebyone.core.settings.signature import takes
from onebyone.core.settings.training import DistillSettings
from onebyone.core.tensor_trees import Inputs, fresh
from onebyone.core.torch_state import ordinary_torch
from onebyone.data import Data, Split
from onebyone.evaluation.feature_error import feature_error
from onebyone.networks.hashing import hash_weights
from onebyone.networks.outputs import comparable, in_float32
from onebyone.networks.surgery import (
    as_network,
    call,
    evaluation_copy,
    home_of,
    in_type_of,
    lay_channels_last,
    outputs_of_modules,
)
from onebyone.training.checkpoint import decision_in
from onebyone.training.job import (
    Decision,
    Examples,
    Job,
    LoopSettings,
    Trained,
    default_batch,
    examples_of,
    meaning_to_learn,
    prepare,
)
from onebyone.training.loop import Objective, fit
from onebyone.training.losses import check_classes, label_loss
from onebyone.training.rate_search import (
    DISTILL_RATE,
    NEAR,
    TRIAL_EXAMPLES,
    TRIED,
    distances,
    further_ways,
    tried_rate,
)

JUDGED_EXAMPLES = 5000  # for the comparison of the network before and after the distillation
# The default share of the images in which a rectangle is replaced by another image's.
MIXED = 0.5


@takes(DistillSettings)
@ordinary_torch()
@float32_in("float32")
def distill(model: nn.Module, data: Data | Any, settings: DistillSettings) -> Trained:
    """Train a copy of a network to give a teacher's outputs; labels are not needed.

    The loss follows the task. For classes it is the Kullback-Leibler divergence from the teacher's
    softened scores, times the squared temperature so that gradients do not shrink with it. For
    numbers it is the squared error divided by the variance of the teacher's outputs. The rest is as
    in :func:`train`, with one exception: if the mean divergence on validation data is larger after
    the distillation than before, the weights from before are returned. A short training can worsen
    a network that is already close to its teacher.

    Args:
        model: The student. Not modified.
        data: As for :func:`train`; targets may be missing. Without them validation counts the
            agreement with the teacher.
        settings: The fields of :class:`DistillSettings`, by keyword.

    Returns:
        As :func:`train`. The log says which epoch the weights come from; 0 for the given weights.

    Raises:
        OptionError: As :func:`train`, or if a feature is not in both networks.
        DataError: As :func:`train`, but missing targets only if labels have a weight.
        ModelError: As :func:`train`, or if the outputs of the two networks differ in shape.
        RecordError: If the checkpoint cannot be read.
        OutputError: If the checkpoint cannot be written.

    References:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. For the
        mixtures, Yun et al., "CutMix", ICCV 2019, and Beyer et al., "Knowledge distillation: a good
        teacher is patient and consistent", CVPR 2022.
    """
    return distilled(as_network(model), data, settings)


def distilled(
    model: nn.Module,
    data: Data | Split,
    settings: DistillSettings,
    *,
    keeps_best: bool = False,
    rates: Sequence[float] | None = None,
) -> Trained:
    """Distil a network as :func:`distill` does.

    Args:
        model: The student. Not modified.
        data: As for :func:`distill`.
        settings: Settings of the distillation.
        keeps_best: Return the weights of the epoch that is nearest to the teacher on validation
            data, without validation data on training data. They are not compared with those of the
            start.
        rates: That are tried, as multiples of ``DISTILL_RATE``, if the settings give none;
            three high ones by default.
    """
    teacher = as_network(settings.teacher, scripted=True)
    examples = examples_of(data)
    meaning, mine = meanings(teacher, model, data, examples, settings)
    mix = _share_mixed(settings, examples, meaning)
    settings = replace(settings, teacher=teacher, mix=mix)
    decision = _decided(model, examples, settings, (meaning, mine), rates)
    options = LoopSettings.of(
        settings,
        examples,
        ends_plain=settings.label_weight == 1,
        learning_rate=decision.learning_rate,
        norms=decision.norms,
        mix=mix,
    )
    kept = ", statistics of batch norms kept" if decision.keeps_statistics else ""
    job = prepare(
        model,
        examples,
        options,
        # Of a training too short for trials: the lowest in float32, the middle one in int8.
        default_rate=DISTILL_RATE * (rates[len(rates) // 2] if rates else 1),
        name=_named(settings) + decision.how + kept,
        device=settings.device,
        keeps_statistics=decision.keeps_statistics,
        meaning=mine,
    )
    if settings.label_weight and settings.loss is None:
        check_classes(job)
    # Always a copy: the layout of its weights changes with channels last.
    guide = evaluation_copy(teacher, device=job.device)
    lay_channels_last(guide)
    job.settings["teacher"] = hash_weights(guide)
    job.decision = decision._replace(learning_rate=job.rate)
    job.teacher, job.guides = guide, meaning.to(job.device)

    def apart(students: Sequence[nn.Module]) -> list[float]:
        judge = judged_part(examples, settings.seed)
        means: Any = {"meaning": job.guides, "mine": job.meaning}
        return distances(teacher, students, judge, **means, device=job.device)

    if keeps_best:
        job.judge = lambda student: apart([student])[0]
    with (
        outputs_of_modules(job.student, settings.features) as ours,
        outputs_of_modules(guide, settings.features) as theirs,
    ):
        trained = fit(job, _objective(job, guide, settings, (ours, theirs)))
    if keeps_best or settings.label_weight or examples.validation is None:
        return trained
    return _nearer(model, trained, apart)


def _decided(
    model: nn.Module,
    examples: Examples,
    settings: DistillSettings,
    means: tuple[Meaning, Meaning],
    rates: Sequence[float] | None,
) -> Decision:
    """Return the settings that were left open, from a checkpoint or by short trials.

    Args:
        model: The student. Not modified.
        examples: Its training and validation data.
        settings: The given settings.
        means: What the teacher's and the student's outputs mean.
        rates: That are tried; those of a distillation in float32 by default.
    """
    meaning, mine = means
    rate, norms, seed = settings.learning_rate, settings.norms, settings.seed
    only_labels = settings.label_weight == 1
    has_statistics = not model.training and any(isinstance(m, _BatchNorm) for m in model.modules())
    keep = bool(settings.keep_statistics) and has_statistics
    resumed = None if rate is not None else decision_in(settings.checkpoint)
    if resumed is not None:
        return resumed
    judge = (examples.validation or examples.train).take(TRIAL_EXAMPLES, seed)
    how: Any = {"meaning": meaning, "mine": mine, "split": judge, "device": settings.device}

    def measured(students: Sequence[nn.Module]) -> list[float]:
        return on_main(lambda: distances(settings.teacher, students, **how))

    settled = norms is not None or only_labels
    at_start = math.inf if settled and rate is not None else measured([model])[0]
    norms = only_labels or at_start > NEAR if norms is None else norms
    if rate is not None:
        return Decision(rate, keep, "", norms)
    batch = settings.batch_size or default_batch(len(examples.train))
    trial = replace(
        settings, task=meaning, batch_size=batch, norms=norms,
        ignore_index=None, metric=None, checkpoint=None, progress=None,
        on_epoch=None, ema=None, patience=None,
    )  # fmt: skip

    def again(part: Split, **changes: Any) -> Trained:
        return distilled(model, part, replace(trial, **changes))

    found, keep, how = tried_rate(
        again,
        examples.train,
        measured,
        at_start=at_start,
        epochs=settings.epochs,
        batch=batch,
        seed=seed,
        ways=[(multiple, keep) for multiple in rates or TRIED],
        further=()
        if rates
        else further_ways(
            keep_statistics=settings.keep_statistics,
            label_weight=settings.label_weight,
            has_statistics=has_statistics,
        ),
        guided=not only_labels,
    )
    return Decision(found, keep, how, norms)


def judged_part(examples: Examples, seed: int) -> Split:
    """Return the examples on which networks are compared before and after a distillation."""
    return (examples.validation or examples.train).take(JUDGED_EXAMPLES, seed)


_Outputs = Mapping[str, Any]  # module name -> its output


def _objective(
    job: Job, guide: nn.Module, settings: DistillSettings, modules: tuple[_Outputs, _Outputs]
) -> Objective:
    """Return the loss of a distillation.

    Args:
        job: The student's training.
        guide: The teacher, on the student's device.
        settings: The weights of the loss's parts.
        modules: The last outputs of the modules of both networks.
    """
    weight, features = settings.label_weight, settings.features
    ours, theirs = modules

    def objective(inputs: Inputs, given: Any, targets: Tensor) -> Tensor:
        assert job.guides is not None
        total = torch.zeros((), device=targets.device)
        if weight < 1 or features:
            with torch.no_grad(), job.autocast():
                wanted = in_float32(call(guide, fresh(in_type_of(guide, inputs))))
        if weight < 1:
            both = (
                comparable(wanted, guide, len(targets)),
                comparable(given, job.student, len(targets)),
            )
            imitation = job.guides.imitation_loss(*both, settings.temperature, job.meaning)
            total = total + (1 - weight) * imitation
        if weight:
            labels = label_loss(
                given,
                targets,
                job.meaning,
                loss=settings.loss,
                label_smoothing=settings.label_smoothing,
            )
            total = total + weight * labels
        for feature in features:
            error = feature_error(ours[feature], theirs[feature], feature)
            total = total + settings.feature_weight * error
        return total

    return objective


def _named(settings: DistillSettings) -> str:
    """Return a description of a distillation's loss."""
    weight, name = settings.label_weight, "labels"
    if weight < 1:
        name = f"teacher's outputs, temperature {settings.temperature:g}"
        name += f", {weight:.0%} labels" if weight else ""
    if weight and settings.label_smoothing:
        name += f", smoothed by {settings.label_smoothing:g}"
    if settings.features:
        name += f", features of {', '.join(settings.features)} × {settings.feature_weight:g}"
    return name


def _nearer(
    start: nn.Module, trained: Trained, apart: Callable[[Sequence[nn.Module]], list[float]]
) -> Trained:
    """Return the network after or before training, whichever is nearer to the teacher."""
    at_start, at_end = on_main(lambda: apart([start, trained.model]))
    if at_end < at_start:
        return trained
    return Trained(evaluation_copy(start), replace(trained.log, chosen_epoch=0))


def _share_mixed(settings: DistillSettings, examples: Examples, meaning: Meaning) -> float:
    """Return the share of images in which a rectangle is replaced by another image's."""
    asked, augmentation = settings.mix, examples.train.augmentation
    images = examples.train.inputs.is_image
    if asked is None:
        if settings.label_weight or not images or not settings.augment or augmentation == "none":
            return 0.0
        return MIXED if meaning.answers_once else 0.0
    if asked and not images:
        raise OptionError(
            f"`mix` must be 0 unless inputs are images of shape (channels, height, width), "
            f"got {asked} and inputs of shape {examples.train.inputs.example_text()}."
        )
    return asked


def meanings(
    teacher: nn.Module,
    student: nn.Module,
    data: Data | Split,
    examples: Examples,
    settings: DistillSettings,
) -> tuple[Meaning, Meaning]:
    """Return what the outputs of a teacher and of its student mean."""
    device = settings.device
    found = meaning_to_learn(
        teacher, data, examples, settings.task, settings.ignore_index, learns=False, device=device
    )
    seen = look_at(student, examples.train, device=home_of(student) if device is None else device)
    return found, found.of_other(seen.outputs)
