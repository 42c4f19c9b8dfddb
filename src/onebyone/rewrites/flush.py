"""Subnormal weights set to zero: the same outputs, and much faster on many processors."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from onebyone.core.arguments import checked
from onebyone.core.records import Subnormals
from onebyone.core.tensor_trees import Inputs
from onebyone.core.torch_state import ordinary_torch
from onebyone.networks.examples import as_inputs
from onebyone.networks.surgery import as_network, copy_network
from onebyone.profiling.subnormals import subnormals_of


class Flushed(NamedTuple):
    """A network without subnormal weights.

    Attributes:
        model: A copy.
        record: What was found in the original; ``None`` where there was nothing.
    """

    model: nn.Module
    record: Subnormals | None


@checked
@ordinary_torch()
def flush_subnormals(model: nn.Module, inputs: Inputs | tuple[int, ...]) -> Flushed:
    """Return a copy of a network with its subnormal weights and buffers set to zero.

    A weight below the smallest normal number (1.2e-38 in float32) adds nothing to any sum of
    ordinary numbers, but processors may take a hundred times as long to multiply by it. Weight
    decay leaves such weights. Those are included that are normal, but whose products with
    activations are not: below 8e-31, and by far too small beside the largest of their tensor to
    change a sum. Outputs with and without them are compared; where they differ by
    more than rounding nothing is changed, and ``record.exact`` is false.

    Args:
        model: Not modified.
        inputs: What outputs are compared on, and activations looked at: a tensor, a tuple of
            arguments, keyword arguments, or the shape of an input with the batch in front. Real
            inputs say most.

    Raises:
        ModelError: If the network cannot be copied or run on that input.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 1e-39]]))
        >>> flushed, record = flush_subnormals(layer, (1, 2))
        >>> flushed.weight.tolist(), record.weights
        ([[1.0, 0.0]], {'weight': 1})
    """
    network = as_network(model)
    flushed, found = subnormals_of(network, as_inputs(network, inputs))
    return Flushed(copy_network(network) if flushed is network else flushed, found)
