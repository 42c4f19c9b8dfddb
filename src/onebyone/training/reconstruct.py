"""Reconstruction: train all weights of a rewritten network on the original's outputs, briefly.

It takes a few hundred steps on unlabelled inputs, after the closed forms of :func:`onebyone.apply`
and before any fine-tuning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from onebyone.calibration.collect import collect
from onebyone.calibration.curvature import output_curvature, places_of
from onebyone.calibration.infer_task import look_at, meaning_of
from onebyone.calibration.inputs import CalibrationData, as_calibration
from onebyone.calibration.meaning import Meaning, TaskLike
from onebyone.core.arguments import checked
from onebyone.core.errors import DataError, OptionError
from onebyone.core.precision import Precision, float32_in, in_full, uses_bf16
from onebyone.core.randomness import seeded
from onebyone.core.records import Reconstruction
from onebyone.core.tensor_trees import Inputs, concatenated, fresh, to_device
from onebyone.core.tensor_trees import batch_size as examples_in
from onebyone.core.torch_state import ordinary_torch
from onebyone.data import DatasetSplit, PictureSplit, Split, TensorSplit
from onebyone.data.splits import held_out
from onebyone.data.trees import TreeSplit
from onebyone.evaluation.feature_error import feature_error
from onebyone.networks.gradients import backward
from onebyone.networks.outputs import Outputs, comparable, the_one
from onebyone.networks.surgery import (
    as_device,
    as_network,
    call,
    check_finite,
    copy_network,
    evaluation_copy,
    floating_type,
    home_of,
    in_type_of,
    lay_channels_last,
    outputs_of_modules,
    run,
)
from onebyone.training.eigenbasis_adam import Basis, EigenbasisAdam, basis_of, has_basis
from onebyone.training.fused_chains import composed

Progress = Callable[[int, int, str], None]
Stopped = Literal["steps", "seconds"]
# The share of the inputs that the weights are judged on, not fitted to, and its largest number.
HELD_OUT = 0.125
MOST_HELD_OUT = 1024
JUDGED = 8  # how often the weights are judged, evenly over the steps
STEPS = 200
RATE = 3e-4
# Divides class scores before the softmax. Without it, a confident teacher's scores say little about
# the other classes.
TEMPERATURE = 4.0
WARM_UP = 0.05  # share of the steps
# The batch size is chosen so that a pass over the data has at least this many steps.
STEPS_A_PASS = 16
LEAST_BATCH, MOST_BATCH = 8, 64
# Inputs used at least twice are kept in memory with the teacher's outputs if they have at most this
# many values, 1 GB.
ANSWERED_VALUES = 250_000_000
# The number of inputs that the bases are computed from.
BASIS_EXAMPLES = 32
# The first steps increase the divergence, while Adam learns its scales. If it exceeds this multiple
# of the divergence at the start, later steps do not recover.
FARTHEST = 4.0


class Reconstructed(NamedTuple):
    """A network after reconstruction, and the record of its steps."""

    model: nn.Module
    log: Reconstruction

    def __str__(self) -> str:
        return str(self.log)


@ordinary_torch()
@float32_in("float32")
@checked
def reconstruct(
    model: nn.Module,
    *,
    teacher: nn.Module,
    calibration: object,
    task: TaskLike | Meaning | None = None,
    steps: int = STEPS,
    seconds: float | None = None,
    features: Sequence[str] = (),
    batch_size: int | None = None,
    learning_rate: float = RATE,
    temperature: float = TEMPERATURE,
    augment: bool = False,
    precision: Precision = "auto",
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Reconstructed:
    """Train all weights of a rewritten network briefly, to give the original's outputs.

    The optimizer is Adam in the eigenbasis of each layer's inputs and output curvature. The
    learning rate has a short warm-up, then a cosine down to 0. Batch norms keep their statistics;
    dropout is off. The loss follows the task: the Kullback-Leibler divergence of classes, softened
    by a temperature; the squared error of numbers, divided by their variance. The weights are
    judged eight times on held-out inputs, without a temperature, and the best ones are returned,
    which may be those of the start. If the divergence becomes far larger than at the start, the
    steps continue from the best weights so far, at a third of the rate.

    Args:
        model: The rewritten network, with float32 weights. Not modified. Parameters that need no
            gradient keep their values.
        teacher: The network to imitate, run in evaluation mode. Not modified.
        calibration: Unlabelled inputs, as for :func:`onebyone.apply`; at least two. The network
            overfits to few inputs. One in eight is held out, at most 1,024.
        task: What the outputs mean, as for :func:`onebyone.plan`.
        steps: The number of steps.
        seconds: A limit of wall time. The result then depends on the machine's speed.
        features: Names of modules in both networks whose outputs are to match as well, by their
            squared error divided by their variance.
        batch_size: Examples in a step. The default is from 8 to 64, depending on the number of
            inputs, and 8 for outputs that are maps.
        learning_rate: The highest learning rate.
        temperature: Divides class scores before the softmax; above 0. One above 1 is lowered where
            the network's highest probability would be below one half on average, as with thousands
            of classes. Other outputs ignore it.
        augment: Whether to augment the inputs as their split does; the teacher sees the same
            inputs. In a few hundred steps more inputs helped, augmentation did not.
        precision: Precision of the student's steps, as for :func:`onebyone.train`. The teacher and
            the judgement never use bf16.
        seed: Random seed. The global random state is not changed.
        device: Where to run. The default is the network's device.
        progress: Called with the number of steps done.

    Returns:
        The network, in the mode and on the device of ``model``, and the record.

    Raises:
        OptionError: If an option has an invalid value, a feature is not in both networks, or no
            parameter needs a gradient.
        DataError: If there are fewer than two inputs, or no part of them can be held out.
        ModelError: If the networks' outputs differ in number or shape, or are not finite tensors.
        WeightsError: If a weight is not finite.

    References:
        For the temperature, Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
        2015; for the basis, Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR
        2025; for the outputs of modules, Romero et al., "FitNets", ICLR 2015.
    """
    _check(steps, seconds, batch_size, learning_rate, temperature)
    model, teacher = as_network(model), as_network(teacher, scripted=True)
    check_finite(model)
    check_finite(teacher)
    place = as_device(device or home_of(model))
    bf16 = uses_bf16(precision, place)
    data = as_calibration(calibration, device=str(place), dtype=floating_type(model))
    fitted, judge = _divided(data, seed)
    student = evaluation_copy(model, device=place)
    guide = evaluation_copy(teacher, device=place)
    if any(len(tensor.sample) == 3 for tensor in fitted.inputs.tensors):  # images
        # Convolutions on the CPU run up to twice as fast with channels last.
        lay_channels_last(student)
        lay_channels_last(guide)
    meaning = meaning_of(guide, data, task, device=place)
    batch = min(batch_size or _batch_size(guide, judge, len(fitted), meaning), len(fitted))
    changing = augment and fitted.augmentation != "none"
    answers = None
    seen = look_at(student, judge, device=place).outputs
    mine = meaning.of_other(seen)
    often = 2 * len(fitted) <= steps * batch
    temperature = mine.temperature(seen, temperature)
    values = fitted.inputs.values + sum(tensor[0].numel() for tensor in seen)
    fits = len(fitted) * values <= ANSWERED_VALUES
    if not changing and not features and often and fits:
        answers = _answered(fitted, guide, judge)
    job = _Job(
        student, guide, fitted, judge, batch, augment, seed, tuple(features), temperature,
        meaning.to(place), mine.to(place), answers, bf16=bf16,
    )  # fmt: skip
    with seeded(seed, place):
        record = _run(job, steps, seconds, learning_rate, progress)
    result = copy_network(model)
    result.load_state_dict(student.state_dict())
    return Reconstructed(result, record)


def _check(
    steps: int,
    seconds: float | None,
    batch_size: int | None,
    learning_rate: float,
    temperature: float,
) -> None:
    if steps < 1:
        raise OptionError(f"`steps` must be at least 1, got {steps}.")
    if seconds is not None and not 0 < seconds < math.inf:
        raise OptionError(f"`seconds` must be above 0, got {seconds}.")
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"`batch_size` must be at least 1, got {batch_size}.")
    if not 0 < learning_rate < math.inf:
        raise OptionError(f"`learning_rate` must be above 0, got {learning_rate}.")
    if not 0 < temperature < math.inf:
        raise OptionError(f"`temperature` must be above 0, got {temperature}.")


def _divided(data: CalibrationData, seed: int) -> tuple[Split, CalibrationData]:
    """Split the inputs into those to fit to and those to judge on."""
    split = data.split
    if not isinstance(split, (TensorSplit, TreeSplit, DatasetSplit, PictureSplit)):
        raise DataError(
            f"Calibration data must be tensors, a torch data set or a loader, so that a part can "
            f"be held out, got {type(split).__name__}."
        )
    count = min(max(1, round(HELD_OUT * len(split))), MOST_HELD_OUT)
    rest, kept = held_out(len(split), count, seed=seed)
    return split.part(rest), CalibrationData(
        split.part(kept), batch_size=data.batch_size, device=data.device, dtype=data.dtype
    )


def _batch_size(guide: nn.Module, judge: CalibrationData, inputs: int, meaning: Meaning) -> int:
    """Return the default batch size; it is small if each output has many positions."""
    if places_of(comparable(run(guide, judge.example()), guide, 1), meaning) > 1:
        return LEAST_BATCH
    return min(max(inputs // STEPS_A_PASS, LEAST_BATCH), MOST_BATCH)


def inputs_for(split: Split, steps: int, seed: int) -> Split:
    """Return as many random inputs of a split as the steps can use.

    More inputs than those of the calibration keep the steps from overfitting.

    Args:
        split: The inputs to draw from.
        steps: The number of steps.
        seed: Random seed.
    """
    wanted = steps * MOST_BATCH + MOST_HELD_OUT
    return split.take(wanted, seed) if wanted < len(split) else split


def _answered(fitted: Split, guide: nn.Module, judge: CalibrationData) -> Split | None:
    """Return the inputs with the teacher's outputs, so that the teacher runs only once on each."""
    inputs, outputs = [], []
    with torch.no_grad():
        for batch in replace(judge, split=fitted).batches():
            answer = the_one(run(guide, batch))
            if not isinstance(answer, Tensor) or len(answer) != examples_in(batch):
                return None
            inputs.append(to_device(batch, "cpu"))
            outputs.append(answer.cpu())
    joined, answers = concatenated(inputs), torch.cat(outputs)
    if isinstance(joined, Tensor):
        return TensorSplit(joined.float(), answers)
    return TreeSplit(joined, answers)


@dataclass(frozen=True)
class _Job:
    """All that the steps need; only ``student`` changes.

    Attributes:
        meaning: What the teacher's outputs mean.
        mine: What the student's outputs mean.
        answers: The inputs to fit to with the teacher's outputs, if these were computed once.
    """

    student: nn.Module
    guide: nn.Module
    fitted: Split
    judge: CalibrationData
    batch_size: int
    augment: bool
    seed: int
    features: tuple[str, ...]
    temperature: float
    meaning: Meaning
    mine: Meaning
    answers: Split | None = None
    bf16: bool = False

    def batches(self) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Yield batches to fit to, in a new order in each pass.

        The second value is the teacher's outputs if they were computed once, else ``None``.
        """
        device = self.judge.device
        for turn in range(1_000_000):
            source = self.fitted if self.answers is None else self.answers
            for inputs, targets in source.batches(
                self.batch_size,
                seed=self.seed + turn,
                augment=self.augment,
                device=device,
                channels_last=True,
            ):
                known = None if self.answers is None else targets
                yield in_type_of(self.student, inputs), known

    def bases(self) -> dict[str, Basis]:
        """Return the bases of the layers that have one, by layer name."""
        few = CalibrationData(
            self.fitted, batch_size=16, device=self.judge.device, dtype=self.judge.dtype
        ).first(BASIS_EXAMPLES)
        names = [name for name, m in self.student.named_modules() if has_basis(m)]
        moments = collect(self.student, names, few.batches, examples=len(few))
        curvature = output_curvature(self.student, names, few.batches, meaning=self.mine)
        return {
            name: basis_of(moments[name], curvature[name], self.student.get_submodule(name))
            for name in names
            # Subnormal outputs make the curvature overflow: such a layer gets no basis.
            if name in moments and name in curvature and bool(curvature[name].isfinite().all())
        }

    def references(self) -> list[Outputs]:
        """Return the teacher's outputs on the inputs to judge on."""
        with torch.no_grad():
            return [
                comparable(run(self.guide, inputs), self.guide, examples_in(inputs))
                for inputs in self.judge.batches()
            ]

    def judged(self, references: Sequence[Outputs]) -> float:
        """Return the student's mean divergence from the teacher's outputs."""
        total = 0.0
        with torch.no_grad():
            for inputs, reference in zip(self.judge.batches(), references, strict=True):
                outputs = comparable(run(self.student, inputs), self.student, examples_in(inputs))
                total += float(self.meaning.divergence(reference, outputs, self.mine).sum())
        mean = total / len(self.judge)
        return mean if math.isfinite(mean) else math.inf


@dataclass
class _Best:
    """The weights with the smallest divergence so far."""

    divergence: float
    step: int
    weights: dict[str, Tensor]


def _run(
    job: _Job,
    steps: int,
    seconds: float | None,
    learning_rate: float,
    progress: Progress | None,
) -> Reconstruction:
    if not any(p.requires_grad for p in job.student.parameters()):
        raise OptionError("The network must have a parameter that needs a gradient, got none.")
    references = job.references()
    before = job.judged(references)
    best = _Best(before, 0, _state(job.student))
    history: list[tuple[int, float | None]] = [(0, before)]
    every = max(1, steps // JUDGED)
    started, rate, done = time.perf_counter(), learning_rate, 0
    stopped: Stopped = "steps"
    optimizer = EigenbasisAdam(job.student, job.bases())
    with (
        outputs_of_modules(job.student, job.features) as ours,
        outputs_of_modules(job.guide, job.features) as theirs,
        composed(job.student, bf16=job.bf16, device=torch.device(job.judge.device)),
    ):
        for inputs, wanted in job.batches():
            share = done / steps
            if seconds is not None:
                share = max(share, (time.perf_counter() - started) / seconds)
            ending = share >= 1
            if done and (ending or done % every == 0) and history[-1][0] != done:
                now = job.judged(references)
                history.append((done, now if math.isfinite(now) else None))
                if now < best.divergence:
                    best = _Best(now, done, _state(job.student))
                elif now > FARTHEST * before:
                    job.student.load_state_dict(best.weights)
                    optimizer.forget()
                    rate /= 3
            if ending:
                stopped = "steps" if done >= steps else "seconds"
                break
            job.student.zero_grad()
            backward(_loss(job, inputs, wanted, ours, theirs), job.student)
            optimizer.step(rate * _schedule(share))
            done += 1
            if progress is not None:
                progress(done, steps, "reconstruct")
    job.student.load_state_dict(best.weights)
    return Reconstruction(
        before=before,
        after=best.divergence,
        judged=tuple(history),
        steps=done,
        kept_step=best.step,
        stopped=stopped,
        examples=len(job.fitted),
        held_out=len(job.judge),
        batch_size=job.batch_size,
        learning_rate=learning_rate,
        temperature=job.temperature,
        features=job.features,
        augmentation=job.fitted.augmentation if job.augment else "none",
        seed=job.seed,
        precision="bf16 autocast" if job.bf16 else "float32",
        seconds=time.perf_counter() - started,
        task=job.meaning.info(),
    )


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _schedule(share: float) -> float:
    """Return the rate's share of the highest: a linear warm-up, then a cosine down to 0."""
    if share < WARM_UP:
        return (share + WARM_UP / 4) / (1.25 * WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def _loss(
    job: _Job,
    inputs: Inputs,
    wanted: Tensor | None,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
) -> Tensor:
    with torch.no_grad():
        known = call(job.guide, fresh(inputs)) if wanted is None else wanted
    reference = comparable(known, job.guide, examples_in(inputs))
    with torch.autocast(job.judge.device.partition(":")[0], torch.bfloat16, enabled=job.bf16):
        given = comparable(call(job.student, fresh(inputs)), job.student, examples_in(inputs))
    outputs = tuple(in_full(tensor) for tensor in given)
    total = job.meaning.imitation_loss(reference, outputs, job.temperature, job.mine)
    for name in job.features:
        total = total + feature_error(ours[name], theirs[name], name)
    return total
