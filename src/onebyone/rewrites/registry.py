"""The rewrites by name: of one layer, of a group of layers, and of a graph."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from onebyone.core.errors import PluginError, UnknownNameError
from onebyone.core.plugins import Plugin, plugins
from onebyone.core.records import Cost, LayerCost, Option, Settings
from onebyone.core.rewrite_rows import REWRITES, Kind
from onebyone.core.tensor_trees import Inputs
from onebyone.networks.channel_groups import ChannelGroup, FoundGroups
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.rewrites.low_rank.reduced_rank import Problem


class LayerRewrite(Protocol):
    """What a module of this package has if it rewrites one layer by itself."""

    def why_not(self, module: nn.Module) -> str | None:
        """Return why a layer cannot be rewritten, in words, or ``None`` where it can."""

    def is_exact(self, module: nn.Module, settings: Settings) -> bool:
        """Whether settings lower no rank, so that the function can stay the same."""

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

    def build(self, module: nn.Module, settings: Settings, *, site: str = "") -> nn.Module:
        """Return the rewritten layer's structure with fresh weights."""

    def errors(
        self, problems: Sequence[Problem], module: nn.Module, options: Sequence[Settings]
    ) -> list[float]:
        """Return the relative squared error of each option, without building any."""

    def fit(
        self,
        chain: Any,
        problems: Sequence[Problem],
        settings: Settings,
        module: nn.Module,
        *,
        rough: bool = False,
    ) -> float:
        """Write the best weights into a rewritten layer, in place; return its relative error.

        Args:
            chain: From :meth:`build`.
            problems: Of each group of the site: what it sees, and what the original layer gave.
                Empty where the site is no layer, such as a head that an earlier step made.
            settings: That the chain was built with.
            module: What it replaces: the layer, or what an earlier step made of it.
            rough: Whether the weights may be a little off the best.
        """


class GroupRewrite(Protocol):
    """What a module of this package has if it rewrites a group of layers that share channels.

    The group's ``site`` is the site of its options, and its members are what they occupy. What is
    seen and given by each reader of the group, in its order, is a :class:`Problem`.
    """

    def find(self, network: nn.Module, example: Inputs) -> FoundGroups:
        """Return the groups that can be rewritten, each proved on outputs, and why not others."""

    def why_other(
        self, network: nn.Module, example: Inputs, groups: Sequence[ChannelGroup]
    ) -> str | None:
        """Return why groups of a network cannot be rewritten, in words, or ``None``."""

    def is_exact(self, group: ChannelGroup, settings: Settings) -> bool:
        """Whether settings keep the function."""

    def grid(self, group: ChannelGroup) -> list[Settings]:
        """Return the settings worth considering for a group."""

    def cost(
        self,
        network: nn.Module,
        group: ChannelGroup,
        layers: Mapping[str, LayerCost],
        settings: Settings | None,
    ) -> Cost:
        """Return what the group's modules cost for one input; as they are without settings."""

    def build(self, network: nn.Module, group: ChannelGroup, settings: Settings) -> nn.Module:
        """Return the network, modified, with the rewritten group's structure."""

    def fits(
        self, network: nn.Module, group: ChannelGroup, problems: Sequence[Problem]
    ) -> GroupFits:
        """Return what the best weights of every option come to."""


class GroupFits(Protocol):
    """A group's options, fitted to what its readers see and are to give."""

    def error(self, settings: Settings) -> float:
        """Return the relative squared error of all readers together, without building any."""

    def stand_ins(self, settings: Settings) -> dict[str, nn.Module]:
        """Return readers that make the network what the option makes it.

        They take the place of the group's readers while all else stays as it is.
        """

    def carried_out(self, settings: Settings) -> tuple[nn.Module, float]:
        """Return the network, modified, with the option, and the relative error of its readers.

        Raises:
            ModelError: If there are no weights: they are of extreme values, or what is seen is.
        """


class GraphRewrite(Protocol):
    """What a module of this package has if its rewrite needs to know which layer feeds which.

    Such a rewrite keeps the network's function.
    """

    def rewrite_all(
        self,
        network: nn.Module,
        example: Inputs,
        options: Sequence[Option],
        *,
        structure_only: bool = False,
    ) -> nn.Module:
        """Return a copy of a network with options carried out, those of the first steps."""


def _ours(kind: Kind) -> dict[str, Any]:
    rows = (row for row in REWRITES.values() if row.kind == kind)
    return {row.name: importlib.import_module(f"onebyone.{row.module}") for row in rows}


LAYER_REWRITES: dict[str, LayerRewrite] = _ours("layer")
"""Ours; :func:`layer_rewrites` has those of other packages too."""

GROUP_REWRITES: dict[str, GroupRewrite] = _ours("group")

GRAPH_REWRITES: dict[str, GraphRewrite] = _ours("graph")

PLUGINS = "onebyone.rewrites"
"""The group of entry points by which another package adds a :class:`LayerRewrite`."""

GROUP_PLUGINS = "onebyone.group_rewrites"
"""The group of entry points by which another package adds a :class:`GroupRewrite`."""

METHODS = ("why_not", "grid", "cost", "is_exact", "build", "errors", "fit")
GROUP_METHODS = ("find", "why_other", "grid", "cost", "is_exact", "build", "fits")


def layer_rewrites() -> dict[str, LayerRewrite]:
    """Return all rewrites of one layer by name, those of other installed packages last.

    A package's rewrite that cannot be used is left out with a warning.
    """
    return {**LAYER_REWRITES, **_usable(plugins(PLUGINS, REWRITES), METHODS)}


def group_rewrites() -> dict[str, GroupRewrite]:
    """Return all rewrites of a group of layers by name, as :func:`layer_rewrites`."""
    return {**GROUP_REWRITES, **_usable(_group_plugins(), GROUP_METHODS)}


def _group_plugins() -> dict[str, Plugin]:
    return plugins(GROUP_PLUGINS, (*REWRITES, *plugins(PLUGINS, REWRITES)))


def layer_rewrite(name: str) -> LayerRewrite:
    """Return the rewrite of that name.

    Raises:
        UnknownNameError: If there is none.
        PluginError: If another package adds it, and it cannot be used.
    """
    if name in LAYER_REWRITES:
        return LAYER_REWRITES[name]
    added = plugins(PLUGINS, REWRITES)
    if name not in added:
        raise UnknownNameError("rewrite", name, (*LAYER_REWRITES, *added))
    found: LayerRewrite = _loaded(added[name], METHODS)
    return found


def group_rewrite(name: str) -> GroupRewrite:
    """Return the rewrite of a group of layers of that name.

    Raises:
        UnknownNameError: If there is none.
        PluginError: If another package adds it, and it cannot be used.
    """
    if name in GROUP_REWRITES:
        return GROUP_REWRITES[name]
    added = _group_plugins()
    if name not in added:
        raise UnknownNameError("rewrite", name, (*GROUP_REWRITES, *added))
    found: GroupRewrite = _loaded(added[name], GROUP_METHODS)
    return found


def rewrite_names() -> tuple[str, ...]:
    """Return the names of all rewrites, those of other installed packages last."""
    return (*REWRITES, *plugins(PLUGINS, REWRITES), *_group_plugins())


def is_layer_rewrite(name: str) -> bool:
    """Whether a rewrite changes one layer by itself; nothing is imported to tell."""
    return name in LAYER_REWRITES or name in plugins(PLUGINS, REWRITES)


def is_group_rewrite(name: str) -> bool:
    """Whether a rewrite changes a group of layers that share channels; nothing is imported."""
    return name in GROUP_REWRITES or name in _group_plugins()


def _usable(added: Mapping[str, Plugin], methods: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name, plugin in added.items():
        try:
            found[name] = _loaded(plugin, methods)
        except PluginError as error:
            warnings.warn(f"Left out: {error}", stacklevel=3)
    return found


def _loaded(plugin: Plugin, methods: Sequence[str]) -> Any:
    found = plugin.load()
    missing = missing_of(found, methods)
    if missing:
        cure = "Check it with onebyone.check_rewrite."
        for group, others in ((PLUGINS, METHODS), (GROUP_PLUGINS, GROUP_METHODS)):
            if not missing_of(found, others):
                cure = f"It has the functions of {group!r}: name it in that group of entry points."
        raise PluginError(
            f"{plugin.name!r} of the package {plugin.package!r} must have the functions "
            f"{', '.join(methods)}, but {', '.join(missing)} is missing. {cure}"
        )
    return found


def missing_of(rewrite: object, methods: Sequence[str]) -> list[str]:
    """Return the functions that a rewrite lacks."""
    return [each for each in methods if not callable(getattr(rewrite, each, None))]


def cost_before(module: nn.Module, layer: LayerCost) -> Cost:
    """Return what a layer costs as it is, with the parameters that its weight is computed from."""
    params = sum(p.numel() for p in module.parameters())
    return Cost(params=params, macs=layer.macs, bytes=weight_bytes(module))
