"""Finds layers that a network runs by another reference than their names.

A forward may keep layers in a plain list, or in an attribute that torch does not register. It then
goes on running a layer that was replaced under its name, so a rewrite would change nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

#: Why a layer that is run so cannot be replaced.
REASON = (
    "the network runs it by another reference than its name, such as a list, so a replacement "
    "would have no effect"
)


@contextmanager
def stand_ins(network: nn.Module, names: Collection[str]) -> Iterator[frozenset[int]]:
    """Put a stand-in under each name inside: the same weights and hooks, but another object.

    Hooks see which of the two runs: only the stand-in, if the network uses the layer's name.

    Args:
        network: Modified inside, and restored afterwards.
        names: First names of layers. The network itself and TorchScript have no stand-ins.

    Yields:
        The ``id`` of each layer that has a stand-in.
    """
    wanted = {id(network.get_submodule(name)) for name in names if name}
    made: dict[int, nn.Module] = {}
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(network.modules()):
        if isinstance(parent, torch.jit.ScriptModule):
            continue
        for key, child in parent._modules.items():  # noqa: SLF001 - under all its names
            if child is None or id(child) not in wanted:
                continue
            if isinstance(child, torch.jit.ScriptModule):
                continue
            made.setdefault(id(child), _shallow(child))
            places.append((parent, key, child))
    try:
        for parent, key, child in places:
            parent._modules[key] = made[id(child)]  # noqa: SLF001
        yield frozenset(made)
    finally:
        for parent, key, child in places:
            parent._modules[key] = child  # noqa: SLF001


def _shallow(module: nn.Module) -> nn.Module:
    """Return another object that shares all that a module has, its registries included."""
    kind = type(module)
    other: nn.Module = kind.__new__(kind)
    other.__dict__ = module.__dict__.copy()
    return other
