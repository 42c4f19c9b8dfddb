"""Finds the places after a network's activations where 1×1 + activation can start as the identity.

What an activation gives, the same activation leaves as it is where it is a bound: ReLU, ReLU6,
Hardtanh. Others change their own output again: what follows them is a PReLU of slope 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from onebyone.core.records import Cost, LeftAlone
from onebyone.core.tensor_trees import Inputs
from onebyone.networks.conv_layers import is_pointwise
from onebyone.networks.dataflow import Reading, Value, find_neighbours
from onebyone.networks.layers import Pointwise
from onebyone.networks.plain_layers import why_not_its_class
from onebyone.networks.stand_ins import REASON
from onebyone.networks.surgery import aliases, module_at
from onebyone.rewrites.fold.merge_layers import is_batch_norm

# Bounds: given their own output, they return it.
_BOUNDS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_CURVES = (
    nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish,
)  # fmt: skip
_GATES = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softmax, nn.Softmax2d, nn.GLU)
# timm's own classes of the same activations, by module and name so that timm need not be imported.
_TIMM = "timm.layers.activations"
_TIMM_CURVES = ("Swish", "Mish", "HardSwish", "HardMish", "PReLU", "GELU", "GELUTanh", "QuickGELU")
# Activations that are called as functions, by the operation that runs.
_OPERATIONS = {
    "relu": "ReLU", "hardtanh": "PReLU", "leaky_relu": "PReLU", "elu": "PReLU", "celu": "PReLU",
    "gelu": "PReLU", "silu": "PReLU", "mish": "PReLU", "hardswish": "PReLU",
}  # fmt: skip
ACTIVATION_OPERATIONS = frozenset({*_OPERATIONS, *(f"{name}_" for name in _OPERATIONS)})
# What reads or makes a map with the channels on its second axis.
_MAP_OPERATIONS = (
    "convolution", "batch_norm", "max_pool", "avg_pool", "upsample", "pixel_shuffle",
    "native_group_norm",
)  # fmt: skip
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)  # noqa: SLF001
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # noqa: SLF001
_ALONG_LAST = (nn.Linear, nn.LayerNorm)


def activation_after(activation: nn.Module) -> str | None:
    """Return the activation that can follow a 1×1 after this one and start as the identity.

    Returns:
        Its class's name: the activation's own where it is a bound, else ``PReLU``; ``None`` where
        the module is no activation of features.
    """
    kind = type(activation)
    if kind in _BOUNDS:
        return kind.__name__
    timm_curve = kind.__module__.startswith(_TIMM) and kind.__name__.startswith(_TIMM_CURVES)
    return "PReLU" if kind in _CURVES or timm_curve else None


POINTWISE: dict[int, Callable[[int], nn.Module]] = {
    1: lambda channels: nn.Conv1d(channels, channels, 1),
    2: lambda channels: Pointwise(channels, channels),
    3: lambda channels: nn.Conv3d(channels, channels, 1),
}


@dataclass(frozen=True)
class Place:
    """Where pairs of 1×1 and activation can be inserted.

    Attributes:
        site: The module that is replaced by a chain that starts with itself.
        where: ``after``: the site is an activation, and pairs of 1×1 + activation follow.
            ``before``: the site is a layer and pairs of activation + 1×1 follow, before the
            activation that the network itself applies to it.
        activation: Class name of the new activations.
        old: Name of the network's activation there; ``None`` if it is a function.
        shape: Of the map there, with the batch.
        why_no_mlpconv: Why what precedes is not a convolution whose block this would be.
    """

    site: str
    where: str
    activation: str
    old: str | None
    shape: tuple[int, ...]
    why_no_mlpconv: str | None

    def cost(self, pairs: int, batch: int, *, value_bytes: int) -> Cost:
        """Return what the new layers cost for one input, of values of so many bytes."""
        channels = self.shape[1]
        weights = channels**2
        slopes = channels if self.activation == "PReLU" else 0
        params = pairs * (weights + channels + slopes)
        return Cost(
            params=params,
            macs=pairs * weights * (math.prod(self.shape) // channels) // batch,
            bytes=params * value_bytes,
        )


class Scene:
    """A network and what one pass of it showed."""

    def __init__(self, network: nn.Module, example: Inputs) -> None:
        self.network = network
        self.neighbours = find_neighbours(network, example)
        self.names = aliases(network)
        # Value -> the layer whose output it is, where the layer can be made a chain and nothing
        # but one operation reads its output.
        self.layers: dict[int, str] = {}
        for name, module in network.named_modules():
            calls = self.neighbours.calls_of(name)
            if self._is_lone_layer(name, module) and self.reader(calls[0].outputs[0]) is not None:
                self.layers[calls[0].outputs[0]] = name

    def _is_lone_layer(self, name: str, module: nn.Module) -> bool:
        calls = self.neighbours.calls_of(name)
        return (
            (isinstance(module, _CONVOLUTIONS) or next(module.children(), None) is None)
            and bool(module.state_dict())
            and len(calls) == len(self.names[name]) == 1
            and len(calls[0].outputs) == 1
            and name not in self.neighbours.called_elsewhere
        )

    def reader(self, place: int) -> Reading | None:
        """Return the one operation that reads a value, if nothing else does."""
        value = self.neighbours.values[place]
        calls = {(reading.module, reading.call) for reading in value.readings}
        return value.readings[0] if len(calls) == 1 and not value.is_output else None

    def module(self, name: str) -> nn.Module:
        """Return a module."""
        return module_at(self.network, name)

    def activation_of(self, name: str | None) -> str | None:
        """Return what can follow a module that is an activation; ``None`` if it is none."""
        return None if name is None else activation_after(self.module(name))


def find_places(scene: Scene) -> Iterator[Place | LeftAlone]:
    """Yield a place, or why there is none, for every activation of a pass."""
    for name, module in scene.network.named_modules():
        if activation_after(module) is not None:
            reason = why_not_its_class(module)
            if name in scene.neighbours.called_elsewhere:
                reason = REASON
            if reason is not None:
                yield LeftAlone(site=name, reason=reason)
            else:
                yield from _places_of(scene, name)
        elif isinstance(module, _GATES):
            reason = f"{type(module).__name__} gives weights or scores, not features"
            yield LeftAlone(site=name, reason=reason)
    yield from _places_of_functions(scene)


def _places_of(scene: Scene, name: str) -> Iterator[Place | LeftAlone]:
    """Yield the places of an activation that is a module."""
    calls = scene.neighbours.calls_of(name)
    if not calls:
        yield LeftAlone(site=name, reason="it does not run")
    elif len(calls) == len(scene.names[name]) == 1:
        yield _after(scene, name)
    else:
        for call in calls:
            layer = scene.layers.get(call.inputs[0]) if len(call.inputs) == 1 else None
            if layer is not None:
                yield _before(scene, layer, scene.activation_of(name), name)
                continue
            made = scene.neighbours.values[call.inputs[0]].operation if call.inputs else None
            reason = (
                f"one module that runs {len(calls)} times, here on the output of "
                f"{f'`{made}`' if made else 'no operation'}, not of a layer that it alone follows"
            )
            yield LeftAlone(site=name, reason=reason)


def _places_of_functions(scene: Scene) -> Iterator[Place | LeftAlone]:
    """Yield the places of activations that are functions in a forward."""
    waiting: Counter[tuple[str, str]] = Counter()
    for value in scene.neighbours.values:
        operation = value.operation or ""
        is_module = value.module is not None and scene.activation_of(value.module) is not None
        if operation in ACTIVATION_OPERATIONS and not is_module:
            waiting[operation, value.module or ""] += 1
    for place, layer in scene.layers.items():
        reader = scene.reader(place)
        if reader is None or (reader.operation, reader.module) not in waiting:
            continue
        waiting[reader.operation, reader.module] -= 1
        yield _before(scene, layer, _OPERATIONS[reader.operation.removesuffix("_")], None)
    for (operation, module), count in waiting.items():
        if count:
            site = f"`{operation}` in {module or 'the network'}"
            reason = "a function on something that is not a layer's output, or not for it alone"
            yield LeftAlone(site=site, reason=reason)


def _after(scene: Scene, name: str) -> Place | LeftAlone:
    """Return the place after an activation that is a module of its own."""
    given, value = scene.neighbours.input_of(name), scene.neighbours.output_of(name)
    if given is None or value is None:
        return LeftAlone(site=name, reason="it does not take and return one tensor")
    reason = _why_no_map(scene, given, value)
    if reason is not None:
        return LeftAlone(site=name, reason=reason)
    new = scene.activation_of(name)
    assert new is not None
    return Place(name, "after", new, name, value.shape, _why_no_mlpconv(scene, given))


def _before(scene: Scene, layer: str, new: str | None, old: str | None) -> Place | LeftAlone:
    """Return the place between a layer and its activation, which is not a module of its own."""
    value = scene.neighbours.output_of(layer)
    assert value is not None
    assert new is not None
    reason = _why_no_map(scene, value, value)
    if reason is not None:
        return LeftAlone(site=layer, reason=reason)
    return Place(layer, "before", new, old, value.shape, _why_no_mlpconv(scene, value))


def _why_no_map(scene: Scene, given: Value, value: Value) -> str | None:
    """Return why an activation's output is not known to be a map with its channels second."""
    axes = len(value.shape) - 2
    if axes < 1:
        return "its output is vectors, not a map"
    if axes not in POINTWISE:
        return f"its output has {axes + 2} axes"
    sides = [(reading.operation, reading.module) for reading in value.readings]
    sides += [(v.operation or "", v.module or "") for v in (value, given)]
    for _, name in sides:
        module = scene.module(name)
        if isinstance(module, _ALONG_LAST):
            return "its channels are on the last axis, next to a linear layer or a layer norm"
        if isinstance(module, _CONVOLUTIONS) and len(module.kernel_size) != axes:
            return "its output has no batch"
    known = any(part in operation for operation, _ in sides for part in _MAP_OPERATIONS)
    if known or not _any_along_last(scene):
        return None
    return "it cannot be seen which axis of its output the channels are"


def _any_along_last(scene: Scene) -> bool:
    """Whether a layer of the network works along the last axis of more than vectors."""
    return any(
        isinstance(scene.module(call.module), _ALONG_LAST)
        and any(len(scene.neighbours.values[place].shape) > 2 for place in call.inputs)
        for call in scene.neighbours.calls
    )


def _why_no_mlpconv(scene: Scene, given: Value) -> str | None:
    """Return why an activation does not belong to a convolution of several places, or ``None``."""
    value: Value | None = given
    if given.module is not None:
        norm = scene.module(given.module)
        if isinstance(norm, _NORMS) or is_batch_norm(norm):
            value = scene.neighbours.input_of(given.module)
    module = None if value is None or value.module is None else scene.module(value.module)
    if not isinstance(module, _CONVOLUTIONS):
        made = value.operation if value is not None else None
        return f"before it is no convolution but {f'`{made}`' if made else 'something else'}"
    return "the convolution before it is 1×1 already" if is_pointwise(module) else None
