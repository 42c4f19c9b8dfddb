"""Divergence measures: how far two networks' outputs differ, for each kind of output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from onebyone.core.errors import OptionError

Form = Literal["scores", "probabilities"]
"""Whether outputs are probabilities, or scores that a softmax or sigmoid turns into probabilities.
Log-probabilities are scores, too."""

# The temperature of the curvature. At 1, a network that is sure of its answers has almost none, and
# errors that are large enough to change an answer go unseen.
CURVATURE_TEMPERATURE = 2.0
# Rounding of a sum of float32 or bfloat16 probabilities.
SUM_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3}
LEAST_SUM_TOLERANCE = 1e-4
# The fewest outputs from which a sigmoid is recognized: fewer may lie within 0…1 by chance.
FEWEST_VALUES = 16
# The least variance, as a share of the mean square. It is the divisor for outputs that vary less.
LEAST_VARIANCE = 1e-6
# Outputs that are all smaller than this count as zero: gradients of such units overflow in float32.
LEAST_SIZE = 1e-30


@runtime_checkable
class Measure(Protocol):
    """A divergence of outputs from a reference's: as a number, as a loss and as a curvature.

    All methods except :meth:`form_of` take outputs as scores; see :class:`Form`.
    """

    @property
    def unit(self) -> str:
        """The unit of the divergence, for tables and records."""
        ...

    @property
    def decides(self) -> bool:
        """Whether outputs decide for classes or labels, so that two networks can agree."""
        ...

    @property
    def joins(self) -> bool:
        """Whether a network's tensors are compared as one, joined along their last dimension."""
        ...

    def fits(self, outputs: Tensor) -> bool:
        """Whether this measure applies to outputs of this shape."""
        ...

    def form_of(self, outputs: Tensor) -> Form:
        """Return whether outputs are scores or probabilities, judged from examples."""
        ...

    def scores(self, outputs: Tensor, form: Form) -> Tensor:
        """Return outputs as scores."""
        ...

    def scale_of(self, outputs: Tensor) -> Tensor:
        """Return the unit of errors, from the reference's outputs on examples."""
        ...

    def apart(self, reference: Tensor, outputs: Tensor, scale: Tensor) -> Tensor:
        """Return the divergence of each example, shape ``(n,)``, never below 0."""
        ...

    def imitation(
        self, reference: Tensor, outputs: Tensor, scale: Tensor, temperature: float
    ) -> Tensor:
        """Return the mean divergence as a loss, a scalar."""
        ...

    def sampled(self, outputs: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random scalar whose gradient's covariance is the divergence's curvature.

        It is that of :meth:`imitation` at ``CURVATURE_TEMPERATURE``.
        """
        ...

    def sensitivity(self, scores: Tensor) -> Tensor:
        """Return for each example how far a small change of its scores moves the divergence.

        It is the trace of the divergence's curvature, averaged over positions; 1 where it is the
        same for all.
        """
        ...

    def decisions(self, scores: Tensor) -> Tensor:
        """Return the decisions of the outputs: classes or labels."""
        ...


@dataclass(frozen=True)
class Classes:
    """One class of several, at each position: Kullback-Leibler divergence, averaged over positions.

    Adding a constant to the scores of all classes does not change it.

    Attributes:
        last: Whether the network's outputs have the classes in the last dimension, ``(n, …,
            classes)``; scores always have them in the second.
    """

    last: bool = False
    unit: str = "Kullback-Leibler divergence in nats"
    decides: bool = True
    joins: bool = False

    def fits(self, outputs: Tensor) -> bool:
        """Whether there are at least two classes, and positions if the classes come last."""
        if self.last:
            return outputs.ndim >= 3 and outputs.shape[-1] > 1
        return outputs.ndim >= 2 and outputs.shape[1] > 1

    def form_of(self, outputs: Tensor) -> Form:
        """Return ``probabilities`` if all outputs are in 0…1 and sum to one over the classes."""
        return "probabilities" if is_distribution(self._classes_second(outputs)) else "scores"

    def scores(self, outputs: Tensor, form: Form) -> Tensor:
        """Return scores ``(n, classes, …)``, of probabilities the logarithms."""
        outputs = self._classes_second(outputs)
        return _log(outputs) if form == "probabilities" else outputs

    def _classes_second(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(-1, 1) if self.last else outputs

    def scale_of(self, outputs: Tensor) -> Tensor:
        """Return 1: nats need no scale."""
        return torch.ones((), device=outputs.device)

    def apart(self, reference: Tensor, outputs: Tensor, scale: Tensor) -> Tensor:
        """Return the divergence of each example."""
        del scale
        each = classes_apart(reference, outputs, dim=1)
        # A value below 0 is rounding: the divergence cannot be negative.
        return by_example(each).mean(dim=1).clamp_min(0)

    def imitation(
        self, reference: Tensor, outputs: Tensor, scale: Tensor, temperature: float
    ) -> Tensor:
        """Return the divergence at a temperature, times the squared temperature (Hinton 2015)."""
        del scale
        positions = math.prod(outputs.shape[2:])
        apart = F.kl_div(
            (outputs / temperature).log_softmax(dim=1),
            (reference / temperature).log_softmax(dim=1),
            log_target=True,
            reduction="batchmean",
        )
        return temperature**2 * apart / positions

    def sampled(self, outputs: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss on classes drawn from the predicted probabilities."""
        del scale
        rows = outputs.float().movedim(1, -1).reshape(-1, outputs.shape[1]) / CURVATURE_TEMPERATURE
        positions = math.prod(outputs.shape[2:])
        return CURVATURE_TEMPERATURE * drawn_class_loss(rows, generator) / math.sqrt(positions)

    def sensitivity(self, scores: Tensor) -> Tensor:
        """Return 1 less the sum of the squared probabilities: 0 for an answer that is sure."""
        squares = scores.double().softmax(dim=1).square().sum(dim=1)
        return 1 - by_example(squares).mean(dim=1)

    def decisions(self, scores: Tensor) -> Tensor:
        """Return the class with the highest score."""
        return scores.argmax(dim=1)


@dataclass(frozen=True)
class Labels:
    """Several labels, each true or false: Kullback-Leibler divergence, summed over the labels."""

    unit: str = "Kullback-Leibler divergence in nats, summed over the labels"
    decides: bool = True
    joins: bool = False

    def fits(self, outputs: Tensor) -> bool:
        """Whether outputs have a second dimension, that of the labels."""
        return outputs.ndim >= 2

    def form_of(self, outputs: Tensor) -> Form:
        """Return ``probabilities`` if all outputs are in 0…1."""
        enough = outputs.numel() >= FEWEST_VALUES
        return "probabilities" if enough and _in_unit_interval(outputs) else "scores"

    def scores(self, outputs: Tensor, form: Form) -> Tensor:
        """Return the logits of probabilities."""
        if form == "scores":
            return outputs
        return _log(outputs) - _log(1 - outputs)

    def scale_of(self, outputs: Tensor) -> Tensor:
        """Return 1: nats need no scale."""
        return torch.ones((), device=outputs.device)

    def apart(self, reference: Tensor, outputs: Tensor, scale: Tensor) -> Tensor:
        """Return the divergence of each example."""
        del scale
        each = labels_apart(reference, outputs).sum(dim=1)
        return by_example(each).mean(dim=1).clamp_min(0)

    def imitation(
        self, reference: Tensor, outputs: Tensor, scale: Tensor, temperature: float
    ) -> Tensor:
        """Return the divergence at a temperature, times the squared temperature."""
        apart = self.apart(reference / temperature, outputs / temperature, scale)
        return temperature**2 * apart.mean()

    def sampled(self, outputs: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss on labels drawn from the predicted probabilities."""
        del scale
        wide = outputs.float() / CURVATURE_TEMPERATURE
        loss = drawn_label_loss(wide, generator).sum()
        return CURVATURE_TEMPERATURE * loss / math.sqrt(math.prod(outputs.shape[2:]))

    def sensitivity(self, scores: Tensor) -> Tensor:
        """Return the sum of the labels' variances."""
        probabilities = scores.double().sigmoid()
        variances = (probabilities * (1 - probabilities)).sum(dim=1)
        return by_example(variances).mean(dim=1)

    def decisions(self, scores: Tensor) -> Tensor:
        """Return which labels have a probability above one half."""
        return scores > 0


class Unchanged:
    """Outputs that a measure takes as they are: not scores of classes or labels."""

    def fits(self, outputs: Tensor) -> bool:
        """Whether outputs have a batch dimension; their other dimensions may be any."""
        return outputs.ndim >= 1

    def form_of(self, outputs: Tensor) -> Form:
        """Return ``scores``: outputs are used unchanged."""
        del outputs
        return "scores"

    def scores(self, outputs: Tensor, form: Form) -> Tensor:
        """Return the outputs unchanged."""
        del form
        return outputs

    def sensitivity(self, scores: Tensor) -> Tensor:
        """Return 1 for each example."""
        return torch.ones(len(scores), dtype=torch.float64, device=scores.device)

    def decisions(self, scores: Tensor) -> Tensor:
        """Return the outputs unchanged."""
        return scores


@dataclass(frozen=True)
class Numbers(Unchanged):
    """Numbers: squared error divided by their variance.

    Attributes:
        each: Whether each output is divided by its own variance, for numbers of different units;
            else all are divided by their mean variance.
    """

    each: bool = False
    decides: bool = False
    joins: bool = False

    @property
    def unit(self) -> str:
        """The unit of the divergence, for tables and records."""
        whose = "each output's" if self.each else "the outputs'"
        return f"squared error relative to {whose} variance"

    def scale_of(self, outputs: Tensor) -> Tensor:
        """Return the variance of each output or of all, on the reference's examples."""
        # Squares of values near 1e-20 underflow in float32.
        columns = outputs.detach().double()
        columns = columns[:, None] if columns.ndim == 1 else columns
        columns = columns.movedim(1, 0).flatten(1)
        power = columns.square().mean(dim=1)
        several = columns.shape[1] > 1
        variance = columns.var(dim=1, correction=0) if several else power
        variance = torch.maximum(variance, LEAST_VARIANCE * power)
        mean = variance.mean()
        if not self.each or outputs.ndim == 1:
            found = mean
        else:
            # An output that is always 0 takes the mean variance of all.
            found = torch.where(variance > 0, variance, mean)
        return torch.where(found > LEAST_SIZE**2, found, 1.0)

    def apart(self, reference: Tensor, outputs: Tensor, scale: Tensor) -> Tensor:
        """Return the relative squared error of each example."""
        error = (outputs - reference) / _along_outputs(scale.sqrt(), outputs)
        return by_example(error.square()).mean(dim=1)

    def imitation(
        self, reference: Tensor, outputs: Tensor, scale: Tensor, temperature: float
    ) -> Tensor:
        """Return the mean relative squared error; the temperature is ignored."""
        del temperature
        return self.apart(reference, outputs, scale).mean()

    def sampled(self, outputs: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
        """Return the outputs' product with a random direction, in units of the scale."""
        signs = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        values = max(math.prod(outputs.shape[1:]), 1)
        weighed = outputs.float() * signs / _along_outputs(scale.sqrt(), outputs).float()
        return weighed.sum() * math.sqrt(2.0 / values)


@dataclass(frozen=True)
class Own(Unchanged):
    """A user's divergence function; its curvature is approximated by that of the squared error.

    Attributes:
        function: Takes the reference's outputs and others; returns one number for each example.
        name: Name of the task, for errors.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    name: str
    decides: bool = False
    joins: bool = False

    @property
    def unit(self) -> str:
        """The unit of the divergence, for tables and records."""
        return f"the divergence of the task {self.name!r}"

    def scale_of(self, outputs: Tensor) -> Tensor:
        """Return the scale of :class:`Numbers`, for the curvature."""
        return Numbers().scale_of(outputs)

    def apart(self, reference: Tensor, outputs: Tensor, scale: Tensor) -> Tensor:
        """Return the function's result after checking it.

        Raises:
            OptionError: If it fails, or does not return a finite number of at least 0 for each
                example.
        """
        del scale
        what = f"The divergence of the task {self.name!r}"
        try:
            apart: Any = self.function(reference, outputs)
        except Exception as error:  # a user's code may raise anything
            raise OptionError(
                f"{what} failed on outputs {tuple(outputs.shape)}: {type(error).__name__}: {error}"
            ) from error
        if tuple(getattr(apart, "shape", ())) != (len(outputs),):
            came = tuple(apart.shape) if isinstance(apart, Tensor) else type(apart).__name__
            raise OptionError(
                f"{what} must give one number an example, shape ({len(outputs)},), got {came}. "
                "Take its mean over all dimensions but the first."
            )
        least = float(apart.detach().min())
        if least < -1e-5 * max(float(apart.detach().abs().max()), 1.0):
            raise OptionError(
                f"{what} must be 0 for equal outputs and above 0 for others, got {least:.3g}."
            )
        checked: Tensor = apart.clamp_min(0)
        return checked

    def imitation(
        self, reference: Tensor, outputs: Tensor, scale: Tensor, temperature: float
    ) -> Tensor:
        """Return the mean of the function's result; the temperature is ignored."""
        del temperature
        return self.apart(reference, outputs, scale).mean()

    def sampled(self, outputs: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
        """Return the same as :class:`Numbers`."""
        return Numbers().sampled(outputs, scale, generator)


def classes_apart(reference: Tensor, outputs: Tensor, *, dim: int) -> Tensor:
    """Return the Kullback-Leibler divergence of softmaxes over one dimension, summed over it."""
    log_p = reference.log_softmax(dim=dim)
    return (log_p.exp() * (log_p - outputs.log_softmax(dim=dim))).sum(dim=dim)


def labels_apart(reference: Tensor, outputs: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of every sigmoid from the reference's."""
    p = reference.sigmoid()
    there = p * (F.logsigmoid(reference) - F.logsigmoid(outputs))
    gone = (1 - p) * (F.logsigmoid(-reference) - F.logsigmoid(-outputs))
    return there + gone


def drawn_class_loss(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return the loss on classes drawn from the probabilities of rows of scores, a scalar."""
    probabilities = rows.detach().softmax(dim=1).cpu()
    drawn = torch.multinomial(probabilities, 1, generator=generator).to(rows.device)
    return -rows.log_softmax(dim=1).gather(1, drawn).sum()


def drawn_label_loss(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Return the loss of every score on a label drawn from its probability."""
    probabilities = scores.detach().sigmoid().cpu()
    drawn = torch.bernoulli(probabilities, generator=generator).to(scores.device)
    return F.binary_cross_entropy_with_logits(scores, drawn, reduction="none")


def is_distribution(outputs: Tensor) -> bool:
    """Whether all outputs are within 0…1 and sum to one over the second dimension."""
    if outputs.ndim < 2 or outputs.shape[1] < 2 or not outputs.numel():
        return False
    if not _in_unit_interval(outputs):
        return False
    tolerance = SUM_TOLERANCE.get(outputs.dtype, LEAST_SUM_TOLERANCE)
    return bool(((outputs.double().sum(dim=1) - 1).abs() <= tolerance).all())


def _in_unit_interval(outputs: Tensor) -> bool:
    low, high = outputs.min(), outputs.max()
    return bool(low >= 0) and bool(high <= 1 + 1e-6)


def _log(probabilities: Tensor) -> Tensor:
    # A probability of 0 was rounded by float32: its logarithm must stay finite.
    return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()


def by_example(values: Tensor) -> Tensor:
    """Reshape values to ``(n, values of an example)``."""
    return values.reshape(len(values), -1) if values.ndim > 1 else values[:, None]


def _along_outputs(scale: Tensor, outputs: Tensor) -> Tensor:
    scale = scale.to(device=outputs.device, dtype=outputs.dtype)
    return scale.view(1, -1, *[1] * (outputs.ndim - 2)) if scale.ndim else scale
