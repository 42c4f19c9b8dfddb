"""Data flow: records one forward pass and returns which layer's output goes into which layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from onebyone.core.errors import ModelError
from onebyone.core.tensor_trees import Inputs, fresh, tensors_in
from onebyone.networks.held import to_run
from onebyone.networks.stand_ins import stand_ins
from onebyone.networks.surgery import hooks_removed, run


@dataclass(frozen=True)
class Reading:
    """An operation that reads a tensor.

    Attributes:
        operation: Its name, such as ``relu``, ``add`` or ``convolution``.
        module: The innermost module that was running: the one whose forward calls the operation.
        call: Index in :attr:`Neighbours.calls` of that module's call; -1 outside of all modules.
        given: Whether the module was given the tensor as an argument of that call.
    """

    operation: str
    module: str
    call: int
    given: bool


@dataclass(frozen=True)
class Value:
    """The content of a tensor between two writes to it.

    Attributes:
        shape: Its shape, with the batch.
        operation: The operation that made it; ``None`` for inputs, weights and constants.
        module: The innermost module that was running when it was made.
        readings: Every operation that reads it, in order. An operation that returns the same
            tensor (``detach``, a view of the same shape) does not count.
        is_output: Whether the network returns it.
    """

    shape: tuple[int, ...]
    operation: str | None
    module: str | None
    readings: tuple[Reading, ...]
    is_output: bool


@dataclass(frozen=True)
class Call:
    """One run of a module.

    Attributes:
        module: Its name.
        inputs: Tensors among its arguments, as indices into :attr:`Neighbours.values`.
        outputs: Tensors that it returned, as indices too.
    """

    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operation that ran.

    Attributes:
        name: Such as ``relu``, ``add`` or ``convolution``.
        module: The innermost module that was running.
        read: Tensors that it read, as indices into :attr:`Neighbours.values`.
        made: Tensors that it returned, as indices too.
        again: Does the same to another tensor; ``None`` unless it read one tensor alone.
    """

    name: str
    module: str
    read: tuple[int, ...]
    made: tuple[int, ...]
    again: Callable[[Tensor], Any] | None


@dataclass(frozen=True)
class Neighbour:
    """The only layer before or after another one, or why there is none.

    Attributes:
        name: The layer's name; ``None`` if there is none.
        reason: Why there is none, in words; else empty.
    """

    name: str | None
    reason: str = ""


@dataclass(frozen=True)
class Neighbours:
    """What makes each module's input and what reads its output, in one evaluation pass.

    A module with several names goes by the first. Modules that do nothing (``nn.Identity``, dropout
    in evaluation) are transparent: what reads their output reads their input.

    Attributes:
        calls: Every run of a module, in starting order.
        values: Every tensor.
        read_elsewhere: Module name -> the module whose forward reads its parameters or buffers
            directly, as ``nn.MultiheadAttention`` reads ``out_proj.weight`` without running
            ``out_proj``. Such a layer cannot be replaced or changed.
        called_elsewhere: Layers that the network runs by another reference than their names. They
            cannot be replaced either.
        operations: Every operation, in order.
    """

    calls: tuple[Call, ...]
    values: tuple[Value, ...]
    read_elsewhere: Mapping[str, str]
    called_elsewhere: frozenset[str]
    operations: tuple[Operation, ...]
    _layers: frozenset[str]

    def calls_of(self, name: str) -> tuple[Call, ...]:
        """Return the runs of a module."""
        return self._calls_by_name.get(name, ())

    @cached_property
    def _calls_by_name(self) -> dict[str, tuple[Call, ...]]:
        grouped: dict[str, list[Call]] = {}
        for call in self.calls:
            grouped.setdefault(call.module, []).append(call)
        return {name: tuple(calls) for name, calls in grouped.items()}

    @cached_property
    def _returned_by(self) -> dict[int, str]:
        """For each value: the outermost layer that returned it and computed it."""
        makers: dict[int, str] = {}
        for call in self.calls:
            for place in call.outputs:
                maker = self.values[place].module or ""
                within = maker == call.module or maker.startswith(f"{call.module}.")
                if within and call.module in self._layers:
                    makers.setdefault(place, call.module)
        return makers

    def input_of(self, name: str) -> Value | None:
        """Return a module's input if it runs once and takes one tensor, else ``None``."""
        calls = self.calls_of(name)
        if len(calls) != 1 or len(calls[0].inputs) != 1:
            return None
        return self.values[calls[0].inputs[0]]

    def output_of(self, name: str) -> Value | None:
        """Return a module's output if it runs once and returns one tensor, else ``None``."""
        calls = self.calls_of(name)
        if len(calls) != 1 or len(calls[0].outputs) != 1:
            return None
        return self.values[calls[0].outputs[0]]

    def only_consumer(self, name: str) -> Neighbour:
        """Return the layer that takes a module's output, if nothing else reads that output.

        A layer is a module without children, or with parameters or buffers of its own (timm's
        ``BatchNormAct2d`` has an activation as a child). What a container's forward does itself,
        such as ``F.relu(self.conv(x))`` or a sum, is not a layer; the reason then says so.

        Args:
            name: A module's first name.

        Examples:
            >>> import torch
            >>> chain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True))
            >>> find_neighbours(chain, torch.zeros(1, 3, 5, 7)).only_consumer("0").name
            '1'
        """
        reason = self._why_not_one_run(name) or self._why_not_read_once(self.output_of(name))
        if reason is not None:
            return Neighbour(None, reason)
        output = self.output_of(name)
        assert output is not None
        reading = output.readings[0]
        if not reading.given or reading.module not in self._layers:
            return Neighbour(None, f"its output goes into {_in_words(reading)}, not into a layer")
        reason = self._why_not_one_run(reading.module)
        if reason is not None:
            return Neighbour(None, f"its output goes into {reading.module!r}, but {reason}")
        return Neighbour(reading.module)

    def only_producer(self, name: str) -> Neighbour:
        """Return the layer that made a module's input, if nothing else reads its output."""
        reason = self._why_not_one_run(name)
        if reason is not None:
            return Neighbour(None, reason)
        value = self.input_of(name)
        if value is None:
            return Neighbour(None, "it does not take one tensor")
        if value.module is None:
            return Neighbour(None, "its input is an input of the network")
        maker = self._returned_by.get(self.calls_of(name)[0].inputs[0])
        if maker is None:
            made = f"`{value.operation}` in {_named(value.module)}"
            return Neighbour(None, f"its input is made by {made}, not by a layer")
        consumer = self.only_consumer(maker)
        if consumer.name != name:
            why = consumer.reason or f"its output goes into {consumer.name!r}"
            return Neighbour(None, f"its input comes from {maker!r}, but {why}")
        return Neighbour(maker)

    def _why_not_read_once(self, output: Value | None) -> str | None:
        if output is None:
            return "it does not return one tensor"
        if output.is_output:
            return "its output is an output of the network"
        if not output.readings:
            return "nothing reads its output"
        if len({(reading.module, reading.call) for reading in output.readings}) > 1:
            readers = dict.fromkeys(_in_words(reading) for reading in output.readings)
            return f"its output is read more than once, by {' and '.join(readers)}"
        return None

    def _why_not_one_run(self, name: str) -> str | None:
        runs = len(self.calls_of(name))
        if runs == 1:
            return None
        return f"it runs {runs} times" if runs else "it does not run"


def _in_words(reading: Reading) -> str:
    where = _named(reading.module)
    return where if reading.given else f"`{reading.operation}` in {where}"


def _named(module: str | None) -> str:
    return repr(module) if module else "the network"


def find_neighbours(model: nn.Module, inputs: Inputs) -> Neighbours:
    """Run a copy of the network once and record which operation reads which tensor.

    Tensors are identified by their memory, so views and in-place operations are recognized. There
    is no symbolic tracing, so it works for every network that runs. If a forward branches on its
    data, only the branch that these inputs take is seen.

    Args:
        model: Not modified; a copy in evaluation mode is run.
        inputs: A tensor ``(batch, …)``, a tuple of arguments, or keyword arguments.

    Raises:
        ModelError: If the network cannot be copied or run on these inputs.
    """
    return neighbours_in(to_run(model), inputs)


def neighbours_in(network: nn.Module, inputs: Inputs) -> Neighbours:
    """Do the same as :func:`find_neighbours` for a network that is already a copy.

    Args:
        network: In evaluation mode. It is run itself; its hooks are removed afterwards.
        inputs: As for :func:`find_neighbours`.

    Raises:
        ModelError: If the network cannot be run on these inputs.
    """
    layers = [name for name, module in network.named_modules() if _is_layer(module)]
    try:
        with stand_ins(network, layers) as originals:
            return _recorded(network, inputs, layers, originals)
    except ModelError:  # its forward may compare its layers with one another
        return _recorded(network, inputs, layers, frozenset())


def _recorded(
    network: nn.Module, inputs: Inputs, layers: Sequence[str], originals: frozenset[int]
) -> Neighbours:
    watch = _Watch(network, originals)
    handles: list[Any] = []
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks: its operations count as its parent's
        handles.append(
            module.register_forward_pre_hook(watch.entering(name), prepend=True, with_kwargs=True)
        )
        handles.append(module.register_forward_hook(watch.leaving(), always_call=True))
    given = fresh(inputs)  # before watching, so that the copying is not recorded
    with hooks_removed(handles), watch:
        output = run(network, given, given_away=True)
    returned = {watch.value_of(tensor) for tensor in tensors_in(output)}
    return Neighbours(
        calls=tuple(Call(c.module, c.inputs, c.outputs) for c in watch.calls),
        values=tuple(
            Value(v.shape, v.operation, v.module, tuple(v.readings), place in returned)
            for place, v in enumerate(watch.values)
        ),
        read_elsewhere=dict(watch.read_elsewhere),
        called_elsewhere=frozenset(watch.called_elsewhere),
        operations=tuple(watch.operations),
        _layers=frozenset(layers),
    )


def _is_layer(module: nn.Module) -> bool:
    if next(module.children(), None) is None:
        return True
    return any(True for _ in module.parameters(recurse=False)) or any(
        True for _ in module.buffers(recurse=False)
    )


@dataclass
class _Call:
    module: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclass
class _Value:
    shape: tuple[int, ...]
    operation: str | None
    module: str | None
    readings: list[Reading] = field(default_factory=list)


@dataclass
class _Memory:
    """A tensor's storage.

    Attributes:
        version: How often it was written.
        writer: The operation that wrote it last, and the module that was running.
        held: A reference that keeps its address from being reused.
    """

    version: int = 0
    writer: tuple[str | None, str | None] = (None, None)
    held: object = None


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows tensors through operations and module calls."""

    def __init__(self, network: nn.Module, originals: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._originals = originals  # identities of layers that have stand-ins
        self.called_elsewhere: set[str] = set()
        self.calls: list[_Call] = []
        self.values: list[_Value] = []
        self.operations: list[Operation] = []
        self.read_elsewhere: dict[str, str] = {}
        self._running: list[int] = []
        self._memories: dict[int, _Memory] = {}
        self._places: dict[tuple[Any, ...], int] = {}
        self._owners: dict[int, set[str]] = {}
        for name, module in network.named_modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                self._owners.setdefault(self._address(tensor), set()).add(name)

    # ------------------------------------------------------------ modules

    def entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if id(module) in self._originals:
                self.called_elsewhere.add(name)
            self._running.append(len(self.calls))
            self.calls.append(_Call(name, self._values_in((args, kwargs))))

        return enter

    def leaving(self) -> Callable[..., None]:
        def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self.calls[self._running.pop()].outputs = self._values_in(output)

        return leave

    def _values_in(self, value: Any) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.value_of(tensor) for tensor in tensors_in(value)))

    # ------------------------------------------------------------ operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        read = {self.value_of(tensor): tensor for tensor in tensors_in((args, kwargs))}
        output = func(*args, **kwargs)
        name = func._overloadpacket.__name__  # noqa: SLF001
        written = _written(func, args, kwargs)
        running = self._running[-1] if self._running else None
        module = self.calls[running].module if running is not None else ""
        for tensor in written:
            memory = self._memory(tensor)
            memory.version += 1
            memory.writer = (name, module)
        made = {self.value_of(t, made_by=(name, module)): None for t in tensors_in(output)}
        for place, tensor in read.items():
            self._note_owner(tensor, module)
            if place not in made:
                given = running is not None and place in self.calls[running].inputs
                reading = Reading(name, module, -1 if running is None else running, given)
                self.values[place].readings.append(reading)
        again = _again(func, args, kwargs)
        self.operations.append(Operation(name, module, tuple(read), tuple(made), again))
        return output

    def _note_owner(self, tensor: Tensor, module: str) -> None:
        owners = self._owners.get(self._address(tensor), ())
        # A module inside the owner, such as a parametrization, reads for the owner.
        if any(module == o or module.startswith(f"{o}.") or not o for o in owners):
            return
        for owner in owners:
            self.read_elsewhere.setdefault(owner, module)

    def value_of(
        self, tensor: Tensor, *, made_by: tuple[str | None, str | None] | None = None
    ) -> int:
        """Return the index of a tensor's present content; a new one for new content."""
        memory = self._memory(tensor)
        key = (self._address(tensor), memory.version, *_layout(tensor))
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(_Value(tuple(tensor.shape), *(made_by or memory.writer)))
        return self._places[key]

    def _memory(self, tensor: Tensor) -> _Memory:
        address = self._address(tensor)
        if address not in self._memories:
            self._memories[address] = _Memory(held=_holder(tensor))
        return self._memories[address]

    def _address(self, tensor: Tensor) -> int:
        storage = _storage(tensor)
        return id(tensor) if storage is None else int(storage._cdata)  # noqa: SLF001


def _storage(tensor: Tensor) -> Any:
    """Return a tensor's storage, which its views share, or ``None`` if it has no single one."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, nested, opaque
        return None


def _holder(tensor: Tensor) -> object:
    storage = _storage(tensor)
    # The data may be freed: only the address must stay reserved.
    return tensor if storage is None else StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    if _storage(tensor) is None:
        return (tuple(tensor.shape),)
    return (tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _again(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Any] | None:
    """Return an operation as a function of the one tensor that it reads, if there is one alone."""
    if not args or not isinstance(args[0], Tensor) or len(list(tensors_in((args, kwargs)))) != 1:
        return None
    rest = args[1:]
    return lambda tensor: func(tensor, *rest, **kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes into."""
    schema = func._schema  # noqa: SLF001
    if not schema.is_mutable:
        return []
    written: list[Tensor] = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        written.extend(tensors_in(value))
    return written
