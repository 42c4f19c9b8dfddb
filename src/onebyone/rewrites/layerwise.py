"""The rewrites of one layer by itself, which a plan weighs by their errors in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import nn

from onebyone.errors import UnknownNameError
from onebyone.kernels import is_linear, shape_of
from onebyone.records import Cost, LayerCost, Settings
from onebyone.rewrites import factorize, separable
from onebyone.rewrites.regression import Problem


class LayerRewrite(Protocol):
    """What a module of this package has if it rewrites one layer by itself."""

    def why_not(self, module: nn.Module) -> str | None:
        """Return why a layer cannot be rewritten, in words, or ``None`` where it can."""

    def grid(self, module: nn.Module) -> list[Settings]:
        """Return the settings worth considering for a layer."""

    def cost(
        self,
        module: nn.Module,
        settings: Settings,
        *,
        input_size: Sequence[int],
        output_size: Sequence[int],
    ) -> Cost:
        """Return what the rewritten layer costs for one input."""

    def build(self, module: nn.Module, settings: Settings, *, site: str = "") -> nn.Sequential:
        """Return the rewritten layer's structure with fresh weights."""

    def errors(
        self, problems: Sequence[Problem], module: nn.Module, options: Sequence[Settings]
    ) -> list[float]:
        """Return the relative squared error of each option, without building any."""

    def fit(
        self,
        chain: nn.Sequential,
        problems: Sequence[Problem],
        settings: Settings,
        module: nn.Module,
        *,
        rough: bool = False,
    ) -> float:
        """Write the best weights into a rewritten layer, in place; return its relative error."""


LAYER_REWRITES: dict[str, LayerRewrite] = {"factorize": factorize, "separable": separable}


def layer_rewrite(name: str) -> LayerRewrite:
    """Return the rewrite of that name.

    Raises:
        UnknownNameError: If there is none.
    """
    if name not in LAYER_REWRITES:
        raise UnknownNameError("rewrite", name, LAYER_REWRITES)
    return LAYER_REWRITES[name]


def cost_before(module: nn.Module, layer: LayerCost) -> Cost:
    """Return what a layer costs as it is, with the parameters that its weight is computed from."""
    return Cost(params=sum(p.numel() for p in module.parameters()), macs=layer.macs)


def cost_of(rewrite: str, module: nn.Module, layer: LayerCost, settings: Settings) -> Cost:
    """Return what a layer costs once rewritten, for one input, at the shapes it was seen at."""
    sizes = layer.input_shape[1:], layer.output_shape[1:]
    if is_linear(module):
        sizes = layer.input_shape[:-1], layer.output_shape[:-1]
    cost = layer_rewrite(rewrite).cost(module, settings, input_size=sizes[0], output_size=sizes[1])
    inner, outer = (math.prod(size) for size in sizes)
    shape = shape_of(module)
    own = shape.values * shape.out * (inner if shape.transposed else outer)
    if own in (0, layer.macs):
        return cost
    # It sees more rows than the network has inputs: windows of a map, regions of a picture.
    return Cost(params=cost.params, macs=round(cost.macs * layer.macs / own))
