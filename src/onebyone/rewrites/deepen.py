"""More 1×1 convolutions and activations after those of a network, which start as the identity.

What an activation gives, the same activation leaves as it is where it is a bound: ReLU, ReLU6,
Hardtanh. Then 1×1 + activation with the identity for its weight is exactly the same function at
first, with more capacity when it is trained (Chen, Goodfellow, Shlens, "Net2Net", ICLR 2016,
arXiv:1511.05641, section 2.3). GELU, SiLU, Hardswish, LeakyReLU, ELU and others change their own
output again, so that no 1×1 before a second one is the identity. There the new activation is a
PReLU that starts with slope 1: exactly the identity too, but linear until its slopes are trained
(He et al. 2015, arXiv:1502.01852).
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from onebyone.core.arguments import checked
from onebyone.core.errors import ModelError, OneByOneError, OptionError, PlanError
from onebyone.core.records import Cost, LeftAlone, Option, Plan, Settings
from onebyone.core.tensor_trees import Inputs, batch_size
from onebyone.core.torch_state import ordinary_torch
from onebyone.networks.conv_layers import is_pointwise
from onebyone.networks.dataflow import Reading, Value, find_neighbours
from onebyone.networks.examples import as_inputs
from onebyone.networks.layers import Pointwise
from onebyone.networks.plain_layers import why_not_its_class
from onebyone.networks.stand_ins import REASON
from onebyone.networks.surgery import (
    aliases,
    as_network,
    check_finite,
    copy_network,
    floating_type,
    module_at,
    replace_module,
)
from onebyone.rewrites.equivalence import Version, keeping, plan_of, versions_of
from onebyone.rewrites.fold.merge_layers import is_batch_norm

# Form -> how many pairs of 1×1 + activation it adds.
FORMS = {"pointwise": 1, "mlpconv": 2}
# Bounds: given their own output, they return it.
_BOUNDS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_CURVES = (
    nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish,
)  # fmt: skip
_GATES = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softmax, nn.Softmax2d, nn.GLU)
# timm's own classes of the same activations, by module and name so that timm need not be imported.
_TIMM = "timm.layers.activations"
_TIMM_CURVES = ("Swish", "Mish", "HardSwish", "HardMish", "PReLU", "GELU", "GELUTanh", "QuickGELU")
# Activations that are called as functions, by the operation that runs.
_OPERATIONS = {
    "relu": "ReLU", "hardtanh": "PReLU", "leaky_relu": "PReLU", "elu": "PReLU", "celu": "PReLU",
    "gelu": "PReLU", "silu": "PReLU", "mish": "PReLU", "hardswish": "PReLU",
}  # fmt: skip
ACTIVATION_OPERATIONS = frozenset({*_OPERATIONS, *(f"{name}_" for name in _OPERATIONS)})
# What reads or makes a map with the channels on its second axis.
_MAP_OPERATIONS = (
    "convolution", "batch_norm", "max_pool", "avg_pool", "upsample", "pixel_shuffle",
    "native_group_norm",
)  # fmt: skip
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)  # noqa: SLF001
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # noqa: SLF001
_ALONG_LAST = (nn.Linear, nn.LayerNorm)


# ---------------------------------------------------------------- activations


def activation_after(activation: nn.Module) -> str | None:
    """Return the activation that can follow a 1×1 after this one and start as the identity.

    Returns:
        Its class's name: the activation's own where it is a bound, else ``PReLU``; ``None`` where
        the module is no activation of features.
    """
    kind = type(activation)
    if kind in _BOUNDS:
        return kind.__name__
    timm_curve = kind.__module__.startswith(_TIMM) and kind.__name__.startswith(_TIMM_CURVES)
    return "PReLU" if kind in _CURVES or timm_curve else None


def _new_activation(name: str, old: nn.Module | None, channels: int) -> nn.Module:
    if name == "PReLU":
        return nn.PReLU(channels, init=1.0)
    if type(old) is nn.Hardtanh:
        return nn.Hardtanh(old.min_val, old.max_val, inplace=old.inplace)
    kind = nn.ReLU6 if name == "ReLU6" else nn.ReLU
    return kind(inplace=bool(getattr(old, "inplace", False)))


def _identity(channels: int, axes: int) -> nn.Module:
    """Return a 1×1 convolution that gives what it is given."""
    # Drawn from a generator of its own: the caller's random numbers stay as they are.
    with torch.random.fork_rng(devices=[]):
        made = _POINTWISE[axes](channels)
    weight, bias = made.weight, made.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        weight.copy_(torch.eye(channels).reshape(weight.shape))
        bias.zero_()
    return made


_POINTWISE: dict[int, Callable[[int], nn.Module]] = {
    1: lambda channels: nn.Conv1d(channels, channels, 1),
    2: lambda channels: Pointwise(channels, channels),
    3: lambda channels: nn.Conv3d(channels, channels, 1),
}


# ---------------------------------------------------------------- places


@dataclass(frozen=True)
class _Place:
    """Where pairs of 1×1 and activation can be inserted.

    Attributes:
        site: The module that is replaced by a chain that starts with itself.
        where: ``after``: the site is an activation, and pairs of 1×1 + activation follow.
            ``before``: the site is a layer and pairs of activation + 1×1 follow, before the
            activation that the network itself applies to it.
        activation: Class name of the new activations.
        old: Name of the network's activation there; ``None`` if it is a function.
        shape: Of the map there, with the batch.
        why_no_mlpconv: Why what precedes is not a convolution whose block this would be.
    """

    site: str
    where: str
    activation: str
    old: str | None
    shape: tuple[int, ...]
    why_no_mlpconv: str | None

    def cost(self, pairs: int, batch: int, *, value_bytes: int) -> Cost:
        """Return what the new layers cost for one input, of values of so many bytes."""
        channels = self.shape[1]
        weights = channels**2
        slopes = channels if self.activation == "PReLU" else 0
        params = pairs * (weights + channels + slopes)
        return Cost(
            params=params,
            macs=pairs * weights * (math.prod(self.shape) // channels) // batch,
            bytes=params * value_bytes,
        )


class _Scene:
    """A network and what one pass of it showed."""

    def __init__(self, network: nn.Module, example: Inputs) -> None:
        self.network = network
        self.neighbours = find_neighbours(network, example)
        self.names = aliases(network)
        # Value -> the layer whose output it is, where the layer can be made a chain and nothing
        # but one operation reads its output.
        self.layers: dict[int, str] = {}
        for name, module in network.named_modules():
            calls = self.neighbours.calls_of(name)
            if self._is_lone_layer(name, module) and self.reader(calls[0].outputs[0]) is not None:
                self.layers[calls[0].outputs[0]] = name

    def _is_lone_layer(self, name: str, module: nn.Module) -> bool:
        calls = self.neighbours.calls_of(name)
        return (
            (isinstance(module, _CONVOLUTIONS) or next(module.children(), None) is None)
            and bool(module.state_dict())
            and len(calls) == len(self.names[name]) == 1
            and len(calls[0].outputs) == 1
            and name not in self.neighbours.called_elsewhere
        )

    def reader(self, place: int) -> Reading | None:
        """Return the one operation that reads a value, if nothing else does."""
        value = self.neighbours.values[place]
        calls = {(reading.module, reading.call) for reading in value.readings}
        return value.readings[0] if len(calls) == 1 and not value.is_output else None

    def module(self, name: str) -> nn.Module:
        """Return a module."""
        return module_at(self.network, name)

    def activation_of(self, name: str | None) -> str | None:
        """Return what can follow a module that is an activation; ``None`` if it is none."""
        return None if name is None else activation_after(self.module(name))


def _places(scene: _Scene) -> Iterator[_Place | LeftAlone]:
    """Yield a place, or why there is none, for every activation of a pass."""
    for name, module in scene.network.named_modules():
        if activation_after(module) is not None:
            reason = why_not_its_class(module)
            if name in scene.neighbours.called_elsewhere:
                reason = REASON
            if reason is not None:
                yield LeftAlone(site=name, reason=reason)
            else:
                yield from _places_of(scene, name)
        elif isinstance(module, _GATES):
            reason = f"{type(module).__name__} gives weights or scores, not features"
            yield LeftAlone(site=name, reason=reason)
    yield from _places_of_functions(scene)


def _places_of(scene: _Scene, name: str) -> Iterator[_Place | LeftAlone]:
    """Yield the places of an activation that is a module."""
    calls = scene.neighbours.calls_of(name)
    if not calls:
        yield LeftAlone(site=name, reason="it does not run")
    elif len(calls) == len(scene.names[name]) == 1:
        yield _after(scene, name)
    else:
        for call in calls:
            layer = scene.layers.get(call.inputs[0]) if len(call.inputs) == 1 else None
            if layer is not None:
                yield _before(scene, layer, scene.activation_of(name), name)
                continue
            made = scene.neighbours.values[call.inputs[0]].operation if call.inputs else None
            reason = (
                f"one module that runs {len(calls)} times, here on the output of "
                f"{f'`{made}`' if made else 'no operation'}, not of a layer that it alone follows"
            )
            yield LeftAlone(site=name, reason=reason)


def _places_of_functions(scene: _Scene) -> Iterator[_Place | LeftAlone]:
    """Yield the places of activations that are functions in a forward."""
    waiting: Counter[tuple[str, str]] = Counter()
    for value in scene.neighbours.values:
        operation = value.operation or ""
        is_module = value.module is not None and scene.activation_of(value.module) is not None
        if operation in ACTIVATION_OPERATIONS and not is_module:
            waiting[operation, value.module or ""] += 1
    for place, layer in scene.layers.items():
        reader = scene.reader(place)
        if reader is None or (reader.operation, reader.module) not in waiting:
            continue
        waiting[reader.operation, reader.module] -= 1
        yield _before(scene, layer, _OPERATIONS[reader.operation.removesuffix("_")], None)
    for (operation, module), count in waiting.items():
        if count:
            site = f"`{operation}` in {module or 'the network'}"
            reason = "a function on something that is not a layer's output, or not for it alone"
            yield LeftAlone(site=site, reason=reason)


def _after(scene: _Scene, name: str) -> _Place | LeftAlone:
    """Return the place after an activation that is a module of its own."""
    given, value = scene.neighbours.input_of(name), scene.neighbours.output_of(name)
    if given is None or value is None:
        return LeftAlone(site=name, reason="it does not take and return one tensor")
    reason = _why_no_map(scene, given, value)
    if reason is not None:
        return LeftAlone(site=name, reason=reason)
    new = scene.activation_of(name)
    assert new is not None
    return _Place(name, "after", new, name, value.shape, _why_no_mlpconv(scene, given))


def _before(scene: _Scene, layer: str, new: str | None, old: str | None) -> _Place | LeftAlone:
    """Return the place between a layer and its activation, which is not a module of its own."""
    value = scene.neighbours.output_of(layer)
    assert value is not None
    assert new is not None
    reason = _why_no_map(scene, value, value)
    if reason is not None:
        return LeftAlone(site=layer, reason=reason)
    return _Place(layer, "before", new, old, value.shape, _why_no_mlpconv(scene, value))


def _why_no_map(scene: _Scene, given: Value, value: Value) -> str | None:
    """Return why an activation's output is not known to be a map with its channels second."""
    axes = len(value.shape) - 2
    if axes < 1:
        return "its output is vectors, not a map"
    if axes not in _POINTWISE:
        return f"its output has {axes + 2} axes"
    sides = [(reading.operation, reading.module) for reading in value.readings]
    sides += [(v.operation or "", v.module or "") for v in (value, given)]
    for _, name in sides:
        module = scene.module(name)
        if isinstance(module, _ALONG_LAST):
            return "its channels are on the last axis, next to a linear layer or a layer norm"
        if isinstance(module, _CONVOLUTIONS) and len(module.kernel_size) != axes:
            return "its output has no batch"
    known = any(part in operation for operation, _ in sides for part in _MAP_OPERATIONS)
    if known or not _any_along_last(scene):
        return None
    return "it cannot be seen which axis of its output the channels are"


def _any_along_last(scene: _Scene) -> bool:
    """Whether a layer of the network works along the last axis of more than vectors."""
    return any(
        isinstance(scene.module(call.module), _ALONG_LAST)
        and any(len(scene.neighbours.values[place].shape) > 2 for place in call.inputs)
        for call in scene.neighbours.calls
    )


def _why_no_mlpconv(scene: _Scene, given: Value) -> str | None:
    """Return why an activation does not belong to a convolution of several places, or ``None``."""
    value: Value | None = given
    if given.module is not None:
        norm = scene.module(given.module)
        if isinstance(norm, _NORMS) or is_batch_norm(norm):
            value = scene.neighbours.input_of(given.module)
    module = None if value is None or value.module is None else scene.module(value.module)
    if not isinstance(module, _CONVOLUTIONS):
        made = value.operation if value is not None else None
        return f"before it is no convolution but {f'`{made}`' if made else 'something else'}"
    return "the convolution before it is 1×1 already" if is_pointwise(module) else None


# ---------------------------------------------------------------- finding


def find(
    network: nn.Module, example: Inputs, *, form: str = "pointwise"
) -> tuple[list[Option], list[LeftAlone]]:
    """Return every place where 1×1 + activation can be inserted without changing the function.

    All of them together are carried out on a copy, and the outputs compared with the network's own:
    what changes them, or breaks a forward, is left alone.

    Args:
        network: Not modified.
        example: A tensor ``(batch, …)``, a tuple of arguments, or keyword arguments.
        form: ``pointwise``: one pair after every activation. ``mlpconv``: two pairs after every
            convolution of more than one place and its activation, which makes each of them the
            block of Network In Network (Lin, Chen, Yan 2013, arXiv:1312.4400, section 3.1).

    Returns:
        The options, whose costs are those of the new layers alone, and each activation that is left
        alone, with the reason.

    Raises:
        OptionError: If there is no such form.
        ModelError: If the network cannot be copied or run on the example.
    """
    if form not in FORMS:
        raise OptionError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}.")
    left_alone: list[LeftAlone] = []
    batch = batch_size(example)
    places: dict[str, _Place] = {}
    for place in _places(_Scene(network, example)):
        if isinstance(place, LeftAlone):
            left_alone.append(place)
        elif form == "mlpconv" and place.why_no_mlpconv is not None:
            left_alone.append(LeftAlone(site=place.site, reason=place.why_no_mlpconv))
        else:
            places[place.site] = place
    value_bytes = floating_type(network).itemsize
    options = [_option(place, form, batch, value_bytes=value_bytes) for place in places.values()]
    kept, rejected = _same_outputs(network, example, places, options)
    return kept, list(dict.fromkeys([*left_alone, *rejected]))


def _option(place: _Place, form: str, batch: int, *, value_bytes: int) -> Option:
    settings: Settings = {"form": form, "where": place.where, "activation": place.activation}
    return Option.of(
        "deepen",
        settings,
        site=place.site,
        before=Cost(params=0, macs=0, bytes=0),
        after=place.cost(FORMS[form], batch, value_bytes=value_bytes),
        occupies=(place.site,),
        error=0.0,
        harm=0.0,
    )


def _same_outputs(
    network: nn.Module, example: Inputs, places: dict[str, _Place], options: list[Option]
) -> tuple[list[Option], list[LeftAlone]]:
    """Return the options that together leave the outputs as they were, and why not the others."""
    accepted = list(options)
    left_alone: list[LeftAlone] = []
    for version in versions_of(network, example):
        accepted, rejected = keeping(
            [],
            accepted,
            partial(_why_changed, version, places),
            lambda option: option.site,
        )
        left_alone += rejected
    return accepted, left_alone


def _why_changed(
    version: Version, places: dict[str, _Place], options: Sequence[Option]
) -> str | None:
    try:
        deeper = _inserted(version.network, places, options).eval()
        reason = version.why_changed(deeper)
    except OneByOneError as error:
        return f"the network with it does not run: {error}"
    return None if reason is None else f"with it {reason}"


# ---------------------------------------------------------------- rewriting


def rewrite(network: nn.Module, example: Inputs, *, site: str, settings: Settings) -> nn.Module:
    """Return a copy of a network with 1×1 + activation inserted at one place.

    Args:
        network: Not modified.
        example: An input that it is run on, to see how wide the map there is.
        site: The module that is replaced by a chain with itself in it.
        settings: ``form``, one of :data:`FORMS`; ``where``: ``after`` an activation, or
            ``before`` the one that the layer's output goes into; and ``activation``, the class of
            the new activation.

    Raises:
        PlanError: If nothing can be inserted there so; says why.
        ModelError: If the network cannot be run.
    """
    nothing = Cost(params=0, macs=0, bytes=0)
    option = Option.of("deepen", settings, site=site, before=nothing, after=nothing)
    return rewrite_all(network, example, [option])


def rewrite_all(
    network: nn.Module,
    example: Inputs,
    options: Sequence[Option],
    *,
    structure_only: bool = False,  # noqa: ARG001 - new layers are the identity from the start
) -> nn.Module:
    """Return a copy of a network with 1×1 + activation inserted at several places.

    Faster than one by one: the network is run once.

    Args:
        network: Not modified.
        example: An input that it is run on.
        options: Read for ``site`` and the settings of the first step.
        structure_only: As for other rewrites; here it makes no difference.

    Raises:
        PlanError: If nothing can be inserted at one of them; says why.
        ModelError: If the network cannot be run.
    """
    found = list(_places(_Scene(network, example)))
    reasons = {p.site: p.reason for p in found if isinstance(p, LeftAlone)}
    places = {p.site: p for p in found if isinstance(p, _Place)}
    for option in options:
        if option.site not in places:
            reason = reasons.get(option.site, "no activation is there")
            raise PlanError(f"The plan's site {option.site!r} cannot be deepened: {reason}.")
        _check_settings(places[option.site], option.first.settings)
    return _inserted(network, places, options)


def _check_settings(place: _Place, settings: Settings) -> None:
    allowed = {
        "form": [form for form in FORMS if form == "pointwise" or place.why_no_mlpconv is None],
        "where": [place.where],
        "activation": list(dict.fromkeys((place.activation, "PReLU"))),
    }
    for key, values in allowed.items():
        if settings.get(key) not in values:
            raise PlanError(
                f"The `{key}` of {place.site!r} must be one of {', '.join(values)}, got "
                f"{settings.get(key)!r}."
            )


def _inserted(
    network: nn.Module, places: dict[str, _Place], options: Sequence[Option]
) -> nn.Module:
    """Return a copy of a network with new layers; places are not inside one another."""
    work = copy_network(network)
    for option in options:
        site = module_at(work, option.site)
        chain = _chain(network, site, places[option.site], option.first.settings)
        work = replace_module(work, option.site, chain)
    return work


def _chain(network: nn.Module, site: nn.Module, place: _Place, settings: Settings) -> nn.Sequential:
    """Return a module with new layers behind it, of its own type and on its device."""
    parameters = (*site.parameters(), *network.parameters(), torch.empty(0))
    first = next(p for p in parameters if p.is_floating_point())
    old = None if place.old is None else module_at(network, place.old)
    after = place.where == "after"
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["activation" if after else "layer"] = site
    channels = place.shape[1]
    for number in range(1, FORMS[str(settings["form"])] + 1):
        pair = [
            (f"pointwise{number}", _identity(channels, len(place.shape) - 2)),
            (f"activation{number}", _new_activation(str(settings["activation"]), old, channels)),
        ]
        for name, module in pair if after else reversed(pair):
            parts[name] = module.to(device=first.device, dtype=first.dtype)
    return nn.Sequential(parts)


@checked
@ordinary_torch()
def deepen(
    model: nn.Module,
    example: Inputs | tuple[int, ...],
    *,
    sites: Sequence[str] | None = None,
    form: str = "pointwise",
    name: str | None = None,
) -> tuple[nn.Module, Plan]:
    """Return a deeper network of the same function: 1×1 convolutions and activations inserted.

    They start as the identity and are there to be trained. What is left alone, and why, is in the
    plan, which can be printed, saved, and applied to the same network anywhere.

    Args:
        model: Not modified.
        example: A tensor ``(batch, …)``, a tuple of arguments, keyword arguments, or the shape of
            an input with the batch in front. The network is run on it to see where maps are, and
            to compare the outputs before and after.
        sites: Names of activations, or, where these are functions in a forward or one module for
            several places, of the layers before them; all by default.
        form: ``pointwise``: one 1×1 + activation at each place. ``mlpconv``: two after each
            convolution of more than one place and its activation, as in Network In Network.
        name: What the plan calls the network; its class by default.

    Returns:
        A new network, in the mode of the old one, module by module; and the plan.

    Raises:
        OptionError: If there is no such form, or nothing can be inserted at one of the sites.
        ModelError: If the network cannot be copied or run on the example, or has no such place.
        WeightsError: If a weight is not finite: then nothing can be compared.

    References:
        Lin, Chen, Yan, "Network In Network", 2013, arXiv:1312.4400, section 3.1.

    Examples:
        >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> network, plan = deepen(chain, (1, 3, 5, 7))
        >>> network
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Sequential(
            (activation): ReLU()
            (pointwise1): Pointwise(8, 8)
            (activation1): ReLU()
          )
        )
    """
    model = as_network(model)
    check_finite(model)
    inputs = as_inputs(model, example)
    options, left_alone = find(model, inputs, form=form)
    if sites is not None:
        options = _asked(options, left_alone, sites)
    if not options:
        reasons = "; ".join(f"{item.site}: {item.reason}" for item in left_alone[:3])
        raise ModelError(
            f"The network must have a place for a 1×1 convolution after an activation, but "
            f"{type(model).__name__} has none{f' ({reasons})' if reasons else ''}."
        )
    plan = plan_of(model, inputs, options, left_alone, name=name)
    return rewrite_all(model, inputs, options), plan


def _asked(
    options: Sequence[Option], left_alone: Sequence[LeftAlone], sites: Sequence[str]
) -> list[Option]:
    by_site = {option.site: option for option in options}
    reasons = {item.site: item.reason for item in left_alone}
    for site in sites:
        if site not in by_site:
            reason = reasons.get(site, f"the places are {', '.join(by_site) or 'none'}")
            raise OptionError(f"Nothing can be inserted at {site!r}: {reason}.")
    return [option for option in options if option.site in set(sites)]
