"""What it takes in a runtime to convert tensors between float32 and int8."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from onebyone.core.randomness import seeded
from onebyone.core.records import Deployment
from onebyone.networks.examples import example_input
from onebyone.profiling.latency import interleave, threads
from onebyone.runtimes import find_runtime
from onebyone.runtimes.onnx import layers_to_onnx

ROUNDS = 15
SECONDS = 2.0
CHANNELS = 64
LEAD_CHANNELS = 16
POINTS = 3


def conversion_ms(values: Sequence[int], deployment: Deployment) -> Callable[[int], float]:
    """Time a few tensors' conversions; return what so many values of one input take, both ways.

    A map between a 1×1 convolution and an average is quantized and dequantized, in turns with the
    same map as it is. Between the sizes that were timed, times are interpolated.

    Args:
        values: Of the tensors that occur, of one input.
        deployment: Where the network is to run.
    """
    from onebyone.quantizing.untrained import with_conversion  # noqa: PLC0415 - only int8 needs it

    run = find_runtime(deployment.runtime).prepare_onnx
    assert run is not None, "checked by `runtime_for`"
    known = np.unique([value for value in values if value]) if any(values) else np.array([1])
    chosen = sorted({int(x) for x in np.quantile(known, np.linspace(0, 1, POINTS))})
    sizes, times = [0], [0.0]
    with seeded(0, deployment.device), threads(deployment.threads):
        for value in chosen:
            side = max(1, round((value / CHANNELS) ** 0.5))
            chain = nn.Sequential(
                nn.Conv2d(LEAD_CHANNELS, CHANNELS, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
            ).eval()
            example = example_input((deployment.batch, LEAD_CHANNELS, side, side))
            content = layers_to_onnx(chain, example)
            samples = interleave(
                {"without": run(content, example), "with": run(with_conversion(content), example)},
                rounds=ROUNDS,
                device=deployment.device,
                seconds=SECONDS,
            )
            more = float(np.median(samples.ms["with"] - samples.ms["without"]))
            sizes.append(side * side * CHANNELS)
            times.append(max(more, times[-1]))
    last = times[-1] / max(sizes[-1], 1)

    def convert(count: int) -> float:
        if count > sizes[-1]:
            return count * last
        return float(np.interp(count, sizes, times))

    return convert
