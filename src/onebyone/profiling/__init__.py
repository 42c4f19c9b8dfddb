"""What a network costs, whole and layer by layer: counted, and timed on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from onebyone.errors import OptionError
from onebyone.profiling.latency import interleave, threads
from onebyone.profiling.trace import time_layers, trace_layers
from onebyone.records import Profile, Timing
from onebyone.runtimes import describe_machine, find_runtime
from onebyone.sites import Inputs, as_device, as_network

__all__ = ["as_inputs", "example_input", "profile"]


def example_input(
    shape: tuple[int, ...], *, device: str = "cpu", seed: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a standard normal input of that shape, batch included.

    Raises:
        OptionError: If a size is no positive int, or there is no such device.
    """
    given: object = shape
    sizes: Sequence[object] = given if isinstance(given, tuple | list) else ()
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise OptionError(
            "`input_shape` must be positive sizes with the batch in front, such as "
            f"(1, 3, 224, 224), got {_in_short(shape)}."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=dtype).to(as_device(device))


def _in_short(shape: object) -> str:
    if isinstance(shape, Tensor):
        return f"a tensor of shape {tuple(shape.shape)}"
    return repr(shape)


def as_inputs(model: nn.Module, inputs: Inputs | tuple[int, ...]) -> Inputs:
    """Return inputs as they are, or for a shape a standard normal input of the network's type.

    Args:
        model: Read for its type and device.
        inputs: Inputs, or the shape of one with the batch in front.

    Raises:
        OptionError: If a shape has a size that is not positive.
    """
    if isinstance(inputs, (Tensor, Mapping)) or not all(isinstance(n, int) for n in inputs):
        return inputs
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return example_input(inputs, device=str(first.device), dtype=first.dtype)


def profile(
    model: nn.Module,
    *,
    input_shape: tuple[int, ...],
    name: str | None = None,
    runtimes: Sequence[str] = ("eager",),
    device: str = "cpu",
    num_threads: int | None = None,
    timed: bool = True,
    rounds: int = 20,
) -> Profile:
    """Count and time a network, whole and layer by layer.

    Args:
        model: Not modified: copies are run.
        input_shape: Shape of one input with the batch in front. Times are for this batch; counts
            are for one input.
        name: What to call it; its class by default.
        runtimes: Names of the runtimes that the whole network is timed in.
        device: Where to time it.
        num_threads: Torch's threads while timing; what is set, by default.
        timed: Whether to time at all.
        rounds: Timed rounds of the whole network.

    Raises:
        OptionError: If the shape is not positive sizes, or there is no such device.
        ModelError: If the network cannot be run on that shape.
    """
    model = as_network(model, scripted=True)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    example = example_input(input_shape, device=device, dtype=dtype)
    costs = trace_layers(model, example[:1])
    layers, latency = costs.layers, {}
    with threads(num_threads):
        if timed:
            timings = time_layers(model, example, layers)
            layers = tuple(replace(layer, timing=timings.get(layer.name)) for layer in layers)
            latency = _whole(model, example, runtimes, device=device, rounds=rounds)
        machine = describe_machine(device)
    return Profile(
        network=name or type(model).__name__,
        input_shape=tuple(example.shape),
        params=costs.params,
        macs=costs.macs,
        layers=layers,
        latency=latency,
        uncounted=costs.uncounted,
        machine=machine,
    )


def _whole(
    model: nn.Module, example: Tensor, runtimes: Sequence[str], *, device: str, rounds: int
) -> dict[str, Timing]:
    """Time a network in runtimes, in turns, those that only know the CPU apart from a GPU's."""
    places = {name: find_runtime(name).device_for(device) for name in runtimes}
    latency = {}
    for place in dict.fromkeys(places.values()):
        inputs = example.to(place)
        callables = {
            name: find_runtime(name).prepare(model, inputs)
            for name, where in places.items()
            if where == place
        }
        samples = interleave(callables, rounds=rounds, device=place)
        for name in callables:
            latency[name] = samples.timing(name, runtime=name, batch=len(inputs))
    return {name: latency[name] for name in runtimes}
