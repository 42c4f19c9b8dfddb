"""Records of what a training did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onebyone.core.fields import Amount, Count, Positive, Whole
from onebyone.core.records.base import Record
from onebyone.core.records.measured import TaskInfo
from onebyone.core.tables import Table
from onebyone.core.units import capitalized, plural

LONG_WAIT = 0.1  # share of the time from which waiting for data is worth advice


@dataclass(frozen=True, kw_only=True)
class Epoch(Record):
    """One pass over the training data.

    Attributes:
        divergence: Mean divergence from the teacher on validation data, in what the task measures
            it in; ``None`` where it was not measured after each epoch, or not finite.
        waited: Seconds of ``seconds`` in which the training waited for its next batch.
    """

    epoch: Whole
    loss: float
    validation: float | None
    learning_rate: Amount
    seconds: Amount
    divergence: Amount | None = None
    waited: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Record):
    """What a reconstruction did.

    Attributes:
        before: Divergence of the outputs from the teacher's on held-out inputs at the start, in
            what the task measures it in.
        after: The same of the weights that were kept; never more than ``before``.
        judged: ``(step, divergence)`` each time that it was measured; ``None`` where it was not
            finite.
        steps: Steps taken.
        kept_step: The step whose weights were kept; 0 for those of the start.
        stopped: What ended it.
        examples: Inputs that the weights were fitted to.
        held_out: Inputs that they were judged on.
        learning_rate: The highest one.
        features: Modules whose outputs were held near the teacher's as well.
        temperature: That class scores were divided by in the steps, not in ``judged``.
        precision: Of the steps; ``judged`` is computed in float32.
        task: What the outputs were taken to mean.
    """

    before: float
    after: float
    judged: tuple[tuple[int, float | None], ...]
    steps: Count
    kept_step: Count
    stopped: Literal["steps", "seconds"]
    examples: Count
    held_out: Count
    batch_size: Whole
    learning_rate: Amount
    features: tuple[str, ...]
    augmentation: str
    seed: int
    seconds: Amount
    temperature: Positive = 1.0
    precision: str = "float32"
    task: TaskInfo | None = None

    def __str__(self) -> str:
        share = self.after / self.before if self.before > 0 else 1.0
        return (
            f"Reconstructed in {self.steps} steps and {self.seconds:.0f} s: divergence on "
            f"{self.held_out} held-out inputs {self.before:.3g} → {self.after:.3g} ({share:.0%}), "
            f"weights of step {self.kept_step}."
        )


@dataclass(frozen=True, kw_only=True)
class TrainLog(Record):
    """What a training did.

    Attributes:
        objective: What was minimized, in words.
        examples: Training examples an epoch.
        chosen_epoch: The epoch whose weights were kept, counted from 1; 0 for those of the start.
        metric: Name of the metric in ``validation``.
        task: What the outputs were taken to mean.
        loading: How examples are loaded while they are used; ``None`` if they are in memory.
    """

    objective: str
    metric: str
    epochs: tuple[Epoch, ...]
    examples: Count
    batch_size: Whole
    learning_rate: Amount
    weight_decay: Amount
    optimizer: str
    schedule: str
    precision: str
    augmentation: str
    seed: int
    seconds: Amount
    chosen_epoch: Count
    device: str
    threads: Whole
    task: TaskInfo | None = None
    loading: str | None = None

    def csv(self) -> str:
        """Return an epoch a line, with a header, as comma-separated values."""
        apart = self._measures_divergence
        header = "epoch,loss,validation,learning_rate,seconds,examples_per_second,waited_seconds"
        lines = [f"{header},divergence" if apart else header]
        for epoch in self.epochs:
            values = (epoch.loss, epoch.validation, epoch.learning_rate, epoch.seconds)
            texts = ["" if value is None else f"{value:.8g}" for value in values]
            pace = f"{self.examples / epoch.seconds:.1f}" if epoch.seconds else ""
            waited = _text(epoch.waited, ".3g", missing="")
            last = [] if not apart else [_text(epoch.divergence, ".8g", missing="")]
            lines.append(",".join([str(epoch.epoch), *texts, pace, waited, *last]))
        return "\n".join(lines) + "\n"

    @property
    def waiting(self) -> str | None:
        """Which share of its time the training waited for data, in words, with advice."""
        known = [(e.waited, e.seconds) for e in self.epochs if e.waited is not None]
        seconds = sum(took for _, took in known)
        if not seconds:
            return None
        share = min(1.0, sum(waited for waited, _ in known) / seconds)
        how = "" if self.loading is None else f" ({self.loading})"
        said = f"waited for data {share:.0%} of the time{how}"
        if self.loading is None or share < LONG_WAIT:
            return said
        return f"{said}: more workers would help if processors are free"

    @property
    def _measures_divergence(self) -> bool:
        return any(epoch.divergence is not None for epoch in self.epochs)

    def table(self) -> Table:
        """Return an epoch a line."""
        apart = self._measures_divergence
        rows = [
            [
                str(epoch.epoch),
                f"{epoch.loss:.4f}",
                "–" if epoch.validation is None else f"{epoch.validation:.4f}",
                f"{epoch.learning_rate:.2g}",
                f"{epoch.seconds:.1f}",
                f"{self.examples / epoch.seconds:,.0f}" if epoch.seconds else "–",
                *([_text(epoch.divergence, ".3g", missing="–")] if apart else []),
            ]
            for epoch in self.epochs
        ]
        note = (
            f"{self.optimizer}, {self.schedule}, batch {self.batch_size}, "
            f"{self.examples:,} examples, {self.precision}, augmentation: "
            f"{self.augmentation}, seed {self.seed}, {self.device}, "
            f"{plural(self.threads, 'thread')}."
        )
        kept = f"{capitalized(self.kept)} were kept."
        said = [] if self.task is None else [str(self.task)]
        if self.waiting is not None:
            said.append(f"The training {self.waiting}.")
        return Table(
            columns=(
                ">epoch",
                ">loss",
                f">validation {self.metric}",
                ">rate",
                ">s",
                ">examples/s",
                *([">divergence"] if apart else []),
            ),
            rows=rows,
            title=self.objective,
            notes=[note, kept, *said],
        )

    @property
    def kept(self) -> str:
        """Which weights were kept, in words."""
        if self.chosen_epoch:
            return f"the weights of epoch {self.chosen_epoch}"
        return "the weights of the start, nearer to the original on validation data,"

    def __str__(self) -> str:
        return str(self.table())


def _text(value: float | None, form: str, *, missing: str) -> str:
    return missing if value is None else format(value, form)
