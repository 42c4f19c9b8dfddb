"""What an export wrote, how it was checked, and how pictures become its inputs."""

from __future__ import annotations

from dataclasses import dataclass

from onebyone.records import FORMAT, Record
from onebyone.runtimes.outputs import SAME_OUTPUTS, OutputDifference
from onebyone.tables import Table
from onebyone.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Record):
    """How a picture becomes an input, as far as it is known; what is not is ``None``.

    A picture of ``height × width`` pixels, its channels first, scaled to 0…1, less ``mean``,
    divided by ``std``, each a value a channel.

    Attributes:
        input_shape: Shape of one input, without the batch.
        crop: Share of a picture's shorter side that is kept when its center is cut out.
        classes: Names of the outputs; empty where they are not known.
    """

    input_shape: tuple[int, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: float = 1.0
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExportCheck(Record):
    """One written file, and how it was compared with the network.

    Attributes:
        files: Names in the folder.
        runtime: What loaded the file and ran it.
        dynamic: Dimensions of the input whose size is free.
        inputs: What it was compared on, in words.
        shapes: Of these inputs.
        tolerance: Largest difference allowed, as a share of the outputs' standard deviation.
        fixed: Why other dimensions are not free, in words; empty where all are.
    """

    format: str
    files: tuple[str, ...]
    file_bytes: int
    runtime: str
    version: str
    dynamic: tuple[str, ...]
    inputs: str
    shapes: tuple[tuple[int, ...], ...]
    difference: OutputDifference
    tolerance: float = SAME_OUTPUTS
    fixed: str = ""


@dataclass(frozen=True, kw_only=True)
class ExportRecord(Record):
    """What an export wrote."""

    network: str
    input_shape: tuple[int, ...]
    checks: tuple[ExportCheck, ...]
    preprocessing: Preprocessing
    format: int = FORMAT

    def table(self) -> Table:
        """Return a format a line."""
        rows = [
            [
                check.format,
                check.files[0],
                format_bytes(check.file_bytes),
                ", ".join(check.dynamic) or "none",
                f"{check.difference.relative:.0e}",
                f"{check.runtime} {check.version}",
            ]
            for check in self.checks
        ]
        first = self.checks[0]
        how = (
            f"Each file was loaded in its runtime and compared on {first.inputs}. Difference: the "
            f"largest, as a share of the outputs' standard deviation; up to {first.tolerance:g} "
            f"is rounding."
        )
        notes = [how]
        notes += [f"{check.format}: {check.fixed}" for check in self.checks if check.fixed]
        return Table(
            columns=("format", "file", ">size", "free sizes", ">differs", "checked in"),
            rows=rows,
            title=f"{self.network} for inputs {'×'.join(map(str, self.input_shape))}",
            notes=notes,
        )

    def __str__(self) -> str:
        return str(self.table())
