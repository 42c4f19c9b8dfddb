"""The record of a quantized network: grids, scales, which layers stay float32, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from onebyone.core.errors import RecordError
from onebyone.core.fields import Count, Positive, Text, Whole
from onebyone.core.records import FORMAT, Record
from onebyone.core.tables import Table
from onebyone.core.units import format_count, plural

LEVELS = 255  # of an activation: 0 to 255

WeightBits = Annotated[int, Meta(ge=7, le=8)]


@dataclass(frozen=True, kw_only=True)
class Grid(Record):
    """The 256 values that a tensor is rounded to: ``scale * (q - zero_point)``."""

    scale: Positive
    zero_point: Annotated[int, Meta(ge=0, le=LEVELS)]

    @property
    def lowest(self) -> float:
        """The smallest value."""
        return -self.scale * self.zero_point

    @property
    def highest(self) -> float:
        """The largest value."""
        return self.scale * (LEVELS - self.zero_point)


@dataclass(frozen=True, kw_only=True)
class Pixels(Record):
    """The 256 levels of each channel of pictures: ``offset + step * level``."""

    offsets: tuple[float, ...]
    steps: tuple[Positive, ...]


@dataclass(frozen=True, kw_only=True)
class ClosedForms(Record):
    """What is done beyond rounding to the nearest between the minimum and the maximum.

    Attributes:
        ranges: Ranges by the least error of the next layer's outputs.
        sequential: Each layer is fitted on the activations of the quantized layers before it, to
            the float network's outputs.
        rounding: Weights are rounded by second moments, each error compensated by the rest.
        equalize: Scales of channels are moved between layers.
        pairs: Inner channels of pairs of layers without an activation between them are mixed.
        bias: The mean error of each output channel is taken off.
        pixels: Inputs that are pictures of bytes are mapped back to these, which loses nothing.
    """

    ranges: bool = True
    sequential: bool = True
    rounding: bool = True
    equalize: bool = True
    pairs: bool = True
    bias: bool = True
    pixels: bool = True


NO_CLOSED_FORMS = ClosedForms(
    ranges=False,
    sequential=False,
    rounding=False,
    equalize=False,
    pairs=False,
    bias=False,
    pixels=False,
)


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer(Record):
    """How one layer computes.

    Attributes:
        name: The module's name; of the second call of a module ``name#2``.
        scales: Of an int8 layer's weights, a value for each output channel.
        why: Why the layer stays float32; empty for int8.
        equalized: How channels were scaled before the layer, in words; empty where they were not.
        error: Squared error of the layer's outputs on the calibration examples, before the
            activation, as a share of their squared deviation; ``None`` where it was not measured.
    """

    name: Text
    kind: Literal["conv", "linear"]
    precision: Literal["int8", "float32"]
    scales: tuple[Positive, ...] = ()
    why: str = ""
    equalized: str = ""
    error: Annotated[float, Meta(ge=0)] | None = None

    def check(self) -> None:
        """Check that int8 layers have scales and float32 layers a reason.

        Raises:
            RecordError: If not.
        """
        if (self.precision == "int8") != bool(self.scales):
            raise RecordError(f"`scales` must be there for int8 layers alone, layer {self.name!r}.")
        if (self.precision == "float32") != bool(self.why):
            raise RecordError(f"`why` must be there for float32 layers alone, layer {self.name!r}.")


@dataclass(frozen=True, kw_only=True)
class Int8Record(Record):
    """A quantized network, but for its integers.

    Attributes:
        network: Its class or name.
        layers: All convolutions and linear layers, in the order in which they run.
        grids: By the name of each quantized tensor in the network's graph.
        pixels: Levels that the inputs are mapped to; ``None`` if they are taken as they are.
        weight_bits: 8, or 7 for processors that saturate sums of products in 16 bits.
        examples: Inputs that were used for calibration.
        distilled: Epochs of a distillation in int8 that the integers come from; 0 without one.
        forms: What was done beyond rounding to the nearest.
        instructions: The processor's instructions for 8-bit products, where it was quantized.
        saturates: Whether ONNX Runtime was seen to saturate there; ``None`` if not tested.
    """

    network: Text
    layers: tuple[QuantizedLayer, ...]
    grids: dict[str, Grid]
    pixels: Pixels | None = None
    weight_bits: WeightBits = 8
    examples: Whole
    distilled: Count = 0
    forms: ClosedForms = ClosedForms()
    instructions: tuple[str, ...] = ()
    saturates: bool | None = None
    format: int = FORMAT

    @property
    def int8_layers(self) -> Count:
        """The number of layers that compute in int8."""
        return sum(layer.precision == "int8" for layer in self.layers)

    def table(self) -> Table:
        """Return a layer a line."""
        rows = [
            [
                layer.name,
                layer.kind,
                layer.precision,
                f"{layer.error:.1e}" if layer.error is not None else "",
                layer.why or layer.equalized,
            ]
            for layer in self.layers
        ]
        processor = ", ".join(self.instructions) or "none known"
        trained = ""
        if self.distilled:
            trained = f", distilled in int8 for {plural(self.distilled, 'epoch')}"
        note = (
            f"{self.int8_layers} of {len(self.layers)} layers in int8, weights of "
            f"{self.weight_bits} bits, calibrated on {format_count(self.examples)} examples"
            f"{trained}. Instructions for 8-bit products: {processor}."
        )
        return Table(
            columns=("layer", "kind", "precision", ">error", "remark"),
            rows=rows,
            title=f"{self.network} in int8",
            notes=[note],
        )

    def __str__(self) -> str:
        return str(self.table())
