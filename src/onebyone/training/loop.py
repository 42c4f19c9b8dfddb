"""The training loop over epochs and steps, its learning-rate schedule and its log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core import processes
from onebyone.core.errors import ModelError, OptionError
from onebyone.core.randomness import seed_generators, seeded
from onebyone.core.records import Epoch, TrainLog
from onebyone.core.tensor_trees import Inputs, sliced
from onebyone.core.units import plural
from onebyone.data import Split
from onebyone.data.augment import cut_mixed
from onebyone.networks.gradients import backward
from onebyone.training.checkpoint import resume, save
from onebyone.training.cuda_graph import CapturedStep, TakeStep
from onebyone.training.data_waits import DataWaits
from onebyone.training.fused_chains import composed
from onebyone.training.job import Job, LoopSettings, Trained, forward
from onebyone.training.shares import Part, mine_of, packed, parts_of
from onebyone.training.synced_norms import synced_norms
from onebyone.training.temporary_norms import take_in
from onebyone.training.validation import Score, validation

WARM_UP = 0.1  # share of the steps
# The largest norm of the whole gradient. Without clipping, deep networks without batch norm can
# fail in the warm-up: a NiN with ReLU after its last layer stayed at chance on the digits.
CLIP = 1.0
Objective = Callable[[Inputs, Any, Tensor], Tensor]


def fit(job: Job, objective: Objective) -> Trained:
    """Train for all epochs; resume from a checkpoint if there is one."""
    options = job.options
    score = validation(job)
    if options.patience is not None and score is None:
        raise OptionError(
            "`patience` needs a validation score to stop by, but there is none. Give data with a "
            "validation part and a metric that fits it, or leave `patience` out."
        )
    if not resume(job):
        save(job)  # keeps the decision, and shows early that the file can be written
    take_step: TakeStep = partial(_step, job, objective)
    if job.captures:
        take_step = CapturedStep(take_step, job.device)
    with seeded(options.seed, job.device):
        while not job.is_done:
            epoch = len(job.log) + 1
            started = time.perf_counter()
            # Seeded in each epoch, so that a resumed training draws the same.
            seed = (options.seed * 1_000_003 + epoch) % 2**63
            # What the network draws differs between processes, as their examples do.
            seed_generators(seed + processes.rank(), job.device)
            waits = DataWaits(job.device)
            with composed(job.student, bf16=job.bf16, device=job.device):
                loss = _epoch(job, take_step, epoch, seed, waits)
            # Where one process waits for data, the others wait for it in the same step.
            waited = max(processes.gathered(waits.seconds()))
            # Of what the network notes by itself, besides batch norms, the main process's counts.
            processes.copy_from_main([*job.student.buffers()])
            trained_seconds = time.perf_counter() - started
            with job.averaged():
                job.log.append(
                    Epoch(
                        epoch=epoch,
                        loss=loss,
                        validation=None if score is None else _measured(job, score),
                        learning_rate=_rate(job, (epoch - 1) * job.steps),
                        seconds=trained_seconds,
                        divergence=_divergence(job),
                        waited=waited,
                    )
                )
                keeps_best = options.patience is not None or job.judge is not None
                if keeps_best and job.best_epoch == epoch:
                    job.best = _copied(job.student.state_dict())
            save(job)
            if options.on_epoch is not None and processes.is_main():
                options.on_epoch(_log(job, score))
    if job.average is not None:
        job.average.put_in()
    if job.best is not None:
        job.student.load_state_dict(job.best)
    processes.copy_from_main([*job.student.parameters(), *job.student.buffers()])
    job.student.eval()
    take_in(job.student, job.added)
    job.student.to(job.home)
    job.student.to(memory_format=torch.contiguous_format)
    for parameter in job.student.parameters():
        parameter.grad = None
    return Trained(job.student, _log(job, score))


def _measured(job: Job, score: Score) -> float:
    return processes.on_main(lambda: score.measure(job))


def _divergence(job: Job) -> float | None:
    judge = job.judge
    if judge is None:
        return None
    apart = processes.on_main(lambda: judge(job.student))
    return apart if math.isfinite(apart) else None


def _copied(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in weights.items()
    }


def _epoch(job: Job, take_step: TakeStep, epoch: int, seed: int, waits: DataWaits) -> float:
    options, first = job.options, (epoch - 1) * job.steps
    total_steps = job.steps * options.epochs
    # Reading the loss waits for the GPU, so there it is read rarely.
    look = 1 if job.device.type == "cpu" else 16
    total = torch.zeros((), dtype=torch.float64, device=job.device)
    job.enter_training()
    train, n = job.examples.train, len(job.examples.train)
    how: dict[str, Any] = {"device": job.device, "channels_last": True}
    loads_share = processes.count() > 1 and not options.mix and getattr(train, "shares", False)
    if loads_share:
        how["mine"] = partial(mine_of, accumulate=options.accumulate)
    augmented = options.augment and epoch <= options.epochs - options.plain_epochs
    batches = train.batches(options.batch_size, seed=seed, augment=augmented, **how)
    generator = torch.Generator().manual_seed(seed)
    steps = range(1, job.steps + 1)
    for step, (inputs, targets) in zip(steps, waits.of(batches), strict=False):
        _set_rate(job.optimizer, _rate(job, first + step - 1))
        if options.mix and isinstance(inputs, Tensor):
            inputs = cut_mixed(inputs, options.mix, generator)  # noqa: PLW2901
        examples = len(targets)
        if loads_share:
            examples = min(options.batch_size, n - (step - 1) * options.batch_size)
        total += take_step(inputs, targets, examples)
        if job.average is not None:
            job.average.update()
        if step % look == 0 or step == job.steps:
            mean = float(total) / step
            _check_finite(mean, job, epoch, step)
            if options.progress is not None and processes.is_main():
                message = f"epoch {epoch} of {options.epochs}, loss {mean:.4f}"
                options.progress(first + step, total_steps, message)
    return float(total) / job.steps


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _step(job: Job, objective: Objective, inputs: Inputs, targets: Tensor, examples: int) -> Tensor:
    """Take an optimizer step and return its loss.

    Args:
        job: The training.
        objective: Of the step.
        inputs: A batch, or only what this process computes of it.
        targets: The same.
        examples: Number of examples in the whole batch.
    """
    job.optimizer.zero_grad(set_to_none=True)
    parts = parts_of(examples, job.options.accumulate)
    if len(targets) < examples:
        parts = packed(parts)
    total = torch.zeros((), device=targets.device)
    for part in parts:
        some, wanted = inputs, targets
        if len(part) < len(targets):
            some = sliced(inputs, part.start, part.stop)
            wanted = targets[part.start : part.stop]
        total = total + _gradients(job, objective, some, wanted, part)
    if processes.count() > 1:
        _add_up_gradients(job, total)
    nn.utils.clip_grad_norm_(job.trained, CLIP)
    job.optimizer.step()
    return total


def _gradients(
    job: Job, objective: Objective, inputs: Inputs, targets: Tensor, part: Part
) -> Tensor:
    """Add the gradients of a part's loss, times its share of the step; return that loss."""
    with synced_norms() if part.divided else nullcontext():
        loss = objective(inputs, forward(job, inputs), targets)
    loss = loss if part.share == 1 else loss * part.share
    backward(loss, job.student)
    return loss.detach()


def _add_up_gradients(job: Job, loss: Tensor) -> None:
    """Replace a step's loss and gradients by their sums over all processes, in place."""
    given = [parameter.grad is not None for parameter in job.trained]
    present = torch.tensor(given, dtype=torch.float32, device=loss.device)
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in job.trained]
    processes.add_up([loss, present, *gradients])
    if not all(given):  # a parameter that no process used must not be decayed either
        used = (present > 0).tolist()
        for parameter, gradient, is_used in zip(job.trained, gradients, used, strict=True):
            parameter.grad = gradient if is_used else None


def _check_finite(mean: float, job: Job, epoch: int, step: int) -> None:
    if math.isfinite(mean):
        return
    other = ', `precision="float32"`' if job.bf16 else ""
    raise ModelError(
        f"The loss must stay finite, but became {mean} in epoch {epoch}, step {step} of "
        f"{job.steps}. Give a lower `learning_rate` than {job.rate:.2g}{other}, or check the "
        "network's weights and the targets for values that are too large."
    )


def _rate(job: Job, step: int) -> float:
    total = job.steps * job.options.epochs
    warm_up = max(1, round(WARM_UP * total))
    if step < warm_up:
        return job.rate * (step + 1) / warm_up
    if job.options.schedule == "constant":
        return job.rate
    return job.rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def _log(job: Job, score: Score | None) -> TrainLog:
    options = job.options
    train_split = job.examples.train
    return TrainLog(
        objective=job.name,
        metric="none" if score is None else score.name,
        epochs=tuple(job.log),
        examples=len(train_split),
        batch_size=options.batch_size,
        learning_rate=job.rate,
        weight_decay=options.weight_decay,
        optimizer=f"AdamW, gradients clipped to norm {CLIP:g}",
        schedule=_schedule(job),
        precision="bf16 autocast" if job.bf16 else "float32",
        augmentation=_augmentation(train_split, options),
        seed=options.seed,
        seconds=sum(epoch.seconds for epoch in job.log),
        chosen_epoch=len(job.log) if job.best is None else job.best_epoch,
        device=str(job.device),
        threads=torch.get_num_threads(),
        task=job.meaning.info(),
        loading=getattr(train_split, "loading", None),
    )


def _schedule(job: Job) -> str:
    """Return the schedule of the learning rate, the average and the end, in words."""
    options = job.options
    then = "cosine to 0" if options.schedule == "cosine" else "constant"
    said = f"warm-up over {WARM_UP:.0%} of the steps, then {then}"
    if options.ema is not None:
        said += f", moving average of the weights with decay {options.ema:g}"
    if options.accumulate > 1:
        said += f", gradients of {options.accumulate} parts a step"
    if job.stops_early and len(job.log) < options.epochs:
        said += f", stopped after epoch {len(job.log)} of {options.epochs}: "
        said += f"{plural(options.patience or 0, 'epoch')} without a better validation score"
    return said


def _augmentation(split: Split, options: LoopSettings) -> str:
    usual = split.augmentation if options.augment else "none"
    if usual != "none" and (count := options.plain_epochs):
        usual += f", none in the last {count} epochs" if count > 1 else ", none in the last epoch"
    if not options.mix:
        return usual
    mixed = f"{options.mix:.0%} with a rectangle of another"
    return mixed if usual == "none" else f"{usual} + {mixed}"
