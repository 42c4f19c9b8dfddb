"""Packs a network for inference on the CPU: traces it, whole or in parts, and packs the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from onebyone.networks.plain_layers import has_hooks
from onebyone.networks.surgery import evaluation_copy, hooks_removed, lay_channels_last, run
from onebyone.runtimes.packed.fuse import Packing, fuse


def pack(model: nn.Module, example: Tensor) -> tuple[nn.Module, Packing]:
    """Return a network for inference on the CPU that computes the same outputs faster.

    The weights of its convolutions and linear layers are packed once for oneDNN. Each call includes
    the batch norm and the activation that follow the layer, and the addition of another branch.
    Activations are in channels-last layout. Layers that the pass does not support run unchanged,
    and a network that cannot be traced is packed part by part.

    Args:
        model: Not modified; the result shares no tensors with it.
        example: An input on the CPU, in float32 or bf16. The result only accepts this shape.

    Raises:
        ModelError: If the network cannot be copied.
    """
    network = evaluation_copy(model)
    if example.ndim == 4:
        lay_channels_last(network)
    with torch.no_grad():
        inputs = _inputs_by_module(network, example)
        done = Packing()
        everything = list(network.modules())  # keeps them alive, since they are identified by `id`
        packed = _packed(network, inputs, done, {})
        del everything
    return packed, done


def _inputs_by_module(network: nn.Module, example: Tensor) -> dict[int, Tensor | None]:
    """Return each module's input; ``None`` if it takes several inputs, or more than one shape."""
    seen: dict[int, Tensor | None] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        known = seen.get(id(module), args[0] if single else None)
        same = single and known is not None and known.shape == args[0].shape
        # Only the shape: all activations of a network together may not fit into memory.
        seen[id(module)] = torch.empty_like(args[0], device="meta") if same else None

    with hooks_removed(
        [m.register_forward_pre_hook(see, with_kwargs=True) for m in network.modules()]
    ):
        run(network, example)
    return seen


def _packed(
    module: nn.Module,
    inputs: dict[int, Tensor | None],
    done: Packing,
    known: dict[int, nn.Module],
) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    result = module
    example = inputs.get(id(module))
    if example is not None and not any(has_hooks(part) for part in module.modules()):
        graph = _traced(module, example)
        if graph is not None:
            result = fuse(graph, done)
    if result is module and not _is_leaf(module):
        for name, child in list(module.named_children()):
            setattr(module, name, _packed(child, inputs, done, known))
    known[id(module)] = result
    return result


def _is_leaf(module: nn.Module) -> bool:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, containers)


class _Tracer(fx.Tracer):
    """Traces a user's subclass of a convolution or linear layer as one node, which is kept."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        own = isinstance(m, nn.Conv2d | nn.Linear)
        return own or super().is_leaf_module(m, module_qualified_name)


class _OneInput(nn.Module):
    """Calls a module with one tensor, so that its other arguments have their defaults."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        """Return the module's output for ``x`` of any shape."""
        return self.body(x)


def _traced(module: nn.Module, example: Tensor) -> fx.GraphModule | None:
    """Return the module's graph with the shape of each node, or ``None`` if tracing fails."""
    try:
        wrapped = _OneInput(module)
        graph = fx.GraphModule(wrapped, _Tracer().trace(wrapped))
        # Uses real zeros, because the network's own code may not run on fake tensors.
        ShapeProp(graph).propagate(torch.zeros_like(example, device="cpu"))
    except Exception:  # noqa: BLE001 - tracing runs the user's code, which may fail in any way
        return None
    return graph.eval()
