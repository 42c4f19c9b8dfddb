"""Chains of factors computed as the one convolution that they are: some are trained faster so.

oneDNN, which computes torch's convolutions on a CPU, has no quick kernels for a depthwise
convolution of several filters a channel: a separable layer with a twelfth of the MACs of its k×k
convolution was seen to take four times as long in training. With nothing but convolutions between
its input and its output, a chain is one convolution whose kernel is the product of the factors',
and the gradient reaches these through it.
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

from onebyone.layers import Pointwise
from onebyone.rewrites.merging import coarse
from onebyone.sites import has_hooks

# What a MAC of a grouped convolution costs in a training step, in MACs of a dense one; plain
# depthwise ones have kernels of their own. From steps of separable layers with 16 to 512 channels
# on a CPU with AVX-512: the two take the same time at about 128 channels in bf16, 64 in float32.
DEAR_IN_BF16, DEAR = 50, 22


@contextmanager
def composed(network: nn.Module, *, bf16: bool, device: torch.device) -> Iterator[None]:
    """Compute chains as one convolution inside, where training steps are expected to be faster so.

    Which these are depends on shapes alone, so that a training stays reproducible. Outputs and
    gradients differ by rounding. A chain is left as it is where a layer of it has hooks, which
    would not be called, and on devices other than a CPU, where nothing of this was measured.

    Args:
        network: Its chains' forwards are replaced, and put back at the end; not to be copied
            meanwhile.
        bf16: Whether steps compute in bf16; else in float32.
        device: Where.
    """
    quicker = [
        (module, found)
        for module in network.modules()
        if device.type == "cpu"
        and (found := composition_of(module)) is not None
        and found.is_quicker(DEAR_IN_BF16 if bf16 else DEAR)
    ]
    for chain, composition in quicker:
        chain.__dict__["forward"] = composition
    try:
        yield
    finally:
        for chain, _ in quicker:
            del chain.__dict__["forward"]


def composition_of(module: nn.Module) -> Composition | None:
    """Return the one convolution that a chain is, at the border too; ``None`` for all else."""
    if type(module) is not nn.Sequential or len(module) < 2 or "forward" in module.__dict__:
        return None
    layers = [layer for layer in module if _is_plain(layer)]
    # A bias before the last layer meets the zeros of a later padding.
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
    """Whether one layer at most has a longer kernel along an axis, and no stride comes before."""
    longer = [
        place
        for place, layer in enumerate(layers)
        if layer.kernel_size[axis] > 1 or int(layer.padding[axis]) > 0
    ]
    before = layers[: longer[0]] if longer else ()
    return len(longer) < 2 and all(layer.stride[axis] == 1 for layer in before)


@dataclass(frozen=True)
class Composition:
    """The one convolution that a chain is; called like the chain.

    Attributes:
        layers: The chain's.
        groups: Into how many separate parts all of them can be divided.
    """

    layers: tuple[nn.Conv2d, ...]
    groups: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the chain returns."""
        with torch.autocast(x.device.type, enabled=False):
            kernel = self.kernel()
        stride, padding, dilation = [], [], []
        for axis in (0, 1):
            # Padding and dilation are those of the one layer that has a longer kernel.
            stride.append(math.prod(layer.stride[axis] for layer in self.layers))
            padding.append(max(int(layer.padding[axis]) for layer in self.layers))
            longer = (layer for layer in self.layers if layer.kernel_size[axis] > 1)
            dilation.append(max((layer.dilation[axis] for layer in longer), default=1))
        bias = self.layers[-1].bias
        return F.conv2d(x, kernel, bias, stride, padding, dilation, self.groups)

    def kernel(self) -> Tensor:
        """Return its kernel, ``(out, channels / groups, height, width)``, from the layers'."""
        kernel, *others = (self._grouped(layer) for layer in self.layers)
        for other in others:
            # Along each axis one of the two has a single place.
            both = torch.einsum("gomyx,gmcvu->gocyvxu", other, kernel)
            kernel = both.flatten(5, 6).flatten(3, 4)
        return kernel.flatten(0, 1)

    def _grouped(self, layer: nn.Conv2d) -> Tensor:
        """Return a layer's kernel as ``(groups, out, in, height, width)``."""
        weight = layer.weight
        fine = weight.reshape(layer.groups, -1, weight.shape[1], math.prod(layer.kernel_size))
        wide = coarse(fine, self.groups)
        return wide.reshape(*wide.shape[:3], *layer.kernel_size)

    def is_quicker(self, dear: float) -> bool:
        """Whether it takes fewer MACs than the chain; of grouped ones each counts as so many."""
        channels, out = self.layers[0].in_channels, self.layers[-1].out_channels
        taps = math.prod(math.prod(layer.kernel_size) for layer in self.layers)
        whole = channels // self.groups * out * taps * _share(self.groups, channels, out, dear)
        chain, places = 0.0, 1  # places before a stride, for each that is left after the chain
        for layer in reversed(self.layers):
            share = _share(layer.groups, layer.in_channels, layer.out_channels, dear)
            chain += share * places * layer.weight.numel()
            places *= math.prod(layer.stride)
        return whole < chain


def _share(groups: int, channels: int, out: int, dear: float) -> float:
    """Return what a MAC of a convolution counts as."""
    return 1.0 if groups == 1 or groups == channels == out else dear
