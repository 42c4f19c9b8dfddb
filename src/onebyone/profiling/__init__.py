"""Profiles a network, whole and layer by layer: counts its MACs and times it on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from onebyone.core.arguments import checked
from onebyone.core.records import Profile, Timing
from onebyone.core.tensor_trees import Inputs, batch_size, first_examples, to_device
from onebyone.core.torch_state import ordinary_torch
from onebyone.networks.examples import Example, given_example
from onebyone.networks.surgery import as_network
from onebyone.profiling.latency import interleave, threads
from onebyone.profiling.subnormals import subnormals_of, with_times
from onebyone.profiling.trace import time_layers, trace_layers
from onebyone.runtimes import describe_machine, find_runtime

__all__ = ["profile", "profile_on"]


@checked
@ordinary_torch()
def profile(
    model: nn.Module,
    *,
    input_shape: tuple[int, ...] | None = None,
    example: object = None,
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
        input_shape: Shape of the only input with the batch in front; its values are random. Times
            are for this batch; counts are for one input.
        example: In place of ``input_shape``: a tensor, a tuple of positional arguments or a mapping
            of keyword arguments.
        name: Name for the network; default: its class.
        runtimes: Names of the runtimes to time the whole network in.
        device: Where to time it.
        num_threads: Torch's threads while timing; default: torch's present setting.
        timed: Whether to time the network; if not, it is only counted.
        rounds: Timed rounds of the whole network.

    Raises:
        OptionError: If the shape is not positive sizes, or not either it or an example is given; or
            there is no such device.
        ModelError: If the network cannot be run on these inputs.
    """
    model = as_network(model, scripted=True, finite=False)
    return profile_on(
        model,
        given_example(model, input_shape=input_shape, example=example),
        name=name,
        runtimes=runtimes,
        device=device,
        num_threads=num_threads,
        timed=timed,
        rounds=rounds,
    )


def profile_on(
    model: nn.Module,
    example: Example,
    *,
    name: str | None = None,
    runtimes: Sequence[str] = ("eager",),
    device: str = "cpu",
    num_threads: int | None = None,
    timed: bool = True,
    rounds: int = 20,
) -> Profile:
    """Count and time a network on an example; see :func:`profile`."""
    inputs = example.on(model, device)
    costs = trace_layers(model, first_examples(inputs, 1))
    layers, latency = costs.layers, {}
    flushed, subnormals = subnormals_of(model, inputs)
    with threads(num_threads):
        if timed:
            timings = time_layers(model, inputs, layers)
            layers = tuple(replace(layer, timing=timings.get(layer.name)) for layer in layers)
            latency = _whole(model, inputs, runtimes, device=device, rounds=rounds)
            subnormals = with_times(subnormals, model, flushed, inputs, runtimes)
        machine = describe_machine(device)
    return Profile(
        network=name or type(model).__name__,
        inputs=example.spec,
        params=costs.params,
        macs=costs.macs,
        layers=layers,
        latency=latency,
        uncounted=costs.uncounted,
        machine=machine,
        subnormals=subnormals,
        weight_bytes=costs.bytes,
    )


def _whole(
    model: nn.Module, inputs: Inputs, runtimes: Sequence[str], *, device: str, rounds: int
) -> dict[str, Timing]:
    """Time a network in runtimes, interleaved per device: CPU-only runtimes apart from a GPU's."""
    places = {name: find_runtime(name).device_for(device) for name in runtimes}
    latency = {}
    for place in dict.fromkeys(places.values()):
        here = to_device(inputs, place)
        callables = {
            name: find_runtime(name).on(model, here)
            for name, where in places.items()
            if where == place
        }
        samples = interleave(callables, rounds=rounds, device=place)
        for name in callables:
            latency[name] = samples.timing(name, runtime=name, batch=batch_size(inputs))
    return {name: latency[name] for name in runtimes}
