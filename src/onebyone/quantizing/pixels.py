"""Inputs made of bytes, such as pictures: mapped back to their 256 levels, they round exactly."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from onebyone.quantizing.graph import Captured, Layer, with_layer
from onebyone.quantizing.record import LEVELS, Grid, Pixels

_VALUES = 2_000_000  # looked at in each channel
_SAME = 1e-3  # of a step: float32 that was computed in another order


def find_pixels(inputs: Tensor) -> Pixels | None:
    """Return the levels that the channels of pictures lie on; ``None`` if there are no such.

    Args:
        inputs: ``(n, channels, height, width)``.
    """
    if inputs.ndim != 4:
        return None
    found = [_levels(inputs[:, channel]) for channel in range(inputs.shape[1])]
    if any(levels is None for levels in found):
        return None
    offsets, steps = zip(*(levels for levels in found if levels is not None), strict=True)
    return Pixels(offsets=offsets, steps=steps)


def _levels(values: Tensor) -> tuple[float, float] | None:
    """Return the lowest of 256 levels and their distance."""
    ordered = torch.from_numpy(np.unique(values.reshape(-1)[:_VALUES].double().numpy()))
    span = float(ordered[-1] - ordered[0])
    if span == 0 or not math.isfinite(span):
        return None
    apart = torch.cat([ordered[:1], ordered[1:][ordered.diff() > span * 1e-5]])
    if not 16 <= len(apart) <= LEVELS + 1:
        return None
    step = float(apart.diff().min())
    places = (apart - apart[0]) / step
    # The smallest distance is known less well than the whole span.
    step = span / max(round(span / step), 1)
    places = (apart - apart[0]) / step
    used = round(float(places[-1]))
    if used > LEVELS or float((places - places.round()).abs().max()) > _SAME * LEVELS:
        return None
    # Levels that were not seen may lie on either side.
    below = (LEVELS - used) // 2
    return float(apart[0]) - below * step, step


def with_pixels(captured: Captured, pixels: Pixels) -> tuple[Captured, dict[str, Grid]]:
    """Return a graph whose first convolutions read levels from 0 to 1 in place of the inputs.

    The mapping is folded into their weights, so that the function stays the same. Zeros that they
    pad with are put around the inputs before.

    Args:
        captured: Changed in place.
        pixels: Of its input.

    Returns:
        The graph, and the grid of each mapped input.
    """
    graph, module = captured.graph, captured.module
    source = next(node for node in graph.nodes if node.op == "placeholder")
    steps = torch.tensor(pixels.steps, dtype=torch.float64) * LEVELS
    offsets = torch.tensor(pixels.offsets, dtype=torch.float64)
    shape = (1, -1, 1, 1)
    module.register_buffer("pixel_scale", (1 / steps).float().reshape(shape))
    module.register_buffer("pixel_shift", (-offsets / steps).float().reshape(shape))
    mapped: dict[tuple[int, ...], fx.Node] = {}
    for node in list(source.users):
        layer = captured.layers.get(node.name)
        if layer is None or not reads_pixels(layer):
            continue
        if layer.padding not in mapped:
            mapped[layer.padding] = _mapped(captured, source, layer)
        rest = list(node.args[1:])
        if any(layer.padding):
            rest[3] = (0, 0)
        node.args = (mapped[layer.padding], *rest)
        wide = layer.weight.double()
        weight = wide * steps.reshape(shape)
        bias = layer.bias.double() + (wide.sum((2, 3)) @ offsets)
        captured = with_layer(
            captured,
            replace(layer, weight=weight.float(), bias=bias.float(), padding=(0, 0)),
        )
    module.recompile()
    grid = Grid(scale=float(np.float32(1 / LEVELS)), zero_point=0)
    return captured, {node.name: grid for node in mapped.values()}


def reads_pixels(layer: Layer) -> bool:
    """Return whether a layer is one that can take the mapping of its inputs into its weights."""
    return layer.kind == "conv" and layer.groups == 1


def _mapped(captured: Captured, source: fx.Node, layer: Layer) -> fx.Node:
    graph = captured.graph
    example = source.meta["val"]
    height, width = layer.padding
    place, result = source, example
    with graph.inserting_after(source):
        if height or width:
            around = [width, width, height, height]
            place = graph.call_function(torch.ops.aten.pad.default, (source, around))
            result = F.pad(example, around)
            place.meta["val"] = result
    for operation, name in (("mul", "pixel_scale"), ("add", "pixel_shift")):
        with graph.inserting_after(place):
            constant = graph.get_attr(name)
        with graph.inserting_after(constant):
            call = getattr(torch.ops.aten, operation).Tensor
            place = graph.call_function(call, (place, constant))
            place.meta["val"] = result
    return place
