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

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from onebyone.core.arguments import checked
from onebyone.core.errors import ModelError, OneByOneError, OptionError, PlanError
from onebyone.core.records import Cost, LeftAlone, Option, Plan, Settings
from onebyone.core.tensor_trees import Inputs, batch_size
from onebyone.core.torch_state import ordinary_torch
from onebyone.networks.examples import as_inputs
from onebyone.networks.surgery import (
    as_network,
    check_finite,
    copy_network,
    floating_type,
    module_at,
    replace_module,
)
from onebyone.rewrites.deepen_places import POINTWISE, Place, Scene, find_places
from onebyone.rewrites.equivalence import Version, keeping, plan_of, versions_of

# Form -> how many pairs of 1×1 + activation it adds.
FORMS = {"pointwise": 1, "mlpconv": 2}


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
        made = POINTWISE[axes](channels)
    weight, bias = made.weight, made.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        weight.copy_(torch.eye(channels).reshape(weight.shape))
        bias.zero_()
    return made


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
    places: dict[str, Place] = {}
    for place in find_places(Scene(network, example)):
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


def _option(place: Place, form: str, batch: int, *, value_bytes: int) -> Option:
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
    network: nn.Module, example: Inputs, places: dict[str, Place], options: list[Option]
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
    version: Version, places: dict[str, Place], options: Sequence[Option]
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
    found = list(find_places(Scene(network, example)))
    reasons = {p.site: p.reason for p in found if isinstance(p, LeftAlone)}
    places = {p.site: p for p in found if isinstance(p, Place)}
    for option in options:
        if option.site not in places:
            reason = reasons.get(option.site, "no activation is there")
            raise PlanError(f"The plan's site {option.site!r} cannot be deepened: {reason}.")
        _check_settings(places[option.site], option.first.settings)
    return _inserted(network, places, options)


def _check_settings(place: Place, settings: Settings) -> None:
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


def _inserted(network: nn.Module, places: dict[str, Place], options: Sequence[Option]) -> nn.Module:
    """Return a copy of a network with new layers; places are not inside one another."""
    work = copy_network(network)
    for option in options:
        site = module_at(work, option.site)
        chain = _chain(network, site, places[option.site], option.first.settings)
        work = replace_module(work, option.site, chain)
    return work


def _chain(network: nn.Module, site: nn.Module, place: Place, settings: Settings) -> nn.Sequential:
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
