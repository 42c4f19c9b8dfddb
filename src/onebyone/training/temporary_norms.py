"""Temporary batch norms: added before activations for a training, folded when it ends.

A network without batch norms learns faster and better with them if it starts from new weights, such
as those of a new head. In evaluation mode a batch norm is one scale and one shift a channel, which
fold into the convolution before it. So the trained network has the same layers, names and costs as
before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.tensor_trees import Inputs, first_examples
from onebyone.networks.dataflow import Neighbours, find_neighbours
from onebyone.networks.plain_layers import has_hooks
from onebyone.networks.surgery import hooks_removed, module_at, run
from onebyone.rewrites.deepen_places import ACTIVATION_OPERATIONS
from onebyone.rewrites.fold.merge_layers import with_affine

_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
# The name of the norm as the convolution's child; the convolution's own forward does not call it.
_CHILD = "added_norm"


@dataclass(frozen=True)
class AddedNorm:
    """An added batch norm.

    Attributes:
        site: Name of the convolution that has it as a child.
        handle: Handle of the hook that applies it to the output.
    """

    site: str
    handle: Any


class _Norming:
    """A hook that applies a norm; a copy of the network gets a hook with the norm's copy."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Any:
        return self.norm(output)


def norm_sites(network: nn.Module, example: Inputs) -> dict[str, str]:
    """Return the convolutions whose output goes to an activation and nowhere else.

    A convolution must have a bias, and trained weights that it shares with no other layer: only
    then can a norm be folded into it.

    Args:
        network: Not modified.
        example: What the network is called with.

    Returns:
        Name of the convolution -> name of the outermost module that returns its output unchanged,
        such as a chain whose last layer it is.
    """
    found = find_neighbours(network, example)
    sites = {}
    fixed = found.called_elsewhere | {*found.read_elsewhere}
    for name, module in network.named_modules():
        if name in fixed or not _is_plain(module) or not _is_followed(found, name):
            continue
        host = _outermost(found, name)
        if not has_hooks(module_at(network, host)):
            sites[name] = host
    shared = _shared(network)
    return {name: host for name, host in sites.items() if name not in shared}


def _is_plain(module: nn.Module) -> bool:
    kind = next((kind for kind in _NORMS if isinstance(module, kind)), None)
    return (
        kind is not None
        and type(module).forward is kind.forward
        and not has_hooks(module)
        and not any(True for _ in module.children())  # such as a parametrization
        and isinstance(module.bias, Tensor)
        and all(parameter.requires_grad for parameter in module.parameters())
    )


def _is_followed(found: Neighbours, name: str) -> bool:
    output = found.output_of(name)
    if output is None or output.is_output:
        return False
    readers = {(reading.module, reading.call) for reading in output.readings}
    operations = {reading.operation for reading in output.readings}
    return len(readers) == 1 and operations <= ACTIVATION_OPERATIONS


def _outermost(found: Neighbours, name: str) -> str:
    """Return the name of the outermost module that returns a layer's output unchanged."""
    (place,) = found.calls_of(name)[0].outputs
    return next(call.module for call in found.calls if call.outputs == (place,))


def _shared(network: nn.Module) -> set[str]:
    owners: dict[int, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return {name for names in owners.values() if len(set(names)) > 1 for name in names}


def add_norms(network: nn.Module, inputs: Inputs) -> tuple[AddedNorm, ...]:
    """Add batch norms, which start as the identity, before a network's activations.

    Args:
        network: Modified: convolutions get a child, and modules a hook, until :func:`take_in`.
        inputs: What the network is called with, for the norms' first statistics.

    Returns:
        The added norms; empty if no convolution can have one.
    """
    added = []
    for site, host in norm_sites(network, first_examples(inputs, 2)).items():
        conv: Any = module_at(network, site)
        kind = next(norm for layer, norm in _NORMS.items() if isinstance(conv, layer))
        norm = kind(conv.out_channels).to(conv.weight)
        handle = module_at(network, host).register_forward_hook(_Norming(norm))
        conv.add_module(_CHILD, norm)
        added.append(AddedNorm(site, handle))
    _start_as_identity([_norm_of(network, each) for each in added], network, inputs)
    return tuple(added)


def take_in(network: nn.Module, added: tuple[AddedNorm, ...]) -> None:
    """Fold added norms into their convolutions; outputs in evaluation mode stay the same.

    Args:
        network: The network that they were added to. Modified.
        added: The return value of :func:`add_norms`.
    """
    for each in added:
        conv = module_at(network, each.site)
        with_affine(conv, _norm_of(network, each), before=True)
        each.handle.remove()
        delattr(conv, _CHILD)


def _norm_of(network: nn.Module, added: AddedNorm) -> nn.Module:
    return module_at(network, f"{added.site}.{_CHILD}")


def _start_as_identity(norms: list[nn.Module], network: nn.Module, inputs: Inputs) -> None:
    """Set each norm's statistics to those of its inputs, and its weights to undo them."""

    def measured(norm: Any, given: tuple[Tensor]) -> None:
        values = given[0].transpose(0, 1).flatten(1).double()
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(mean)

    handles = [norm.register_forward_pre_hook(measured) for norm in norms]
    modes = {name: module.training for name, module in network.named_modules()}
    with hooks_removed(handles), torch.no_grad():
        run(network.eval(), inputs)
    for name, module in network.named_modules():
        module.training = modes[name]
