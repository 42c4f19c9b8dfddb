"""Channels of a group removed from a network, in place."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onebyone.core.errors import PlanError
from onebyone.networks.channel_groups import ChannelGroup
from onebyone.networks.conv_layers import (
    bias_of,
    is_linear,
    kernel_of,
    pointwise_like,
    set_kernel,
    shape_of,
    spatial_like,
    why_unknown,
)
from onebyone.networks.surgery import module_at, replace_module

# Attributes by which torch's modules, and those of torchvision and timm, keep a number of channels.
_SIZES = ("num_features", "num_parameters")


def narrowed(network: nn.Module, group: ChannelGroup, kept: Sequence[int]) -> nn.Module:
    """Remove channels from all layers of a group; ``network`` is modified.

    The layers that read the channels keep the weights of those that are left, and have a bias.

    Args:
        network: Has the group's layers, of full width.
        group: The layers.
        kept: Channels that stay, in order.

    Raises:
        PlanError: If a layer is not as the group says.
    """
    places = torch.as_tensor(list(kept), dtype=torch.long)
    for name in group.producers:
        network = replace_module(network, name, _fewer_outputs(network, name, places))
    for name in group.between:
        network = replace_module(network, name, _fewer_values(network, name, places))
    for name in group.readers:
        network = replace_module(network, name, fewer_inputs(network, name, group, kept))
    return network


def fewer_inputs(
    network: nn.Module, name: str, group: ChannelGroup, kept: Sequence[int]
) -> nn.Module:
    """Return a group's reader without the weights of the channels that are removed.

    Args:
        network: Has the reader. Not modified.
        name: The reader.
        group: Its group.
        kept: Channels that stay, in order.
    """
    module = _layer(network, name)
    kernel = kernel_of(module)
    places = values_of(kept, values=shape_of(module).channels // group.channels)
    return layer_like(module, kernel[:, :, places], bias_of(module), biased=True)


def values_of(kept: Sequence[int], *, values: int) -> Tensor:
    """Return the input channels of a reader that belong to channels of its group.

    Args:
        kept: Channels.
        values: How many input channels each of them is, one after the other.
    """
    places = torch.as_tensor(list(kept), dtype=torch.long)
    return (places.unsqueeze(1) * values + torch.arange(values)).flatten()


def layer_like(
    module: nn.Module, kernel: Tensor, bias: Tensor | None, *, biased: bool
) -> nn.Module:
    """Return a plain layer of a module's geometry with other widths and weights.

    Args:
        module: The layer to follow, also in its mode and in whether it is trained. Not modified.
        kernel: Shape ``(groups, out, in, positions)``.
        bias: Shape ``(groups × out,)``; zeros by default.
        biased: Whether it has one.
    """
    groups, out, channels, _ = kernel.shape
    sizes = channels * groups, out * groups
    new = (
        pointwise_like(module, *sizes, bias=biased)
        if is_linear(module)
        else spatial_like(module, *sizes, groups=groups, bias=biased)
    )
    set_kernel(new, kernel)
    if biased:
        assert isinstance(new.bias, Tensor)
        with torch.no_grad():
            new.bias.zero_() if bias is None else new.bias.copy_(bias)
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return new.requires_grad_(trained).train(module.training)


def _layer(network: nn.Module, name: str) -> nn.Module:
    module = module_at(network, name)
    reason = why_unknown(module)
    if reason is not None:
        raise PlanError(f"The channels of {name!r} cannot be removed: {reason}.")
    return module


def _fewer_outputs(network: nn.Module, name: str, places: Tensor) -> nn.Module:
    module = _layer(network, name)
    bias = bias_of(module)
    kept = None if bias is None else bias[places]
    return layer_like(module, kernel_of(module)[:, places], kept, biased=bias is not None)


def _fewer_values(network: nn.Module, name: str, places: Tensor) -> nn.Module:
    """Return a module with values for each channel, without those of the removed channels."""
    module = module_at(network, name)
    if why_unknown(module) is None:  # depthwise
        bias = bias_of(module)
        kept = None if bias is None else bias[places]
        return layer_like(module, kernel_of(module)[places], kept, biased=bias is not None)
    new = copy.deepcopy(module)
    for key, parameter in module.named_parameters(recurse=False):
        fewer = parameter.detach()[places.to(parameter.device)].clone()
        setattr(new, key, nn.Parameter(fewer, requires_grad=parameter.requires_grad))
    for key, buffer in module.named_buffers(recurse=False):
        if buffer.ndim:
            setattr(new, key, buffer[places.to(buffer.device)].clone())
    for size in _SIZES:
        if hasattr(new, size):
            setattr(new, size, len(places))
    return new
