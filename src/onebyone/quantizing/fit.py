"""The walk through a network that chooses grids, scales and integers, layer after layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from onebyone.quantizing.graph import Captured, Layer
from onebyone.quantizing.placement import Placement
from onebyone.quantizing.ranges import best_grid, min_max_grid
from onebyone.quantizing.record import ClosedForms, Grid
from onebyone.quantizing.rounding import by_moments, nearest
from onebyone.quantizing.simulate import BIAS_LIMIT, bias_name, bias_scales, on_grid, weight_name

# Examples that ranges are tried on.
RANGE_EXAMPLES = 64
# Rows of unfolded patches for each value that a kernel sees, and at least so many.
ROWS_A_VALUE, FEWEST_ROWS = 16, 8192
PATCH_VALUES = 16_000_000  # unfolded at once


@dataclass
class Fitted:
    """What was chosen: grids by tensor, scales and errors by layer, integers by name."""

    grids: dict[str, Grid] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    integers: dict[str, Tensor] = field(default_factory=dict)


def fit(
    captured: Captured,
    placement: Placement,
    quantized: set[str],
    inputs: Tensor,
    *,
    forms: ClosedForms,
    bits: int = 8,
    fixed: Mapping[str, Grid] | None = None,
) -> Fitted:
    """Return grids and integers for a network's int8 layers.

    The network runs twice at once, in float32 and as far as it is quantized. Each layer is fitted
    on what the quantized layers before it give, to what the float layer gives.

    Args:
        captured: Not modified.
        placement: Where its tensors are quantized.
        quantized: Nodes of the int8 layers.
        inputs: Unlabelled examples ``(n, …)``. Not modified.
        forms: What is done beyond rounding to the nearest.
        bits: Of a weight.
        fixed: Grids of tensors that are known.
    """
    known = fixed or {}
    walk = Walk(captured, inputs)
    fitted = Fitted()
    for node in captured.graph.nodes:
        plain = walk.plain[node] = walk.run(node, walk.plain)
        layer = captured.layers.get(node.name)
        if node.name in quantized and layer is not None:
            source: Any = node.args[0]
            seen = walk.rounded[source] if forms.sequential else walk.plain[source]
            grid = fitted.grids[placement.grids[source.name]]
            weight, bias = _fit_layer(
                layer, seen, plain, grid, forms=forms, bits=bits, fitted=fitted
            )
            rounded = layer.run(seen, weight, bias)
            fitted.errors[node.name] = _relative_error(rounded, plain)
        else:
            rounded = walk.run(node, walk.rounded)
        if not forms.sequential:
            rounded = plain
        if node.name in placement.grids:
            name = placement.grids[node.name]
            if name == node.name:
                fitted.grids[name] = known.get(name) or _grid(walk, node, rounded, forms)
            if forms.sequential:
                rounded = on_grid(rounded, fitted.grids[name])
        walk.rounded[node] = rounded
        walk.forget(node)
    kept = {name: fitted.grids[grid] for name, grid in placement.grids.items()}
    fitted.grids.clear()
    fitted.grids.update(kept)
    return fitted


class Walk:
    """A graph that is run operation by operation, in float32 and quantized side by side."""

    def __init__(self, captured: Captured, inputs: Tensor) -> None:
        self.captured = captured
        self.plain: dict[fx.Node, Any] = {}
        self.rounded: dict[fx.Node, Any] = {}
        self._inputs = inputs
        last: dict[fx.Node, fx.Node] = {}
        for node in captured.graph.nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        self._done: dict[fx.Node, list[fx.Node]] = {}
        for node, user in last.items():
            self._done.setdefault(user, []).append(node)

    def run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Return what one operation gives for the values of its inputs."""
        if node.op == "placeholder":
            return self._inputs
        if node.op == "get_attr":
            value: Any = self.captured.module
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        if node.op == "output":
            return None
        layer = self.captured.layers.get(node.name)
        if layer is not None:
            source: Any = node.args[0]
            return layer.run(values[source])
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda old: values[old])
        target: Any = node.target
        return target(*args, **kwargs)

    def forget(self, node: fx.Node) -> None:
        """Drop what no later operation reads."""
        for done in self._done.get(node, ()):
            self.plain.pop(done, None)
            self.rounded.pop(done, None)


def _grid(walk: Walk, node: fx.Node, values: Tensor, forms: ClosedForms) -> Grid:
    """Return the grid of a tensor: by what its readers make of it, or from minimum to maximum."""
    if not forms.ranges:
        return min_max_grid(values)
    few = values[:RANGE_EXAMPLES]
    readers = list(_readers(walk, node))
    whole = [read(few) for read in readers]
    sizes = [float(each.var()) * each.numel() or 1.0 for each in whole]

    def error(rounded: Tensor) -> float:
        return sum(
            float((read(rounded) - exact).square().sum()) / size
            for read, exact, size in zip(readers, whole, sizes, strict=True)
        )

    return best_grid(few, error, widest=values)


def _readers(walk: Walk, node: fx.Node) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield what is done with a tensor: each layer that reads it; once itself for all else."""
    others = False
    for user in node.users:
        layer = walk.captured.layers.get(user.name)
        if layer is None:
            others = True
        else:
            yield layer.run
    if others:
        yield lambda x: x


def _relative_error(values: Tensor, exact: Tensor) -> float:
    """Return the squared error as a share of the squared deviation."""
    size = float(exact.double().var()) if exact.numel() > 1 else 0.0
    return float((values - exact).double().square().mean()) / (size or 1.0)


def _fit_layer(
    layer: Layer,
    seen: Tensor,
    target: Tensor,
    grid: Grid,
    *,
    forms: ClosedForms,
    bits: int,
    fitted: Fitted,
) -> tuple[Tensor, Tensor]:
    """Choose a layer's integers; return its weights and bias as they will be computed with.

    Args:
        layer: With the float weights.
        seen: Its inputs, as far as they are quantized.
        target: Its outputs in the float network.
        grid: That its inputs lie on.
        forms: What is done.
        bits: Of a weight.
        fitted: Takes the integers.
    """
    weight = layer.weight.reshape(layer.groups, len(layer.weight) // layer.groups, -1)
    if forms.rounding:
        rows = _rows(layer, seen)
        integers, scales = by_moments(weight, rows.mT @ rows / rows.shape[1], bits=bits)
    else:
        integers, scales = nearest(weight, bits=bits)
    scales = scales.reshape(-1).float()
    integers = integers.reshape(layer.weight.shape)
    # The bias is an integer too, on the grid of the sums: it must fit beside them.
    least = layer.bias.abs() / grid.scale / BIAS_LIMIT
    scales = torch.maximum(scales, least)
    values = integers.float() * scales.reshape(-1, *[1] * (layer.weight.ndim - 1))
    bias = layer.bias
    if forms.bias:
        gap = target - layer.run(seen, values, bias)
        bias = bias + _channel_means(gap, layer)
    step = bias_scales(grid, scales)
    bias_integers = torch.round(bias.double() / step.double()).clamp_(-BIAS_LIMIT, BIAS_LIMIT)
    fitted.scales[layer.node] = scales
    fitted.integers[weight_name(layer.node)] = integers.to(torch.int8)
    fitted.integers[bias_name(layer.node)] = bias_integers.to(torch.int32)
    return values, bias_integers.float() * step


def _channel_means(x: Tensor, layer: Layer) -> Tensor:
    if layer.kind == "linear":
        return x.reshape(-1, x.shape[-1]).mean(0)
    return x.mean((0, 2, 3))


def _rows(layer: Layer, seen: Tensor) -> Tensor:
    """Return what each group's kernel sees, ``(groups, rows, in)``, less its mean.

    Of convolutions a part of the positions is drawn, the same share of each example.
    """
    if layer.kind == "linear":
        x = seen.reshape(1, -1, seen.shape[-1])
        return x - x.mean(1, keepdim=True)
    groups, values = layer.groups, math.prod(layer.weight.shape[1:])
    kernel: Any = layer.weight.shape[2:]
    how: Any = (layer.dilation, layer.padding, layer.stride)
    positions = F.unfold(seen[:1, :1], kernel, *how).shape[2]
    wanted = max(ROWS_A_VALUE * values, FEWEST_ROWS)
    each = min(positions, math.ceil(wanted / len(seen)))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(positions, generator=generator)[:each].sort().values
    chunk = max(1, PATCH_VALUES // (groups * values * positions))
    patches = torch.cat(
        [F.unfold(part, kernel, *how)[:, :, drawn] for part in torch.split(seen, chunk)]
    )
    x = patches.reshape(len(seen), groups, values, each).permute(1, 0, 3, 2)
    x = x.reshape(groups, -1, values)
    return x - x.mean(1, keepdim=True)
