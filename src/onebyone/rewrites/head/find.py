"""Finds the chain of calls at the end of a network that makes scores of a map, from its graph.

The graph comes from ``torch.fx`` with the modules as closed boxes, which are opened from the back
only as far as the head is inside one of them. So a network whose blocks cannot be traced still has
a readable head. Where the outermost forward itself cannot be traced, ``torch.export`` is asked; its
graph has no calls of modules, but each operation knows the module that it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from onebyone.core.tensor_trees import fresh
from onebyone.networks.export_graph import exported_graph
from onebyone.networks.fx_forward import CannotTrace, trace_calls
from onebyone.networks.plain_layers import why_called_otherwise, why_not_its_class
from onebyone.networks.surgery import run
from onebyone.rewrites.head.chain import Chain, NotFound
from onebyone.rewrites.head.read_graph import Opening, Reader, Shapes


def find_chain(network: nn.Module, example: Tensor) -> Chain:
    """Return the chain at the end of a network.

    Args:
        network: In evaluation mode. Not modified.
        example: An input ``(batch, …)`` that the network is run on.

    Raises:
        NotFound: With the reason.
        ModelError: If the network does not run on the example.
    """
    _check_kind(network)
    _check_scores(run(network, example))
    opened: list[str] = []
    shut: set[str] = set()
    while True:
        try:
            graph, shapes = _traced(network, opened, example)
        except CannotTrace as reason:
            if opened and opened[-1] not in shut and len(shut) < len(list(network.modules())):
                shut.add(opened.pop())
                continue
            return _by_export(network, example, str(reason))
        try:
            chain = Reader(network, graph, shapes, shut).read()
        except Opening as more:
            opened.append(more.name)
        except NotFound as reason:
            # Behind a box that cannot be traced there may still be a head to be seen by export.
            return _by_export(network, example, str(reason)) if shut else _raise(reason)
        else:
            return _plain(network, replace(chain, opened=tuple(opened)))


def _raise(error: Exception) -> Chain:
    raise error


def _by_export(network: nn.Module, example: Tensor, reason: str) -> Chain:
    try:
        graph, shapes = exported_graph(network, example)
    except CannotTrace as error:
        raise NotFound(
            f"its forward cannot be traced by torch.fx ({reason}) nor by torch.export ({error})"
        ) from error
    chain = Reader(network, graph, shapes, set(dict(network.named_modules()))).read()
    return _plain(network, chain)


def _plain(network: nn.Module, chain: Chain) -> Chain:
    """Return a chain whose layers do what their classes say, and whose callers what was traced."""
    for call in chain.calls:
        if call.name and (reason := why_not_its_class(network.get_submodule(call.name))):
            raise NotFound(f"its module {call.name!r} {reason}")
    for name in dict.fromkeys(("", *chain.opened, *(call.caller for call in chain.calls))):
        reason = why_called_otherwise(network.get_submodule(name))
        if reason is not None:
            raise NotFound(f"its module {name!r} {reason}" if name else f"it {reason}")
    return chain


def _check_kind(network: nn.Module) -> None:
    if isinstance(network, torch.jit.ScriptModule):
        raise NotFound("it is a TorchScript module; pass the nn.Module that it was made from")
    for name, parameter in network.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise NotFound(f"{name!r} is a lazy parameter; run the network once to give it a shape")


def _check_scores(output: object) -> None:
    """Refuse what is not a row of scores for each input."""
    if isinstance(output, Tensor):
        if output.ndim != 2:
            shape = "×".join(map(str, output.shape))
            raise NotFound(
                f"it does not end in linear layers on a flattened map, but in a {shape} output"
            )
        return
    what = type(output).__name__
    if isinstance(output, Mapping):
        what = f"a {what} of {', '.join(map(repr, output))}"
    elif isinstance(output, Sequence):
        what = f"a {what} of {len(output)}"
    raise NotFound(f"it gives {what}, not one tensor of scores")


def _traced(network: nn.Module, opened: list[str], example: Tensor) -> tuple[fx.Graph, Shapes]:
    graph = trace_calls(network, opened)
    shapes: Shapes = {}
    try:
        with torch.no_grad():
            _ShapeReader(network, graph, shapes).run(fresh(example))
    except Exception as error:  # the graph may hold what was decided for symbols only
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CannotTrace(lines[0].rstrip(".")) from error
    return graph, shapes


class _ShapeReader(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, shapes: Shapes) -> None:
        super().__init__(module, graph=graph)
        self.shapes = shapes

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result
