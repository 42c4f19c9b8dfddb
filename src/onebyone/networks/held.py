"""Networks that nobody else holds, so that what only runs one of them needs no copy of its own."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from onebyone.core.errors import ModelError
from onebyone.core.tensor_trees import Inputs, device_of
from onebyone.networks.copies import MOST_OBJECTS, runs_alone
from onebyone.networks.surgery import evaluation_copy, in_evaluation_mode, run

T = TypeVar("T")


@dataclass(frozen=True)
class _Held:
    """A held network, and what was made of it."""

    network: nn.Module
    made: dict[Hashable, Any] = field(default_factory=dict)


_HELD: ContextVar[tuple[_Held, ...]] = ContextVar("networks that onebyone holds", default=())
_ATOMS = (str, bytes, int, float, complex, bool, type(None))
_CONTAINERS = (list, tuple, set, frozenset, deque)
# A copy has the same ones, so it changes nothing whether they change.
_SHARED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


@contextmanager
def held(network: nn.Module, inputs: Inputs) -> Iterator[None]:
    """In this context, functions that only run this network run it itself instead of a copy.

    They leave it as it was. A network that changes itself as it runs, such as one that keeps its
    last features, is copied by each of them, as everywhere else.

    Args:
        network: A copy that the caller made and nobody else uses. Run once.
        inputs: What to run it on.

    Raises:
        ModelError: If it does not run on them.
    """
    if _is_held(network) or _trains(network) or _changes(network, inputs):
        yield
        return
    before = _HELD.set((*_HELD.get(), _Held(network)))
    try:
        yield
    finally:
        _HELD.reset(before)


def to_run(model: nn.Module, *, device: torch.device | str | None = None) -> nn.Module:
    """Return a network to run: a copy in evaluation mode, or itself where it is held.

    The caller must leave it as it was: hooks are removed, settings of parameters restored.

    Args:
        model: Not modified.
        device: Where to run it. The default is where it is.

    Raises:
        ModelError: As :func:`evaluation_copy`.
    """
    if _is_held(model) and (device is None or _lies_on(model, torch.device(device))):
        return model
    return evaluation_copy(model, device=device)


def to_run_beside(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a network to run on the device of the inputs, as :func:`to_run`."""
    return to_run(model, device=device_of(inputs))


def any_to_run(model: nn.Module, *, device: torch.device | str = "cpu") -> nn.Module:
    """Return a user's network to run, as :func:`to_run`, also one that cannot be copied.

    Such a network, which may hold a session of another runtime, is returned itself if it is in
    evaluation mode.

    Raises:
        ModelError: As :func:`evaluation_copy`, if it is not.
    """
    try:
        return to_run(model, device=device)
    except ModelError:
        return in_evaluation_mode(model, device=device)


def copy_runs_alone(model: nn.Module, copy: nn.Module) -> AbstractContextManager[None]:
    """Check in a context that a run of a copy uses nothing of the network, unless both are one."""
    return nullcontext() if copy is model else runs_alone(model)


def made_once(network: nn.Module, key: Hashable, make: Callable[[], T]) -> T:
    """Return what ``make`` gives for a network; of a held network, what it gave the first time.

    Args:
        network: Not changed while it is held, once something was made of it.
        key: Says what is made.
        make: Makes it.
    """
    for each in _HELD.get():
        if each.network is network:
            if key not in each.made:
                each.made[key] = make()
            made: T = each.made[key]
            return made
    return make()


def forget_made(network: nn.Module) -> None:
    """Free the memory of all that :func:`made_once` made of a network."""
    for each in _HELD.get():
        if each.network is network:
            each.made.clear()


def _is_held(model: nn.Module) -> bool:
    return any(model is each.network for each in _HELD.get()) and not _trains(model)


def _trains(model: nn.Module) -> bool:
    return any(module.training for module in model.modules())


def _lies_on(model: nn.Module, device: torch.device) -> bool:
    return all(t.device == device for t in (*model.parameters(), *model.buffers()))


def _changes(network: nn.Module, inputs: Inputs) -> bool:
    """Run a network once and return whether it is another one afterwards."""
    before = _state(network)
    run(network, inputs)
    return before != _state(network)


def _state(network: nn.Module) -> list[Any]:
    """Return what differs if a network has changed: its objects, their sizes, writes to tensors.

    An object is known by its ``id``. Python may give the ``id`` of a freed object to a new one, but
    an object is freed only where the network no longer holds it: something else has changed then.
    Global variables are left out, since a copy shares them.
    """
    found: list[Any] = []
    seen: set[int] = set()
    waiting: deque[Any] = deque([vars(module) for module in network.modules()])
    while waiting and len(seen) < MOST_OBJECTS:
        value = waiting.popleft()
        if issubclass(type(value), _ATOMS):  # a proxy may do anything in `isinstance`
            found.append(repr(value))
            continue
        found.append(id(value))
        if id(value) in seen:
            continue
        seen.add(id(value))
        if issubclass(type(value), Tensor):
            found += _written(value)
        else:
            parts = _parts(value)
            found.append(len(parts))
            waiting += parts
    return found


def _parts(value: Any) -> list[Any]:
    """Return the objects that an object holds and that a deep copy has copies of."""
    kind = type(value)
    if issubclass(kind, _SHARED):
        return []
    if issubclass(kind, dict):
        return list(value.values())
    if issubclass(kind, _CONTAINERS):
        return list(value)
    if issubclass(kind, types.MethodType):
        return [value.__self__]
    try:
        return list(vars(value).values())
    except TypeError:  # it has no attributes of its own
        return []


def _written(tensor: Tensor) -> list[Any]:
    """Return what changes when a tensor is written, also through its ``data``."""
    if tensor.is_inference():
        return [repr(tensor.sum())]
    writes = tensor._version  # noqa: SLF001 - their number
    if tensor.is_quantized or tensor.layout != torch.strided:
        return [writes]
    return [writes, tensor.data_ptr(), repr(tensor.detach().sum())]
