"""A quantized network whose integers can be trained, by straight-through gradients.

The network computes what its simulation computes, from weights, biases and steps of activations
that are parameters. Rounding passes gradients through; values beyond a grid's ends get none. The
gradient of a step is that of LSQ. The steps of weights are kept: on a ResNet-20 training them as
well came less near to the teacher.

References:
    Esser et al., "Learned Step Size Quantization", ICLR 2020 (arXiv:1902.08153).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from onebyone.core.errors import ModelError
from onebyone.quantizing.network import Quantized
from onebyone.quantizing.placement import passes
from onebyone.quantizing.record import LEVELS
from onebyone.quantizing.rounding import largest_integer
from onebyone.quantizing.simulate import (
    BIAS_LIMIT,
    bias_name,
    bias_scales,
    quantized_operations,
    weight_name,
)

_ATEN = torch.ops.aten


class _Rounded(torch.autograd.Function):
    """Rounding to a grid, with straight-through gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, grid: tuple[int, int, int]) -> Tensor:
        zero_point, low, high = ctx.grid = grid
        ctx.save_for_backward(x, scale)
        levels = torch.round_(x * _inverse(scale)).add_(zero_point).clamp_(low, high)
        return levels.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale = ctx.saved_tensors
        zero_point, low, high = ctx.grid
        places = x * _inverse(scale)
        nearest = torch.round(places)
        levels = nearest.clamp(low - zero_point, high - zero_point)
        inside = (levels == nearest).to(places.dtype)
        of_x = gradient * inside if ctx.needs_input_grad[0] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            # Inside, a value moves with the step by what rounding added; beyond the ends, with
            # the end.
            each = levels.addcmul_(places, inside, value=-1).mul_(gradient)
            of_scale = each.sum_to_size(scale.shape)
        return of_x, of_scale, None


def _inverse(scale: Tensor) -> Tensor:
    # As the simulation's operation computes it: in float64, then rounded.
    return (1 / scale.double()).to(scale.dtype)


def rounded(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """Return values rounded to ``scale * (q - zero_point)``, with straight-through gradients.

    Args:
        x: Values.
        scale: One step, or steps that broadcast over ``x``.
        zero_point: The level of zero.
        low: The lowest level.
        high: The highest level.
    """
    result: Tensor = _Rounded.apply(x, scale, (zero_point, low, high))
    return result


class GridStep(nn.Module):
    """The step of a grid of activations; it stays positive as the exponential of a parameter."""

    first: Tensor

    def __init__(self, scale: float, *, learned: bool) -> None:
        super().__init__()
        self.register_buffer("first", torch.tensor(scale, dtype=torch.float32))
        self.change = nn.Parameter(torch.zeros(()), requires_grad=learned)

    def forward(self) -> Tensor:
        """Return the step, a scalar."""
        return self.first * self.change.exp()


class LayerIntegers(nn.Module):
    """The weights and the bias of a layer, rounded to integers times steps.

    Args:
        weight: Integers ``(out, …)``.
        scales: Their steps ``(out,)``.
        bias: Integers ``(out,)``.
        step: The step of the layer's input.
        bits: Of a weight.
    """

    scales: Tensor
    first_bias: Tensor

    def __init__(
        self, weight: Tensor, scales: Tensor, bias: Tensor, step: Tensor, bits: int
    ) -> None:
        super().__init__()
        self._limit = largest_integer(bits)
        self.weight = nn.Parameter(weight.float() * _along(scales, weight))
        # The integers of a bias have more digits than float32, so only its change is float32.
        self.bias_change = nn.Parameter(torch.zeros_like(scales))
        self.register_buffer("scales", scales.clone())
        self.register_buffer("first_bias", bias.double() * (step * scales).double())

    def integers(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return the integers of the weights and of the bias, in floating point."""
        with torch.no_grad():
            levels = torch.round(self.weight * _inverse(_along(self.scales, self.weight)))
            bias = self._bias_integers(step * self.scales)
            return levels.clamp(-self._limit, self._limit), bias

    def forward(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and bias, given the step of the layer's input."""
        scales, limit = _along(self.scales, self.weight), self._limit
        weight = rounded(self.weight, scales, 0, -limit, limit)
        with torch.no_grad():
            sums = step * self.scales
            bias = self._bias_integers(sums).to(sums.dtype) * sums
        # The bias's value, with the gradient of its change.
        return weight, bias + (self.bias_change - self.bias_change.detach())

    def _bias_integers(self, sums: Tensor) -> Tensor:
        places = (self.first_bias + self.bias_change.double()) / sums.double()
        return torch.round(places).clamp(-BIAS_LIMIT, BIAS_LIMIT)


def _along(scales: Tensor, weight: Tensor) -> Tensor:
    return scales.reshape(-1, *[1] * (weight.ndim - 1))


@dataclass(frozen=True)
class _Pair:
    """A tensor's rounding in a simulation.

    Attributes:
        source: The tensor.
        levels: Its operation that gives levels.
        values: That which gives values again.
        grid: The name of the tensor whose grid it has.
        fixed: Whether its grid is known and must stay.
    """

    source: fx.Node
    levels: fx.Node
    values: fx.Node
    grid: str
    fixed: bool


def trainable(quantized: Quantized) -> fx.GraphModule:
    """Return a network that gives what a simulation gives, and can be trained.

    Trained are the weights and biases of the int8 layers, and the steps of the activations, but for
    the levels of pictures. Layers in float32 stay as they are.

    Args:
        quantized: Not modified.

    Raises:
        ModelError: If it is not as :func:`onebyone.quantizing.quantize` made it.
    """
    module = copy.deepcopy(_simulation(quantized))
    for parameter in module.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003 - torch names it by position
    graph = module.graph
    steps: dict[str, fx.Node] = {}
    step_of: dict[fx.Node, fx.Node] = {}
    for pair in list(_pairs(module)):
        scale, zero_point = pair.levels.args[1:3]
        with graph.inserting_before(pair.levels):
            if pair.grid not in steps:
                name = _step_name(pair.grid)
                module.add_submodule(name, GridStep(float(scale), learned=not pair.fixed))  # type: ignore[arg-type]
                steps[pair.grid] = graph.call_module(name)
            step = steps[pair.grid]
            made = graph.call_function(rounded, (pair.source, step, zero_point, 0, LEVELS))
        pair.values.replace_all_uses_with(made)
        step_of[made] = step
    for node in list(_layers(graph)):
        before: Any = node.args[0]
        step = step_of[before]
        first: Any = getattr(module, str(step.target)).first
        weight, scales, bias = _buffers(module, node)
        name = _layer_name(node)
        module.add_submodule(
            name, LayerIntegers(weight, scales, bias, first, quantized.record.weight_bits)
        )
        with graph.inserting_before(node):
            both = graph.call_module(name, (step,))
            parts = [graph.call_function(operator.getitem, (both, place)) for place in (0, 1)]
        node.args = (before, *parts, *node.args[3:])
    graph.eliminate_dead_code()
    for name in [name for name, _ in module.named_buffers() if name.endswith(_STORED)]:
        delattr(module, name)
    module.recompile()
    return module.eval()


_STORED = ("_weight_integers", "_weight_scales", "_bias_integers", "_bias_scales")


def with_trained(quantized: Quantized, trained: nn.Module, *, epochs: int) -> Quantized:
    """Return a quantized network with the integers and steps of its trained form.

    Args:
        quantized: What the trained form was made from. Not modified.
        trained: What :func:`trainable` gave, after a training.
        epochs: Of that training, for the record.
    """
    module = copy.deepcopy(_simulation(quantized))
    grids = dict(quantized.record.grids)
    with torch.no_grad():
        for pair in list(_pairs(module)):
            step = _submodule(trained, _step_name(pair.grid), GridStep)
            scale = _kept(step.change, float(step()), grids[pair.source.name].scale)
            grids[pair.source.name] = replace(grids[pair.source.name], scale=scale)
            for node in (pair.levels, pair.values):
                node.args = (node.args[0], scale, *node.args[2:])
        integers = dict(quantized.integers)
        for node in list(_layers(module.graph)):
            layer = _submodule(trained, _layer_name(node), LayerIntegers)
            grid = grids[_source_of(node)]
            weight, bias = layer.integers(torch.tensor(grid.scale, dtype=torch.float32))
            weight, bias = weight.to(torch.int8).contiguous(), bias.to(torch.int32)
            integers[weight_name(node.name)], integers[bias_name(node.name)] = weight, bias
            _, scales, _ = _buffers(module, node)
            _set_buffers(module, node, (weight, scales, bias, bias_scales(grid, scales)))
    module.recompile()
    record = replace(quantized.record, grids=grids, distilled=quantized.record.distilled + epochs)
    if epochs:  # the errors were those of the integers before
        record = replace(record, layers=tuple(replace(each, error=None) for each in record.layers))
    return Quantized(module.eval(), record, integers)


def _kept(change: Tensor, scale: float, first: float) -> float:
    return first if float(change) == 0 else scale


def _simulation(quantized: Quantized) -> fx.GraphModule:
    if not isinstance(quantized.network, fx.GraphModule):
        raise ModelError(
            "A network to be trained in int8 must be as `quantize` made it, got a "
            f"{type(quantized.network).__name__}. Give what `quantize` or `load_quantized` returns."
        )
    return quantized.network


def _pairs(module: fx.GraphModule) -> Iterator[_Pair]:
    """Yield each rounded tensor; those that pass another one's values on share its grid."""
    found: dict[fx.Node, _Pair] = {}
    for node in module.graph.nodes:
        if node.target is not quantized_operations().quantize_per_tensor.default:
            continue
        source = node.args[0]
        (values,) = node.users
        grid = source.name
        before = next((each for each in source.all_input_nodes if each in found), None)
        if before is not None and passes(source):
            other = found[before]
            if other.levels.args[1:3] == node.args[1:3]:
                grid = other.grid
        pair = _Pair(source, node, values, grid, _is_of_pixels(source))
        found[values] = pair
        yield pair


def _is_of_pixels(source: fx.Node) -> bool:
    """Return whether a tensor has pictures' levels, as :func:`with_pixels` maps them."""
    shifts = [each for each in source.all_input_nodes if each.op == "get_attr"]
    return source.target is _ATEN.add.Tensor and any(n.target == "pixel_shift" for n in shifts)


def _layers(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the int8 layers in the order in which they run."""
    stored = quantized_operations().dequantize_per_channel.default
    for node in graph.nodes:
        if len(node.args) > 2 and getattr(node.args[1], "target", None) is stored:
            yield node


def _source_of(layer: fx.Node) -> str:
    """Return the name of the tensor that a layer of a simulation reads."""
    values: Any = layer.args[0]
    return str(values.args[0].args[0].name)


def _buffers(module: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor, Tensor]:
    names = (f"{node.name}{part}" for part in _STORED[:3])
    weight, scales, bias = (getattr(module, name) for name in names)
    return weight, scales, bias


def _set_buffers(module: fx.GraphModule, node: fx.Node, values: tuple[Tensor, ...]) -> None:
    for part, value in zip(_STORED, values, strict=True):
        setattr(module, f"{node.name}{part}", value.clone())


def _step_name(grid: str) -> str:
    return f"step_of_{grid}"


def _layer_name(node: fx.Node) -> str:
    return f"integers_of_{node.name}"


def _submodule(network: nn.Module, name: str, kind: type[Any]) -> Any:
    found = getattr(network, name, None)
    if not isinstance(found, kind):
        raise ModelError(
            f"A trained network must be of the quantized one, but has no {name!r}. Give what "
            "`trainable` made of it."
        )
    return found
