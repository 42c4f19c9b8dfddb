"""A group of layers that share channels as a chain, to be timed as it is and rewritten."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from onebyone.core.records import Step
from onebyone.networks.channel_groups import ChannelGroup
from onebyone.networks.surgery import module_at
from onebyone.rewrites.registry import group_rewrite


class _Operation(nn.Module):
    """What a network's forward does itself between two layers."""

    def __init__(self, again: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        """Return the first tensor that the operation gives."""
        given = self.again(x)
        first: Tensor = given if isinstance(given, Tensor) else given[0]
        return first


def group_chain(network: nn.Module, group: ChannelGroup, steps: Sequence[Step]) -> nn.Sequential:
    """Return a group from its first producer to its last reader, branches left out.

    Args:
        network: Has the group's modules. Not modified.
        group: The layers.
        steps: Rewrites of the group; none for the group as it is.
    """
    alone: nn.Module = nn.Module()
    for name in group.members:
        _put(alone, name, copy.deepcopy(module_at(network, name)))
    for step in steps:
        alone = group_rewrite(step.rewrite).build(alone, group, step.settings)
    parts: list[nn.Module] = [alone.get_submodule(group.site)]
    for link in group.path:
        own = link.again is None
        parts.append(alone.get_submodule(link.name) if own else _Operation(link.again))  # type: ignore[arg-type]
    return nn.Sequential(*parts, alone.get_submodule(group.readers[-1]))


def group_text(network: nn.Module, group: ChannelGroup) -> str:
    """Return what a group's time depends on, besides the size of its input."""
    layers = [group.site, *(link.name for link in group.path), group.readers[-1]]
    operations = {link.name for link in group.path if link.again is not None}
    return " → ".join(n if n in operations else str(module_at(network, n)) for n in layers)


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a tree under its name, with empty modules above it."""
    *above, last = name.split(".")
    for part in above:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
