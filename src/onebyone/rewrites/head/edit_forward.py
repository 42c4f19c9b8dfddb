"""Calls taken out of a network's forward pass: by the module's name, or in its caller's code.

A call of a module that is called nowhere else goes when the module is replaced, and no forward
changes. A call of a function, or of a module that has other uses, goes from the forward of the
module that makes it, as this forward is in training mode and as it is in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch.nn.functional as F
from torch import fx, nn

from onebyone.networks.fx_forward import CannotTrace, set_forward, traced_in
from onebyone.networks.plain_layers import has_hooks
from onebyone.networks.surgery import replace_module
from onebyone.rewrites.head.chain import Call, Chain, NotFound


class Action(Enum):
    """What to do with a call."""

    KEEP = auto()
    ERASE = auto()
    KEEP_DIMENSIONS = auto()  # of a mean
    WHOLE_CHANNELS = auto()  # are dropped by a dropout


@dataclass(frozen=True)
class Edits:
    """What changes in a network.

    Attributes:
        modules: New modules by name.
        forwards: Graphs in evaluation and in training mode, by the name of the module.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    forwards: dict[str, tuple[fx.Graph, fx.Graph]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Visible:
    """A call of the chain as the forward of one module shows it.

    Attributes:
        op: The node's.
        target: The node's; a module's name is relative.
        action: What to do with the node.
        averaged: Whether the map has been averaged when it gets there.
    """

    op: str
    target: object
    action: Action
    averaged: bool


def edits_of(network: nn.Module, chain: Chain, actions: Sequence[Action | nn.Module]) -> Edits:
    """Return what to change so that a chain's calls are as wanted.

    Args:
        network: Not modified.
        chain: In the network.
        actions: For each call; a module is put in the place of the one that is called.

    Raises:
        NotFound: If that cannot be, with the reason.
    """
    edits = Edits()
    callers: dict[str, None] = {}
    by_code: dict[int, Action] = {}
    for index, (call, action) in enumerate(zip(chain.calls, actions, strict=True)):
        if action is Action.KEEP:
            continue
        new = _replacement(call, action)
        if new is not None:
            _check_hooks(network.get_submodule(call.name), call.name)
            edits.modules[call.name] = new
        elif isinstance(action, Action):
            by_code[index] = action
            callers[call.caller] = None
    for caller in callers:
        visible = _visible(chain, caller, by_code)
        edits.forwards[caller] = _new_graphs(network, caller, visible)
    return edits


def carry_out(network: nn.Module, edits: Edits) -> None:
    """Change a network in place."""
    for name, (evaluation, training) in edits.forwards.items():
        set_forward(network.get_submodule(name), evaluation=evaluation, training=training)
    for name, module in edits.modules.items():
        replace_module(network, name, module)


def _replacement(call: Call, action: Action | nn.Module) -> nn.Module | None:
    """Return the module to put in the place of a called one, if that is the way."""
    if isinstance(action, nn.Module):
        if not call.alone:
            raise NotFound(f"its module {call.name!r} is used in other places too")
        return action
    if not call.alone:
        if action is Action.WHOLE_CHANNELS and call.op == "call_module":
            raise NotFound(f"its dropout {call.name!r} is used in other places too")
        return None
    if action is Action.WHOLE_CHANNELS:
        assert isinstance(call.module, nn.Dropout)
        return nn.Dropout2d(call.module.p, inplace=call.module.inplace)
    return nn.Identity()


def _check_hooks(module: nn.Module, name: str) -> None:
    if has_hooks(module):
        raise NotFound(f"its module {name!r} has hooks, which a rewrite would lose")


# ---------------------------------------------------------------- in the code of a forward


def _visible(chain: Chain, caller: str, actions: Mapping[int, Action]) -> list[_Visible | None]:
    """Return the chain as one forward shows it; ``None`` last if it goes on outside."""
    seen: list[_Visible | None] = []
    averaged = False
    inside = True
    for index, call in enumerate(chain.calls):
        averaged |= call.role in ("average", "mean")
        box = _box(chain, caller, call)
        inside = box is not None or call.caller == caller
        if not inside:
            continue
        if box is not None:
            shown = _Visible("call_module", box, Action.KEEP, averaged)
        else:
            target = _relative(call.name, caller) if call.name else call.target
            shown = _Visible(call.op, target, actions.get(index, Action.KEEP), averaged)
        # One call of a box may hold several calls of the chain.
        if box is None or not seen or seen[-1] is None or seen[-1].target != box:
            seen.append(shown)
    return seen if inside else [*seen, None]


def _box(chain: Chain, caller: str, call: Call) -> str | None:
    """Return the opened module, called by ``caller``, that a call is inside of."""
    for name in sorted(chain.opened, key=len):
        below = not caller or name.startswith(f"{caller}.")
        if below and (call.caller == name or call.caller.startswith(f"{name}.")):
            return _relative(name, caller)
    return None


def _relative(name: str, caller: str) -> str:
    return name.removeprefix(f"{caller}.") if caller else name


def _new_graphs(
    network: nn.Module, caller: str, visible: list[_Visible | None]
) -> tuple[fx.Graph, fx.Graph]:
    module = network.get_submodule(caller)
    whose = f"the forward of its module {caller!r}" if caller else "its forward"
    if type(module).__module__.startswith("torch.nn."):
        raise NotFound(f"the order of calls in {whose} is fixed")
    made = []
    for training in (False, True):
        mode = "training" if training else "evaluation"
        try:
            graph = traced_in(module, training=training)
            _edit(graph, module, visible)
        except CannotTrace as reason:
            raise NotFound(f"{whose} cannot be traced in {mode} mode: {reason}") from reason
        made.append(graph)
    return made[0], made[1]


def _edit(graph: fx.Graph, module: nn.Module, visible: list[_Visible | None]) -> None:
    """Walk back over the chain and change its nodes."""
    node, rest = _end(graph, visible)
    for shown in reversed(rest):
        while not _matches(node, shown):
            if not _is_dropout(node, module):
                raise CannotTrace(f"its head does not show the call of {_text(shown.target)}")
            if shown.averaged:
                _change(graph, node, Action.WHOLE_CHANNELS)
            node = _input(node)
        before = _input(node)
        _change(graph, node, shown.action)
        node = before
    graph.lint()


def _end(graph: fx.Graph, visible: list[_Visible | None]) -> tuple[fx.Node, list[_Visible]]:
    """Return the node of the chain's last visible call, and the calls up to it."""
    rest = [shown for shown in visible if shown is not None]
    if visible[-1] is None:
        output = next(n for n in reversed(graph.nodes) if n.op == "output")
        return _input(output), rest
    last = rest[-1]
    found = [node for node in graph.nodes if _matches(node, last)]
    if len(found) != 1:
        raise CannotTrace(f"it calls {_text(last.target)} {len(found)} times")
    return found[0], rest


def _matches(node: fx.Node, shown: _Visible) -> bool:
    return node.op == shown.op and node.target == shown.target


def _is_dropout(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.Dropout)
    return node.target is F.dropout


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        raise CannotTrace("its head takes something that is not one tensor")
    return source


def _change(graph: fx.Graph, node: fx.Node, action: Action) -> None:
    if action is Action.ERASE:
        node.replace_all_uses_with(_input(node))
        graph.erase_node(node)
    elif action is Action.KEEP_DIMENSIONS:
        node.args = node.args[:2]
        node.kwargs = {**node.kwargs, "keepdim": True}
    elif action is Action.WHOLE_CHANNELS:
        if node.op == "call_module":
            raise CannotTrace(f"it calls the dropout {node.target!r} in this mode only")
        node.target = F.dropout2d


def _text(target: object) -> str:
    return repr(getattr(target, "__name__", target))
