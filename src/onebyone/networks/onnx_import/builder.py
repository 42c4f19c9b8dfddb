"""Builds a module and its graph from the nodes of an ONNX file."""

from __future__ import annotations

import builtins
import keyword
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import GraphAppendingTracer

from onebyone.core.shared_state import SharedChange
from onebyone.networks.onnx_import.file import OnnxFile, OnnxNode
from onebyone.networks.onnx_import.modules import AsTensor
from onebyone.networks.onnx_import.network import OnnxNetwork

# A constant that an operator makes must not have more values: files can claim any size.
MOST_MADE = 2**27
_WORD = re.compile(r"[A-Za-z0-9_]+\Z")
# Names that the generated forward uses otherwise.
_WORDS_OF_CODE = frozenset({"self", "torch", "math", "operator", "inf", "nan", "device", "fx"})
_TAKEN = frozenset(dir(OnnxNetwork("")))


@contextmanager
def _without_log() -> Iterator[None]:
    """Stop torch from logging a traceback for shapes that do not fit: they are refused by name."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


_unlogged = SharedChange(_without_log)


class Refused(Exception):  # noqa: N818 - a finding, not an error
    """A node cannot be read; the message says why, without a full stop."""


@dataclass(frozen=True)
class Sizes:
    """Numbers that are computed from the sizes of tensors, such as the target of a reshape.

    They stay Python's numbers, so that no tensor is made of them and any batch is right.

    Attributes:
        entries: An array of rank 0 or more, of numbers and of nodes of the graph that give numbers.
        dtype: The type that they have in the file.
    """

    entries: np.ndarray[Any, Any]
    dtype: torch.dtype

    @classmethod
    def of(cls, entries: Sequence[Any], dtype: torch.dtype = torch.int64) -> Sizes:
        """Return a list of numbers."""
        return cls(objects(entries), dtype)


Value = fx.Proxy | Tensor | Sizes
Builder = Callable[..., Any]


def objects(entries: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Return an array of objects; NumPy would look into nodes by itself."""
    made = np.empty(len(entries), dtype=object)
    for place, entry in enumerate(entries):
        made[place] = entry
    return made


class _Tracer(GraphAppendingTracer):
    """Adds nodes to the graph, each with its shape for the example."""

    def __init__(self, root: OnnxNetwork) -> None:
        super().__init__(fx.Graph())
        self.module = root
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.kept: dict[int, fx.Node] = {}
        self.held: list[Tensor] = []  # so that no identity is used again
        self.learned: dict[int, str] = {}  # identity of a weight -> its name

    def create_arg(self, a: Any) -> Any:
        """Return an argument; a constant becomes a parameter or a buffer of the network."""
        if isinstance(a, Tensor):
            return self.constant(a)
        if isinstance(a, Sizes):
            return super().create_arg(list(a.entries.flat))
        return super().create_arg(a)

    def constant(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self.kept:
            name = self.learned.get(id(tensor))
            target = free_name(self.module, name or f"constant_{len(self.held)}")
            if name is not None and tensor.is_floating_point() and tensor.numel() > 1:
                self.module.register_parameter(target, nn.Parameter(tensor.clone()))
            else:
                self.module.register_buffer(target, tensor.clone())
            self.held.append(tensor)
            node = self.graph.create_node("get_attr", target)
            with self.fake:
                node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype)
            self.kept[id(tensor)] = node
        return self.kept[id(tensor)]

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *a: Any, **k: Any
    ) -> Any:
        """Add a node, and compute its shape for the example."""
        made = super().create_proxy(kind, target, args, kwargs, *a, **k)
        node = made.node
        if "val" not in node.meta:
            node.meta["val"] = self._computed(node)
        return made

    def _computed(self, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, lambda each: each.meta["val"])
        kwargs = fx.node.map_arg(node.kwargs, lambda each: each.meta["val"])
        with _unlogged(), self.fake, torch.no_grad():
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return self.module.get_submodule(str(node.target))(*args, **kwargs)


class GraphBuilder:
    """What operators use to add to the network.

    Args:
        file: The file.
        shapes: For each input the shape of an example.

    Attributes:
        opset: Version of the operators.
        values: Each value of the file that has been made, by name.
        network: Gets modules.
        fixed: Whether the file fixes all sizes but that of the batch.
        frees_batch: Whether the file fixes the batch, so that constants of it are made free.
    """

    def __init__(self, file: OnnxFile, shapes: Sequence[tuple[int, ...]]) -> None:
        self.file = file
        self.opset = file.opset
        self.network = OnnxNetwork(file.sha256).eval()
        self._tracer = _Tracer(self.network)
        self.values: dict[str, Any] = {}
        self._names: set[str] = set()
        self._modules: dict[Any, str] = {}
        self.fixed = all(None not in each.sizes[1:] for each in file.inputs)
        self.frees_batch = all(bool(each.sizes) and each.sizes[0] for each in file.inputs)
        self.batch = next((shape[0] for shape in shapes if shape), 1)
        self.uses = _uses(file)
        self.arguments: list[str] = []
        for each, shape in zip(file.inputs, shapes, strict=True):
            with self._tracer.fake:
                held = torch.empty(shape, dtype=each.dtype)
            name = argument_name(each.name, self.arguments)
            self.arguments.append(name)
            node = self.graph.placeholder(name)
            node.meta["val"] = held
            self.values[each.name] = fx.Proxy(node, self._tracer)
        for name, tensor in file.constants.items():
            self.keep_weight(name, tensor)

    @property
    def graph(self) -> fx.Graph:
        """The graph of the forward."""
        return self._tracer.graph

    def keep_weight(self, name: str, tensor: Tensor) -> None:
        """Make a constant of the file known under its name, which its parameter gets."""
        self.values[name] = tensor
        self._tracer.learned[id(tensor)] = clean(name)
        self._tracer.held.append(tensor)

    # ------------------------------------------------------------ adding to the graph

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add a call of a function; of constants alone it is computed at once."""
        if not any(isinstance(leaf, fx.Proxy) for leaf in _leaves((args, kwargs))):
            return function(*_plain(args), **_plain(kwargs))
        return self._tracer.create_proxy("call_function", function, args, kwargs)

    def method(self, name: str, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Add a call of a tensor's method."""
        if not any(isinstance(leaf, fx.Proxy) for leaf in _leaves((x, args, kwargs))):
            return getattr(x, name)(*_plain(args), **_plain(kwargs))
        return self._tracer.create_proxy("call_method", name, (x, *args), kwargs)

    def module(
        self, node: OnnxNode, make: Callable[[], nn.Module], *args: Any, weight: str = ""
    ) -> Any:
        """Add a call of a layer.

        Args:
            node: Of the file. A node with the same weights and attributes uses the same layer.
            make: Makes the layer.
            args: Of the call. If all are constants it is computed at once.
            weight: Name of the layer's weight in the file, which names the layer.
        """
        if not any(isinstance(leaf, fx.Proxy) for leaf in _leaves(args)):
            with torch.no_grad():
                return make().eval()(*_plain(args))
        key = (node.operator, node.inputs[1:], repr(sorted(node.attributes.items())))
        name = self._modules.get(key) if weight else None
        if name is None:
            name = self._free_module_name(node, weight)
            _place(self.network, name, make().eval())
            if weight:
                self._modules[key] = name
        return self._tracer.create_proxy("call_module", name, args, {})

    def layer_of(self, value: Any, kinds: tuple[type[nn.Module], ...]) -> nn.Module | None:
        """Return the layer that made a value, if it runs once so far and nothing else reads it."""
        if not isinstance(value, fx.Proxy) or value.node.op != "call_module":
            return None
        target = value.node.target
        runs = sum(each.op == "call_module" and each.target == target for each in self.graph.nodes)
        names = [name for name, other in self.values.items() if other is value]
        read = sum(self.uses.get(name, 0) for name in names)
        layer = self.network.get_submodule(str(target))
        if runs != 1 or read != 1 or value.node.users or not isinstance(layer, kinds):
            return None
        return layer

    def keep_apart(self, value: fx.Proxy) -> None:
        """Let no other node use the layer that made a value: it has been changed."""
        self._modules = {k: n for k, n in self._modules.items() if n != value.node.target}

    # ------------------------------------------------------------ looking at values

    def shape(self, value: Any) -> tuple[int, ...]:
        """Return the shape of a value for the example."""
        if isinstance(value, Sizes):
            return tuple(value.entries.shape)
        if isinstance(value, Tensor):
            return tuple(value.shape)
        held = value.node.meta["val"]
        return tuple(held.shape) if isinstance(held, Tensor) else ()

    def dtype(self, value: Any) -> torch.dtype:
        """Return the type of a value."""
        if isinstance(value, Sizes | Tensor):
            return value.dtype
        found: torch.dtype = value.node.meta["val"].dtype
        return found

    def constant(self, value: Any, what: str) -> Tensor:
        """Return a value that must be a constant.

        Raises:
            Refused: If it is computed from the inputs.
        """
        if isinstance(value, Sizes) and all(
            isinstance(each, int | float | bool) for each in value.entries.flat
        ):
            return torch.tensor(value.entries.tolist(), dtype=value.dtype)
        if not isinstance(value, Tensor):
            raise Refused(f"its {what} must be a constant, but is computed from the inputs")
        return value

    def numbers(self, value: Any, what: str) -> list[Any]:
        """Return a value as a list of numbers, which may be computed from sizes of tensors.

        Raises:
            Refused: If they are computed from values of tensors.
        """
        if isinstance(value, Sizes):
            return list(value.entries.flat)
        if isinstance(value, Tensor):
            return list(value.reshape(-1).tolist())
        raise Refused(f"its {what} must be a constant or computed from sizes, not from values")

    def tensor(self, value: Any) -> Any:
        """Return a value as a tensor."""
        if not isinstance(value, Sizes):
            return value
        if all(isinstance(each, int | float | bool) for each in value.entries.flat):
            return self.constant(value, "sizes")
        nested = value.entries.tolist()
        module = AsTensor(value.dtype)
        name = self._free(f"as_tensor_{len(self._names)}")
        _place(self.network, name, module)
        return self._tracer.create_proxy("call_module", name, (nested,), {})

    def size(self, x: Any, axis: int) -> Any:
        """Return the size of a tensor along an axis, as a number of the graph."""
        return x.shape[axis] if isinstance(x, Tensor) else self.method("size", x, axis)

    # ------------------------------------------------------------ names

    def _free_module_name(self, node: OnnxNode, weight: str) -> str:
        return self._free(_from_weight(weight) or _from_node(node))

    def _free(self, wanted: str) -> str:
        parts = [f"{part}_" if part in _TAKEN else part for part in wanted.split(".")]
        name = ".".join(parts)
        if any(_clash(name, other) for other in self._names):
            name = name.replace(".", "_")
        stem, count = name, 1
        while any(_clash(name, other) for other in self._names) or hasattr(self.network, name):
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name

    def finish(self) -> None:
        """Add the outputs.

        Raises:
            Refused: If the file names an output that no node makes.
        """
        missing = [name for name in self.file.outputs if name not in self.values]
        if missing:
            raise Refused(f"no node makes the output {missing[0]!r}")
        found = tuple(self.tensor(self.values[name]) for name in self.file.outputs)
        self.graph.output(self._tracer.create_arg(found[0] if len(found) == 1 else found))
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()


def _uses(file: OnnxFile) -> dict[str, int]:
    """Return how many nodes and outputs read each value."""
    counts: dict[str, int] = {}
    for name in [*(name for node in file.nodes for name in node.inputs), *file.outputs]:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Sizes):
        yield from value.entries.flat
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def _plain(value: Any) -> Any:
    """Return arguments without numbers of the graph, for a call that is computed at once."""
    if isinstance(value, Sizes):
        return value.entries.tolist()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(each) for each in value)
    return value


def check_made(sizes: Sequence[Any]) -> None:
    """Check that a constant with these sizes is not absurdly large.

    Raises:
        Refused: If it is.
    """
    known = [size for size in sizes if isinstance(size, int)]
    if any(size < 0 for size in known) or math.prod(known) > MOST_MADE:
        raise Refused(f"it makes a tensor of the sizes {known}")


# ---------------------------------------------------------------- names


def clean(name: str) -> str:
    """Return a name with letters, digits and underscores alone: it becomes a part of code."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", name)[:80].strip("_") or "value"


def argument_name(name: str, taken: Sequence[str]) -> str:
    """Return the name of an argument for an input of the file."""
    stem = clean(name)
    known = keyword.iskeyword(stem) or hasattr(builtins, stem) or stem in _WORDS_OF_CODE
    stem = f"input_{stem}" if stem[0].isdigit() or known else stem
    return stem if stem not in taken else f"{stem}_{len(taken)}"


def free_name(module: nn.Module, wanted: str) -> str:
    """Return a name that a module does not have yet."""
    name, count = (f"weight_{wanted}" if wanted[0].isdigit() else wanted), 1
    stem = name
    while hasattr(module, name):
        count += 1
        name = f"{stem}_{count}"
    return name


def _from_weight(weight: str) -> str:
    """Return ``layer1.0.conv1`` for ``layer1.0.conv1.weight``; empty for names of tools."""
    parts = weight.split(".")[:-1]
    if not parts or not all(_WORD.match(part) for part in parts) or len(weight) > 200:
        return ""
    return ".".join(parts)


def _from_node(node: OnnxNode) -> str:
    """Return ``layer1.0.relu`` for ``/layer1/layer1.0/relu/Relu``, as PyTorch names nodes."""
    if node.name.startswith("/"):
        path: list[str] = []
        for part in node.name.strip("/").split("/")[:-1]:
            if path and part.startswith(f"{path[-1]}."):
                path[-1] = part
            else:
                path.append(part)
        words = [word for part in path for word in part.split(".")]
        if words and all(_WORD.match(word) for word in words) and len(node.name) <= 200:
            return ".".join(words)
    name = clean(node.name)
    return f"{clean(node.operator).lower()}_{name}" if name[0].isdigit() else name


def _clash(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    parent = root
    for part in path:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(last, module)
