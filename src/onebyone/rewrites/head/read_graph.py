"""Reads a head's calls from a graph, from the scores back to the map."""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from onebyone.networks.layers import GlobalAverageHead
from onebyone.networks.surgery import parameter_owners
from onebyone.rewrites.head.chain import (
    Call,
    Chain,
    NotFound,
    is_elementwise,
    is_norm,
    is_understood_linear,
)
from onebyone.rewrites.head.score_map import ScoreMapHead

Shapes = dict[fx.Node, tuple[int, ...]]

# What only gives the same numbers another shape, in the same order.
_RESHAPES: frozenset[Any] = frozenset(
    {"flatten", "view", "reshape", "squeeze", "contiguous"}
    | {torch.flatten, torch.reshape, torch.squeeze, operator.getitem}
)
_POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)
_POOL_FUNCTIONS: frozenset[Any] = frozenset({F.adaptive_avg_pool2d, F.avg_pool2d})
_ACTIVATION_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU, F.relu6: nn.ReLU6,
    F.gelu: nn.GELU, F.silu: nn.SiLU, F.mish: nn.Mish, F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid, F.hardtanh: nn.Hardtanh, F.leaky_relu: nn.LeakyReLU,
    F.elu: nn.ELU, F.selu: nn.SELU, F.celu: nn.CELU, F.softplus: nn.Softplus,
    F.logsigmoid: nn.LogSigmoid, torch.sigmoid: nn.Sigmoid, F.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid, torch.tanh: nn.Tanh, F.tanh: nn.Tanh, "tanh": nn.Tanh,
}  # fmt: skip
_SOFTMAXES: frozenset[Any] = frozenset(
    {F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, "softmax", "log_softmax"}
)


class Opening(Exception):  # noqa: N818 - a request
    """The module of that name must be opened to go on."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Reader:
    """Walks a graph from its output back to the map that the head takes.

    Args:
        network: Has the modules that the graph calls.
        graph: Of calls.
        shapes: Of the tensors that the nodes give.
        shut: Names of modules that cannot be opened.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, shapes: Shapes, shut: set[str]) -> None:
        self.graph = graph
        self.shapes = shapes
        self.shut = shut
        self.modules: dict[str, nn.Module] = dict(network.named_modules())
        self.names: dict[int, int] = {}
        self.owners = parameter_owners(network)
        for _, module in network.named_modules(remove_duplicate=False):
            self.names[id(module)] = self.names.get(id(module), 0) + 1
        self.by_place = True
        self.note = ""

    def read(self) -> Chain:
        """Return the chain; raise if there is none, or if a box must be opened."""
        node = self._last_linear()
        calls: list[Call] = []
        while True:
            source = _only_input(node)
            if len(self._shape(source)) != 2 and not self._is_linear(node):
                break
            calls.insert(0, self._step(node))
            node = source
            if len(self._shape(node)) != 2:
                raise NotFound("its linear layer acts on each place of a map")
        flat = self._shape(node)
        node, flattening = self._flattening(node)
        node, pooling, order = self._pooling(node)
        calls = [*pooling, *flattening, *calls]
        channels, height, width = self._shape(node)[1:]
        chain = Chain(tuple(calls), (), channels, height, width, order, self.by_place, self.note)
        size = 1 if chain.averaged else height * width
        if flat[1] != channels * size:
            raise NotFound("its map becomes a vector in a way that is not a flattening")
        return chain

    # ------------------------------------------------ from the output to the last linear layer

    def _last_linear(self) -> fx.Node:
        node: Any = next(n for n in reversed(self.graph.nodes) if n.op == "output").args[0]
        while True:
            if not isinstance(node, fx.Node) or node.op in ("placeholder", "get_attr"):
                raise NotFound("it does not end in linear layers on a flattened map")
            if node.op == "call_module":
                if self._is_linear(node):
                    return node
                self._open_head(node)
            if node.target is F.linear:
                raise NotFound(
                    f"{_called_by(node)} calls torch's 'linear' function, not an nn.Linear module"
                )
            source = node.args[0] if node.args else None
            if isinstance(source, fx.Node) and len(self._shape(source)) != 2:
                self._refuse_convolutions(node)
            if len(self._shape(node)) != 2:
                raise NotFound("it does not end in linear layers on a flattened map")
            self.by_place &= self._is_by_place(node)
            node = _only_input(node, alone=False)

    def _is_linear(self, node: fx.Node) -> bool:
        """Whether a node calls a linear layer; refuse what only looks like one."""
        if node.op != "call_module":
            return False
        module = self._module(node)
        if "quantized" in type(module).__module__.split("."):
            raise NotFound(
                f"its layer {node.target!r} is quantized, a {type(module).__module__}."
                f"{type(module).__qualname__}: rewrite the network before it is quantized"
            )
        if isinstance(module, nn.Linear) and nn.utils.parametrize.is_parametrized(module):
            raise NotFound(f"its linear layer {node.target!r} is parametrized")
        if is_understood_linear(module):
            return True
        kind = type(module)
        if isinstance(module, nn.Linear) or (
            kind.__name__.endswith("Linear") and not any(True for _ in module.children())
        ):
            raise NotFound(
                f"its layer {node.target!r} is a {kind.__module__}.{kind.__qualname__}, which may "
                f"compute something else than nn.Linear"
            )
        return False

    def _open_head(self, node: fx.Node) -> None:
        """Ask for a box to be opened that gives scores or features."""
        module = self._module(node)
        if len(self._shape(node)) == 2 and _is_box(module):
            self._refuse_own(node)
            self._open(node)

    def _refuse_own(self, node: fx.Node) -> None:
        if isinstance(self._module(node), (GlobalAverageHead, ScoreMapHead)):
            raise NotFound(f"its head {node.target!r} is already convolutions")

    def _open(self, node: fx.Node) -> None:
        name = str(node.target)
        if name in self.shut:
            raise NotFound(f"the forward of its module {name!r} cannot be traced by torch.fx")
        raise Opening(name)

    def _refuse_convolutions(self, node: fx.Node) -> None:
        """Say so where the scores come from a convolution."""
        classes = self._shape(node)[-1]
        while node.args and isinstance(node.args[0], fx.Node):
            if node.op == "call_module":
                module = self._module(node)
                if isinstance(module, nn.Conv2d):
                    raise NotFound(
                        f"its head is already convolutions: {node.target!r} gives the scores"
                    )
                if self._shape(node)[1:2] != (classes,):
                    return
                self._refuse_own(node)
                if _is_box(module) and str(node.target) not in self.shut:
                    raise Opening(str(node.target))
            node = node.args[0]

    def _is_by_place(self, node: fx.Node) -> bool:
        """Whether what is done to the scores can be done to a map of them too."""
        if node.op == "call_module":
            module = self._module(node)
            if isinstance(module, (nn.Softmax, nn.LogSoftmax)):
                return module.dim in (None, 1)
            return is_elementwise(module)
        if node.target in _SOFTMAXES:
            return node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None) in (None, 1)
        return node.target in _ACTIVATION_FUNCTIONS

    # ------------------------------------------------ over the steps between linear layers

    def _step(self, node: fx.Node) -> Call:
        if self._is_linear(node):
            self._check_linear(node)
            return self._call("linear", node, self._module(node))
        if self._is_reshape(node):
            return self._call("flatten", node, self._module_or_none(node))
        if node.op == "call_module":
            module = self._module(node)
            if is_elementwise(module) or is_norm(module):
                role = "dropout" if isinstance(module, nn.Dropout) else "step"
                return self._call(role, node, module)
            if _is_box(module) and any(True for _ in module.children()):
                self._open(node)
            raise NotFound(f"its head has a {type(module).__name__} next to its linear layers")
        if node.target is F.dropout:
            return self._call("dropout", node, nn.Dropout(_probability(node)))
        return self._call("step", node, _activation(node))

    def _check_linear(self, node: fx.Node) -> None:
        name = str(node.target)
        calls = sum(n.op == "call_module" and n.target == name for n in self.graph.nodes)
        if calls > 1:
            raise NotFound(f"the linear layer {name!r} is used {calls} times")
        module = self._module(node)
        shared = any(self.owners[id(p)] > 1 for p in module.parameters(recurse=False))
        if shared or self.names[id(module)] > 1:
            raise NotFound(f"the weight of the linear layer {name!r} is shared with another layer")

    # ------------------------------------------------ over the flattening and the pooling

    def _flattening(self, node: fx.Node) -> tuple[fx.Node, list[Call]]:
        """Go back from a vector to the map that it was."""
        calls: list[Call] = []
        while len(self._shape(node)) != 4:
            if _is_mean(node, self._shape(_only_input(node))):
                calls.insert(0, self._call("mean", node, None))
            elif self._is_reshape(node):
                calls.insert(0, self._call("flatten", node, self._module_or_none(node)))
            elif node.op == "call_module" and _is_box(self._module(node)):
                self._open(node)
            else:
                how = getattr(node.target, "__name__", node.target)
                raise NotFound(
                    f"its map becomes a vector by {how!r}, in a way that is not a flattening"
                )
            node = _only_input(node)
        return node, calls

    def _is_reshape(self, node: fx.Node) -> bool:
        """Whether a node gives each input's numbers in the same order, in whatever shape."""
        if node.op == "call_module":
            if type(self._module(node)) is not nn.Flatten:
                return False
        elif node.target not in _RESHAPES:
            return False
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        before, after = self._shape(source), self._shape(node)
        return before[:1] == after[:1] and math.prod(before[1:]) == math.prod(after[1:])

    def _pooling(self, node: fx.Node) -> tuple[fx.Node, list[Call], tuple[int, ...] | None]:
        """Go back over pooling, dropout and one permutation to the map that the new head takes."""
        calls: list[Call] = []
        order = None
        while isinstance(node.args[0] if node.args else None, fx.Node):
            role, module = self._map_role(node)
            if role == "permute":
                order = _order(node) if order is None else None
            if role is None or (role == "permute" and order is None):
                break
            calls.insert(0, self._call(role, node, module))
            node = _only_input(node)
        return node, calls, order

    def _map_role(self, node: fx.Node) -> tuple[str | None, nn.Module | None]:
        before = self._shape(cast("fx.Node", node.args[0]))
        if len(before) != 4:
            return None, None
        module = self._module_or_none(node)
        if type(module) in (nn.Dropout, nn.Identity):
            return ("dropout" if isinstance(module, nn.Dropout) else "pool"), module
        if node.target is F.dropout:
            return "dropout", nn.Dropout(_probability(node))
        if _order(node) is not None:
            return "permute", None
        role = "flatten" if node.target == "contiguous" else self._pool_role(node, before)
        return role, module

    def _pool_role(self, node: fx.Node, before: tuple[int, ...]) -> str | None:
        """Return ``average`` for a global average, ``pool`` for a pooling that changes nothing."""
        after = self._shape(node)
        if node.op == "call_module":
            module = self._module(node)
            if type(module) not in _POOLS:
                kind = type(module)
                opaque = not kind.__module__.startswith("torch.nn.") and "ool" in kind.__name__
                if opaque and str(node.target) not in self.shut:
                    raise Opening(str(node.target))
                return None
            adaptive = isinstance(module, nn.AdaptiveAvgPool2d)
        elif node.target in _POOL_FUNCTIONS:
            adaptive = node.target is F.adaptive_avg_pool2d
        else:
            return "average" if _is_mean(node, before) else None
        if after[2:] == (1, 1) and (adaptive or self._covers(node, before)):
            return "average"
        # Only an adaptive pool does nothing by design at this size, and would undo larger maps.
        if adaptive and before == after:
            return "pool"
        if adaptive:
            sizes = ["×".join(map(str, shape[2:])) for shape in (before, after)]
            self.note = (
                f"its adaptive pool makes {sizes[0]} maps {sizes[1]}, so it stays before the head, "
                f"which gives one score a class for an image of any size"
            )
        return None

    def _covers(self, node: fx.Node, before: tuple[int, ...]) -> bool:
        """Whether an average pool's window is the whole map, and nothing else."""
        if node.op != "call_module":
            return False
        pool = cast("nn.AvgPool2d", self._module(node))
        size = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * 2
        plain = pool.padding in {0, (0, 0)} and pool.divisor_override is None
        return plain and size == before[2:]

    # ------------------------------------------------ nodes

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.shapes.get(node, ())

    def _module(self, node: fx.Node) -> nn.Module:
        return self.modules[str(node.target)]

    def _module_or_none(self, node: fx.Node) -> nn.Module | None:
        return self._module(node) if node.op == "call_module" else None

    def _call(self, role: str, node: fx.Node, module: nn.Module | None) -> Call:
        alone = False
        if node.op == "call_module":
            calls = sum(n.op == "call_module" and n.target == node.target for n in self.graph.nodes)
            alone = calls == 1 and self.names[id(self._module(node))] == 1
        caller = str(node.meta.get("caller", ""))
        return Call(role, caller, node.op, node.target, module, alone)


def _is_box(module: nn.Module) -> bool:
    """Whether a module has a forward to look into."""
    plain = type(module).__module__.startswith("torch.nn.modules")
    return not plain or any(True for _ in module.children())


def _called_by(node: fx.Node) -> str:
    caller = node.meta.get("caller")
    return f"its module {caller!r}" if caller else "its forward"


def _only_input(node: fx.Node, *, alone: bool = True) -> fx.Node:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        raise NotFound("its head takes something that is not one tensor")
    readers = [user for user in source.users if user is not node and not _reads_shape(user)]
    if alone and readers:
        raise NotFound("a part of its head is used in two places")
    return source


def _reads_shape(node: fx.Node) -> bool:
    """Whether a node only asks for a size, as ``x.view(x.size(0), -1)`` does."""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    return node.op == "call_function" and node.target is getattr and "shape" in node.args


def _is_mean(node: fx.Node, before: tuple[int, ...]) -> bool:
    """Whether a node averages a map ``(n, c, h, w)`` over its pixels."""
    if node.target not in ("mean", torch.mean) or len(before) != 4:
        return False
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(dims, (list, tuple)):
        return False
    return sorted(cast("int", d) % 4 for d in dims) == [2, 3]


def _order(node: fx.Node) -> tuple[int, ...] | None:
    """Return the order of the dimensions that a node gives to a map, if that is all it does."""
    if node.target not in ("permute", torch.permute):
        return None
    dims = node.args[1:] if len(node.args) > 2 else node.args[1] if len(node.args) > 1 else None
    if not isinstance(dims, (list, tuple)) or not all(isinstance(d, int) for d in dims):
        return None
    order = tuple(cast("int", d) % 4 for d in dims)
    return order if order[0] == 0 else None


def _probability(node: fx.Node) -> float:
    """Return a dropout call's probability; refuse one that is on in evaluation mode too."""
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    if training is not False:
        raise NotFound("its head calls dropout in evaluation mode too")
    return float(cast("float", node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)))


def _activation(node: fx.Node) -> nn.Module:
    """Return the module that does what a function does, with the same settings."""
    kind = _ACTIVATION_FUNCTIONS.get(node.target)
    if kind is None:
        name = getattr(node.target, "__name__", str(node.target))
        raise NotFound(f"its head does {name!r} between the linear layers")
    settings = dict(node.kwargs)
    if len(node.args) > 1:
        try:
            names = list(inspect.signature(node.target).parameters)[1:]  # type: ignore[arg-type]
        except (TypeError, ValueError):
            names = []
        if len(names) < len(node.args) - 1:
            raise NotFound(f"its head calls {kind.__name__} with settings that cannot be read")
        settings |= dict(zip(names, node.args[1:], strict=False))
    settings.pop("inplace", None)
    make: Any = kind
    activation: nn.Module = make(**settings)
    return activation
