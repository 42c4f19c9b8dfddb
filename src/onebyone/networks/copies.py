"""Deep copies of networks that keep modes and attributes and share nothing with the original.

``copy.deepcopy`` is not enough. It does not copy functions, so a forward that was set on an
instance still calls the original's layers. It does not copy what weak references point to. A class
may define its own copying. And for ``torch.fx`` graph modules it drops modes and attributes.
"""

from __future__ import annotations

import copy
import dis
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from onebyone.core.errors import ModelError
from onebyone.core.user_code import users_fault

# The search of a copy stops after this many objects: a network may hold a whole data set.
MOST_OBJECTS = 200_000
# Where `nn.Module` keeps tensors and modules; these are compared separately.
_REGISTERED = ("_parameters", "_buffers", "_modules")
_CURE = (
    "Define its forward in a class, or set it by `types.MethodType(function, module)`, so that a "
    "copy calls itself"
)
_CONTAINERS = (list, tuple, set, frozenset, deque)
_ATOMS = (str, bytes, int, float, complex, bool, type, Tensor, types.ModuleType, types.CodeType)


def true_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of a network in the same modes that shares nothing with it.

    Raises:
        ModelError: If such a copy is impossible; says why and what to do.
    """
    memo: dict[int, Any] = {}
    try:
        # With gradients, torch.jit would make copies of parameters that cannot be trained.
        with torch.no_grad():
            duplicate = copy.deepcopy(model, memo)
    except Exception as error:
        raise users_fault(
            error,
            "The network must be deep-copyable, since only a copy is ever modified",
            "Detach tensors that it keeps as attributes, and replace old-style weight norm by "
            "torch.nn.utils.parametrizations",
            what=f"copying {type(model).__name__}",
        ) from error
    if not isinstance(duplicate, nn.Module):
        raise _untrue(model, f"the copy is a {type(duplicate).__name__}, not a torch.nn.Module")
    _complete_graphs(model, duplicate, memo)
    _take_modes(model, duplicate)
    _check_separate(model, duplicate)
    return duplicate


def _untrue(model: nn.Module, reason: str, cure: str = _CURE) -> ModelError:
    return ModelError(
        f"A copy of the network must do the same without using any part of the original, since "
        f"only the copy is modified, but in a copy of {type(model).__name__} {reason}. {cure}."
    )


def _complete_graphs(model: nn.Module, duplicate: nn.Module, memo: dict[int, Any]) -> None:
    """Copy the attributes and modules that torch.fx drops: those its graphs do not use."""
    theirs = dict(duplicate.named_modules(remove_duplicate=False))
    for name, mine in model.named_modules(remove_duplicate=False):
        other = theirs.get(name)
        if not isinstance(mine, fx.GraphModule) or other is None:
            continue
        for key, value in vars(mine).items():
            if key not in vars(other):
                other.__dict__[key] = copy.deepcopy(value, memo)
        for kind in _REGISTERED:
            kept, given = vars(other)[kind], vars(mine)[kind]
            for key, value in given.items():
                if key not in kept:
                    kept[key] = copy.deepcopy(value, memo)


def _take_modes(model: nn.Module, duplicate: nn.Module) -> None:
    """Set every module and parameter of a copy to the mode of the original's."""
    mine = dict(model.named_modules(remove_duplicate=False))
    theirs = dict(duplicate.named_modules(remove_duplicate=False))
    for name in mine.keys() ^ theirs.keys():
        raise _untrue(
            model,
            f"the module {name!r} is {'missing' if name in mine else 'not in the network'}",
            "Let its `__deepcopy__` copy all its modules, or remove it",
        )
    for name, module in mine.items():
        theirs[name].training = module.training
        own = dict(theirs[name].named_parameters(recurse=False))
        for key, parameter in module.named_parameters(recurse=False):
            other = own.get(key)
            if (
                other is not None
                and other.is_leaf
                and other.requires_grad != parameter.requires_grad
            ):
                other.requires_grad_(parameter.requires_grad)


# ---------------------------------------------------------------- what a copy must not share


def _check_separate(model: nn.Module, duplicate: nn.Module) -> None:
    foreign = {
        id(module): f"the original's module {name!r}" if name else "the original itself"
        for name, module in model.named_modules()
    }
    memory: dict[int, str] = {}
    for name, tensor in _tensors(model):
        foreign[id(tensor)] = memory[_address(tensor)] = f"the original's tensor {name!r}"
    memory.pop(0, None)  # tensors without values
    for name, module in duplicate.named_modules():
        if id(module) in foreign:
            raise _untrue(model, f"the module {name!r} is {foreign[id(module)]}")
    for name, tensor in _tensors(duplicate):
        if _address(tensor) in memory or id(tensor) in foreign:
            cure = "Let its `__deepcopy__` clone its tensors, or remove it"
            raise _untrue(model, f"the tensor {name!r} lies in the original's memory", cure)
    walk = _Walk(foreign)
    for name, module in duplicate.named_modules():
        found = walk.from_module(module)
        if found is not None:
            of = f"the module {name!r}" if name else "the network"
            raise _untrue(model, f"{found[0]} of {of} still uses {found[1]}")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, opaque; lazy: no memory
        return 0


class _Walk:
    """Searches everything a copy refers to for modules and tensors of the original.

    Args:
        foreign: Descriptions of the original's modules and tensors, by ``id``.
    """

    def __init__(self, foreign: Mapping[int, str]) -> None:
        self._foreign = foreign
        self._seen: set[int] = set()
        # Keeps temporary objects alive, so that Python does not reuse their ids.
        self._held: list[Any] = []

    def from_module(self, module: nn.Module) -> tuple[str, str] | None:
        """Return which attribute of a module uses which part of the original, or ``None``."""
        own = [(key, value) for key, value in vars(module).items() if key not in _REGISTERED]
        kind = type(module)
        # The methods of torch's own classes need no search.
        if not kind.__module__.startswith("torch."):
            own += [(key, getattr(kind, key)) for key in ("forward", "__call__")]
        for key, value in own:
            found = self._search(value)
            if found is not None:
                return f"`{key}`{_defined(value)}", found
        return None

    def _search(self, start: Any) -> str | None:
        waiting = [start]
        while waiting and len(self._seen) < MOST_OBJECTS:
            value = waiting.pop()
            if id(value) in self._foreign:
                return self._foreign[id(value)]
            if value is None or isinstance(value, _ATOMS) or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            self._held.append(value)
            waiting += _reached(value)
        return None


def _reached(value: Any) -> list[Any]:  # noqa: PLR0911 - a kind a line
    """Return the objects that an object refers to and that a deep copy may have kept."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, _CONTAINERS):
        return list(value)
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.BuiltinMethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, weakref.ref):
        return [value()]
    attributes = getattr(value, "__dict__", None)
    return list(attributes.values()) if isinstance(attributes, dict) else []


def _of_function(function: types.FunctionType) -> list[Any]:
    found: list[Any] = [function.__defaults__, function.__kwdefaults__, vars(function)]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    library = (function.__module__ or "").partition(".")[0]
    if library != "torch" and library not in sys.stdlib_module_names:
        names = _names_in(function.__code__)
        found += [function.__globals__[name] for name in names if name in function.__globals__]
    return found


@functools.cache
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    """Return the global names that a function reads, without attribute names."""
    found = [
        str(instruction.argval)
        for instruction in dis.get_instructions(code)
        if instruction.opname == "LOAD_GLOBAL"
    ]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _names_in(constant)
    return tuple(dict.fromkeys(found))


def _defined(value: Any) -> str:
    """Return where a function was defined, in brackets; empty for anything else."""
    function = getattr(value, "__func__", value)
    if not isinstance(function, types.FunctionType):
        return ""
    code = function.__code__
    return f" (a function from {code.co_filename}:{code.co_firstlineno})"


# ---------------------------------------------------------------- what a copy really runs


@contextmanager
def runs_alone(model: nn.Module) -> Iterator[None]:
    """Check that nothing of a network is used while its copy runs in this context.

    This finds what inspecting a copy cannot, such as a ``__call__`` that looks itself up in a
    registry.

    Raises:
        ModelError: If a module or tensor of the network is used.
    """
    modules = {id(module): name for name, module in model.named_modules()}
    used: list[str] = []

    def entering(module: nn.Module, _: object) -> None:
        if id(module) in modules:
            name = modules[id(module)]
            used.append(f"the original's module {name!r}" if name else "the original itself")

    watch = _UsedMemory(model)
    handle = nn.modules.module.register_module_forward_pre_hook(entering)
    try:
        with watch:
            yield
    finally:
        handle.remove()
    used += watch.used
    if used:
        raise _untrue(model, f"a run still uses {used[0]}")


class _UsedMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations on a network's tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {
            _address(t): f"the original's tensor {name!r}" for name, t in _tensors(model)
        }
        self._names.pop(0, None)
        self.used: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):  # noqa: SLF001
            if isinstance(value, Tensor) and _address(value) in self._names:
                self.used.append(self._names[_address(value)])
        return func(*args, **kwargs)
