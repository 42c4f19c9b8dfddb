"""Distillation in int8: train a quantized network's integers to give a teacher's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from onebyone.calibration.meaning import Meaning, TaskLike
from onebyone.core.arguments import checked
from onebyone.core.metrics import AnyMetric
from onebyone.core.processes import on_main
from onebyone.core.records import TrainLog
from onebyone.core.settings.common import Progress
from onebyone.core.settings.training import DistillSettings
from onebyone.core.torch_state import ordinary_torch
from onebyone.data import Data
from onebyone.networks.surgery import as_network, home_of
from onebyone.quantizing import Quantized
from onebyone.quantizing.trainable import trainable, with_trained
from onebyone.training.distill import distilled, judged_part, meanings
from onebyone.training.job import examples_of
from onebyone.training.rate_search import distances

# Rates that are tried, as multiples of those of a distillation in float32: the closed forms leave
# little, and a weight that moves by half a step is another integer.
RATES = (1 / 64, 1 / 16, 1 / 4)


class DistilledInt8(NamedTuple):
    """A quantized network that was distilled in int8.

    Attributes:
        quantized: Its integers and steps are the trained ones; those of the start if no epoch came
            nearer to the teacher.
        log: Of the training. ``chosen_epoch`` is 0 for the integers of the start.
        before: Mean divergence of the outputs from the teacher's on validation data at the start.
        after: The same at the end; never more.
        examples: Validation examples that both were measured on.
    """

    quantized: Quantized
    log: TrainLog
    before: float
    after: float
    examples: int

    def __str__(self) -> str:
        return str(self.log)


@checked
@ordinary_torch()
def distill_int8(
    quantized: Quantized,
    data: Data | Any,
    *,
    teacher: nn.Module,
    epochs: int,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    mix: float | None = None,
    task: TaskLike | Meaning | None = None,
    metric: str | AnyMetric | None = None,
    ignore_index: int | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    on_epoch: Callable[[TrainLog], None] | None = None,
    progress: Progress | None = None,
    capture: bool = True,
    seed: int = 0,
) -> DistilledInt8:
    """Train a quantized network to give a teacher's outputs, rounded as it is; without labels.

    The network computes on its grids while it is trained. Gradients pass through the rounding;
    values beyond a grid's ends get none. The steps of activations are trained too.
    Layers in float32 stay as they are. The result is that of the epoch that is nearest to the
    teacher on validation data, or the network itself if none is nearer.

    Args:
        quantized: What :func:`onebyone.quantizing.quantize` returned. Not modified.
        data: As for :func:`onebyone.distill`; its targets are only used for the score.
        teacher: The network to imitate, such as the original in float32. Not modified.
        epochs: Passes over the training data.
        learning_rate: The highest learning rate. By default three are tried for up to 100 steps
            each, 300 if the network is far from its teacher, and the best is used. A training too
            short for trials uses the middle one, 0.00006 at a batch of 128.
        batch_size: Examples in a training step. By default 128, or fewer on small data.
        mix: Share of the images in which a rectangle is replaced by another image's, as for
            :func:`onebyone.distill`.
        task: What the outputs mean, as for :func:`onebyone.distill`.
        metric: Of the score after each epoch.
        ignore_index: A label that is left out of the score.
        device: Where to train. By default where the teacher is.
        checkpoint: A file that is written after every epoch. If it exists, training resumes.
        on_epoch: Called after each epoch with the :class:`TrainLog` so far.
        progress: Called as ``progress(done_steps, total_steps, message)``.
        capture: Capture training steps as CUDA graphs on a GPU.
        seed: Random seed.

    Raises:
        ModelError: If ``quantized`` was not made by ``quantize``, or outputs differ in shape.
        OptionError: If the checkpoint is of another training, or an option is not valid.
    """
    guide = as_network(teacher, scripted=True)
    settings = DistillSettings(
        teacher=guide,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        mix=mix,
        task=task,
        metric=metric,
        ignore_index=ignore_index,
        device=home_of(guide) if device is None else device,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
        progress=progress,
        capture=capture,
        seed=seed,
        # The grids have more digits than bf16, and decay would move integers by itself.
        precision="float32",
        weight_decay=0.0,
        norms=False,
    )
    student = trainable(quantized)
    trained = distilled(student, data, settings, keeps_best=True, rates=RATES)
    made = with_trained(quantized, trained.model, epochs=trained.log.chosen_epoch)
    before, after, examples = _apart(settings, data, (quantized, made))
    if trained.log.chosen_epoch and after < before:
        return DistilledInt8(made, trained.log, before, after, examples)
    log = replace(trained.log, chosen_epoch=0)
    return DistilledInt8(quantized, log, before, before, examples)


def _apart(
    settings: DistillSettings, data: Data | Any, both: tuple[Quantized, Quantized]
) -> tuple[float, float, int]:
    """Return the divergence of two simulations from the teacher, and of how many examples."""
    examples = examples_of(data)
    judge = judged_part(examples, settings.seed)
    networks = [each.network for each in both]
    theirs, ours = meanings(settings.teacher, networks[0], data, examples, settings)
    apart = on_main(
        lambda: distances(
            settings.teacher, networks, judge, meaning=theirs, mine=ours, device="cpu"
        )
    )
    return apart[0], apart[1], len(judge)
