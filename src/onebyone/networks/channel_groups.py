"""Channels between layers: who writes them, who reads them, and what is done to each meanwhile.

The channels that a layer gives can be removed if all that happens to them, up to the layers that
read them, happens to each channel by itself. The layers that share such channels are a group. It is
found by walking along the data flow of one pass, from a layer's output in both directions (as in
Fang et al., "DepGraph", CVPR 2023).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from onebyone.core.tensor_trees import Inputs
from onebyone.networks.conv_layers import Shape, is_linear, shape_of, why_unknown
from onebyone.networks.dataflow import Neighbours, Value, neighbours_in
from onebyone.networks.stand_ins import REASON
from onebyone.networks.surgery import module_at

# Operations that do the same to each channel by itself, wherever the channels' axis keeps its size.
_PER_CHANNEL = frozenset((
    "abs", "add", "alias", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "celu", "clamp", "clamp_max",
    "clamp_min", "clone", "constant_pad_nd", "contiguous", "detach", "div", "elu", "erf", "exp",
    "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log1p",
    "log_sigmoid_forward", "max_pool2d_with_indices", "max_pool3d_with_indices", "mean", "mish",
    "mul", "neg", "pow", "reciprocal", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "relu", "replication_pad1d", "replication_pad2d", "replication_pad3d",
    "rsqrt", "rsub", "selu", "sigmoid", "silu", "slice", "softplus", "sqrt", "square", "sub",
    "sum", "tanh", "threshold", "to", "_to_copy", "upsample_bicubic2d", "upsample_bilinear2d",
    "upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_trilinear3d",
))  # fmt: skip
_VIEWS = frozenset((
    "_reshape_alias", "_unsafe_view", "flatten", "reshape", "squeeze", "unflatten", "unsqueeze",
    "view",
))  # fmt: skip
_SUMS = frozenset(("add", "sub", "rsub"))
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)  # noqa: SLF001
_NAMED = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision's and timm's


@dataclass(frozen=True)
class Link:
    """What is done to the channels on their way.

    Attributes:
        name: Of a module with values for each channel, or of an operation.
        again: The operation, for another tensor; ``None`` for a module.
    """

    name: str
    again: Callable[[Tensor], Any] | None = None


@dataclass(frozen=True)
class ChannelGroup:
    """Layers that share channels; all names are in order of execution.

    Attributes:
        channels: How many.
        producers: Layers whose output channels they are.
        between: Modules with values for each channel: norms, depthwise convolutions, PReLU.
        readers: Layers whose input channels they are; a linear layer may read several values of
            each, one after the other.
        path: What is done to them from the first producer to the last reader, branches left out.
    """

    channels: int
    producers: tuple[str, ...]
    between: tuple[str, ...]
    readers: tuple[str, ...]
    path: tuple[Link, ...] = field(default=(), compare=False)

    @property
    def site(self) -> str:
        """The first producer: no other group has it."""
        return self.producers[0]

    @property
    def members(self) -> tuple[str, ...]:
        """Names of all modules whose weights change with the number of channels."""
        return (*self.producers, *self.between, *self.readers)


@dataclass(frozen=True)
class FoundGroups:
    """The groups of a network.

    Attributes:
        groups: In order of their first producers.
        reasons: Producers whose channels cannot be removed, with the reason in words.
    """

    groups: tuple[ChannelGroup, ...]
    reasons: Mapping[str, str]

    def at(self, site: str) -> ChannelGroup | None:
        """Return the group whose first producer has that name."""
        return next((group for group in self.groups if group.site == site), None)


def channel_groups(network: nn.Module, inputs: Inputs) -> FoundGroups:
    """Find the groups of layers that share channels which can be removed.

    Args:
        network: In evaluation mode. Run once; not changed.
        inputs: A tensor ``(batch, …)``, a tuple of arguments, or keyword arguments.

    Raises:
        ModelError: If the network does not run on the inputs.
    """
    search = _Search(network, neighbours_in(network, inputs))
    groups: list[ChannelGroup] = []
    reasons: dict[str, str] = {}
    for name in search.layers:
        if any(name in group.producers for group in groups) or search.is_depthwise(name):
            continue
        try:
            groups.append(search.group_of(name))
        except _BlockedError as blocked:
            reasons[name] = str(blocked)
    return FoundGroups(tuple(groups), reasons)


class _BlockedError(Exception):
    """Why channels cannot be removed, in words."""


@dataclass(frozen=True)
class _Unit:
    """A call of a module that is known, or an operation outside of these."""

    place: int  # in order
    name: str  # of the module, or of the operation
    is_module: bool
    where: str  # module in which an operation ran
    read: tuple[int, ...]
    made: tuple[int, ...]
    again: Callable[[Tensor], Any] | None = None


@dataclass(frozen=True)
class _Axis:
    """Where the channels are in a tensor: along which axis, and how many values each has there."""

    index: int
    values: int = 1


@dataclass
class _Members:
    channels: int
    producers: dict[str, int] = field(default_factory=dict)
    between: dict[str, int] = field(default_factory=dict)
    readers: dict[str, int] = field(default_factory=dict)
    axes: dict[int, _Axis] = field(default_factory=dict)


class _Search:
    def __init__(self, network: nn.Module, flow: Neighbours) -> None:
        self.network = network
        self.flow = flow
        modules = {
            name: module
            for name, module in network.named_modules()
            if flow.calls_of(name) and (why_unknown(module) is None or _is_per_channel(module))
        }
        self.modules = modules
        units = sorted(self._units(), key=lambda unit: unit.place)
        self.reading: dict[int, list[_Unit]] = defaultdict(list)
        self.making: dict[int, _Unit] = {}
        for unit in units:
            for value in unit.read:
                self.reading[value].append(unit)
            for value in unit.made:
                self.making.setdefault(value, unit)
        self.layers = [unit.name for unit in units if unit.is_module and self._is_layer(unit.name)]
        self.layers = list(dict.fromkeys(self.layers))

    def _is_layer(self, name: str) -> bool:
        return not _is_per_channel(self.modules[name])

    def is_depthwise(self, name: str) -> bool:
        """Whether a layer gives one channel for each that it reads, of that alone."""
        return self._is_layer(name) and _is_depthwise(shape_of(self.modules[name]))

    def _units(self) -> Iterator[_Unit]:
        firsts: dict[str, int] = {}
        for place, operation in enumerate(self.flow.operations):
            owner = self._owner(operation.module)
            if owner is not None:
                firsts.setdefault(owner, place)
                continue
            yield _Unit(
                place=place,
                name=operation.name,
                is_module=False,
                where=operation.module,
                read=operation.read,
                made=operation.made,
                again=operation.again,
            )
        for name in self.modules:
            place = firsts.get(name, -1)
            for call in self.flow.calls_of(name):
                yield _Unit(
                    place=place,
                    name=name,
                    is_module=True,
                    where=name,
                    read=call.inputs,
                    made=call.outputs,
                )

    def _owner(self, module: str) -> str | None:
        """Return the known module that an operation is part of, if it is of one."""
        while module not in self.modules:
            if "." not in module:
                return "" if "" in self.modules else None
            module = module.rpartition(".")[0]
        return module

    def group_of(self, name: str) -> ChannelGroup:
        """Return the group that a layer's output channels belong to.

        Raises:
            _BlockedError: If they cannot be removed.
        """
        shape = shape_of(self.modules[name])
        calls = self.flow.calls_of(name)
        if len(calls) != 1 or len(calls[0].outputs) != 1:
            raise _BlockedError(f"it runs {len(calls)} times")
        start = calls[0].outputs[0]
        found = _Members(shape.out)
        todo = [(start, self._axis_of(name, self.flow.values[start]))]
        while todo:
            value, axis = todo.pop()
            known = found.axes.get(value)
            if known is None:
                found.axes[value] = axis
                todo += self._next(found, value, axis)
            elif known != axis:
                raise _BlockedError("its channels are laid out in two ways")
        if not found.readers:
            raise _BlockedError("no layer reads its channels")
        for member in (*found.producers, *found.between, *found.readers):
            if member in self.flow.called_elsewhere:
                raise _BlockedError(f"{member!r} cannot be replaced: {REASON}")
            reader = self.flow.read_elsewhere.get(member)
            if reader is not None:
                where = repr(reader) if reader else "the network"
                raise _BlockedError(f"the weight of {member!r} is read by {where} itself")
        return ChannelGroup(
            channels=shape.out,
            producers=_ordered(found.producers),
            between=_ordered(found.between),
            readers=_ordered(found.readers),
            path=self._path(found, start),
        )

    def _axis_of(self, name: str, value: Value) -> _Axis:
        module, axes = self.modules[name], len(value.shape)
        if is_linear(module):
            return _Axis(axes - 1)
        if axes != len(_kernel_size(module)) + 2:
            raise _BlockedError("it is given no batch")
        return _Axis(1)

    def _next(self, found: _Members, value: int, axis: _Axis) -> list[tuple[int, _Axis]]:
        """Return the tensors that have the same channels as a tensor, one step away."""
        seen = self.flow.values[value]
        if seen.is_output:
            raise _BlockedError("its channels are an output of the network")
        maker = self.making.get(value)
        if seen.operation is None or maker is None:
            raise _BlockedError(
                "its channels meet an input of the network, or values for each channel that a "
                "forward reads itself"
            )
        units = [maker, *self.reading[value]]
        return [each for unit in units for each in self._through(found, unit, value, axis)]

    def _through(
        self, found: _Members, unit: _Unit, value: int, axis: _Axis
    ) -> Iterator[tuple[int, _Axis]]:
        if not unit.is_module:
            if value in unit.read and value in unit.made:
                return
            yield from self._through_operation(unit, value, axis)
            return
        calls = len(self.flow.calls_of(unit.name))
        if calls != 1:
            raise _BlockedError(f"{unit.name!r} runs {calls} times")
        if len(unit.read) != 1 or len(unit.made) != 1:
            raise _BlockedError(f"{unit.name!r} does not take and return one tensor")
        if self._is_layer(unit.name) and not self.is_depthwise(unit.name):
            self._join(found, unit, value, axis)
            return
        if axis.values != 1:
            raise _BlockedError(f"{unit.name!r} follows a flatten")
        found.between[unit.name] = unit.place
        yield from ((other, axis) for other in (*unit.read, *unit.made) if other != value)

    def _join(self, found: _Members, unit: _Unit, value: int, axis: _Axis) -> None:
        """Note a layer that writes the channels or reads them."""
        shape = shape_of(self.modules[unit.name])
        if shape.groups > 1:
            raise _BlockedError(f"{unit.name!r} is a grouped convolution")
        own = self._axis_of(unit.name, self.flow.values[value]).index
        writes = value in unit.made
        size = shape.out if writes else shape.channels
        if own != axis.index or size != found.channels * axis.values:
            raise _BlockedError(f"{unit.name!r} takes another axis for its channels")
        if writes and axis.values != 1:
            raise _BlockedError(f"{unit.name!r} writes several values of each channel")
        (found.producers if writes else found.readers)[unit.name] = unit.place

    def _through_operation(
        self, unit: _Unit, value: int, axis: _Axis
    ) -> Iterator[tuple[int, _Axis]]:
        shape = self.flow.values[value].shape
        name = unit.name.rstrip("_")
        where = repr(unit.where) if unit.where else "the network"
        if name not in _PER_CHANNEL | _VIEWS:
            inside = module_at(self.network, unit.where)
            if isinstance(inside, (nn.modules.conv._ConvNd, nn.Linear)):  # noqa: SLF001
                raise _BlockedError(f"{where} {why_unknown(inside)}")
            raise _BlockedError(f"`{name}` in {where} may mix its channels")
        others = [each for each in (*unit.read, *unit.made) if each != value]
        joined = 0
        for other in others:
            there = self.flow.values[other].shape
            across = (other in unit.made) != (value in unit.made)
            if name in _VIEWS:
                moved = _viewed(shape, there, axis)
            elif not across:
                moved = _beside(shape, there, axis)
            elif value in unit.made:
                moved = _before(shape, there, axis)
            else:
                moved = _after(shape, there, axis)
            if moved is None and (name in _VIEWS or other in unit.made):
                raise _BlockedError(f"`{name}` in {where} does not keep its channels apart")
            if moved is not None:
                joined += other in unit.read and value in unit.read
                yield other, moved
        if joined and name in _SUMS:
            raise _BlockedError(f"a sum in {where} shares its channels with other layers")

    def _path(self, found: _Members, start: int) -> tuple[Link, ...]:
        """Return the way from the first producer's output to the last reader."""
        last = max(found.readers, key=lambda name: found.readers[name])
        ends = self.flow.calls_of(last)[0].inputs[0]
        ways: dict[int, tuple[Link, ...]] = {start: ()}
        todo = [start]
        while todo:
            value = todo.pop(0)
            for unit in self.reading[value]:
                if unit.is_module and unit.name not in found.between:
                    continue
                for made in unit.made:
                    if made in found.axes and made not in ways:
                        ways[made] = (*ways[value], *self._link(unit, found, value, made))
                        todo.append(made)
        return ways.get(ends, ())

    def _link(self, unit: _Unit, found: _Members, value: int, made: int) -> tuple[Link, ...]:
        if unit.is_module:
            return (Link(unit.name),)
        if unit.name in _VIEWS:
            # Of another batch the sizes are others.
            flat = found.axes[made].values != found.axes[value].values
            apart = len(self.flow.values[made].shape) < len(self.flow.values[value].shape)
            return (Link("flatten", lambda x: x.flatten(1)),) if flat or apart else ()
        return () if unit.again is None else (Link(unit.name, unit.again),)


def _ordered(places: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(places, key=lambda name: places[name]))


def _is_per_channel(module: nn.Module) -> bool:
    if isinstance(module, _NORMS) or type(module).__name__ in _NAMED:
        return True
    return isinstance(module, nn.PReLU) and module.num_parameters > 1


def _is_depthwise(shape: Shape) -> bool:
    return shape.groups > 1 and shape.groups == shape.channels == shape.out


def _kernel_size(module: nn.Module) -> tuple[int, ...]:
    size: tuple[int, ...] = module.kernel_size  # type: ignore[assignment]
    return size


def _beside(shape: tuple[int, ...], other: tuple[int, ...], axis: _Axis) -> _Axis | None:
    """Return where the channels are in a tensor that an operation reads beside another.

    Both broadcast, so axes are counted from the right.
    """
    index = axis.index - len(shape) + len(other)
    return _Axis(index, axis.values) if index >= 0 and other[index] == shape[axis.index] else None


def _after(shape: tuple[int, ...], made: tuple[int, ...], axis: _Axis) -> _Axis | None:
    """Return where the channels are in what an operation makes; later axes may be gone."""
    kept = len(made) <= len(shape) and made[: axis.index + 1] == shape[: axis.index + 1]
    if kept or (len(made) == len(shape) and made[axis.index] == shape[axis.index]):
        return axis
    return None


def _before(made: tuple[int, ...], shape: tuple[int, ...], axis: _Axis) -> _Axis | None:
    """Return where the channels are in what an operation made another tensor from."""
    if len(shape) > len(made):  # places were averaged away
        return axis if shape[: axis.index + 1] == made[: axis.index + 1] else None
    return _beside(made, shape, axis)


def _viewed(shape: tuple[int, ...], other: tuple[int, ...], axis: _Axis) -> _Axis | None:
    """Return where the channels are in another view of the same values, in the same order."""
    before, size = math.prod(shape[: axis.index]), shape[axis.index]
    for index, there in enumerate(other):
        if math.prod(other[:index]) != before or there < 2:
            continue
        if there == size:
            return _Axis(index, axis.values)
        larger, rest = divmod(there, size)
        if larger > 1 and rest == 0:  # flattened with what follows it
            return _Axis(index, axis.values * larger)
        smaller, rest = divmod(size, there)
        if smaller > 1 and rest == 0 and axis.values % smaller == 0:
            return _Axis(index, axis.values // smaller)
        return None
    return None
