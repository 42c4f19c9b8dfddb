"""Fewer hidden channels, as a rewrite of a group of layers.

References:
    He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, for
    readers refitted by least squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor, nn

from onebyone.core.errors import ModelError, PlanError
from onebyone.core.records import Cost, LayerCost, Settings
from onebyone.networks.channel_groups import ChannelGroup
from onebyone.networks.conv_layers import set_kernel, shape_of, weight_of, why_unknown
from onebyone.networks.surgery import module_at
from onebyone.networks.weight_bytes import saved_tensors
from onebyone.rewrites.low_rank.reduced_rank import Problem, regress
from onebyone.rewrites.narrow.carry_out import layer_like, narrowed, values_of
from onebyone.rewrites.narrow.eliminate import Elimination, eliminate, lost_by, without
from onebyone.rewrites.narrow.find import find, why_other

__all__ = ["build", "cost", "find", "fits", "grid", "is_exact", "why_other"]

# Widths tried, at most: multiples of a power of two, because runtimes like them.
GRID = 12


def grid(group: ChannelGroup) -> list[Settings]:
    """Return the widths worth considering for a group, below its own."""
    step = 1
    while group.channels / step > GRID:
        step *= 2
    return [{"channels": width} for width in range(step, group.channels, step)]


def width_of(group: ChannelGroup, settings: Settings) -> int:
    """Return the number of channels in an option's settings.

    Raises:
        PlanError: If there is none, or the group has not so many.
    """
    width = settings.get("channels")
    if not isinstance(width, int) or not 1 <= width <= group.channels:
        raise PlanError(
            f"The `channels` of {group.site!r} must be a whole number from 1 up to "
            f"{group.channels}, got {settings}."
        )
    return width


def is_exact(group: ChannelGroup, settings: Settings) -> bool:
    """Whether settings remove no channel, so that nothing changes."""
    return width_of(group, settings) == group.channels


def cost(
    network: nn.Module,
    group: ChannelGroup,
    layers: Mapping[str, LayerCost],
    settings: Settings | None,
) -> Cost:
    """Return what a group's modules cost with fewer channels, for one input.

    Args:
        network: Has the modules, of full width. Not modified.
        group: The layers.
        layers: By name, as they were seen.
        settings: The width; ``None`` for their own.
    """
    width = group.channels if settings is None else width_of(group, settings)
    total = Cost(params=0, macs=0, bytes=0)
    for name in group.members:
        macs = layers[name].macs if name in layers else 0
        total = total + _cost_of(module_at(network, name), name, group, width, macs)
    return total


def _cost_of(module: nn.Module, name: str, group: ChannelGroup, width: int, macs: int) -> Cost:
    share = Fraction(width, group.channels)
    if why_unknown(module) is None:
        read = name in group.readers
        return layer_cost(
            module,
            macs,
            read=share if read else Fraction(1),
            written=Fraction(1) if read else share,
        )
    tensors = {id(t): t for t in (*module.parameters(), *saved_tensors(module))}.values()
    sizes = [int(t.numel() * share) if t.ndim else t.numel() for t in tensors]
    held = sum(n * t.element_size() for n, t in zip(sizes, tensors, strict=True))
    params = sum(int(p.numel() * share) for p in module.parameters())
    return Cost(params=params, macs=int(macs * share), bytes=held)


def layer_cost(module: nn.Module, macs: int, *, read: Fraction, written: Fraction) -> Cost:
    """Return what a layer costs with fewer channels, for one input.

    Args:
        module: Of full width. Not modified.
        macs: Its own.
        read: Which share of its input channels is left; with fewer it has a bias.
        written: Which share of its output channels is left.
    """
    if read == written == 1:
        tensors = {id(t): t for t in (*module.parameters(), *saved_tensors(module))}.values()
        params = sum(p.numel() for p in module.parameters())
        held = sum(t.numel() * t.element_size() for t in tensors)
        return Cost(params=params, macs=macs, bytes=held)
    shape = shape_of(module)
    params = int(shape.values * shape.out * read * written)
    if read < 1 or getattr(module, "bias", None) is not None:
        params += int(shape.out * written)
    size = weight_of(module).element_size()
    return Cost(params=params, macs=int(macs * read * written), bytes=params * size)


def build(network: nn.Module, group: ChannelGroup, settings: Settings) -> nn.Module:
    """Return a network, modified, with a group of fewer channels; which ones is not said yet."""
    width = width_of(group, settings)
    return network if width == group.channels else narrowed(network, group, range(width))


def fits(network: nn.Module, group: ChannelGroup, problems: Sequence[Problem]) -> NarrowFits:
    """Return what the best weights of every width come to.

    Args:
        network: Has the group's layers, of full width.
        group: The layers.
        problems: Of each reader, in the group's order: what it sees, and what it is to give.
    """
    return NarrowFits(network, group, tuple(problems))


@dataclass(frozen=True)
class NarrowFits:
    """The channels that readers miss least, and the best weights for those that are left."""

    network: nn.Module
    group: ChannelGroup
    problems: tuple[Problem, ...]

    @cached_property
    def elimination(self) -> Elimination:
        """The order in which channels are removed, with the error of every width."""
        return eliminate(self.problems, self.group.channels)

    def error(self, settings: Settings) -> float:
        """Return the relative squared error of a width, of all readers together."""
        return self.elimination.error(width_of(self.group, settings))

    def stand_ins(self, settings: Settings) -> dict[str, nn.Module]:
        """Return readers of full width that ignore channels, refitted for the others."""
        readers = {}
        for reader in self._refitted(settings):
            module = module_at(self.network, reader.name)
            weight = reader.lifted
            whole = weight.new_zeros(len(weight), reader.problem.weight[0].numel())
            whole[:, reader.places] = weight
            kernel = _kernel(module, whole)
            readers[reader.name] = layer_like(module, kernel, reader.bias, biased=True)
        return readers

    def carried_out(self, settings: Settings) -> tuple[nn.Module, float]:
        """Return the network, modified, without the channels that its readers miss least.

        Raises:
            ModelError: If the equations cannot be solved.
        """
        width = width_of(self.group, settings)
        if width == self.group.channels:
            return self.network, 0.0
        try:
            kept = self.elimination.kept(width)
            readers = self._refitted(settings)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ModelError(
                f"The channels of {self.group.site!r} must be removed by least squares, but the "
                f"equations cannot be solved: {str(error).rstrip('.')}. Leave them as they are, or "
                "check the scale of the weights and inputs."
            ) from error
        network, lost = narrowed(self.network, self.group, kept), 0.0
        for reader in readers:
            module = module_at(network, reader.name)
            set_kernel(module, _kernel(module, reader.lifted))
            assert isinstance(module.bias, Tensor)
            with torch.no_grad():
                module.bias.copy_(reader.bias)
            lost += reader.problem.unit * reader.lost
        return network, lost / max(sum(problem.felt for problem in self.problems), 1e-300)

    def _refitted(self, settings: Settings) -> list[_Reader]:
        kept = self.elimination.kept(width_of(self.group, settings))
        found = []
        for name, problem in zip(self.group.readers, self.problems, strict=True):
            shape = shape_of(module_at(self.network, name))
            channels = values_of(kept, values=shape.channels // self.group.channels)
            places = values_of(channels.tolist(), values=shape.taps)
            found.append(_Reader(name, problem, places, regress(without(problem, places))))
        return found


@dataclass(frozen=True)
class _Reader:
    """A reader that sees only some values of its input, with its best weights for these."""

    name: str
    problem: Problem
    places: Tensor
    weight: Tensor

    @property
    def lifted(self) -> Tensor:
        return self.problem.lifted(self.weight)

    @property
    def bias(self) -> Tensor:
        return self.problem.mean_y - self.lifted @ self.problem.mean_x[self.places]

    @property
    def lost(self) -> float:
        return lost_by(without(self.problem, self.places), self.weight)


def _kernel(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.reshape(1, len(weight), -1, shape_of(module).taps)
