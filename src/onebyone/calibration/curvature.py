"""How sensitive a network's outputs are to errors in each layer's output (Fisher information)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.calibration.inputs import Batches, CalibrationData
from onebyone.calibration.meaning import Meaning
from onebyone.calibration.moments import is_summable, largest_absolute, working_precision
from onebyone.core.errors import GradientError
from onebyone.core.processes import on_main
from onebyone.core.tensor_trees import batch_size, map_tensors
from onebyone.networks.conv_layers import output_rows
from onebyone.networks.gradients import backward
from onebyone.networks.held import to_run
from onebyone.networks.outputs import Outputs, check_finite_outputs, comparable
from onebyone.networks.surgery import call, hooks_removed, in_evaluation_mode, run

# The curvature needs a forward and a backward pass with gradients of activations only: twice the
# MACs of a forward pass. A few hundred examples are enough; this limit allows them.
CURVATURE_MACS = 8e11
FEWEST_CURVATURE_EXAMPLES = 64
# If outputs are maps, a direction is drawn at each position, so few examples give many directions.
DIRECTIONS = 65_536
FEWEST_WITH_MAPS = 8


def curvature_of(
    model: nn.Module, names: Sequence[str], data: CalibrationData, macs: int, meaning: Meaning
) -> dict[str, Tensor]:
    """Return :func:`output_curvature` on a number of examples chosen by their cost.

    Args:
        model: Not modified.
        names: Layers.
        data: The calibration data.
        macs: MACs of the network for one input.
        meaning: Meaning of its outputs.
    """
    enough = data.within(CURVATURE_MACS, 2 * macs, fewest=FEWEST_CURVATURE_EXAMPLES)
    network = in_evaluation_mode(model, device=data.device)
    places = places_of(comparable(run(network, data.example()), network, 1), meaning)
    if places > 1:
        enough = enough.first(max(FEWEST_WITH_MAPS, DIRECTIONS // places))
    # Labels are drawn batch by batch: other batches would draw others.
    return on_main(lambda: output_curvature(model, names, enough.batches, meaning=meaning))


def places_of(outputs: Outputs, meaning: Meaning) -> int:
    """Return the number of output positions per input (1 if outputs are vectors)."""
    as_scores = meaning.task.measure.scores
    return max(math.prod(as_scores(tensor, "scores").shape[2:]) for tensor in outputs)


def output_curvature(
    model: nn.Module, names: Sequence[str], batches: Batches, *, meaning: Meaning, seed: int = 0
) -> dict[str, Tensor]:
    """Return how sensitive the network's outputs are to errors in each layer's output.

    This is the Fisher information of each layer's output channels, summed over positions and
    averaged over examples. For a small error ``e`` of covariance ``E``, independent between
    positions, the divergence of the network's outputs is about ``trace(F @ E) / 2``. Classes and
    labels are drawn from the network's own predictions (Martens 2020, section 5). For numbers,
    directions are drawn, which gives the Gauss-Newton matrix of the relative squared error. With
    several output tensors it is the mean over them, as for their divergences.

    Args:
        model: Not modified; a copy in evaluation mode is run, with gradients of activations only.
        names: Layers.
        batches: The inputs.
        meaning: Meaning of the network's outputs.
        seed: Random seed of the drawn labels.

    Returns:
        A matrix ``(out, out)`` in float64 for each layer that ran; no matrices if the forward
        blocks gradients, as within ``torch.no_grad()``.

    Raises:
        ModelError: If an output is not finite; names the first layer that gives such values.
    """
    network = to_run(model)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                rows = working_precision(gradient)
                rows = output_rows(
                    module, rows if is_summable(largest_absolute(rows)) else rows.double()
                )
                part = (rows.T @ rows).to(device="cpu", dtype=torch.float64)
                sums[name] = sums[name] + part if name in sums else part

            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    handles = [network.get_submodule(n).register_forward_hook(watch(n)) for n in names]
    examples = 0
    with _weights_fixed(network), hooks_removed(handles), torch.enable_grad():
        for inputs in batches():
            count = batch_size(inputs)
            given = comparable(call(network, map_tensors(_tracked, inputs)), network, count)
            check_finite_outputs(given, network, inputs)
            try:
                backward(meaning.sampled_loss(given, generator), network)
            except GradientError:
                return {}
            examples += count
    return {name: total / examples for name, total in sums.items()}


@contextmanager
def _weights_fixed(network: nn.Module) -> Iterator[None]:
    """Take the gradients of activations only in this context."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


def _tracked(tensor: Tensor) -> Tensor:
    """Return a copy that gradients are traced to, if the tensor can have any."""
    copied = tensor.detach().clone()
    if not copied.is_floating_point():
        return copied
    copied.requires_grad = True
    return copied + 0  # since nothing may write into a leaf
