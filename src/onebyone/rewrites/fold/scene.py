"""Which folds a network allows, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from onebyone.core.records import Cost
from onebyone.core.tensor_trees import Inputs, batch_size
from onebyone.networks.conv_layers import is_transposed, shape_of, weight_of, why_unknown
from onebyone.networks.dataflow import Neighbours, neighbours_in
from onebyone.networks.plain_layers import has_hooks, why_not_its_class
from onebyone.networks.stand_ins import REASON
from onebyone.networks.surgery import aliases, module_at
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.rewrites.fold.merge_layers import (
    Merge,
    affine_of,
    axes_of,
    merge_of,
    rest_of,
    why_no_affine,
    why_uneven,
)

FORMS = {
    "norm-before": "a batch norm goes into the layer before it",
    "norm-after": "a batch norm goes into the layer after it",
    "merge": "two layers with nothing between become one",
}
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)  # noqa: SLF001


@dataclass(frozen=True)
class Fold:
    """One fold, by names.

    Attributes:
        form: One of :data:`FORMS`.
        site: The module that disappears.
        into: The layer that takes it in.
    """

    form: str
    site: str
    into: str


@dataclass(frozen=True)
class Scene:
    """A network and what is known of which layer feeds which.

    Attributes:
        network: Run, never modified while the scene is looked at.
        names: First name -> all the names of that module.
        owners: Where a tensor's data is -> the modules that own such a tensor.
        hooked: Tensors that a module with hooks takes or returns -> that module.
        batch: Of the example.
        values: Whether weights count, or only structure.
    """

    network: nn.Module
    neighbours: Neighbours
    names: dict[str, tuple[str, ...]]
    owners: dict[int, list[str]]
    hooked: dict[int, str]
    batch: int
    values: bool

    def module(self, name: str) -> nn.Module:
        """Return a module."""
        return module_at(self.network, name)

    def in_order(self, fold: Fold) -> tuple[str, str]:
        """Return the names of a fold's two modules in the order in which they run."""
        if fold.form == "norm-before":
            return fold.into, fold.site
        if fold.form == "norm-after":
            return fold.site, fold.into
        if self.neighbours.only_consumer(fold.into).name == fold.site:
            return fold.into, fold.site
        return fold.site, fold.into


def look_at(network: nn.Module, example: Inputs, *, values: bool) -> Scene:
    """Run a network and return which layer feeds which."""
    neighbours = neighbours_in(network, example)
    modules = dict(network.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.numel():
                owners.setdefault(tensor.data_ptr(), []).append(name)
    hooked = {
        place: call.module
        for call in neighbours.calls
        if has_hooks(modules[call.module])
        for place in (*call.inputs, *call.outputs)
    }
    batch = batch_size(example)
    return Scene(network, neighbours, aliases(network), owners, hooked, batch, values)


def why_not(scene: Scene, fold: Fold) -> str | None:
    """Return why a fold would not be exact, or would disturb something, in words."""
    first, second = scene.in_order(fold)
    consumer = scene.neighbours.only_consumer(first)
    if consumer.name != second:
        return consumer.reason or f"{first!r} feeds {consumer.name!r}"
    between = scene.neighbours.calls_of(first)[0].outputs[0]
    watcher = scene.hooked.get(between)
    if watcher is not None:
        return f"hooks of {watcher!r} see what is between"
    dropout = _acting_in_training(scene, between)
    if dropout is not None:
        return f"{dropout} is between, which acts in training"
    for name in (first, second):
        reason = _why_tied(scene, name)
        if reason is not None:
            return reason
    if fold.form == "merge":
        merge = _why_unknown_layers(scene, first, second) or merge_of(
            scene.module(first), scene.module(second), values=scene.values
        )
        return merge if isinstance(merge, str) else _why_dearer(scene, first, second, merge)
    return _why_no_norm(scene, fold)


def _acting_in_training(scene: Scene, between: int) -> str | None:
    """Return the kind of a layer that passes a tensor on unchanged, but only in evaluation."""
    for call in scene.neighbours.calls:
        if between in call.inputs and between in call.outputs:
            module = scene.module(call.module)
            idle = type(module) is nn.Identity or any(True for _ in module.children())
            if not idle and 0.0 not in (getattr(module, n, 1.0) for n in ("p", "drop_prob")):
                return type(module).__name__
    return None


def _why_tied(scene: Scene, name: str) -> str | None:
    """Return what else depends on a module being as it is, or ``None``."""
    module = scene.module(name)
    if len(scene.names[name]) > 1:
        return f"{name!r} is one module of several names, {', '.join(scene.names[name])}"
    reason = why_not_its_class(module)
    if reason is not None:
        return f"{name!r} {reason}"
    if name in scene.neighbours.called_elsewhere:
        return f"{name!r} cannot be replaced: {REASON}"
    if name in scene.neighbours.read_elsewhere:
        reader = scene.neighbours.read_elsewhere[name] or "the network"
        return f"the forward of {reader} reads the weight of {name!r}"
    for tensor in (*module.parameters(), *module.buffers()):
        for owner in scene.owners.get(tensor.data_ptr(), ()) if tensor.numel() else ():
            if owner != name and not owner.startswith(f"{name}."):
                return f"{name!r} shares a weight with {owner!r}"
    return None


def _why_unknown_layers(scene: Scene, *names: str) -> str | None:
    return next(filter(None, (why_unknown(scene.module(name)) for name in names)), None)


def _why_no_norm(scene: Scene, fold: Fold) -> str | None:
    norm, layer = scene.module(fold.site), scene.module(fold.into)
    reason = why_unknown(layer) or why_no_affine(norm)
    if reason is not None:
        return reason
    shape, before = shape_of(layer), fold.form == "norm-before"
    value = scene.neighbours.input_of(fold.site)
    dimensions = 2 if isinstance(layer, nn.Linear) else axes_of(layer) + 2
    if value is None or len(value.shape) != dimensions:
        return "they do not agree on which axis the channels are"
    if len(affine_of(norm)[0]) != (shape.out if before else shape.channels):
        return "they have different numbers of channels"
    return None if before else _why_not_after(norm, layer, values=scene.values)


def _why_not_after(norm: nn.Module, layer: nn.Module, *, values: bool) -> str | None:
    if type(rest_of(norm)) is not nn.Identity:
        return "it has an activation of its own"
    if not values or not bool(affine_of(norm)[1].any()):
        return None
    return why_uneven(layer)


def _macs(scene: Scene, name: str) -> int:
    """Return the MACs of a layer for one input, as counted."""
    return _weights(scene.module(name)) * _places(scene, name) // scene.batch


def _weights(layer: nn.Module) -> int:
    """Return the number of values of a layer's kernel."""
    shape = shape_of(layer)
    return shape.out * shape.values


def _places(scene: Scene, name: str) -> int:
    """Return how many places of the whole batch meet the whole kernel."""
    shape = shape_of(scene.module(name))
    neighbours = scene.neighbours
    value = neighbours.input_of(name) if shape.transposed else neighbours.output_of(name)
    assert value is not None
    return math.prod(value.shape) // (shape.channels if shape.transposed else shape.out)


def _own_cost(scene: Scene, names: Sequence[str], macs: int) -> Cost:
    """Return the cost of modules as they are."""
    modules = [scene.module(name) for name in names]
    return Cost(
        params=sum(p.numel() for module in modules for p in module.parameters()),
        macs=macs,
        bytes=sum(map(weight_bytes, modules)),
    )


def costs_of(scene: Scene, fold: Fold) -> tuple[Cost, Cost]:
    """Return the cost of the two modules before the fold, and of the merged one after it."""
    first, second = scene.in_order(fold)
    if fold.form == "merge":
        merge = merge_of(scene.module(first), scene.module(second), values=scene.values)
        assert isinstance(merge, Merge)
        macs = _macs(scene, first) + _macs(scene, second)
        return _own_cost(scene, (first, second), macs), _merged_cost(scene, first, second, merge)
    layer, norm = scene.module(fold.into), scene.module(fold.site)
    shape = shape_of(layer)
    macs = _macs(scene, fold.into)
    values, rest = _weights(layer) + shape.out, rest_of(norm)
    after = Cost(
        params=values + sum(p.numel() for p in rest.parameters()),
        macs=macs,
        bytes=values * weight_of(layer).element_size() + weight_bytes(rest),
    )
    return _own_cost(scene, (first, second), macs), after


def _merged_cost(scene: Scene, first: str, second: str, merge: Merge) -> Cost:
    transposed_first = is_transposed(scene.module(first))
    places = _places(scene, first if transposed_first else second)
    return Cost(
        params=merge.params,
        macs=merge.weights * places // scene.batch,
        bytes=merge.params * weight_of(scene.module(second)).element_size(),
    )


def _why_dearer(scene: Scene, first: str, second: str, merge: Merge) -> str | None:
    if not scene.values:
        return None
    now = _own_cost(scene, (first, second), _macs(scene, first) + _macs(scene, second))
    then = _merged_cost(scene, first, second, merge)
    if then.macs > now.macs:
        return f"merged they would cost {then.macs:,} MACs, not {now.macs:,}"
    if then.params > now.params:
        return f"merged they would have {then.params:,} parameters, not {now.params:,}"
    return None
