"""A network as a graph of single operations, its batch norms folded into its layers."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import guard_or_false

from onebyone.core.errors import ModelError
from onebyone.core.shared_state import errors_unprinted, warnings_ignored
from onebyone.networks.exportable import growth_limited
from onebyone.networks.fx_forward import attributes_kept
from onebyone.networks.surgery import evaluation_copy

_ATEN = torch.ops.aten
CONV, LINEAR = _ATEN.conv2d.default, _ATEN.linear.default
_NORM = _ATEN._native_batch_norm_legit_no_training.default  # noqa: SLF001 - so it is called
# Sets of free dimensions of a picture, from the most: some networks fix the size.
_FREE = ((0, 2, 3), (0,))
_DEFAULTS: tuple[Any, ...] = ((1, 1), (0, 0), (1, 1), 1)  # of a convolution's geometry


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer of a graph.

    Attributes:
        name: The module's name in the network; of a module that runs twice the second call is
            ``name#2``.
        node: The name of its operation in the graph.
        weight: ``(out, in / groups, height, width)``, or ``(out, in)`` of a linear layer.
        bias: ``(out,)``; zeros where the layer has none.
    """

    name: str
    node: str
    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @property
    def kind(self) -> str:
        """``conv`` or ``linear``."""
        return "linear" if self.weight.ndim == 2 else "conv"

    def run(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return the layer's outputs, with other weights if these are given."""
        weight = self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        if self.kind == "linear":
            return nn.functional.linear(x, weight, bias)
        return nn.functional.conv2d(
            x, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )


@dataclass(frozen=True)
class Captured:
    """A network's graph in evaluation mode.

    Attributes:
        module: Runs the graph. A layer's weights are its attributes ``<node>_weight``,
            ``<node>_bias``.
        layers: By the name of their node, in the order in which they run.
        sizes: Of one example; ``None`` for those that are free. Constants in the graph may depend
            on the others.
    """

    module: fx.GraphModule
    layers: dict[str, Layer]
    sizes: tuple[int | None, ...]

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph


def capture(network: nn.Module, example: Tensor) -> Captured:
    """Return a network's graph, each batch norm that follows a layer folded into it.

    Args:
        network: Not modified.
        example: An input ``(batch, …)``.

    Raises:
        ModelError: If it cannot be traced, or fixes the size of its batch.
    """
    copy = evaluation_copy(network, device="cpu").requires_grad_(requires_grad=False)
    module, sizes = _traced(copy, example)
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.name == "_guards_fn":
            module.graph.erase_node(node)
        if node.target is _ATEN.view.default:
            # Convolutions of some kernels give maps of another layout, which a view does not take.
            node.target = _ATEN.reshape.default
    layers: dict[str, Layer] = {}
    for node in list(module.graph.nodes):
        found = _layer(module, node)
        if found is not None:
            layers[node.name] = _with_norm_folded(module, node, found)
    for node in module.graph.nodes:
        if node.name in layers:
            _own_weights(module, node, layers[node.name])
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return Captured(module, _named(layers, module.graph), sizes)


def _traced(network: nn.Module, example: Tensor) -> tuple[fx.GraphModule, tuple[int | None, ...]]:
    """Return a network's graph, and the sizes of one example, without those that are free."""
    two = example.cpu().repeat_interleave(2, 0)[:2]  # one alone would be taken for a constant size
    failure: Exception | None = None
    for free in _FREE if example.ndim == 4 else _FREE[1:]:
        shapes = (dict.fromkeys(free, Dim.AUTO),)
        with attributes_kept(network), warnings_ignored(), errors_unprinted():
            try:
                with growth_limited(network):
                    program = torch.export.export(network, (two,), dynamic_shapes=shapes)
                program = program.run_decompositions({})
            except Exception as error:  # noqa: BLE001 - a user's forward may do anything
                failure = error
                continue
            size = next(n for n in program.graph.nodes if n.name in _inputs(program)).meta["val"]
            if isinstance(size.shape[0], int) and not guard_or_false(size.shape[0] != 2):
                raise ModelError(
                    "A network must take any batch size to be quantized, but this one fixes it "
                    "to that of its example. Read the batch's size in `forward` from the input."
                )
            module = program.module()
            assert isinstance(module, fx.GraphModule)
            return module, tuple(x if isinstance(x, int) else None for x in size.shape[1:])
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    raise ModelError(
        f"The network {type(network).__name__} cannot be traced to be quantized: "
        f"{lines[0].rstrip('.')}."
    ) from failure


def _inputs(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    return tuple(program.graph_signature.user_inputs)


def _constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    """Return the tensor that a node reads from the module, if it does."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else None


def _layer(module: fx.GraphModule, node: fx.Node) -> Layer | None:
    """Return the layer that a node calls, if int8 can compute it: 2-D, with constant weights."""
    if node.target not in (CONV, LINEAR):
        return None
    args = [*node.args, *[None] * (3 - len(node.args))]
    weight = _constant(module, args[1])
    bias = _constant(module, args[2])
    if weight is None or weight.dtype != torch.float32:
        return None
    if args[2] is not None and bias is None:
        return None
    layer = Layer(
        name=_module_name(node),
        node=node.name,
        weight=weight.clone(),
        bias=torch.zeros(len(weight)) if bias is None else bias.clone(),
    )
    if node.target is LINEAR:
        return layer
    geometry: list[Any] = [*args[3:], *_DEFAULTS[len(args) - 3 :]]
    stride, padding, dilation, groups = geometry
    return replace(
        layer,
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=int(groups),
    )


def _pair(value: Any) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in value)
    return sizes * 2 if len(sizes) == 1 else sizes


def _module_name(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values() if not name.startswith("_empty_nn_module_stack")]
    return (names[-1] if names else "") or node.name


def _named(layers: dict[str, Layer], graph: fx.Graph) -> dict[str, Layer]:
    """Return the layers in order, each with a name of its own."""
    seen: dict[str, int] = {}
    named = {}
    for node in graph.nodes:
        layer = layers.get(node.name)
        if layer is None:
            continue
        seen[layer.name] = seen.get(layer.name, 0) + 1
        times = seen[layer.name]
        name = layer.name if times == 1 else f"{layer.name}#{times}"
        named[node.name] = replace(layer, name=name)
    return named


def _with_norm_folded(module: fx.GraphModule, node: fx.Node, layer: Layer) -> Layer:
    """Return a layer with the batch norm that alone follows it folded in; the norm is removed."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not _NORM or users[0].args[0] is not node:
        return layer
    norm = users[0]
    results = list(norm.users)
    if any(use.target is not operator.getitem or use.args[1] != 0 for use in results):
        return layer
    scale, shift, mean, variance = (_constant(module, arg) for arg in norm.args[1:5])
    if mean is None or variance is None:
        return layer
    factor = (variance.double() + float(norm.args[6])).rsqrt()  # type: ignore[arg-type]
    factor = factor if scale is None else factor * scale.double()
    bias = (layer.bias.double() - mean.double()) * factor
    bias = bias if shift is None else bias + shift.double()
    weight = layer.weight.double() * factor.reshape(-1, *[1] * (layer.weight.ndim - 1))
    for use in results:
        use.replace_all_uses_with(node)
        module.graph.erase_node(use)
    module.graph.erase_node(norm)
    return replace(layer, weight=weight.float(), bias=bias.float())


def _own_weights(module: fx.GraphModule, node: fx.Node, layer: Layer) -> None:
    """Make a layer read weights of its own: others may share those that it has."""
    made = []
    for part, value in (("weight", layer.weight), ("bias", layer.bias)):
        name = f"{node.name}_{part}"
        module.register_buffer(name, value)
        with module.graph.inserting_before(node):
            made.append(module.graph.get_attr(name))
    node.args = (node.args[0], *made, *node.args[3:])


def with_layer(captured: Captured, layer: Layer) -> Captured:
    """Return a graph of which one layer is another; what it reads in the graph is changed too."""
    setattr(captured.module, f"{layer.node}_weight", layer.weight)
    setattr(captured.module, f"{layer.node}_bias", layer.bias)
    return replace(captured, layers={**captured.layers, layer.node: layer})


def tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes whose tensors an operation takes, without weights."""
    for source in node.all_input_nodes:
        if source.op != "get_attr":
            yield source
