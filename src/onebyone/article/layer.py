"""Compares a 1×1 with a 3×3 convolution from 512 to 32 maps: costs, warm times and cold times."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from onebyone.article.record import ColdCalls, LayerComparison, LayerTimes
from onebyone.core.errors import ModelError
from onebyone.networks.examples import example_input
from onebyone.networks.layers import Pointwise
from onebyone.profiling.latency import interleave, threads
from onebyone.profiling.trace import trace_layers

INPUT_SHAPE = (512, 12, 12)
OUTPUT_CHANNELS = 32
BATCHES = (1, 32)
COLD_SECONDS = 300  # importing torch from a slow disk takes a minute

Layer = Literal["pointwise", "spatial"]
Step = Callable[[str], None]


def compare_layers(
    *, rounds: int = 30, cold_processes: int = 3, step: Step | None = None
) -> LayerComparison:
    """Measure the article's two layers.

    Args:
        rounds: Warm samples of each layer at each batch size, interleaved.
        cold_processes: Fresh processes for each order of the two cold calls.
        step: Called with a description of the next step.

    Raises:
        ModelError: If a fresh process fails.
    """
    tell = step or (lambda _: None)
    channels = INPUT_SHAPE[0]
    pointwise = Pointwise(channels, OUTPUT_CHANNELS)
    spatial = nn.Conv2d(channels, OUTPUT_CHANNELS, kernel_size=3, padding=1)
    example = example_input((1, *INPUT_SHAPE))
    costs, shapes = [], []
    for layer in (pointwise, spatial):
        traced = trace_layers(layer, example)
        costs.append(traced.cost)
        shapes.append(tuple(traced.output.shape[1:]))
    assert shapes[0] == shapes[1]
    times = []
    for number in thread_counts():
        for batch in BATCHES:
            tell(f"the 1×1 against the 3×3, batch {batch}, threads: {number}")
            with threads(number):
                times.append(_times(pointwise, spatial, batch=batch, rounds=rounds))
    cold = []
    order: tuple[Layer, Layer]
    for order in (("spatial", "pointwise"), ("pointwise", "spatial")):
        for number in range(1, cold_processes + 1):
            tell(f"cold calls, {order[0]} first, process {number} of {cold_processes}")
            cold.append(_cold_calls(order))
    return LayerComparison(
        input_shape=INPUT_SHAPE,
        output_shape=shapes[0],
        pointwise=costs[0],
        spatial=costs[1],
        times=tuple(times),
        cold=tuple(cold),
    )


def thread_counts() -> tuple[int, ...]:
    """Return the numbers of threads that the layers are timed with: 1, and torch's setting."""
    return tuple(sorted({1, torch.get_num_threads()}))


def _times(pointwise: nn.Module, spatial: nn.Module, *, batch: int, rounds: int) -> LayerTimes:
    maps = example_input((batch, *INPUT_SHAPE))
    # The smallest possible convolution: its time is the fixed cost of a call.
    floor = nn.Conv2d(1, 1, kernel_size=1)
    samples = interleave(
        {
            "pointwise": _forward(pointwise, maps),
            "spatial": _forward(spatial, maps),
            "floor": _forward(floor, torch.zeros(1, 1, 1, 1)),
        },
        rounds=rounds,
    )
    return LayerTimes(
        batch=batch,
        pointwise=samples.timing("pointwise", runtime="eager", batch=batch),
        spatial=samples.timing("spatial", runtime="eager", batch=batch),
        floor=samples.timing("floor", runtime="eager", batch=1),
        ratio=samples.ratio("spatial", "pointwise"),
    )


def _forward(layer: nn.Module, maps: Tensor) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.inference_mode():
            output: Tensor = layer(maps)
        return output

    return forward


def _cold_calls(order: tuple[Layer, Layer]) -> ColdCalls:
    script = Path(__file__).with_name("cold_call.py")
    # -P keeps the script's folder out of the import path.
    command = [sys.executable, "-P", str(script), str(torch.get_num_threads()), *order]
    try:
        finished = subprocess.run(  # noqa: S603  # our own interpreter and our own script
            command, capture_output=True, text=True, timeout=COLD_SECONDS, check=True
        )
        milliseconds = json.loads(finished.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()
        raise ModelError(
            f"A fresh Python process must be able to time one cold call, but {command[0]} failed: "
            f"{said[-1] if said else error}"
        ) from error
    return ColdCalls(
        first=order[0],
        pointwise_ms=milliseconds["pointwise"],
        spatial_ms=milliseconds["spatial"],
    )
