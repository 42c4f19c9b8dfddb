"""Folds carried out on a network, in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from onebyone.core.errors import PlanError
from onebyone.networks.plain_layers import has_hooks
from onebyone.networks.surgery import module_at, replace_module
from onebyone.rewrites.fold.merge_layers import merge_of, merged, rest_of, with_affine
from onebyone.rewrites.fold.scene import Fold, Scene

# The children of a chain that `factorize` makes.
_FACTORS = {"reduce", "spatial", "vertical", "horizontal", "expand"}


@dataclass(frozen=True)
class OrderedFold:
    """A fold whose two modules' order is known: what carrying it out needs."""

    fold: Fold
    first: str
    second: str
    values: bool


def ordered(scene: Scene, fold: Fold) -> OrderedFold:
    """Return what carrying out a fold needs."""
    return OrderedFold(fold, *scene.in_order(fold), scene.values)


def carry_out(network: nn.Module, step: OrderedFold) -> nn.Module:
    """Fold two modules of a network, in place."""
    fold = step.fold
    if fold.form == "merge":
        return _carry_out_merge(network, step)
    norm, layer = module_at(network, fold.site), module_at(network, fold.into)
    new = with_affine(layer, norm, before=fold.form == "norm-before")
    if new is not layer:
        network = replace_module(network, fold.into, new)
    return _replace_keeping_modes(network, fold.site, rest_of(norm))


def _replace_keeping_modes(network: nn.Module, name: str, new: nn.Module) -> nn.Module:
    inside = [(module, module.training) for module in new.modules() if module is not new]
    network = replace_module(network, name, new)
    for module, training in inside:
        module.training = training
    return network


def _carry_out_merge(network: nn.Module, step: OrderedFold) -> nn.Module:
    fold = step.fold
    one, two = module_at(network, step.first), module_at(network, step.second)
    merge = merge_of(one, two, values=step.values)
    if isinstance(merge, str):
        raise PlanError(f"{fold.site!r} cannot be folded into {fold.into!r}: {merge}.")
    network = replace_module(network, fold.into, merged(merge, one, two))
    parent = _chain_of(network, fold)
    if parent is None:
        return replace_module(network, fold.site, nn.Identity())
    chain = cast("nn.Sequential", module_at(network, parent))
    # By name: deleting by place would number the others anew.
    delattr(chain, fold.site.rpartition(".")[2])
    return network if len(chain) > 1 else replace_module(network, parent, chain[0])


def _chain_of(network: nn.Module, fold: Fold) -> str | None:
    """Return the name of the factorized layer that both are factors of, or ``None``."""
    parent, _, name = fold.site.rpartition(".")
    if fold.into.rpartition(".")[0] != parent:
        return None
    chain = module_at(network, parent)
    if type(chain) is not nn.Sequential or has_hooks(chain):
        return None
    names = {child for child, _ in chain.named_children()}
    return parent if names <= _FACTORS and name in names else None


def carried_out(network: nn.Module, steps: Sequence[OrderedFold]) -> nn.Module:
    """Fold a network, in place, as found."""
    for step in steps:
        network = carry_out(network, step)
    return network
