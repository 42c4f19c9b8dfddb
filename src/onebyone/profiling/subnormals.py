"""Measures what subnormal numbers cost a network, and whether its outputs need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from onebyone.core.records import Subnormals
from onebyone.core.tensor_trees import Inputs, batch_size, device_of, to_device
from onebyone.networks.held import to_run_beside
from onebyone.networks.subnormals import (
    count_near,
    count_subnormals,
    count_values,
    flush_in_place,
    subnormal_activations,
)
from onebyone.networks.surgery import copy_network, run
from onebyone.profiling.latency import interleave
from onebyone.runtimes import difference, find_runtime, outputs_of

# Outputs count as the same if they differ by at most this share of their standard deviation.
SAME = 1e-5
# The same for bf16, which has fewer digits.
SAME_BF16 = 2e-2
ROUNDS = 15
SECONDS = 5.0


def without_subnormals(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Subnormals | None]:
    """Return a network without subnormal weights and buffers, and a record of them.

    A value below the smallest normal number (1.2e-38 in float32) does not change a sum with a part
    of ordinary size, but many processors take a hundred times as long to multiply by it. The same
    holds for values somewhat above it (below 8e-31), whose products are subnormal. Both are set to
    zero.

    PyTorch's switch for this, ``torch.set_flush_denormal``, applies to one thread of one process,
    and ONNX Runtime's to the first session of a process. Weights of zero work wherever the network
    runs.

    Args:
        model: Not modified.
        inputs: Inputs to compare the outputs on; real ones, if possible.

    Returns:
        A copy without them; or the network itself, if it has none or its outputs need them. And
        the record; ``None`` if it has none.

    Raises:
        ModelError: If the network cannot be copied or run on the inputs.
    """
    weights, near = count_subnormals(model), count_near(model)
    if not weights and not near:
        return model, None
    flushed = copy_network(model)
    flush_in_place(flushed)
    reference = outputs_of(run(to_run_beside(model, inputs), inputs))
    outputs = outputs_of(run(to_run_beside(flushed, inputs), inputs))
    error = difference(reference, outputs).relative
    coarse = any(str(p.dtype) == "torch.bfloat16" for p in model.parameters())
    record = Subnormals(
        weights=weights,
        near=near,
        values=count_values(model),
        activations=subnormal_activations(flushed, inputs),
        error=error,
        exact=error is not None and error <= (SAME_BF16 if coarse else SAME),
    )
    return (flushed if record.exact else model), record


def subnormals_of(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Subnormals | None]:
    """Do the same as :func:`without_subnormals`, and always look for subnormal activations."""
    flushed, found = without_subnormals(model, inputs)
    if found is None:
        activations = subnormal_activations(model, inputs)
        if activations:
            found = Subnormals(weights={}, values=count_values(model), activations=activations)
    return flushed, found


def with_times(
    found: Subnormals | None,
    model: nn.Module,
    flushed: nn.Module,
    example: Inputs,
    runtimes: Sequence[str],
) -> Subnormals | None:
    """Add to the record the network's times with and without its subnormal weights.

    Args:
        found: The record. If it is ``None`` or nothing was set to zero, nothing is timed.
        model: The original network. Not modified.
        flushed: The network without subnormal weights. Not modified.
        example: The timed inputs.
        runtimes: Names of the runtimes to time in.
    """
    if found is None or not found.flushed:
        return found
    before, after, ratio = dict(found.before), dict(found.after), dict(found.ratio)
    for name in runtimes:
        runtime = find_runtime(name)
        device = runtime.device_for(str(device_of(example)))
        inputs = to_device(example, device)
        samples = interleave(
            {"before": runtime.on(model, inputs), "after": runtime.on(flushed, inputs)},
            rounds=ROUNDS,
            device=device,
            seconds=SECONDS,
        )
        before[name] = samples.timing("before", runtime=name, batch=batch_size(inputs))
        after[name] = samples.timing("after", runtime=name, batch=batch_size(inputs))
        ratio[name] = samples.ratio("before", "after")
    return replace(found, before=before, after=after, ratio=ratio)
