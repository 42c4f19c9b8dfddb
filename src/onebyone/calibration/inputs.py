"""Calibration data: the unlabelled inputs that layers are measured and fitted on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from onebyone.calibration.moments import MOST_VALUES
from onebyone.core.errors import DataError
from onebyone.core.records import CalibrationInfo
from onebyone.core.tensor_trees import Inputs, first_examples, in_floats, map_tensors
from onebyone.data import Split, as_split, repeatable
from onebyone.networks.conv_layers import shape_of, why_unknown
from onebyone.networks.surgery import as_device, floating_type, module_at
from onebyone.profiling.trace import trace_layers

# Most input values per batch. The activations of all layers grow with it and must fit into memory.
BATCH_VALUES = 1_250_000
# The default number of examples: enough for this many rows per input value of a kernel, if one pass
# costs at most this many MACs, but at least this many examples.
ROWS_TO_FIT = 3
CALIBRATION_MACS = 1e12
FEWEST_EXAMPLES = 1024

Batches = Callable[[], Iterable[Inputs]]
"""Each call yields the same calibration inputs, batch by batch, on the network's device."""


@dataclass(frozen=True)
class CalibrationData:
    """Unlabelled inputs that layers are measured and fitted on.

    Attributes:
        split: The examples; their targets are not read.
        name: Name of the data, for the record.
        seed: Random seed that the examples were drawn with.
        batch_size: Most examples per batch.
        device: Device of the batches.
        dtype: Type that floating-point inputs are converted to; ``None`` keeps theirs.
    """

    split: Split
    name: str = "calibration data"
    seed: int = 0
    batch_size: int = 128
    device: str = "cpu"
    dtype: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.split)

    def batches(self) -> Iterator[Inputs]:
        """Yield the inputs, batch by batch; each call yields the same."""
        fitting = BATCH_VALUES // max(self.split.inputs.values, 1)
        size = max(1, min(self.batch_size, fitting))
        for inputs, _ in self.split.batches(size, device=self.device):
            typed = inputs if self.dtype is None else in_floats(inputs, self.dtype)
            yield map_tensors(_laid_channels_last, typed)

    def first(self, n: int) -> CalibrationData:
        """Return a smaller set, drawn from this one."""
        return replace(self, split=self.split.take(n, self.seed)) if n < len(self) else self

    def within(self, macs: float, each: float, *, fewest: int) -> CalibrationData:
        """Return as many of the examples as this many MACs allow, but not fewer than ``fewest``.

        The limit is in MACs, not in seconds, so the result does not depend on the machine.

        Args:
            macs: Most MACs to spend.
            each: MACs of one example.
            fewest: Keep at least this many, if there are.
        """
        return self.first(max(fewest, int(macs / max(each, 1))))

    def example(self) -> Inputs:
        """Return the first inputs, with a batch of 1."""
        first: Inputs = first_examples(next(self.batches()), 1)
        return first

    def info(self) -> CalibrationInfo:
        """Return the record of what was used."""
        return CalibrationInfo(data=self.name, examples=len(self), seed=self.seed)


def _laid_channels_last(tensor: Tensor) -> Tensor:
    # Convolutions on the CPU run up to twice as fast in this layout.
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def drawn_for(
    network: nn.Module,
    split: Split,
    *,
    examples: int | None = None,
    name: str = "calibration data",
    seed: int = 0,
    device: str = "cpu",
) -> CalibrationData:
    """Draw the inputs that a network's layers are measured and fitted on.

    Args:
        network: Not modified.
        split: The examples to draw from.
        examples: How many. The default is 1,024 or more: three rows for each input value of every
            kernel, as long as a pass costs at most 1e12 MACs. A linear layer gets only one row per
            example; fitted on fewer rows than it has inputs, it overfits these examples.
        name: Name of the data, for the record.
        seed: Random seed of the draw.
        device: Where the network will run.

    Raises:
        ModelError: If the network cannot be run on the data.
    """
    whole = CalibrationData(split, name, seed, device=device, dtype=floating_type(network))
    drawn = whole.first(_enough_for(network, whole) if examples is None else examples)
    return replace(drawn, split=repeatable(drawn.split))


def _enough_for(network: nn.Module, data: CalibrationData) -> int:
    costs = trace_layers(network, data.example())
    wanted = FEWEST_EXAMPLES
    for layer in costs.layers:
        module = module_at(network, layer.name)
        if not layer.macs or why_unknown(module) is not None:
            continue
        shape = shape_of(module)
        if shape.values <= MOST_VALUES:
            rows = layer.macs / (shape.out * shape.values)  # per example
            wanted = max(wanted, math.ceil(ROWS_TO_FIT * shape.values / rows))
    affordable = int(CALIBRATION_MACS / max(costs.macs, 1))
    return min(wanted, max(FEWEST_EXAMPLES, affordable))


def as_calibration(
    examples: object, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> CalibrationData:
    """Return calibration data from inputs in any usual form.

    Args:
        examples: Calibration data; a tensor of inputs ``(n, …)``, or a mapping of keyword
            arguments to them; or a split, a torch data set or a loader, whose targets are not used.
        device: Where the network runs.
        dtype: Type of its weights.

    Raises:
        DataError: If there are no examples, or their form is unknown.
        OptionError: If there is no such device.
    """
    if isinstance(examples, CalibrationData):
        return replace(examples, device=str(as_device(device)), dtype=dtype)
    split = as_split(examples)
    if len(split) == 0:
        raise DataError("Calibration data must have at least one example, got none.")
    return CalibrationData(split=repeatable(split), device=str(as_device(device)), dtype=dtype)
