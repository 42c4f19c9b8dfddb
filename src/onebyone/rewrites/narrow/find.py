"""The groups of a network whose channels can be removed, proved on outputs.

Without some of its channels a group must give what it gives when the layers that read them ignore
these. Anything else that reads the channels, mixes them or relies on their number shows in that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from onebyone.calibration.moments import MOST_VALUES
from onebyone.core.errors import ModelError, PlanError
from onebyone.core.tensor_trees import Inputs
from onebyone.networks.channel_groups import ChannelGroup, FoundGroups, channel_groups
from onebyone.networks.conv_layers import kernel_of, set_kernel, shape_of, why_unknown
from onebyone.networks.held import to_run
from onebyone.networks.plain_layers import why_not_its_class
from onebyone.networks.surgery import (
    aliases,
    copy_network,
    module_at,
    parameter_owners,
    replaced,
)
from onebyone.rewrites.equivalence import Version, keeping, version_of
from onebyone.rewrites.narrow.carry_out import narrowed, values_of
from onebyone.rewrites.plain import not_plain_in, plain_layer


def find(network: nn.Module, example: Inputs) -> FoundGroups:
    """Return the groups of layers whose channels can be removed, each proved on outputs.

    Args:
        network: Not modified.
        example: An input of the network.

    Raises:
        ModelError: If the network cannot be copied or run on the example.
    """
    found = channel_groups(to_run(network), example)
    reasons = dict(found.reasons)
    free = []
    names, owners = aliases(network), parameter_owners(network)
    for group in found.groups:
        reason = _why_not_free(network, group, names, owners)
        if reason is None:
            free.append(group)
        else:
            reasons[group.site] = reason
    if not free:
        return FoundGroups((), reasons)
    version = version_of(network, example)
    otherwise = not_plain_in(version, list(dict.fromkeys(_layers(network, free))))
    for group in list(free):
        wrong = next((name for name in group.members if name in otherwise), None)
        if wrong is not None:
            free.remove(group)
            reasons[group.site] = f"{wrong!r}: {otherwise[wrong]}"
    proved, rejected = _proved(version, free)
    reasons |= rejected
    return FoundGroups(tuple(proved), reasons)


def _layers(network: nn.Module, groups: Sequence[ChannelGroup]) -> Iterator[str]:
    for group in groups:
        yield from (n for n in group.members if why_unknown(module_at(network, n)) is None)


def _why_not_free(
    network: nn.Module,
    group: ChannelGroup,
    names: Mapping[str, tuple[str, ...]],
    owners: Mapping[int, int],
) -> str | None:
    """Return why a group's modules must stay as they are, in words, or ``None``.

    Args:
        network: Not modified.
        group: The layers.
        names: All names of each module, by its first one.
        owners: How many modules have each parameter, by identity.
    """
    if group.channels < 2:
        return "it has one channel"
    for name in group.readers:
        values = shape_of(module_at(network, name)).values
        if values > MOST_VALUES:
            return f"{name!r} sees {values:,} values at once, too many to be refitted"
    for name in group.members:
        module = module_at(network, name)
        if len(names.get(name, ())) > 1:
            return f"{name!r} is one module of several names"
        if any(owners[id(each)] > 1 for each in module.parameters()):
            return f"the weight of {name!r} is shared with another layer"
        reason = why_not_its_class(module)
        if reason is not None:
            return f"{name!r} {reason}"
    return None


def _proved(
    version: Version, groups: Sequence[ChannelGroup]
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups that give the same as if their readers ignored the removed channels."""
    reasons: dict[str, str] = {}
    proved = list(groups)
    for part in (0, 1):  # each channel is removed once
        kept = {group.site: _half(group, part) for group in proved}

        def why_changed(
            chosen: Sequence[ChannelGroup], kept: Mapping[str, list[int]] = kept
        ) -> str | None:
            return _why_changed(version, {group: kept[group.site] for group in chosen})

        proved, rejected = keeping([], proved, why_changed, lambda group: group.site)
        reasons |= {each.site: each.reason for each in rejected}
    return sorted(proved, key=groups.index), reasons


def _half(group: ChannelGroup, part: int) -> list[int]:
    """Return one half of a group's channels or the other, drawn at random."""
    generator = torch.Generator().manual_seed(group.channels)
    drawn = torch.randperm(group.channels, generator=generator)
    return sorted(drawn[part::2].tolist())


def why_other(network: nn.Module, example: Inputs, groups: Sequence[ChannelGroup]) -> str | None:
    """Return how outputs without channels differ from those of readers that ignore them.

    Args:
        network: Not modified.
        example: An input of the network.
        groups: All lose half of their channels, then the other half.
    """
    version = version_of(network, example)
    for part in (0, 1):
        reason = _why_changed(version, {group: _half(group, part) for group in groups})
        if reason is not None:
            return reason
    return None


def _why_changed(version: Version, kept: Mapping[ChannelGroup, Sequence[int]]) -> str | None:
    """Return how outputs without channels differ from those of readers that ignore them.

    Args:
        version: The network, with what it is compared on; as it was afterwards.
        kept: For each group the channels that stay.
    """
    fewer, compared = copy_network(version.network), version
    if version.decides:
        compared = version.at([name for group in kept for name in group.readers])
    readers: dict[str, nn.Module] = {}
    for group, channels in kept.items():
        for name in group.readers:
            layer = readers.get(name, module_at(version.network, name))
            readers[name] = _ignoring(layer, group, channels)
        fewer = narrowed(fewer, group, channels)
    try:
        with replaced(version.network, readers):
            # Another version, for what this one gave is kept.
            return replace(compared).why_changed(fewer)
    except (ModelError, PlanError) as error:
        return f"the network does not run with fewer channels: {error}"


def _ignoring(reader: nn.Module, group: ChannelGroup, kept: Sequence[int]) -> nn.Module:
    """Return a layer that does what a reader does without some of its channels."""
    layer = plain_layer(copy.deepcopy(reader))
    kernel = kernel_of(layer)
    gone = torch.ones(kernel.shape[2], dtype=torch.bool)
    gone[values_of(kept, values=shape_of(layer).channels // group.channels)] = False
    kernel[:, :, gone] = 0
    set_kernel(layer, kernel)
    return layer
