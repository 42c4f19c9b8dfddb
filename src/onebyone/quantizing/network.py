"""Quantize a network: capture, equalize, fit, simulate; save it and load it again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from onebyone.calibration.inputs import as_calibration
from onebyone.core.arguments import checked
from onebyone.core.errors import OptionError, RecordError, UnknownNameError
from onebyone.core.torch_state import ordinary_torch
from onebyone.core.write_files import write_bytes, written_together
from onebyone.data import Data
from onebyone.data.splits import tensor_batches
from onebyone.networks.surgery import as_network, floating_type
from onebyone.quantizing.equalize import equalize
from onebyone.quantizing.fit import Fitted, fit
from onebyone.quantizing.graph import Captured, capture
from onebyone.quantizing.pairs import mix_pairs
from onebyone.quantizing.pixels import find_pixels, with_pixels
from onebyone.quantizing.placement import place
from onebyone.quantizing.record import ClosedForms, Grid, Int8Record, QuantizedLayer
from onebyone.quantizing.saturation import eight_bit_instructions, saturates_here
from onebyone.quantizing.simulate import simulated

EXAMPLES = 128
RECORD, INTEGERS = "int8.json", "int8.safetensors"


@dataclass(frozen=True)
class Quantized:
    """A network in int8.

    Attributes:
        network: The simulation: it gives what the exported file gives in its runtime.
        record: Grids, scales, and which layers stay float32.
        integers: Weights (int8) and biases (int32), by layer.
    """

    network: nn.Module
    record: Int8Record
    integers: Mapping[str, Tensor]

    def save(self, folder: str | Path) -> None:
        """Write ``int8.json`` and ``int8.safetensors`` into a folder, both or none.

        Raises:
            OutputError: If they cannot be written.
        """
        with written_together(folder) as aside:
            self.record.save(aside / RECORD)
            write_bytes(aside / INTEGERS, save(dict(self.integers)))


@checked
@ordinary_torch()
@torch.no_grad()
def quantize(
    model: nn.Module,
    calibration: object,
    *,
    examples: int = EXAMPLES,
    keep_float32: Mapping[str, str] | Collection[str] = (),
    forms: ClosedForms | None = None,
    weight_bits: int | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Quantized:
    """Return a network whose convolutions and linear layers compute in int8.

    Weights are symmetric with a scale for each output channel, activations affine with a scale for
    each tensor, biases and sums of 32 bits. Batch norms are folded before.

    Args:
        model: Not modified. It must take any batch size.
        calibration: Unlabelled inputs: a tensor ``(n, …)``, a split or data set, whose targets are
            not read, or an :class:`onebyone.data.Data`, of which the training part is taken.
        examples: How many of them are used.
        keep_float32: Names of layers that stay float32, with the reasons if it is a mapping.
        forms: What is done beyond rounding to the nearest; all, by default.
        weight_bits: 8, or 7 for processors that saturate sums of products in 16 bits; what this
            one needs, by default.
        name: What to call the network; its class by default.
        seed: Of the draw of the examples.

    Raises:
        ModelError: If the network cannot be traced.
        OptionError: If no layer is left to quantize, or weights are to have other bits.
        UnknownNameError: If there is no layer of a name in ``keep_float32``.
    """
    saturates = saturates_here()
    bits = (7 if saturates else 8) if weight_bits is None else weight_bits
    if bits not in (7, 8):
        raise OptionError(f"`weight_bits` must be 7 or 8, got {weight_bits!r}.")
    forms = forms or ClosedForms()
    network = as_network(model)
    inputs = _inputs(network, calibration, examples, seed)
    captured = capture(network, inputs[:1])
    reasons = _float32(captured, keep_float32)
    quantized = {node for node, layer in captured.layers.items() if layer.name not in reasons}
    if not quantized:
        raise OptionError("A network must have a layer that can be quantized, and none is left.")
    pixels = find_pixels(inputs) if forms.pixels else None
    fixed: Mapping[str, Grid] = {}
    if pixels is not None:
        captured, fixed = with_pixels(captured, pixels)
    placement = place(captured, quantized)
    remarks: dict[str, str] = {}
    if forms.pairs:
        captured, remarks = mix_pairs(captured, quantized, inputs, bits=bits)
    if forms.equalize:
        captured, scaled = equalize(captured, placement, quantized, inputs, bits=bits)
        for node, remark in scaled.items():
            remarks[node] = f"{remark}, {remarks[node]}" if node in remarks else remark
    fitted = fit(captured, placement, quantized, inputs, forms=forms, bits=bits, fixed=fixed)
    record = Int8Record(
        network=name or type(model).__name__,
        layers=_layers(captured, fitted, reasons, remarks),
        grids=fitted.grids,
        pixels=pixels,
        weight_bits=bits,
        examples=len(inputs),
        forms=forms,
        instructions=eight_bit_instructions(),
        saturates=saturates,
    )
    return Quantized(simulated(captured, record, fitted.integers), record, fitted.integers)


@checked
@ordinary_torch()
def load_quantized(model: nn.Module, folder: str | Path, example: Tensor) -> Quantized:
    """Return a quantized network from what :meth:`Quantized.save` wrote.

    Args:
        model: The float network that was quantized. Not modified.
        folder: Where it was saved.
        example: An input ``(batch, …)``.

    Raises:
        RecordError: If the files are missing, damaged, or of another network.
    """
    record = Int8Record.load(Path(folder) / RECORD)
    path = Path(folder) / INTEGERS
    try:
        integers = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecordError(f"Cannot read the integers at {path}: {error}.") from error
    captured = capture(as_network(model), example)
    if record.pixels is not None:
        captured, _ = with_pixels(captured, record.pixels)
    return Quantized(simulated(captured, record, integers), record, integers)


def _inputs(network: nn.Module, calibration: object, examples: int, seed: int) -> Tensor:
    source = calibration.train if isinstance(calibration, Data) else calibration
    data = as_calibration(source, dtype=floating_type(network))
    split = data.split.take(examples, seed) if examples < len(data) else data.split
    inputs = torch.cat([batch for batch, _ in tensor_batches(split, examples, stage="int8")])
    return inputs.to(torch.float32).contiguous()


def _float32(captured: Captured, keep: Mapping[str, str] | Collection[str]) -> dict[str, str]:
    """Return the reason for each layer that stays float32."""
    known = [layer.name for layer in captured.layers.values()]
    for name in keep:
        if name not in known:
            raise UnknownNameError("layer", name, known)
    if isinstance(keep, Mapping):
        return dict(keep)
    return dict.fromkeys(keep, "asked for")


def _layers(
    captured: Captured, fitted: Fitted, reasons: Mapping[str, str], remarks: Mapping[str, str]
) -> tuple[QuantizedLayer, ...]:
    return tuple(
        QuantizedLayer(
            name=layer.name,
            kind="linear" if layer.kind == "linear" else "conv",
            precision="float32" if layer.name in reasons else "int8",
            scales=tuple(fitted.scales[node].tolist()) if node in fitted.scales else (),
            why=reasons.get(layer.name, ""),
            equalized=remarks.get(node, ""),
            error=fitted.errors.get(node),
        )
        for node, layer in captured.layers.items()
    )
