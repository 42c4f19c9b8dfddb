"""How long a survey will take, told before its first pass over the data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import nn

from onebyone.calibration.curvature import CURVATURE_MACS, FEWEST_CURVATURE_EXAMPLES
from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.moments import TO_COMPARE
from onebyone.core import processes
from onebyone.core.records import LayerCost
from onebyone.core.run_lines import LOGGER
from onebyone.core.tensor_trees import batch_size, first_examples
from onebyone.core.units import format_seconds
from onebyone.networks.conv_layers import shape_of
from onebyone.networks.surgery import module_at, run
from onebyone.planning.probes import Counts

# Examples of the pass whose time tells how fast the network runs.
TIMED_EXAMPLES = 32
# The closed forms of a layer's options take about so many seconds, however small it is, and as many
# MACs as this number times the cube of its kernel's input values.
SECONDS_A_LAYER = 0.35
CUBES = 20
# Passes take longer than their layers' MACs alone: hooks and copies of activations.
OVERHEAD = 1.3


def survey_macs(
    network: nn.Module,
    layers: Mapping[str, LayerCost],
    names: Sequence[str],
    counts: Counts,
    readers: Sequence[str],
    *,
    examples: int,
) -> float:
    """Return about how many MACs a survey takes, those of its closed forms included.

    Args:
        network: Not modified.
        layers: By name, in order of execution.
        names: Of those with options.
        counts: How many options are measured, and on how many examples.
        readers: Of each group of layers with options, the first reader.
        examples: Of the calibration data.
    """
    forward = sum(layer.macs for layer in layers.values())
    curved = min(examples, max(FEWEST_CURVATURE_EXAMPLES, int(CURVATURE_MACS / (2 * forward))))
    total = OVERHEAD * (forward * (examples + 3 * curved) + counts.macs([*names, *readers]))
    for name in names:
        shape = shape_of(module_at(network, name))
        values = shape.values
        seen = examples * layers[name].macs / max(shape.out * values, 1)
        rows = min(TO_COMPARE.rows(values), seen)
        total += shape.groups * (rows * values**2 + CUBES * values**3)
    return total


def tell_seconds(
    network: nn.Module,
    layers: Mapping[str, LayerCost],
    names: Sequence[str],
    counts: Counts,
    readers: Sequence[str],
    *,
    data: CalibrationData,
) -> float:
    """Time one pass on a few examples, and tell about how long the survey will take, in seconds.

    Nothing depends on it.

    Args:
        network: In evaluation mode.
        layers: As for :func:`survey_macs`, as are ``names``, ``counts`` and ``readers``.
        names: Of those with options.
        counts: How many options are measured.
        readers: Of groups.
        data: The calibration data.
    """
    inputs = first_examples(next(iter(data.batches())), TIMED_EXAMPLES)
    run(network, inputs)  # the first pass prepares kernels
    start = time.perf_counter()
    run(network, inputs)
    each = (time.perf_counter() - start) / batch_size(inputs)
    forward = sum(layer.macs for layer in layers.values())
    macs = survey_macs(network, layers, names, counts, readers, examples=len(data))
    seconds = (each * macs / max(forward, 1) + SECONDS_A_LAYER * len(names)) / processes.count()
    if processes.is_main():
        LOGGER.info(
            f"options of {len(names)} layers: about {format_seconds(seconds)}, harm measured on "
            f"{counts.examples} examples"
        )
    return seconds
