"""Flatten + Linear becomes convolutions: the same scores exactly, or 1×1 + global average pooling.

The network keeps its class, its attributes and what it does in training mode, such as scores of
auxiliary heads: only the calls between the last map and the last linear layer change.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from onebyone.core.errors import ModelError, PlanError
from onebyone.core.records import Cost, Settings
from onebyone.core.tensor_trees import Inputs
from onebyone.networks.layers import GlobalAverageHead, Pointwise
from onebyone.networks.surgery import evaluation_copy
from onebyone.networks.weight_bytes import weight_bytes
from onebyone.rewrites.equivalence import Version, version_of
from onebyone.rewrites.head.chain import Call, Chain, NotFound, is_norm
from onebyone.rewrites.head.edit_forward import Action, carry_out, edits_of
from onebyone.rewrites.head.find import find_chain
from onebyone.rewrites.head.score_map import PlaceNorm, ScoreMapHead

FORMS = ("exact", "gap")


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
        note: What a user should know, such as a pool that has to stay; or nothing.
        no_gap: Why ``gap`` cannot be done, or nothing.
        maps: Whether the exact head is one 1×1 convolution before the average, not after.
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
    note: str = ""
    no_gap: str = ""
    maps: bool = False

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers of the chain, in order."""
        return [step for step in self.steps if isinstance(step, nn.Linear)]

    @property
    def cost(self) -> Cost:
        """What the linear layers cost for one input."""
        params = sum(p.numel() for linear in self.linears for p in linear.parameters())
        return Cost(
            params=params,
            macs=sum(linear.weight.numel() for linear in self.linears),
            bytes=sum(weight_bytes(linear) for linear in self.linears),
        )


@dataclass(frozen=True)
class NoHead:
    """Why no head can be rewritten, in words."""

    reason: str


# ---------------------------------------------------------------- finding


def of_inputs(network: nn.Module, example: Inputs) -> HeadSite | NoHead:
    """Return the head of a network like :func:`find_head`; none if it takes several inputs."""
    if not isinstance(example, Tensor):
        return NoHead("the network takes something that is not one tensor")
    return find_head(network, example)


def find_head(network: nn.Module, example: Tensor) -> HeadSite | NoHead:
    """Return the head of a network, or why there is none to rewrite.

    Args:
        network: Not modified.
        example: An input ``(batch, …)`` that the network is run on.
    """
    try:
        copied = evaluation_copy(network)
        chain = find_chain(copied, example)
        return _site(copied, chain)
    except NotFound as reason:
        return NoHead(str(reason))
    except ModelError as error:
        return NoHead(str(error).rstrip("."))


def _site(network: nn.Module, chain: Chain) -> HeadSite:
    """Return what a chain is; refuse if ``exact`` cannot be done."""
    first = _first(chain)
    steps = _steps(chain)
    edits_of(network, chain, _actions(chain, nn.Identity()))
    no_gap = ""
    if not chain.averaged:
        try:
            edits_of(network, chain, _actions(chain, nn.Identity(), gap=True))
        except NotFound as reason:
            no_gap = str(reason)
    size = (1, 1) if chain.averaged else (chain.height, chain.width)
    return HeadSite(
        name=chain.calls[first].name,
        occupies=tuple(dict.fromkeys(call.name for call in chain.calls if _goes(call))),
        channels=chain.channels,
        height=size[0],
        width=size[1],
        averaged=chain.averaged,
        steps=tuple(steps),
        map_height=chain.height,
        map_width=chain.width,
        note=chain.note,
        no_gap=no_gap,
        maps=_becomes_maps(chain),
    )


def _goes(call: Call) -> bool:
    return bool(call.name) and call.alone


def _first(chain: Chain) -> int:
    return next(i for i, call in enumerate(chain.calls) if call.role == "linear")


def _steps(chain: Chain) -> list[nn.Module]:
    """Return the modules from the first linear layer on, which takes an unpermuted map."""
    steps = []
    for call in chain.calls[_first(chain) :]:
        if call.role != "flatten":
            assert call.module is not None
            steps.append(call.module)
    if chain.order is not None:
        steps[0] = _reordered(cast("nn.Linear", steps[0]), chain)
    return steps


def _reordered(linear: nn.Linear, chain: Chain) -> nn.Linear:
    """Return the linear layer that does to the map what the given one does to the permuted map."""
    assert chain.order is not None
    size = (1, 1) if chain.averaged else (chain.height, chain.width)
    shape = (0, chain.channels, *size)
    permuted = [shape[d] for d in chain.order[1:]]
    back = [0, *(chain.order.index(d) for d in (1, 2, 3))]
    result = copy.deepcopy(linear)
    with torch.no_grad():
        weight = linear.weight.reshape(-1, *permuted).permute(back)
        result.weight.copy_(weight.reshape_as(linear.weight))
    return result


def _becomes_maps(chain: Chain) -> bool:
    """Whether one linear layer takes the average, so that it can as well be taken of its scores."""
    first = _first(chain)
    roles = {call.role for call in chain.calls[:first]}
    return chain.averaged and "step" not in roles and first == len(chain.calls) - 1


def _actions(chain: Chain, head: nn.Module, *, gap: bool = False) -> list[Action | nn.Module]:
    """Return what to do with each call of a chain so that ``head`` takes the map."""
    first = _first(chain)
    maps = gap or _becomes_maps(chain)
    actions: list[Action | nn.Module] = []
    averaged = False
    for call in chain.calls[:first]:
        averaged |= call.role in ("average", "mean")
        actions.append(_action_before(chain, call, maps=maps, averaged=averaged))
    return [*actions, head, *[Action.ERASE] * (len(chain.calls) - first - 1)]


def _action_before(chain: Chain, call: Call, *, maps: bool, averaged: bool) -> Action | nn.Module:
    """Return what to do with a call between the map and the first linear layer."""
    if call.role == "step":
        return _kept_on_map(chain, call)
    if call.role == "dropout":
        # Dropping a channel of the average is dropping the channel's whole map.
        return Action.WHOLE_CHANNELS if maps and averaged else Action.KEEP
    if type(call.module) is nn.Identity:
        return Action.KEEP
    if call.role in ("flatten", "permute"):
        return Action.ERASE
    if maps or not chain.averaged:
        return Action.ERASE
    return Action.KEEP_DIMENSIONS if call.role == "mean" else Action.KEEP


def _kept_on_map(chain: Chain, call: Call) -> Action | nn.Module:
    """Return what makes of a module on the vector the same on the map."""
    module = call.module
    assert module is not None
    norm = is_norm(module)
    by_feature = norm or (isinstance(module, nn.PReLU) and module.num_parameters > 1)
    if by_feature and not chain.averaged and (chain.height, chain.width) != (1, 1):
        raise NotFound(f"its head has a {type(module).__name__} before its linear layers")
    return _on_maps(module) if norm else Action.KEEP


def _on_maps(norm: nn.Module) -> nn.Module:
    """Return the normalization of maps that does to each place what ``norm`` does to a vector."""
    result: nn.Module
    if isinstance(norm, nn.BatchNorm1d):
        result = nn.BatchNorm2d(
            norm.num_features,
            eps=norm.eps,
            momentum=norm.momentum,
            affine=norm.affine,
            track_running_stats=norm.track_running_stats,
        )
    else:
        assert isinstance(norm, nn.LayerNorm)
        result = PlaceNorm(norm.normalized_shape, eps=norm.eps)
    copied = vars(copy.deepcopy(norm))
    vars(result).update({key: copied[key] for key in ("_parameters", "_buffers", "training")})
    return result


# ---------------------------------------------------------------- building


# What a GAP head may have: depthwise 3×3 convolutions, and with so many hidden widths as shares of
# the channels. Three are nearer than two, before training and after, at the same parameters
# (Fashion-MNIST, the article's classic network); there parameters buy accuracy, so that widths are
# close together.
WIDTHS = {0: (1 / 4, 1 / 2, 1), 3: (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1)}
FEWEST_HIDDEN = 8


def gap_settings(channels: int) -> list[Settings]:
    """Return what GAP heads of so many channels may be: hidden widths, with context or without."""
    found: list[Settings] = [{"form": "gap", "hidden": []}]
    for context, shares in WIDTHS.items():
        widths = {max(FEWEST_HIDDEN, int(share * channels)) for share in shares}
        found += [
            {"form": "gap", "hidden": [width], **({"context": context} if context else {})}
            for width in sorted(widths)
            if width <= channels
        ]
    return found


def form_and_widths(settings: Settings, *, site: str) -> tuple[str, list[int], int]:
    """Return the form, hidden widths and context in a head's settings.

    Raises:
        PlanError: If they are not of their types.
    """
    hidden, context = settings.get("hidden", []), settings.get("context", 0)
    if not isinstance(hidden, list):
        raise PlanError(f"The `hidden` widths of the head {site!r} must be a list, got {hidden!r}.")
    if not isinstance(context, int) or isinstance(context, bool) or context < 0:
        raise PlanError(f"The `context` of the head {site!r} must be 0 or more, got {context!r}.")
    return str(settings.get("form")), hidden, context


def cost(site: HeadSite, form: str, hidden: list[int], context: int = 0) -> Cost:
    """Return what the new head costs for one input."""
    if form == "exact":
        # Before the average, the 1×1 convolution runs at each pixel of the map.
        places = site.map_height * site.map_width if site.maps else 1
        return replace(site.cost, macs=site.cost.macs * places)
    widths = [site.channels, *hidden]
    widths += [widths[-1]] * context
    widths.append(site.linears[-1].out_features)
    weights = sum(a * b for a, b in pairwise(widths)) + context * 9 * widths[-2]
    params = weights + sum(widths[1:])
    return Cost(
        params=params,
        macs=weights * site.map_height * site.map_width,
        bytes=params * site.linears[-1].weight.element_size(),
    )


def why_not(site: HeadSite, form: str) -> str | None:
    """Return why a form is no use for a head, or ``None`` where it is."""
    if form != "gap":
        return None
    if site.averaged:
        return "its head averages over the map already"
    if (site.height, site.width) == (1, 1):
        return "its head takes a map of one pixel, of which there is nothing to average"
    return site.no_gap or None


def rewrite(
    network: nn.Module,
    example: Tensor,
    *,
    name: str,
    form: str,
    hidden: list[int],
    context: int = 0,
) -> nn.Module:
    """Return the network with its head rewritten; for ``exact`` with the same function.

    The new network is of the same class, or, where calls of functions had to go from a forward,
    that module is of a class derived from its own. In it, branches of the forward on attributes
    other than ``training`` are as they were at the time, and arguments with defaults are fixed.

    Args:
        network: Not modified.
        example: An input ``(batch, …)`` of the size that the head was made for.
        name: The first linear layer's name.
        form: ``exact``: the same weights as convolutions; a larger image gives a map of scores,
            one for each window, unless the network averages, or pools to a fixed size, before its
            linear layers. ``gap``: 1×1 convolutions and a global average with fresh weights, for
            :func:`fit_gap`.
        hidden: Widths of the 1×1 convolutions before the last; for ``gap``.
        context: Depthwise 3×3 convolutions between them; for ``gap``.

    Raises:
        PlanError: If there is no such head, or the form is none.

    References:
        Long, Shelhamer, Darrell, "Fully Convolutional Networks", CVPR 2015, section 3.1.
    """
    if form not in FORMS:
        raise PlanError(f"The form of a head must be one of {', '.join(FORMS)}, got {form!r}.")
    copied = evaluation_copy(network)
    try:
        chain = find_chain(copied, example)
        found = chain.calls[_first(chain)].name
        if found != name:
            raise PlanError(f"The network's head starts at {found!r}, but the plan says {name!r}.")
        head = _exact(chain) if form == "exact" else _gap(chain, hidden, context)
        edits = edits_of(copied, chain, _actions(chain, head, gap=form == "gap"))
    except (NotFound, ModelError) as reason:
        raise PlanError(
            f"The head {name!r} cannot be rewritten: {str(reason).rstrip('.')}."
        ) from reason
    before = version_of(copied, example) if form == "exact" else None
    carry_out(copied, edits)
    if before is not None:
        _check_same(before, copied, name)
    _restore_modes(copied, network, chain, name)
    return copied


def _check_same(before: Version, network: nn.Module, name: str) -> None:
    """Refuse other scores: the forward then does what its graph does not show."""
    try:
        reason = before.why_changed(before.like(network))
    except ModelError as error:
        reason = f"with it the network does not run: {str(error).rstrip('.')}"
    if reason is not None:
        raise PlanError(
            f"The head {name!r} cannot be rewritten: {reason}. Does the forward draw random "
            f"numbers in evaluation mode, or call modules that are kept in a list?"
        )


def _restore_modes(copied: nn.Module, network: nn.Module, chain: Chain, name: str) -> None:
    """Set training mode as it was, module by module; the new head's steps follow those before."""
    modes = {n: m.training for n, m in network.named_modules()}
    for found, module in copied.named_modules():
        inside = found.startswith(f"{name}.")
        module.training = modes.get(name if inside else found, network.training)
    head = copied.get_submodule(name)
    if isinstance(head, ScoreMapHead):
        for step, call in zip(head, _step_calls(chain), strict=True):
            step.training = modes.get(call.name or call.caller, network.training)


def _step_calls(chain: Chain) -> list[Call]:
    return [call for call in chain.calls[_first(chain) :] if call.role != "flatten"]


def _exact(chain: Chain) -> nn.Module:
    """Return the same function in convolutions, with the linear layers' own weights."""
    steps = _steps(chain)
    first = cast("nn.Linear", steps[0])
    if _becomes_maps(chain):
        head = GlobalAverageHead(chain.channels, first.out_features)
        head.maps[0] = _convolution(first, (1, 1), kind=Pointwise)
        return head
    size = (1, 1) if chain.averaged else (chain.height, chain.width)
    made: list[nn.Module] = []
    for step in steps:
        if isinstance(step, nn.Linear):
            made.append(_convolution(step, size))
            size = (1, 1)
        else:
            made.append(_on_maps(step) if is_norm(step) else copy.deepcopy(step))
    return ScoreMapHead(*made, by_place=chain.by_place)


def _convolution(
    linear: nn.Linear, size: tuple[int, int], *, kind: type[nn.Conv2d] = nn.Conv2d
) -> nn.Conv2d:
    """Return the convolution that equals a linear layer on a flattened map of that size."""
    channels = linear.in_features // (size[0] * size[1])
    settings: dict[str, Any] = {} if kind is Pointwise else {"kernel_size": size}
    # Without memory: the parameters come from the linear layer.
    result = kind(channels, linear.out_features, bias=False, device="meta", **settings)
    weight = linear.weight.detach().reshape(-1, channels, *size).clone()
    result.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    bias = linear.bias
    if bias is not None:
        result.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return result


def _gap(chain: Chain, hidden: list[int], context: int) -> GlobalAverageHead:
    last = cast("nn.Linear", chain.calls[-1].module)
    head = GlobalAverageHead(chain.channels, last.out_features, hidden, context=context)
    head.to(last.weight)
    return head.requires_grad_(last.weight.requires_grad)
