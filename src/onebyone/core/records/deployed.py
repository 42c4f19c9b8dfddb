"""The record of a run's network in int8: its files, and what each layer computes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onebyone.core.fields import Amount, Count, Text, Whole
from onebyone.core.records.base import Record
from onebyone.core.records.training import TrainLog
from onebyone.core.tables import Table
from onebyone.core.units import format_bytes, format_count, plural


@dataclass(frozen=True, kw_only=True)
class DeployedLayer(Record):
    """What one layer of a deployed network computes in.

    Attributes:
        remark: Why it stays float32, or how its channels were scaled; empty where there is nothing
            to say.
        error: Squared error of its outputs in int8, as a share of their squared deviation; ``None``
            where it was not measured.
        largest_scale: The largest step of its integer weights; ``None`` for float32.
    """

    name: Text
    precision: Literal["int8", "float32"]
    remark: str = ""
    error: float | None = None
    largest_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class Int8Distillation(Record):
    """What a distillation in int8 did.

    Attributes:
        log: Of the training; ``chosen_epoch`` is 0 if no epoch was nearer to the teacher.
        before: Mean divergence from the teacher on validation data with the closed forms alone, in
            what the task measures it in.
        after: The same of the integers that are deployed; never more.
        examples: Validation examples that both were measured on.
    """

    log: TrainLog
    before: Amount
    after: Amount
    examples: Whole

    def __str__(self) -> str:
        epochs = plural(len(self.log.epochs), "epoch")
        kept = f"the integers of epoch {self.log.chosen_epoch}"
        if not self.log.chosen_epoch:
            kept = "those from before"
        return (
            f"Distilled in int8 for {epochs}: divergence on {format_count(self.examples)} "
            f"validation inputs {self.before:.3g} → {self.after:.3g}; {kept} were kept."
        )


@dataclass(frozen=True, kw_only=True)
class Deployed(Record):
    """A run's network as it is deployed in int8.

    Attributes:
        files: Of the formats that were written, below the run's folder.
        file: The one that was compared with the original. The figures in the record's ``after`` are
            of it.
        runtime: What that file was scored in.
        weight_bits: 8, or 7 for processors that saturate.
        instructions: The processor's instructions for 8-bit products, where it was made.
        saturates: Whether ONNX Runtime was seen to saturate there; ``None`` if not tested.
        examples: Inputs that were used for calibration.
        difference: Of the file's outputs from those of the simulated network, as a share of their
            standard deviation.
        distilled: What a distillation in int8 did; ``None`` without one.
    """

    files: tuple[str, ...]
    file: Text
    runtime: Text
    layers: tuple[DeployedLayer, ...]
    file_bytes: Count
    weight_bits: Whole = 8
    instructions: tuple[str, ...] = ()
    saturates: bool | None = None
    examples: Whole
    difference: float
    distilled: Int8Distillation | None = None

    @property
    def int8_layers(self) -> int:
        """The number of layers that compute in int8."""
        return sum(layer.precision == "int8" for layer in self.layers)

    def notes(self) -> tuple[str, ...]:
        """Return in sentences what was deployed, and on what processor."""
        processor = ", ".join(self.instructions) or "none known"
        sums = {True: "saturates", False: "does not saturate", None: "was not tested to saturate"}
        layers = plural(len(self.layers), "layer")
        made = (
            f"{self.int8_layers} of {layers} in int8, weights of {self.weight_bits} bits, "
            f"calibrated on {format_count(self.examples)} examples."
        )
        file = (
            f"{self.file} ({format_bytes(self.file_bytes)}) was scored and timed itself, in "
            f"{self.runtime}. Its outputs differ from the simulated network's by at most "
            f"{self.difference:.2g} of their standard deviation."
        )
        where = (
            f"The processor's instructions for 8-bit products: {processor}; it "
            f"{sums[self.saturates]}. On a processor with others, outputs and times may differ."
        )
        distilled = () if self.distilled is None else (str(self.distilled),)
        return made, *distilled, file, where

    def table(self) -> Table:
        """Return a layer a line."""
        rows = [
            [
                layer.name,
                layer.precision,
                "" if layer.largest_scale is None else f"{layer.largest_scale:.2g}",
                "" if layer.error is None else f"{layer.error:.1e}",
                layer.remark,
            ]
            for layer in self.layers
        ]
        return Table(
            columns=("layer", "precision", ">largest step", ">error", "remark"),
            rows=rows,
            title="Deployed in int8",
            notes=list(self.notes()),
        )

    def __str__(self) -> str:
        return str(self.table())
