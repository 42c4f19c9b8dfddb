"""Graph pass for the CPU: folds batch norms, packs weights for oneDNN, and fuses layers."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from onebyone.runtimes.packed.layer_calls import (
    IN_PLACE,
    NO_ACTIVATION,
    Call,
    Given,
    Unary,
    Way,
    calls_of,
    fastest,
    is_product,
)
from onebyone.runtimes.packed.nodes import layer_of, module_of, mutates, shape_of

_MODULE_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Unary]] = {
    nn.ReLU: lambda _: ("relu", [], ""),
    nn.ReLU6: lambda _: ("hardtanh", [0.0, 6.0], ""),
    nn.Hardtanh: lambda module: ("hardtanh", [module.min_val, module.max_val], ""),
    nn.LeakyReLU: lambda module: ("leaky_relu", [module.negative_slope], ""),
    nn.SiLU: lambda _: ("swish", [], ""),
    nn.Hardswish: lambda _: ("hardswish", [], ""),
    nn.Sigmoid: lambda _: ("sigmoid", [], ""),
    nn.Hardsigmoid: lambda _: ("hardsigmoid", [], ""),
    nn.Tanh: lambda _: ("tanh", [], ""),
    nn.GELU: lambda module: ("gelu", [], module.approximate),
}
# Functions of one tensor, without other arguments that change the result.
_FUNCTION_ACTIVATIONS: dict[Any, Unary] = {
    F.relu: ("relu", [], ""),
    torch.relu: ("relu", [], ""),
    torch.relu_: ("relu", [], ""),
    F.relu6: ("hardtanh", [0.0, 6.0], ""),
    F.silu: ("swish", [], ""),
    F.hardswish: ("hardswish", [], ""),
    F.hardsigmoid: ("hardsigmoid", [], ""),
    torch.sigmoid: ("sigmoid", [], ""),
    torch.tanh: ("tanh", [], ""),
    "relu": ("relu", [], ""),
    "relu_": ("relu", [], ""),
    "sigmoid": ("sigmoid", [], ""),
    "tanh": ("tanh", [], ""),
}
_HARMLESS_KEYWORDS = {"inplace"}
_IN_PLACE_ADDITIONS: tuple[Any, ...] = (operator.iadd, "add_")
_ADDITIONS: tuple[Any, ...] = (operator.add, torch.add, "add", *_IN_PLACE_ADDITIONS)
_NOTHING = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)

# Below this size, oneDNN's fixed cost of some tens of microseconds per call matters.
SMALL_MACS = 4_000_000


@dataclass
class Packing:
    """What the pass did.

    Attributes:
        packed: Layers whose weights were packed.
        folded: Batch norms folded into them.
        activations: Activations fused into them.
        additions: Additions of two branches fused into them.
        rows: Pointwise convolutions packed as linear layers over the pixels.
        products: Layers that were faster unpacked: pointwise and linear ones through the BLAS
            library, and small ones unchanged.
        measured: The fastest way for each kind of layer, by geometry, shape and what follows it.
    """

    packed: int = 0
    folded: int = 0
    activations: int = 0
    additions: int = 0
    rows: int = 0
    products: int = 0
    measured: dict[tuple[Any, ...], Way] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.packed} layers packed, {self.rows} of them 1×1 as products of rows, "
            f"{self.folded} batch norms folded, "
            f"{self.activations} activations and {self.additions} additions fused, "
            f"{self.products} layers faster unpacked"
        )


def fuse(graph: fx.GraphModule, done: Packing) -> nn.Module:
    """Pack a traced network's layers, and fuse the steps around them.

    Args:
        graph: In evaluation mode, with the output shape of each node. Modified in place.
        done: Updated with what was done.
    """
    for node in reversed(list(graph.graph.nodes)):
        _drop_check(graph, node)
    for node in list(graph.graph.nodes):
        _drop_nothing(graph, node)
    for node in list(graph.graph.nodes):
        done.folded += _fold_norm(graph, node)
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    mutating = [place for node, place in order.items() if mutates(graph, node)]
    taken: set[fx.Node] = set()
    for node in list(graph.graph.nodes):
        if node not in taken:
            steps = _steps(graph, node, order, mutating)
            if steps is None:
                continue
            taken |= _emit(graph, steps, _way(graph, steps, done), done)
    # Erase only replaced nodes: an in-place node may have no reader and still change what others
    # read.
    for node in reversed(list(graph.graph.nodes)):
        if node in taken:
            graph.graph.erase_node(node)
    _add_in_place(graph)
    _channels_last_input(graph)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _drop_check(graph: fx.GraphModule, node: fx.Node) -> None:
    """Remove an assertion, which held for this shape, and the nodes that only it used."""
    asserted = node.target is torch._assert  # noqa: SLF001 - the only name it has
    asked = node.target in (getattr, operator.eq) and not node.users
    if node.op == "call_function" and (asserted or asked) and not node.users:
        graph.graph.erase_node(node)


def _drop_nothing(graph: fx.GraphModule, node: fx.Node) -> None:
    if type(module_of(graph, node)) in _NOTHING and isinstance(node.args[0], fx.Node):
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)


def _fold_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    norm = _norm_of(graph, node)
    if norm is None or not isinstance(node.args[0], fx.Node):
        return False
    before = node.args[0]
    layer = module_of(graph, before)
    if type(layer) is not nn.Conv2d or len(before.users) > 1 or layer.weight.dtype != norm.dtype:
        return False
    name = f"folded_{before.name}"
    graph.add_submodule(name, _with_norm(layer, norm))
    before.target = name
    node.replace_all_uses_with(before)
    graph.graph.erase_node(node)
    return True


@dataclass(frozen=True)
class _Norm:
    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def dtype(self) -> torch.dtype:
        return self.mean.dtype


def _norm_of(graph: fx.GraphModule, node: fx.Node) -> _Norm | None:
    """Return a node's batch norm (module or ``F.batch_norm``) if it uses running statistics."""
    module = module_of(graph, node)
    if type(module) is nn.BatchNorm2d:
        if module.running_mean is None or module.running_var is None or module.training:
            return None
        return _Norm(
            module.running_mean, module.running_var, module.weight, module.bias, module.eps
        )
    if node.op == "call_function" and node.target is F.batch_norm:
        return _functional_norm(graph, node)
    return None


def _functional_norm(graph: fx.GraphModule, node: fx.Node) -> _Norm | None:
    names = list(inspect.signature(F.batch_norm).parameters)
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("training", False) is not False:
        return None
    values = [
        _constant(graph, given.get(name))
        for name in ("running_mean", "running_var", "weight", "bias")
    ]
    mean, variance, weight, bias = values
    absent = [given.get(name) is not None for name in ("weight", "bias")]
    if mean is None or variance is None or absent != [weight is not None, bias is not None]:
        return None
    eps = given.get("eps", 1e-5)
    return _Norm(mean, variance, weight, bias, eps) if isinstance(eps, float) else None


def _constant(graph: fx.GraphModule, value: Any) -> Tensor | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = operator.attrgetter(str(value.target))(graph)
    return found if isinstance(found, Tensor) else None


def _with_norm(layer: nn.Conv2d, norm: _Norm) -> nn.Conv2d:
    """Return a new convolution with the norm folded in; the old one may have other uses."""
    scale = (norm.variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.mean.double() if layer.bias is None else layer.bias.double() - norm.mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    new = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        padding_mode=layer.padding_mode,
        device="meta",
    )
    new.weight = nn.Parameter(layer.weight.detach() * scale.to(norm.dtype).view(-1, 1, 1, 1))
    new.bias = nn.Parameter(shift.to(norm.dtype))
    return new.eval()


# ---------------------------------------------------------------- packed layers


@dataclass(frozen=True)
class _Steps:
    """A layer and the operations after it that will become one call.

    Attributes:
        layer: A convolution or a linear layer.
        nodes: The nodes of the layer, the addition and the activation, if there are any.
        other: The branch that is added.
        unary: The activation.
    """

    layer: nn.Conv2d | nn.Linear
    nodes: tuple[fx.Node, ...]
    other: fx.Node | None = None
    unary: Unary = NO_ACTIVATION


def _steps(
    graph: fx.GraphModule, node: fx.Node, order: dict[fx.Node, int], mutating: list[int]
) -> _Steps | None:
    layer = layer_of(graph, node)
    if layer is None:
        return None
    if isinstance(layer, nn.Linear):
        return _with_activation(graph, _Steps(layer, (node,)), order, mutating)
    steps = _Steps(layer, (node,))
    other = _addend(node, order)
    if other is not None:
        wider = _Steps(layer, (node, next(iter(node.users))), other)
        steps = wider if _undisturbed(wider, order, mutating) else steps
    return _with_activation(graph, steps, order, mutating)


def _undisturbed(steps: _Steps, order: dict[fx.Node, int], mutating: list[int]) -> bool:
    """Whether no node mutates a tensor between the steps, which move to the last one's position."""
    first, *own = (order[node] for node in steps.nodes)
    return not any(first < place < own[-1] and place not in own for place in mutating)


def _with_activation(
    graph: fx.GraphModule, steps: _Steps, order: dict[fx.Node, int], mutating: list[int]
) -> _Steps:
    found = _activation_after(graph, steps.nodes[-1])
    # After an addition, oneDNN supports only ReLU as activation.
    if found is None or (steps.other is not None and found[1][0] != "relu"):
        return steps
    wider = _Steps(steps.layer, (*steps.nodes, found[0]), steps.other, found[1])
    return wider if _undisturbed(wider, order, mutating) else steps


def _macs(layer: nn.Conv2d | nn.Linear, node: fx.Node) -> int:
    outputs = math.prod(shape_of(node) or ())
    return outputs * layer.weight[0].numel()


def _way(graph: fx.GraphModule, steps: _Steps, done: Packing) -> Way:
    """Time a layer in each possible way and return the best for this processor and shape.

    oneDNN has about 20 µs more overhead per call than the BLAS library, and on some processors its
    product is no faster. Of its two kernels for 1×1 convolutions, the one for linear layers is
    usually faster.
    """
    layer, source = steps.layer, steps.nodes[0].args[0]
    assert isinstance(source, fx.Node)
    shape = shape_of(source)
    small = _macs(layer, steps.nodes[0]) <= SMALL_MACS
    if shape is None or not (is_product(layer) or (small and steps.other is None)):
        return "packed"
    meeting = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else ()
    adds = steps.other is not None
    key = (str(meeting), shape, layer.weight.shape, layer.bias is None, steps.unary[0], adds)
    if key not in done.measured:
        after = _step_after(graph, steps)
        x, other = _ones(source, layer), None if steps.other is None else _ones(steps.other, layer)
        ways = calls_of(layer, shape, steps.unary, adds=adds)
        done.measured[key] = fastest(
            {way: _timed(make(), x, other, after) for way, make in ways.items()}
        )
    return done.measured[key]


def _timed(
    call: Call, x: Tensor, other: Tensor | None, after: Callable[[Tensor], Tensor] | None
) -> Callable[[], Tensor]:
    call = replace(call, function=IN_PLACE.get(call.function, call.function))
    if call.whole or after is None:
        return partial(call, x, other)
    return lambda: after(call(x, other))


def _ones(node: fx.Node, layer: nn.Conv2d | nn.Linear) -> Tensor:
    ones = torch.ones(shape_of(node) or (), dtype=layer.weight.dtype)
    is_map = ones.ndim == 4 and isinstance(layer, nn.Conv2d)
    return ones.contiguous(memory_format=torch.channels_last) if is_map else ones


def _step_after(graph: fx.GraphModule, steps: _Steps) -> Callable[[Tensor], Tensor] | None:
    """Return the activation after a layer as a function, as in the graph."""
    if steps.unary is NO_ACTIVATION:
        return None
    node = steps.nodes[-1]
    step: Any = module_of(graph, node) or node.target
    if isinstance(step, str):
        return operator.methodcaller(step)
    return partial(step, **node.kwargs)


def _emit(graph: fx.GraphModule, steps: _Steps, way: Way, done: Packing) -> set[fx.Node]:
    """Insert one call for the steps that it computes; return the nodes that it replaces."""
    shape = shape_of(steps.nodes[0].all_input_nodes[0]) or ()
    adds = steps.other is not None
    call = calls_of(steps.layer, shape, steps.unary, adds=adds)[way]()
    _count(steps, call, way, done)
    if call.function is steps.layer:
        return set()
    replaced = steps.nodes if call.whole else steps.nodes[:1]
    with graph.graph.inserting_before(replaced[-1]):
        arguments = _arguments(graph, steps, call)
        new = graph.graph.call_function(call.function, arguments)
    new.meta = {**replaced[-1].meta, "packed": True}
    replaced[-1].replace_all_uses_with(new)
    return set(replaced)


def _count(steps: _Steps, call: Call, way: Way, done: Packing) -> None:
    done.packed += way != "plain"
    done.rows += way == "rows"
    done.products += way == "plain"
    done.additions += steps.other is not None
    done.activations += call.whole and steps.unary is not NO_ACTIVATION


def _arguments(graph: fx.GraphModule, steps: _Steps, call: Call) -> tuple[Any, ...]:
    first = steps.nodes[0]
    given = {Given.INPUT: first.args[0], Given.BRANCH: steps.other}

    def node(place: int, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return _keep(graph, f"packed_{first.name}_{place}", argument)
        return given[argument] if isinstance(argument, Given) else argument

    return tuple(node(place, argument) for place, argument in enumerate(call.arguments))


def _add_in_place(graph: fx.GraphModule) -> None:
    """Write a sum into its other branch's memory if nothing reads that branch later."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        if node.target not in IN_PLACE:
            continue
        source, other = node.args[:2]
        if other is source or not other.meta.get("packed"):
            continue
        readers = [user for user in other.users if user is not node]
        # A reader that is not a packed layer might return a view of the branch.
        if all(user.meta.get("packed") and order[user] < order[node] for user in readers):
            node.target = IN_PLACE[node.target]


def _addend(node: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """Return the other branch if a node's only use is an addition to a tensor of its shape."""
    if len(node.users) != 1:
        return None
    addition = next(iter(node.users))
    function = addition.op in ("call_function", "call_method") and addition.target in _ADDITIONS
    if not function or addition.kwargs or len(addition.args) != 2:
        return None
    others = [argument for argument in addition.args if argument is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    other = others[0]
    changed = addition.target in _IN_PLACE_ADDITIONS and addition.args[0] is other
    if changed and any(order.get(user, -1) > order[addition] for user in other.users):
        return None  # later readers need the other branch with the addition
    shapes = {shape_of(node), shape_of(other), shape_of(addition)}
    if len(shapes) != 1 or None in shapes:
        return None
    same_type = node.meta["tensor_meta"].dtype == other.meta["tensor_meta"].dtype
    return other if same_type else None


def _activation_after(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Unary] | None:
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if len(user.args) != 1 or set(user.kwargs) - _HARMLESS_KEYWORDS:
        return None
    module = module_of(graph, user)
    if module is not None:
        make = _MODULE_ACTIVATIONS.get(type(module))
        return None if make is None else (user, make(module))
    if user.op not in ("call_function", "call_method"):
        return None
    unary = _FUNCTION_ACTIVATIONS.get(user.target)
    return None if unary is None else (user, unary)


def _keep(graph: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    # A plain attribute, because a packed weight is opaque and cannot be in a state dict.
    object.__setattr__(graph, name, tensor)
    return graph.graph.create_node("get_attr", name)


def _channels_last_input(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        shape = shape_of(node) if node.op == "placeholder" else None
        if shape is None or len(shape) != 4:
            continue
        with graph.graph.inserting_after(node):
            laid = graph.graph.call_method(
                "contiguous", (node,), {"memory_format": torch.channels_last}
            )
        node.replace_all_uses_with(laid, delete_user_cb=lambda user, own=laid: user is not own)
