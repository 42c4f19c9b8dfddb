"""Traces a module's forward pass with torch.fx, and replaces it while keeping the module's type."""

from __future__ import annotations

import importlib
import inspect
import linecache
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, cast

from torch import fx, nn

from onebyone.core.shared_state import warnings_ignored

Globals = tuple[tuple[str, Any], ...]


class CannotTrace(Exception):  # noqa: N818 - a finding, not an error
    """A forward cannot be traced; the message says why."""


class CallTracer(fx.Tracer):
    """Traces a module's own calls; it traces into submodules only if they are in ``opened``.

    Each node's ``meta["caller"]`` is the name of the module whose forward makes the call.

    Args:
        opened: Names of the modules to trace into.
    """

    def __init__(self, opened: Iterable[str] = ()) -> None:
        super().__init__()
        self.opened = frozenset(opened)
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one node."""
        del m
        return module_qualified_name not in self.opened

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a new node with its caller's name."""
        node = super().create_node(*args, **kwargs)
        node.meta["caller"] = self.scope.module_path
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Trace the call of a module, and store its caller's name if it becomes one node.

        While tracing, fx patches the call of every module; calls from other threads run normally.
        """
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        caller = self.scope.module_path
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy) and result.node.op == "call_module":
            name = self.path_of_module(m)
            if result.node.target == name and name not in self.opened:
                result.node.meta["caller"] = caller
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Trace a module attribute if this thread reads it."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def trace_calls(module: nn.Module, opened: Iterable[str] = ()) -> fx.Graph:
    """Return the graph of a module's calls in its present mode.

    Arguments of ``forward`` with a default keep it, and the graph asserts that.

    Args:
        module: Not modified: attributes that its forward sets are restored.
        opened: Names of the modules in it to trace into.

    Raises:
        CannotTrace: If it cannot be traced; the message says why.
    """
    tracer = CallTracer(opened)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(module).forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    with attributes_kept(module), warnings_ignored():
        # fx warns if it cannot assert a default, such as a float.
        try:
            graph = tracer.trace(module, concrete_args=defaults or None)
        except Exception as error:  # a user's forward may do anything while it is traced
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CannotTrace(lines[0].rstrip(".")) from error
        made = [name for name in vars(module) if name.startswith("_tensor_constant")]
    if made:
        raise CannotTrace("it creates a constant tensor")
    return graph


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Restore attributes that a traced forward sets on its modules: their values are proxies."""
    kept = [(part, dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes in kept:
            vars(part).clear()
            vars(part).update(attributes)


def traced_in(module: nn.Module, *, training: bool) -> fx.Graph:
    """Return the graph of a module's own calls in one mode; each submodule is one node.

    Raises:
        CannotTrace: If it cannot be traced; the message says why.
    """
    with attributes_kept(module):
        module.training = training
        return trace_calls(module)


# ---------------------------------------------------------------- a new forward


def set_forward(module: nn.Module, *, evaluation: fx.Graph, training: fx.Graph) -> None:
    """Replace one module's forward, in place.

    The module gets a class of its own, derived from its class and with the same name, as
    ``torch.nn.utils.parametrize`` does; unlike there, it can be pickled. The rest of the class is
    unchanged, and tools that look up the type find the new forward.

    Args:
        module: Modified in place.
        evaluation: Its forward in evaluation mode.
        training: Its forward in training mode.
    """
    base: Any = getattr(type(module), "_edited_from", type(module))
    source, names = _source(evaluation, training)
    module.__class__ = _edited_class(base, source, names)


def _source(evaluation: fx.Graph, training: fx.Graph) -> tuple[str, Globals]:
    """Return the source of a forward that computes the graphs, and the globals it needs."""
    codes = [graph.python_code("self") for graph in (evaluation, training)]
    before, signature, body = _parts(codes[0].src)
    other, _, training_body = _parts(codes[1].src)
    if body != training_body:
        body = f"if self.training:\n{textwrap.indent(training_body, '    ')}\n{body}"
    lines = [*dict.fromkeys([*before, *other]), signature, textwrap.indent(body, "    ")]
    names = {**codes[1].globals, **codes[0].globals}
    for name, value in codes[1].globals.items():
        if names[name] is not value:
            raise CannotTrace(f"{name!r} differs between training and evaluation mode")
    packed = {n: _Import(v.__name__) if isinstance(v, ModuleType) else v for n, v in names.items()}
    return "\n".join(lines) + "\n", tuple(sorted(packed.items(), key=lambda item: item[0]))


def _parts(source: str) -> tuple[list[str], str, str]:
    """Return what comes before the function, its first line, and its body without indentation."""
    lines = source.strip("\n").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def forward("))
    return lines[:start], lines[start], textwrap.dedent("\n".join(lines[start + 1 :]))


class _Import:
    """A module to import, by name: Python modules cannot be pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Import) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


@cache
def _edited_class(base: Any, source: str, names: Globals) -> type[nn.Module]:
    """Return a subclass of ``base`` with another forward; cached for each source."""
    found = {
        name: importlib.import_module(value.name) if isinstance(value, _Import) else value
        for name, value in names
    }
    file = f"<forward of {base.__module__}.{base.__qualname__}, edited, {hash(source):x}>"
    # fx generated the source, from a network that has already run.
    exec(compile(source, file, "exec", dont_inherit=True), found)  # noqa: S102
    # For tracebacks, and for tools that ask for the source.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    body = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": _reduce,
        "_edited_from": base,
        "_edited_source": (source, names),
        "forward": found["forward"],
    }
    return type(base.__name__, (base,), body)


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    del protocol
    kind: Any = type(module)
    state: Any = cast("Any", module).__getstate__()
    return _blank, (kind._edited_from, *kind._edited_source), state  # noqa: SLF001


def _blank(base: Any, source: str, names: Globals) -> nn.Module:
    kind: type[nn.Module] = _edited_class(base, source, names)
    return kind.__new__(kind)
