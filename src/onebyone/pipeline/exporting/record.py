"""Records of an export: its files, how they were checked, and how pictures become inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from onebyone.core.fields import Amount, Count, Share
from onebyone.core.records import FORMAT, InputSpec, Record
from onebyone.core.tables import Table
from onebyone.core.units import format_bytes
from onebyone.runtimes.output_check import SAME_OUTPUTS, OutputDifference


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Record):
    """How a picture becomes an input; unknown values are ``None``.

    A picture of ``height × width`` pixels, channels first, is scaled to 0…1; then ``mean`` is
    subtracted and the result is divided by ``std``, with one value per channel.

    Attributes:
        inputs: What the network takes, with a batch of one example.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        crop: Share of a picture's shorter side that a center crop keeps.
        classes: Names of the outputs; empty if unknown.
    """

    inputs: InputSpec
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: Share = 1.0
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExportCheck(Record):
    """One written file, and how it was compared with the network.

    Attributes:
        format: Name of the format.
        files: File names in the folder.
        file_bytes: Their total size.
        runtime: The package that loaded and ran the file.
        version: The version of that package.
        dynamic: Free dimensions of the input.
        inputs: The inputs that it was compared on, in words.
        shapes: Shapes of these inputs; of several tensors, one after the other.
        difference: Difference of the outputs from the network's.
        tolerance: Largest allowed difference, as a share of the outputs' standard deviation.
        fixed: Why other dimensions are not free, in words; empty if all are.
    """

    format: str
    files: Annotated[tuple[str, ...], Meta(min_length=1)]
    file_bytes: Count
    runtime: str
    version: str
    dynamic: tuple[str, ...]
    inputs: str
    shapes: tuple[tuple[int, ...], ...]
    difference: OutputDifference
    tolerance: Amount = SAME_OUTPUTS
    fixed: str = ""


@dataclass(frozen=True, kw_only=True)
class ExportRecord(Record):
    """The result of an export: the files, their checks, and the preprocessing.

    Attributes:
        network: Its name.
        inputs: What it takes.
        checks: One for each file.
        preprocessing: How pictures become inputs.
        precision: What the layers compute in.
        params: Weights of convolutions and matrix products; ``None`` in older records.
        macs: Their multiply-accumulates for one input; ``None`` in older records.
        format: Of the record.
    """

    network: str
    inputs: InputSpec
    checks: Annotated[tuple[ExportCheck, ...], Meta(min_length=1)]
    preprocessing: Preprocessing
    precision: Literal["float32", "int8"] = "float32"
    params: Count | None = None
    macs: Count | None = None
    format: int = FORMAT

    def table(self) -> Table:
        """Return a table with one format per line."""
        rows = [
            [
                check.format,
                check.files[0],
                format_bytes(check.file_bytes),
                ", ".join(check.dynamic) or "none",
                f"{check.difference.size:.0e}",
                f"{check.runtime} {check.version}",
            ]
            for check in self.checks
        ]
        first = self.checks[0]
        against = "" if self.precision == "float32" else "with the simulated int8 network "
        how = (
            f"Each file was loaded in its runtime and compared {against}on {first.inputs}. "
            f"Difference: the largest, as a share of the outputs' standard deviation; up to "
            f"{first.tolerance:g} is rounding."
        )
        notes = [how]
        notes += [f"{check.format}: {check.fixed}" for check in self.checks if check.fixed]
        return Table(
            columns=("format", "file", ">size", "free sizes", ">differs", "checked in"),
            rows=rows,
            title=f"{self.network} for inputs {self.inputs.example_text()}",
            notes=notes,
        )

    def __str__(self) -> str:
        return str(self.table())
