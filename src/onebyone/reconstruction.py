"""Reconstruction: a rewritten network's weights, all at once, brought near the original's outputs.

A few hundred steps on unlabelled inputs, between the closed forms of :func:`onebyone.apply` and
training proper.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from onebyone.calibration import (
    CalibrationData,
    Moments,
    as_calibration,
    collect,
    output_curvature,
    places_of,
)
from onebyone.data import DatasetSplit, Split, TensorSplit
from onebyone.data.splits import held_out
from onebyone.errors import DataError, OptionError
from onebyone.evaluation import feature_error
from onebyone.kernels import shape_of
from onebyone.outputs import Outputs, comparable, imitation_loss, mean_divergence, the_one
from onebyone.precision import Precision, float32_in, in_full, uses_bf16
from onebyone.randomness import seeded
from onebyone.records import Reconstruction
from onebyone.rewrites.composed import composed
from onebyone.rewrites.regression import eigen
from onebyone.sites import (
    as_device,
    as_network,
    copy_network,
    evaluation_copy,
    floating_type,
    home_of,
    in_type_of,
    outputs_of_modules,
    run,
)

Progress = Callable[[int, int, str], None]
Stopped = Literal["steps", "seconds"]

# Share of the inputs that the weights are judged on, not fitted to; but not more than so many.
HELD_OUT = 0.125
MOST_HELD_OUT = 1024
JUDGED = 8  # times, evenly over the steps
STEPS = 200
RATE = 3e-4
# Divides class scores before the softmax: as they are, inputs of which the teacher is sure say
# little but that it is.
TEMPERATURE = 4.0
WARM_UP = 0.05  # share of the steps
BETAS = (0.9, 0.99)
# A gradient below this share of its layer's, or below this at all, is rounding.
LEAST_ROOT = 1e-4
LEAST_GRADIENT = 1e-12
# Examples a step: a pass over the data is at least so many steps.
STEPS_A_PASS = 16
LEAST_BATCH, MOST_BATCH = 8, 64
# Inputs that are seen twice or more are kept in memory with the teacher's answers, if these are not
# more values: 1 GB.
ANSWERED_VALUES = 250_000_000
# The bases are those of so many inputs; wider layers than this are stepped without.
BASIS_EXAMPLES = 32
MOST_VALUES = 640
# The first steps lead away, while Adam learns its scales, and the rest come back; from farther than
# so many times the start's divergence they do not.
FARTHEST = 4.0


class Reconstructed(NamedTuple):
    """A network brought nearer to its teacher, and what was done."""

    model: nn.Module
    log: Reconstruction


@float32_in("float32")
def reconstruct(
    model: nn.Module,
    *,
    teacher: nn.Module,
    calibration: object,
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
    """Bring all weights of a rewritten network together nearer to the original's outputs.

    Adam in the eigenbasis of each layer's inputs and output curvature, with a short warm-up and a
    cosine down to 0. Batch norms keep their statistics, dropout is off. Class scores are compared
    by the Kullback-Leibler divergence, softened by a temperature, other outputs by their squared
    error relative to their mean square. The weights are judged eight times on held-out inputs,
    there by the scores as they are; the best ones are kept, also those of the start. Steps that end
    far farther away than the start are taken back, and the rate is cut to a third.

    Args:
        model: With float32 weights. Not modified. Parameters that need no gradient stay as they
            are.
        teacher: The network to be like, run in evaluation mode. Not modified.
        calibration: Unlabelled inputs, as for :func:`onebyone.apply`; two at the least, and the
            more the better: of few the network learns what is theirs alone. One in eight is held
            out, 1,024 at most.
        steps: To take.
        seconds: To take at most, wall time; a result then depends on the machine's speed.
        features: Names of modules in both networks whose outputs are to be alike as well, each by
            its squared error relative to its variance.
        batch_size: Examples a step; where not given from 8 to 64 by the number of inputs, and 8
            for outputs that are maps.
        learning_rate: The highest one.
        temperature: Divides class scores before the softmax; above 0. Of other outputs it changes
            nothing.
        augment: Whether to augment the inputs as their split does; the teacher sees the same. In a
            few hundred steps more inputs help, and augmented ones have not.
        precision: Of the network's own steps, as for :func:`onebyone.train`; what it is compared
            with, and judged by, is computed in full.
        seed: Of the draws. The global random state is not changed.
        device: Where to run; the network's own where not given.
        progress: Told of the steps done.

    Returns:
        The network in the mode and on the device of ``model``, and the record.

    Raises:
        OptionError: If an option is outside what it may be, a feature is not in both networks, or
            no parameter needs a gradient.
        DataError: If there are fewer than two inputs, or they cannot be divided.
        ModelError: If the networks' outputs differ in number or shape, or are not tensors.

    References:
        For the temperature, Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
        2015; for the basis, Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR
        2025; for the outputs of modules, Romero et al., "FitNets", ICLR 2015.
    """
    _check(steps, seconds, batch_size, learning_rate, temperature)
    model, teacher = as_network(model), as_network(teacher, scripted=True)
    place = as_device(device or home_of(model))
    bf16 = uses_bf16(precision, place)
    data = as_calibration(calibration, device=str(place), dtype=floating_type(model))
    fitted, judge = _divided(data, seed)
    student = evaluation_copy(model, device=place)
    guide = evaluation_copy(teacher, device=place)
    if len(fitted.input_shape) == 3:
        # Convolutions on the CPU run up to twice as fast so.
        student.to(memory_format=torch.channels_last)
        guide.to(memory_format=torch.channels_last)
    batch = min(batch_size or _batch_size(guide, judge, len(fitted)), len(fitted))
    changing = augment and fitted.augmentation != "none"
    answers = None
    often = 2 * len(fitted) <= steps * batch
    fits = len(fitted) * math.prod(fitted.input_shape) <= ANSWERED_VALUES
    if not changing and not features and often and fits:
        answers = _answered(fitted, guide, judge)
    job = _Job(
        student, guide, fitted, judge, batch, augment, seed, tuple(features), temperature, answers,
        bf16=bf16,
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
    """Return the inputs to fit to, and those to judge on."""
    split = data.split
    if not isinstance(split, (TensorSplit, DatasetSplit)):
        raise DataError(
            f"Calibration data must be a tensor, a torch data set or a loader, of which a part can "
            f"be held out, got {type(split).__name__}."
        )
    count = min(max(1, round(HELD_OUT * len(split))), MOST_HELD_OUT)
    rest, kept = held_out(len(split), count, seed=seed)
    return split.part(rest), CalibrationData(
        split.part(kept), batch_size=data.batch_size, device=data.device, dtype=data.dtype
    )


def _batch_size(guide: nn.Module, judge: CalibrationData, inputs: int) -> int:
    """Return the examples of a step: few where each says something at many places."""
    if places_of(comparable(run(guide, judge.example()), guide, 1)) > 1:
        return LEAST_BATCH
    return min(max(inputs // STEPS_A_PASS, LEAST_BATCH), MOST_BATCH)


def inputs_for(split: Split, steps: int, seed: int) -> Split:
    """Return as many of a split's inputs as so many steps can make use of, drawn at random.

    Weights fitted to few inputs again and again come near the original on these alone.

    Args:
        split: With inputs to spare.
        steps: To take.
        seed: Of the draw.
    """
    wanted = steps * MOST_BATCH + MOST_HELD_OUT
    return split.take(wanted, seed) if wanted < len(split) else split


def _answered(fitted: Split, guide: nn.Module, judge: CalibrationData) -> TensorSplit | None:
    """Return inputs that stay as they are with the teacher's outputs, which then need one pass."""
    inputs, outputs = [], []
    with torch.no_grad():
        for batch in replace(judge, split=fitted).batches():
            answer = the_one(guide(batch))
            if not isinstance(answer, Tensor) or len(answer) != len(batch):
                return None
            inputs.append(batch.cpu())
            outputs.append(answer.cpu())
    return TensorSplit(torch.cat(inputs).float(), torch.cat(outputs))


# ---------------------------------------------------------------- the steps


@dataclass(frozen=True)
class _Job:
    """What the steps need; ``student`` is the one thing that changes.

    Attributes:
        answers: The inputs to fit to with the teacher's outputs, where these are always the same.
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
    answers: TensorSplit | None = None
    bf16: bool = False

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield batches to fit to, pass after pass, each in an order of its own.

        With each the teacher's outputs, where they are known beforehand.
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

    def bases(self) -> dict[str, _Basis]:
        """Return the bases that the steps are taken in, of the layers that have one."""
        few = CalibrationData(
            self.fitted, batch_size=16, device=self.judge.device, dtype=self.judge.dtype
        ).first(BASIS_EXAMPLES)
        names = [name for name, m in self.student.named_modules() if _has_basis(m)]
        moments = collect(self.student, names, few.batches, examples=len(few))
        curvature = output_curvature(self.student, names, few.batches)
        return {
            name: _basis_of(moments[name], curvature[name], self.student.get_submodule(name))
            for name in names
            if name in moments and name in curvature
        }

    def references(self) -> list[Outputs]:
        """Return the teacher's outputs on the inputs to judge on."""
        with torch.no_grad():
            return [
                comparable(self.guide(inputs), self.guide, len(inputs))
                for inputs in self.judge.batches()
            ]

    def judged(self, references: Sequence[Outputs]) -> float:
        """Return the mean divergence from them."""
        total = 0.0
        with torch.no_grad():
            for inputs, reference in zip(self.judge.batches(), references, strict=True):
                outputs = comparable(self.student(inputs), self.student, len(inputs))
                total += float(mean_divergence(reference, outputs).sum())
        mean = total / len(self.judge)
        # A divergence below 0 is rounding: nothing is nearer than the same outputs.
        return max(mean, 0.0) if math.isfinite(mean) else math.inf


@dataclass
class _Best:
    """The weights that are nearest to the teacher so far."""

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
    optimizer = _Turned(job.student, job.bases())
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
            _loss(job, inputs, wanted, ours, theirs).backward()  # type: ignore[no-untyped-call]
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
    )


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


# ---------------------------------------------------------------- Adam where it sees straight


@dataclass(frozen=True)
class _Basis:
    """Directions in which a layer's gradient is nearly uncorrelated, orthonormal, a group each.

    Attributes:
        inputs: Eigenvectors of the second moment of what the layer sees, with a last 1 where it
            has a bias, shape ``(groups, d, d)``.
        outputs: Those of the curvature of its outputs, shape ``(groups, out, out)``.
    """

    inputs: Tensor
    outputs: Tensor


def _has_basis(module: nn.Module) -> bool:
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
        return False
    if nn.utils.parametrize.is_parametrized(module):
        return False
    trained = all(p.requires_grad for p in module.parameters())
    return trained and shape_of(module).values < MOST_VALUES


def _basis_of(moments: Sequence[Moments], curvature: Tensor, layer: nn.Module) -> _Basis:
    shape, weight = shape_of(layer), layer.weight
    assert isinstance(weight, Tensor)
    inputs, outputs = [], []
    for group, data in enumerate(moments):
        assert data.xx is not None
        second = data.xx + torch.outer(data.mean_x, data.mean_x)
        if layer.bias is not None:
            last = torch.cat([data.mean_x, data.mean_x.new_ones(1)])
            second = torch.cat([torch.cat([second, data.mean_x[None]]), last[:, None]], dim=1)
        mine = slice(group * shape.group_out, (group + 1) * shape.group_out)
        inputs.append(eigen(second)[1].to(weight))
        outputs.append(eigen(curvature[mine, mine])[1].to(weight))
    return _Basis(torch.stack(inputs), torch.stack(outputs))


class _Turned:
    """Adam in the eigenbasis of each layer's inputs and output curvature.

    A layer's Gauss-Newton matrix is about the Kronecker product of these two (Martens, Grosse,
    "K-FAC", ICML 2015), and Adam scales each coordinate by itself, which is worth most where they
    are uncorrelated (Vyas et al., "SOAP", ICLR 2025). The basis stays that of the start: the
    weights do not go far. Other parameters are stepped as they are.
    """

    def __init__(self, network: nn.Module, bases: dict[str, _Basis]) -> None:
        self._layers = [
            (cast("nn.Conv2d", network.get_submodule(name)), basis) for name, basis in bases.items()
        ]
        turned = {id(p) for layer, _ in self._layers for p in layer.parameters()}
        self._plain = [p for p in network.parameters() if p.requires_grad and id(p) not in turned]
        self.forget()

    def forget(self) -> None:
        """Forget the gradients seen so far."""
        self._taken = 0
        self._means: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Step along the parameters' gradients."""
        self._taken += 1
        for place, parameter in enumerate(self._plain):
            if parameter.grad is not None:
                parameter.sub_(rate * self._direction(-1 - place, parameter.grad))
        for place, (layer, basis) in enumerate(self._layers):
            if layer.weight.grad is None:
                continue
            gradient = layer.weight.grad.reshape(len(basis.outputs), basis.outputs.shape[1], -1)
            if layer.bias is not None:
                assert layer.bias.grad is not None
                last = layer.bias.grad.reshape(*gradient.shape[:2], 1)
                gradient = torch.cat([gradient, last], dim=2)
            straight = basis.outputs.mT @ gradient @ basis.inputs
            move = rate * basis.outputs @ self._direction(place, straight) @ basis.inputs.mT
            if layer.bias is not None:
                layer.bias.sub_(move[..., -1].reshape(layer.bias.shape))
                move = move[..., :-1]
            layer.weight.sub_(move.reshape(layer.weight.shape))

    def _direction(self, key: int, gradient: Tensor) -> Tensor:
        mean, square = self._means.get(key, (torch.zeros_like(gradient),) * 2)
        mean = torch.lerp(gradient, mean, BETAS[0])
        square = torch.lerp(gradient.square(), square, BETAS[1])
        self._means[key] = mean, square
        mean = mean / (1 - BETAS[0] ** self._taken)
        square = square / (1 - BETAS[1] ** self._taken)
        root = square.sqrt()
        # What hardly has a gradient, as behind a dead channel, must not move by its rounding.
        return mean / (root + LEAST_ROOT * root.square().mean().sqrt() + LEAST_GRADIENT)


def _schedule(share: float) -> float:
    """Return the rate's share of the highest: up over the warm-up, then a cosine down to 0."""
    if share < WARM_UP:
        return (share + WARM_UP / 4) / (1.25 * WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def _loss(
    job: _Job,
    inputs: Tensor,
    wanted: Tensor | None,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
) -> Tensor:
    with torch.no_grad():
        known = job.guide(inputs) if wanted is None else wanted
    reference = comparable(known, job.guide, len(inputs))
    with torch.autocast(job.judge.device.partition(":")[0], torch.bfloat16, enabled=job.bf16):
        given = comparable(job.student(inputs), job.student, len(inputs))
    outputs = tuple(in_full(tensor) for tensor in given)
    total = imitation_loss(reference, outputs, job.temperature)
    for name in job.features:
        total = total + feature_error(ours[name], theirs[name], name)
    return total
