"""A network for inference on the CPU: traced whole or in parts, and its graph packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from onebyone.runtimes.fusing import Packing, fuse
from onebyone.sites import evaluation_copy, has_hooks, hooks_removed


def pack(model: nn.Module, example: Tensor) -> tuple[nn.Module, Packing]:
    """Return a network for inference on the CPU that gives the same outputs with less work.

    Its convolutions and linear layers have their weights packed once for oneDNN, with the batch
    norm before, the activation after and the addition of another branch in the same call;
    activations lie with their channels last. Whatever the pass does not understand runs as it is:
    a network that cannot be traced is packed part by part.

    Args:
        model: Not modified, and none of its tensors is shared.
        example: An input, on the CPU, of float32 or bf16; its shape is what the result is for.

    Raises:
        ModelError: If the network cannot be copied.
    """
    network = evaluation_copy(model)
    if example.ndim == 4:
        network = network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        inputs = _inputs_by_module(network, example)
        done = Packing()
        everything = list(network.modules())  # alive to the end: they are known by their ids
        packed = _packed(network, inputs, done, {})
        del everything
    return packed, done


def _inputs_by_module(network: nn.Module, example: Tensor) -> dict[int, Tensor | None]:
    """Return for each module the input it saw; ``None`` if it took several, or two shapes."""
    seen: dict[int, Tensor | None] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        known = seen.get(id(module), args[0] if single else None)
        same = single and known is not None and known.shape == args[0].shape
        # Of the shape alone: all activations of a network together may not fit in memory.
        seen[id(module)] = torch.empty_like(args[0], device="meta") if same else None

    with hooks_removed(
        [m.register_forward_pre_hook(see, with_kwargs=True) for m in network.modules()]
    ):
        network(example)
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
    """Sees a convolution or linear layer of the user's own kind as one step, left as it is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        own = isinstance(m, nn.Conv2d | nn.Linear)
        return own or super().is_leaf_module(m, module_qualified_name)


class _OneInput(nn.Module):
    """Calls a module with one tensor, so that its other arguments are their plain defaults."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        """Return what the body gives for ``x``, of any shape."""
        return self.body(x)


def _traced(module: nn.Module, example: Tensor) -> fx.GraphModule | None:
    """Return the module's graph with a shape at each node, or ``None`` if it cannot be had."""
    try:
        wrapped = _OneInput(module)
        graph = fx.GraphModule(wrapped, _Tracer().trace(wrapped))
        # Real zeros, not fake tensors: the network's own code runs on them.
        ShapeProp(graph).propagate(torch.zeros_like(example, device="cpu"))
    except Exception:  # noqa: BLE001 - tracing runs the user's code, which may fail in any way
        return None
    return graph.eval()
