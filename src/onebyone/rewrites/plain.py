"""Whether layers compute what their weights say, and are used for nothing but that: by comparison.

Every rewrite of a layer starts from its kernel. A patched forward, a subclass that is called in its
own way, or a parent that reads the weight itself may do something else with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.errors import ModelError
from onebyone.core.tensor_trees import Inputs
from onebyone.networks.conv_layers import (
    bias_of,
    kernel_of,
    pointwise_like,
    set_kernel,
    shape_of,
    spatial_like,
)
from onebyone.networks.stand_ins import REASON, stand_ins
from onebyone.networks.surgery import hooks_removed, module_at, replaced
from onebyone.rewrites.equivalence import TOLERANCES, Version, difference, keeping, version_of


def plain_layer(module: nn.Module) -> nn.Module:
    """Return a fresh plain layer of a layer's geometry, kernel and bias.

    Args:
        module: A layer that is known. Not modified.
    """
    shape, bias = shape_of(module), bias_of(module)
    if isinstance(module, nn.Linear):
        new = pointwise_like(module, shape.channels, shape.out, bias=bias is not None)
    else:
        new = spatial_like(
            module, shape.channels, shape.out, groups=shape.groups, bias=bias is not None
        )
    set_kernel(new, kernel_of(module))
    if bias is not None:
        assert isinstance(new.bias, Tensor)
        with torch.no_grad():
            new.bias.copy_(bias)
    return new.train(module.training)


def why_not_plain(network: nn.Module, example: Inputs, names: Sequence[str]) -> dict[str, str]:
    """Return the layers that a plain layer of the same weights cannot take the place of, and why.

    Compared are what each layer gives, and what the network gives once all are replaced; in float64
    where the network runs so, on the example and on noise like it.

    Args:
        network: Not modified.
        example: An input of the network.
        names: Convolutions and linear layers that are known.

    Raises:
        ModelError: If the network cannot be copied or run on the example.
    """
    return not_plain_in(version_of(network, example), names) if names else {}


def not_plain_in(version: Version, names: Sequence[str]) -> dict[str, str]:
    """Return the same of a version of a network, which is as it was afterwards."""
    known = version.not_plain
    new = [name for name in names if name not in known]
    if new:
        layers = {name: plain_layer(module_at(version.network, name)) for name in new}
        found = _otherwise(version, layers)
        left = [name for name in new if name not in found]
        _, rejected = keeping([], left, partial(_why_missed, version, layers), str)
        found |= {item.site: item.reason for item in rejected}
        known |= {name: found.get(name) for name in new}
    return {name: reason for name in names if (reason := known[name]) is not None}


def _otherwise(version: Version, layers: dict[str, nn.Module]) -> dict[str, str]:
    """Return the layers that give something else than plain ones, or cannot be replaced."""
    try:
        with stand_ins(version.network, list(layers)) as originals:
            return _compared(version, layers, originals)
    except ModelError:  # its forward may compare its layers with one another
        return _compared(version, layers, frozenset())


def _compared(
    version: Version, layers: dict[str, nn.Module], originals: frozenset[int]
) -> dict[str, str]:
    found: dict[str, str] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any
        ) -> None:
            reason = _why_other(layers[name], [*args, *kwargs.values()], given)
            if id(module) in originals:
                reason = REASON
            if reason is not None:
                found.setdefault(name, reason)

        return hook

    handles = [
        module_at(version.network, name).register_forward_hook(compare(name), with_kwargs=True)
        for name in layers
    ]
    with hooks_removed(handles):
        version.outputs_of(version.network)
    return found


def _why_other(plain: nn.Module, arguments: Sequence[Any], given: Any) -> str | None:
    if len(arguments) != 1 or not isinstance(arguments[0], Tensor) or not isinstance(given, Tensor):
        return "it is not called with one tensor alone, or does not give one"
    kind = type(plain).__name__
    try:
        expected = plain(arguments[0])
    except (RuntimeError, TypeError, ValueError) as error:
        return f"a plain {kind} does not run in its place: {str(error).splitlines()[0]}"
    if expected.shape != given.shape:
        return f"it gives another shape than a plain {kind} of its weights"
    apart = difference(expected, given)
    if apart <= TOLERANCES.get(given.dtype, 0.0):
        return None
    return f"it computes something else than a plain {kind} of its weights (differs by {apart:.1e})"


def _why_missed(version: Version, layers: dict[str, nn.Module], names: Sequence[str]) -> str | None:
    """Return what the network misses with plain layers in the place of its own, or ``None``.

    A forward may ask a layer for its ``weight.dtype``, its ``stride`` or the number of its
    parameters. Each plain layer is in a container, as what becomes of a layer is, which has none of
    a layer's attributes and other parameters.
    """
    compared = version.at(names) if version.decides else version
    assert compared.outputs is not None  # before anything is replaced
    try:
        containers = {name: _in_a_container(layers[name]) for name in names}
        with replaced(version.network, containers) as network:
            reason = compared.why_changed(network)
    except ModelError as error:
        return f"the network's forward reads it itself: {error.__cause__ or error}"
    return None if reason is None else f"the network does more with it than run it: {reason}"


def _in_a_container(layer: nn.Module) -> nn.Module:
    """Return a layer as part of another module, with one parameter more than it had."""
    container = nn.Sequential(layer)
    container.register_parameter("more", nn.Parameter(torch.zeros(7)))
    return container
