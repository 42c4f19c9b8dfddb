"""Flatten + Linear becomes convolutions: the same scores exactly, or 1×1 + global average pooling.

The graph of the network's last part is read by ``torch.fx``. Modules stay closed boxes unless the
head is inside one of them, so a network whose blocks cannot be traced can still have its head
rewritten, and everything before the head keeps its classes, names and weights.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from onebyone.errors import PlanError
from onebyone.evaluation import divergence, is_classifier_output
from onebyone.layers import GlobalAverageHead
from onebyone.records import Cost
from onebyone.sites import evaluation_copy, replace_module

FORMS = ("exact", "gap")

_FLATTENS: frozenset[Any] = frozenset({"flatten", "view", "reshape", "squeeze"})
_FLATTEN_FUNCTIONS: frozenset[Any] = frozenset({torch.flatten, torch.reshape, torch.squeeze})
_POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)
_POOL_FUNCTIONS: frozenset[Any] = frozenset({F.adaptive_avg_pool2d, F.avg_pool2d})
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU,
    nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout,
    nn.AlphaDropout,
)  # fmt: skip
_ACTIVATION_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU,
    F.relu6: nn.ReLU6, F.gelu: nn.GELU, F.silu: nn.SiLU, F.hardswish: nn.Hardswish,
    torch.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid, torch.tanh: nn.Tanh, "tanh": nn.Tanh,
}  # fmt: skip


def is_understood_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or a subclass known to compute the same."""
    # timm's Linear differs from torch's only in how it is scripted.
    kind = type(module)
    return kind is nn.Linear or (kind.__module__, kind.__name__) == (
        "timm.layers.linear",
        "Linear",
    )


class ScoreMapHead(nn.Sequential):
    """A classifier of convolutions only: scores of one window, or a map of scores of many.

    Shapes:
        A map that the first kernel covers once gives ``(batch, classes)``; a larger one gives
        ``(batch, classes, height, width)``, a score for each place of the kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, or the map of scores."""
        scores: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return scores.flatten(1) if scores.shape[-2:] == (1, 1) else scores


@dataclass(frozen=True)
class HeadSite:
    """A chain flatten → linear (→ activation, dropout → linear)* at the end of a network.

    Attributes:
        name: The first linear layer's, where the new head goes.
        occupies: Names of all the modules of the chain.
        channels: Of the map that is flattened.
        height: Of that map, in pixels.
        width: Of that map, in pixels.
        averaged: Whether the map was averaged over its pixels before it was flattened.
        steps: The chain after the flattening: linear layers and elementwise modules.
        map_height: Height of the map before averaging.
        map_width: Width of the map before averaging.
    """

    name: str
    occupies: tuple[str, ...]
    channels: int
    height: int
    width: int
    averaged: bool
    steps: tuple[nn.Module, ...]
    map_height: int
    map_width: int

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers of the chain, in order."""
        return [step for step in self.steps if isinstance(step, nn.Linear)]

    @property
    def cost(self) -> Cost:
        """What the linear layers cost for one input."""
        params = sum(p.numel() for linear in self.linears for p in linear.parameters())
        return Cost(params=params, macs=sum(linear.weight.numel() for linear in self.linears))


@dataclass(frozen=True)
class NoHead:
    """Why no head can be rewritten, in words."""

    reason: str


class _Stop(Exception):  # noqa: N818 - a finding, not an error
    """The head cannot be rewritten; the message says why."""


@dataclass(frozen=True)
class _Chain:
    """Where the chain is in the graph.

    Attributes:
        start: The node whose output, a map, the new head takes.
        end: The last linear layer's node.
        site: What is there.
    """

    module: fx.GraphModule
    start: fx.Node
    end: fx.Node
    site: HeadSite


# ---------------------------------------------------------------- finding


def find_head(network: nn.Module, example: Tensor) -> HeadSite | NoHead:
    """Return the head of a network, or why there is none to rewrite.

    Args:
        network: Not modified.
        example: An input ``(batch, …)`` that the network is run on.
    """
    try:
        return _find_chain(evaluation_copy(network), example).site
    except _Stop as reason:
        return NoHead(str(reason))


class _Tracer(fx.Tracer):
    """Traces the root, its containers on the way, and the modules that were opened."""

    def __init__(self, opened: Iterable[str]) -> None:
        super().__init__()
        self.opened = frozenset(opened)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m
        return module_qualified_name not in self.opened


def _find_chain(network: nn.Module, example: Tensor) -> _Chain:
    """Open modules from the back until the chain is in sight."""
    opened: set[str] = set()
    while True:
        graph_module, shapes = _traced(network, opened, example)
        try:
            return _chain_in(graph_module, shapes)
        except _Opening as more:
            opened.add(more.name)


class _Opening(Exception):  # noqa: N818 - a request
    """The module of that name must be opened to go on."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _traced(
    network: nn.Module, opened: set[str], example: Tensor
) -> tuple[fx.GraphModule, dict[fx.Node, tuple[int, ...]]]:
    try:
        graph = _Tracer(opened).trace(network)
        graph_module = fx.GraphModule(network, graph, type(network).__name__)
        shapes: dict[fx.Node, tuple[int, ...]] = {}
        with torch.no_grad():
            _Shapes(graph_module, shapes).run(example)
    except Exception as error:  # a user's forward may do anything while it is traced
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _Stop(f"its forward cannot be traced by torch.fx: {lines[0]}") from error
    return graph_module, shapes


class _Shapes(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        super().__init__(module)
        self.shapes = shapes

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def _chain_in(module: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> _Chain:
    end = _last_linear(module, shapes)
    steps: list[nn.Module] = []
    names: list[str] = []
    node = end
    while not _is_flatten(module, node, shapes):
        step = _step(module, node)
        steps.insert(0, step)
        if node.op == "call_module":
            names.insert(0, str(node.target))
        node = _only_input(node)
    _check_linears(module, [n for n in names if isinstance(module.get_submodule(n), nn.Linear)])
    flat_to_map = [node]
    start, averaged = _map_before(module, node, shapes, flat_to_map)
    channels, height, width = shapes[start][1:]
    first = next(n for n in names if isinstance(module.get_submodule(n), nn.Linear))
    names = [str(n.target) for n in reversed(flat_to_map) if n.op == "call_module"] + names
    size = (1, 1) if averaged else (height, width)
    site = HeadSite(first, tuple(names), channels, *size, averaged, tuple(steps), height, width)
    if site.linears[0].in_features != channels * size[0] * size[1]:
        raise _Stop("the first linear layer does not see the whole flattened map")
    return _Chain(module, start, end, site)


def _last_linear(module: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> fx.Node:
    """Walk back from the output over what follows the last linear layer."""
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    node = output.args[0]
    while True:
        if not isinstance(node, fx.Node) or node.op in ("placeholder", "get_attr"):
            raise _Stop("it does not end in linear layers on a flattened map")
        if node.op == "call_module":
            target = module.get_submodule(str(node.target))
            _refuse_parametrized(target)
            if is_understood_linear(target):
                return node
            _open_if_box(module, node, shapes)
        if len(shapes.get(node, ())) != 2 or _is_flatten(module, node, shapes):
            raise _Stop("it does not end in linear layers on a flattened map")
        node = _only_input(node, alone=False)


def _open_if_box(
    module: fx.GraphModule, node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]
) -> None:
    """Ask for a closed module to be opened, unless it gives a map: that is where features end."""
    target = module.get_submodule(str(node.target))
    plain = type(target).__module__.startswith("torch.nn.modules")
    has_children = any(True for _ in target.children())
    if (has_children or not plain) and len(shapes.get(node, ())) == 2:
        raise _Opening(str(node.target))


def _only_input(node: fx.Node, *, alone: bool = True) -> fx.Node:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        raise _Stop("its head takes something that is not one tensor")
    readers = [user for user in source.users if user is not node and not _reads_shape(user)]
    if alone and readers:
        raise _Stop("a part of its head is used in two places")
    return source


def _reads_shape(node: fx.Node) -> bool:
    """Whether a node only asks for a size, as ``x.view(x.size(0), -1)`` does."""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    return node.op == "call_function" and node.target is getattr and "shape" in node.args


def _step(module: fx.GraphModule, node: fx.Node) -> nn.Module:
    """Return the module that a node of the chain runs or stands for."""
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        _refuse_parametrized(target)
        if is_understood_linear(target):
            return cast("nn.Linear", target)
        if type(target) in _ELEMENTWISE:
            return target
        if any(True for _ in target.children()):
            raise _Opening(str(node.target))
        raise _Stop(f"its head has a {type(target).__name__} between the linear layers")
    if node.target is F.dropout:
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        return nn.Dropout(cast("float", p))
    if node.target is F.gelu:
        return nn.GELU(cast("str", node.kwargs.get("approximate", "none")))
    if node.target in _ACTIVATION_FUNCTIONS:
        return _ACTIVATION_FUNCTIONS[node.target]()
    name = getattr(node.target, "__name__", str(node.target))
    raise _Stop(f"its head does {name!r} between the linear layers")


def _refuse_parametrized(module: nn.Module) -> None:
    if isinstance(module, nn.Linear) and nn.utils.parametrize.is_parametrized(module):
        raise _Stop("a linear layer of its head is parametrized")


def _check_linears(module: fx.GraphModule, names: list[str]) -> None:
    for name in names:
        calls = sum(n.op == "call_module" and n.target == name for n in module.graph.nodes)
        if calls > 1:
            raise _Stop(f"the linear layer {name!r} is used {calls} times")
        weight = module.get_submodule(name).weight
        owners = sum(
            parameter is weight
            for part in module.modules()
            for parameter in part.parameters(recurse=False)
        )
        if owners > 1:
            raise _Stop(f"the weight of the linear layer {name!r} is shared with another layer")


def _is_flatten(
    module: fx.GraphModule, node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]
) -> bool:
    """Whether a node turns a map ``(n, c, h, w)`` into ``(n, c·h·w)``, by whatever means."""
    if len(shapes.get(node, ())) != 2 or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before = shapes.get(node.args[0], ())
    if len(before) != 4:
        return False
    if _is_mean(node):
        return True
    same = shapes[node] == (before[0], before[1] * before[2] * before[3])
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        if isinstance(target, nn.Flatten):
            return same
        raise _Opening(str(node.target))
    flattens = node.target in (_FLATTENS if node.op == "call_method" else _FLATTEN_FUNCTIONS)
    if flattens and same:
        return True
    if node.op == "call_function" and node.target is operator.getitem:
        # x[:, :, 0, 0] of a map of one pixel
        return same and before[2:] == (1, 1)
    raise _Stop("its map becomes a vector in a way that is not a flattening")


def _is_mean(node: fx.Node) -> bool:
    if node.target not in ("mean", torch.mean):
        return False
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(dims, (list, tuple)):
        return False
    return sorted(cast("int", d) % 4 for d in dims) == [2, 3]


def _map_before(
    module: fx.GraphModule,
    flatten: fx.Node,
    shapes: dict[fx.Node, tuple[int, ...]],
    passed: list[fx.Node],
) -> tuple[fx.Node, bool]:
    """Go back over pooling to the map that the new head takes; say whether it was averaged."""
    averaged = _is_mean(flatten)
    node = _only_input(flatten)
    while True:
        if _is_elementwise_dropout(module, node):
            passed.append(node)
            node = _only_input(node)
            continue
        pooled = _pooling(module, node, shapes)
        if pooled is None:
            return node, averaged
        before = _only_input(node)
        if pooled == "average":
            averaged = True
        passed.append(node)
        node = before


def _is_elementwise_dropout(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), (nn.Dropout, nn.Identity))
    return node.target is F.dropout


def _pooling(  # noqa: PLR0911 - a case a line
    module: fx.GraphModule, node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]
) -> str | None:
    """Return ``average`` for a global average, ``identity`` for a pooling that changes nothing."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(shapes.get(source, ())) != 4:
        return None
    if len(shapes.get(node, ())) != 4:
        return None
    target: Any = node.target
    if node.op == "call_module":
        box = module.get_submodule(str(node.target))
        kind = type(box)
        if kind not in _POOLS:
            opaque = not kind.__module__.startswith("torch.nn.modules") and "ool" in kind.__name__
            if opaque:
                raise _Opening(str(node.target))
            return None
        adaptive = kind is nn.AdaptiveAvgPool2d
    elif target in _POOL_FUNCTIONS:
        adaptive = target is F.adaptive_avg_pool2d
    elif _is_mean(node):
        return "average"
    else:
        return None
    before, after = shapes[source], shapes[node]
    if after[2:] == (1, 1) and (adaptive or _covers(node, module, before)):
        return "average"
    # Only an adaptive pool does nothing by design at this size, and would undo larger maps.
    return "identity" if adaptive and before == after else None


def _covers(node: fx.Node, module: fx.GraphModule, before: tuple[int, ...]) -> bool:
    if node.op != "call_module":
        return False
    pool = cast("nn.AvgPool2d", module.get_submodule(str(node.target)))
    size = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * 2
    plain = pool.padding in {0, (0, 0)} and pool.divisor_override is None
    return plain and size == before[2:]


# ---------------------------------------------------------------- building


def hidden_widths(channels: int) -> list[list[int]]:
    """Return the hidden widths that a GAP head of that many channels may have."""
    widths = sorted({max(8, channels // 4), max(8, channels // 2), channels})
    return [[], *([width] for width in widths if width <= channels)]


def cost(site: HeadSite, form: str, hidden: list[int]) -> Cost:
    """Return what the new head costs for one input."""
    if form == "exact":
        linears = site.linears
        params = site.cost.params
        if _becomes_maps(site):
            # The averaging head has a bias, also where the linear layer has none.
            added = linears[0].out_features if getattr(linears[0], "bias", None) is None else 0
            places = site.map_height * site.map_width
            return Cost(params=params + added, macs=linears[0].weight.numel() * places)
        return Cost(params=params, macs=site.cost.macs)
    widths = [site.channels, *hidden, site.linears[-1].out_features]
    weights = sum(a * b for a, b in pairwise(widths))
    return Cost(params=weights + sum(widths[1:]), macs=weights * site.map_height * site.map_width)


def _becomes_maps(site: HeadSite) -> bool:
    """Whether the exact head is one 1×1 convolution before the average, not after."""
    return site.averaged and len(site.linears) == 1 and site.steps[-1] is site.linears[0]


def why_not(site: HeadSite, form: str) -> str | None:
    """Return why a form is no use for a head, or ``None`` where it is."""
    if form == "gap" and site.averaged:
        return "its head averages over the map already"
    return None


def rewrite(
    network: nn.Module, example: Tensor, *, name: str, form: str, hidden: list[int]
) -> nn.Module:
    """Return the network with its head rewritten; for ``exact`` with the same function.

    Args:
        network: Not modified.
        example: An input ``(batch, …)`` of the size that the head was made for.
        name: The first linear layer's name.
        form: ``exact``: the same weights as convolutions; ``gap``: 1×1 convolutions and a global
            average with fresh weights, for :func:`fit_gap`.
        hidden: Widths of the 1×1 convolutions before the last; for ``gap``.

    Raises:
        PlanError: If there is no such head, or the form is none.
    """
    if form not in FORMS:
        raise PlanError(f"The form of a head must be one of {', '.join(FORMS)}, got {form!r}.")
    copied = evaluation_copy(network)
    modes = {n: m.training for n, m in network.named_modules()}
    try:
        chain = _find_chain(copied, example)
    except _Stop as reason:
        raise PlanError(f"The head {name!r} cannot be rewritten: {reason}.") from reason
    site = chain.site
    if site.name != name:
        raise PlanError(f"The network's head starts at {site.name!r}, but the plan says {name!r}.")
    head = _exact(site) if form == "exact" else _gap(site, hidden)
    module, graph = chain.module, chain.module.graph
    replace_module(module, name, head)
    with graph.inserting_after(chain.start):
        call = graph.call_module(name, (chain.start,))
    chain.end.replace_all_uses_with(call)
    graph.eliminate_dead_code()
    _drop_unused(module, [n for n in site.occupies if n != name])
    graph.lint()
    module.recompile()
    for found, part in module.named_modules():
        part.training = modes.get(found, network.training)
    return module


def _drop_unused(module: fx.GraphModule, names: list[str]) -> None:
    used = {n.target for n in module.graph.nodes if n.op == "call_module"}
    for name in names:
        if name not in used:
            module.delete_submodule(name)


def _exact(site: HeadSite) -> nn.Module:
    """Return the same function in convolutions, with the linear layers' own weights."""
    linears = site.linears
    if _becomes_maps(site):
        head = GlobalAverageHead(site.channels, linears[0].out_features)
        head.to(linears[0].weight)
        return _with_dropout(site, _copy_linear(linears[0], head, "maps.0"))
    steps: list[nn.Module] = [nn.AdaptiveAvgPool2d(1)] if site.averaged else []
    size = (site.height, site.width)
    for step in site.steps:
        if isinstance(step, nn.Linear):
            channels = step.in_features // (size[0] * size[1])
            convolution = nn.Conv2d(
                channels, step.out_features, size, bias=getattr(step, "bias", None) is not None
            ).to(step.weight)
            steps.append(_copy_linear(step, convolution, ""))
            size = (1, 1)
        else:
            steps.append(copy.deepcopy(step))
    return ScoreMapHead(*steps)


def _with_dropout(site: HeadSite, head: nn.Module) -> nn.Module:
    dropouts = [copy.deepcopy(s) for s in site.steps if isinstance(s, nn.Dropout)]
    return nn.Sequential(*dropouts, head) if dropouts else head


def _copy_linear(linear: nn.Linear, target: nn.Module, name: str) -> nn.Module:
    convolution = target.get_submodule(name)
    weight, bias = convolution.weight, convolution.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(linear.weight.reshape(weight.shape))
        if isinstance(bias, Tensor):
            source = getattr(linear, "bias", None)
            bias.copy_(torch.zeros_like(bias) if source is None else source)
    convolution.requires_grad_(linear.weight.requires_grad)
    return target


def _gap(site: HeadSite, hidden: list[int]) -> GlobalAverageHead:
    last = site.linears[-1]
    head = GlobalAverageHead(site.channels, last.out_features, tuple(hidden)).to(last.weight)
    return head.requires_grad_(last.weight.requires_grad)


# ---------------------------------------------------------------- fitting the averaging head

RIDGE = 1e-4
FIT_STEPS = 300
FIT_BATCH = 128
FIT_RATE = 5e-3


def fit_gap(
    head: GlobalAverageHead,
    features: Tensor,
    targets: Tensor,
    *,
    linear: nn.Linear | None = None,
    seed: int = 0,
) -> float:
    """Fit an averaging head to give the original's outputs; ``head`` is modified in place.

    The hidden layer starts from the linear layer's weights averaged over the map's places, the
    last layer from the closed-form ridge regression of the outputs on the averaged hidden maps;
    then both are improved together for a few hundred steps on the kept features.

    Args:
        head: With one hidden layer or none.
        features: The maps that the head sees, shape ``(n, channels, height, width)``.
        targets: The original's outputs, shape ``(n, classes)``.
        linear: The first linear layer of the original head, on the flattened map.
        seed: Of the batches' order and of directions that the linear layer lacks.

    Returns:
        The mean divergence from the targets on these features.
    """
    features, targets = features.float(), targets.float()
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(head).float().cpu().train()
    layers = [m for m in network.maps if isinstance(m, nn.Conv2d)]
    if len(layers) == 2:
        _start_hidden(layers[0], features, linear, generator)
    _regress_last(network, layers[-1], features, targets)
    _improve(network, features, targets, generator)
    with torch.no_grad():
        for mine, theirs in zip(head.parameters(), network.parameters(), strict=True):
            mine.copy_(theirs)
        return float(divergence(targets, network(features)).mean())


def _start_hidden(
    layer: nn.Conv2d, features: Tensor, linear: nn.Linear | None, generator: torch.Generator
) -> None:
    """Start hidden channels from the principal directions of the averaged linear weights."""
    width, channels = layer.out_channels, layer.in_channels
    rows = torch.randn(width, channels, generator=generator)
    if linear is not None:
        places = linear.in_features // channels
        means = linear.weight.detach().float().cpu().reshape(-1, channels, places).mean(2)
        order = means.norm(dim=1).argsort(descending=True)[:width]
        rows[: len(order)] = means[order]
    # Each channel on for about half of what is seen, at unit scale.
    seen = features.transpose(0, 1).flatten(1)
    sample = seen[:, torch.randperm(seen.shape[1], generator=generator)[:4096]]
    response = rows @ sample
    scale = response.std(dim=1, keepdim=True).clamp_min(1e-6)
    with torch.no_grad():
        layer.weight.copy_((rows / scale)[:, :, None, None])
        assert layer.bias is not None
        layer.bias.copy_(-(response.median(dim=1).values / scale[:, 0]))


def _regress_last(
    network: GlobalAverageHead, layer: nn.Conv2d, features: Tensor, targets: Tensor
) -> None:
    with torch.no_grad():
        hidden = features
        for module in list(network.maps)[:-1]:
            hidden = module(hidden)
        x = hidden.mean((2, 3)).double()
        # Scores are free up to a constant an example: softmax does not see it.
        y = targets.double()
        y = y - y.mean(dim=1, keepdim=True) if is_classifier_output(y) else y
        mean_x, mean_y = x.mean(0), y.mean(0)
        x0, y0 = x - mean_x, y - mean_y
        gram = x0.T @ x0 / len(x)
        gram += RIDGE * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram, x0.T @ y0 / len(x)).T
        layer.weight.copy_(weight[:, :, None, None])
        assert layer.bias is not None
        layer.bias.copy_(mean_y - weight @ mean_x)


def _improve(
    network: GlobalAverageHead, features: Tensor, targets: Tensor, generator: torch.Generator
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=FIT_RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    size = min(FIT_BATCH, len(features))
    loss_of: Callable[[Tensor, Tensor], Tensor] = divergence
    with torch.enable_grad():
        for _ in range(FIT_STEPS):
            rows = torch.randint(len(features), (size,), generator=generator)
            loss = loss_of(targets[rows], network(features[rows])).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
