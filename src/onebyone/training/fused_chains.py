"""Fused training: compute a chain of convolutions as one convolution where that is faster.

oneDNN, which computes torch's convolutions on a CPU, has no fast kernels for a depthwise
convolution with several filters a channel. A separable layer with a twelfth of the MACs of its k×k
convolution took four times as long in training. A chain of nothing but convolutions equals one
convolution, whose kernel is the product of theirs. Gradients flow through that product to the
layers' own weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebyone.networks.layers import Pointwise
from onebyone.networks.plain_layers import has_hooks
from onebyone.rewrites.fold.merge_layers import coarse

# The cost of a grouped convolution's MAC in a training step, in MACs of a dense convolution. Plain
# depthwise convolutions have fast kernels and cost 1. Measured on separable layers with 16 to 512
# channels, on a CPU with AVX-512: break-even is at about 128 channels in bf16, 64 in float32.
GROUPED_COST_IN_BF16, GROUPED_COST = 50, 22


@contextmanager
def composed(network: nn.Module, *, bf16: bool, device: torch.device) -> Iterator[None]:
    """Compute a chain as one convolution inside the block if that should make steps faster.

    The choice depends on shapes alone, so a training stays reproducible. Outputs and gradients
    differ by rounding. Skips chains with hooks, which would not be called, and devices other than a
    CPU, where this was not measured.

    Args:
        network: The forwards of its chains are replaced, and restored at the end. It must not be
            copied inside the block.
        bf16: Whether steps compute in bf16; else in float32.
        device: Where the network is.
    """
    quicker = [
        (module, found)
        for module in network.modules()
        if device.type == "cpu"
        and (found := composition_of(module)) is not None
        and found.is_quicker(GROUPED_COST_IN_BF16 if bf16 else GROUPED_COST)
    ]
    for chain, composition in quicker:
        chain.__dict__["forward"] = composition
    try:
        yield
    finally:
        for chain, _ in quicker:
            del chain.__dict__["forward"]


def composition_of(module: nn.Module) -> Composition | None:
    """Return the one convolution that equals a chain, borders included, or ``None``."""
    if type(module) is not nn.Sequential or len(module) < 2 or "forward" in module.__dict__:
        return None
    layers = [layer for layer in module if _is_plain(layer)]
    # A bias before the last layer would also have to apply to a later layer's zero padding.
    if len(layers) < len(module) or any(layer.bias is not None for layer in layers[:-1]):
        return None
    if not all(_is_one_kernel(layers, axis) for axis in (0, 1)):
        return None
    return Composition(tuple(layers), math.gcd(*(layer.groups for layer in layers)))


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(layer) in (nn.Conv2d, Pointwise)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and "forward" not in layer.__dict__
        and not has_hooks(layer)
    )


def _is_one_kernel(layers: Sequence[nn.Conv2d], axis: int) -> bool:
    """Whether at most one layer has a kernel above 1 along an axis, with no stride before it."""
    longer = [
        place
        for place, layer in enumerate(layers)
        if layer.kernel_size[axis] > 1 or int(layer.padding[axis]) > 0
    ]
    before = layers[: longer[0]] if longer else ()
    return len(longer) < 2 and all(layer.stride[axis] == 1 for layer in before)


@dataclass(frozen=True)
class Composition:
    """The one convolution that equals a chain of convolutions.

    Attributes:
        layers: The chain's layers.
        groups: The number of groups that all layers can be divided into.
    """

    layers: tuple[nn.Conv2d, ...]
    groups: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return the chain's output."""
        with torch.autocast(x.device.type, enabled=False):
            kernel = self.kernel()
        stride, padding, dilation = [], [], []
        for axis in (0, 1):
            # Padding and dilation come from the one layer with a kernel above 1.
            stride.append(math.prod(layer.stride[axis] for layer in self.layers))
            padding.append(max(int(layer.padding[axis]) for layer in self.layers))
            longer = (layer for layer in self.layers if layer.kernel_size[axis] > 1)
            dilation.append(max((layer.dilation[axis] for layer in longer), default=1))
        bias = self.layers[-1].bias
        return F.conv2d(x, kernel, bias, stride, padding, dilation, self.groups)

    def kernel(self) -> Tensor:
        """Return the product of the kernels, ``(out, channels / groups, height, width)``."""
        kernel, *others = (self._grouped(layer) for layer in self.layers)
        for other in others:
            # Along each axis one of the two kernels has size 1.
            both = torch.einsum("gomyx,gmcvu->gocyvxu", other, kernel)
            kernel = both.flatten(5, 6).flatten(3, 4)
        return kernel.flatten(0, 1)

    def _grouped(self, layer: nn.Conv2d) -> Tensor:
        """Return a layer's kernel as ``(groups, out, in, height, width)``."""
        weight = layer.weight
        fine = weight.reshape(layer.groups, -1, weight.shape[1], math.prod(layer.kernel_size))
        wide = coarse(fine, self.groups)
        return wide.reshape(*wide.shape[:3], *layer.kernel_size)

    def is_quicker(self, grouped_cost: float) -> bool:
        """Whether it costs less than the chain; a grouped convolution's MAC costs that much."""
        channels, out = self.layers[0].in_channels, self.layers[-1].out_channels
        kernel_size = math.prod(math.prod(layer.kernel_size) for layer in self.layers)
        cost = _cost_of_mac(self.groups, channels, out, grouped_cost)
        whole = channels // self.groups * out * kernel_size * cost
        chain, positions = 0.0, 1  # positions before a stride for each output position of the chain
        for layer in reversed(self.layers):
            cost = _cost_of_mac(layer.groups, layer.in_channels, layer.out_channels, grouped_cost)
            chain += cost * positions * layer.weight.numel()
            positions *= math.prod(layer.stride)
        return whole < chain


def _cost_of_mac(groups: int, channels: int, out: int, grouped_cost: float) -> float:
    """Return the cost of a convolution's MAC."""
    return 1.0 if groups == 1 or groups == channels == out else grouped_cost
