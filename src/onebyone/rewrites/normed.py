"""Batch norms that a training puts before activations, and that are no more when it ends.

A network without norms that is trained anew from weights that say little, as a new head is, learns
faster and farther with them. In evaluation a batch norm is one scale and one shift a channel, which
the convolution before it takes into its own: the network that comes out has the layers, names and
costs of the one that went in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.neighbours import Neighbours, find_neighbours
from onebyone.rewrites.deepen import ACTIVATION_OPERATIONS
from onebyone.rewrites.merging import with_affine
from onebyone.sites import has_hooks, hooks_removed, module_at, run

_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
# Of the child that a convolution gets: its forward does not know of it.
_CHILD = "added_norm"


@dataclass(frozen=True)
class AddedNorm:
    """A batch norm that was added.

    Attributes:
        site: Name of the convolution, which holds it.
        handle: Of the hook by which it takes the output.
    """

    site: str
    handle: Any


class _Norming:
    """A hook that gives a module's output to a norm; copied with the network, it has the copy."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Any:
        return self.norm(output)


def norm_sites(network: nn.Module, example: Tensor) -> dict[str, str]:
    """Return the convolutions whose output goes to an activation and nowhere else.

    Only those with a bias, and whose weights are their own and are trained: what is added to them
    can be taken into them.

    Args:
        network: Not modified.
        example: An input ``(batch, …)``.

    Returns:
        Name of the convolution -> of the outermost module that returns its output as it is, such as
        a chain of which it is the last layer.
    """
    found = find_neighbours(network, example)
    sites = {}
    for name, module in network.named_modules():
        if name in found.read_elsewhere or not _is_plain(module) or not _is_followed(found, name):
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
    """Return the outermost module that returns a layer's output as it is."""
    (place,) = found.calls_of(name)[0].outputs
    return next(call.module for call in found.calls if call.outputs == (place,))


def _shared(network: nn.Module) -> set[str]:
    owners: dict[int, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return {name for names in owners.values() if len(set(names)) > 1 for name in names}


def add_norms(network: nn.Module, inputs: Tensor) -> tuple[AddedNorm, ...]:
    """Give a network batch norms before its activations, which start as the identity.

    Args:
        network: Modified: convolutions get a child, and modules a hook, until :func:`take_in`.
        inputs: Of which the norms get their first statistics, ``(batch, …)``.

    Returns:
        What was added; nothing where there is no place for one.
    """
    added = []
    for site, host in norm_sites(network, inputs[:2]).items():
        conv: Any = module_at(network, site)
        kind = next(norm for layer, norm in _NORMS.items() if isinstance(conv, layer))
        norm = kind(conv.out_channels).to(conv.weight)
        handle = module_at(network, host).register_forward_hook(_Norming(norm))
        conv.add_module(_CHILD, norm)
        added.append(AddedNorm(site, handle))
    _start_as_identity([_norm_of(network, each) for each in added], network, inputs)
    return tuple(added)


def take_in(network: nn.Module, added: tuple[AddedNorm, ...]) -> None:
    """Take added norms into their convolutions; in evaluation the outputs stay the same.

    Args:
        network: The one that they were added to, or that has its weights. Modified.
        added: What :func:`add_norms` returned.
    """
    for each in added:
        conv = module_at(network, each.site)
        with_affine(conv, _norm_of(network, each), before=True)
        each.handle.remove()
        delattr(conv, _CHILD)


def _norm_of(network: nn.Module, added: AddedNorm) -> nn.Module:
    return module_at(network, f"{added.site}.{_CHILD}")


def _start_as_identity(norms: list[nn.Module], network: nn.Module, inputs: Tensor) -> None:
    """Set each norm's statistics to those of what it gets, and its weights to undo them."""

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
