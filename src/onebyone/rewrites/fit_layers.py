"""The layers of a plan, rewritten and fitted one after the other to what each sees."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from onebyone.calibration.collect import Across
from onebyone.calibration.curvature import curvature_of
from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.meaning import Meaning
from onebyone.calibration.moments import Moments
from onebyone.core.errors import ModelError, PlanError
from onebyone.core.records import Option, Step
from onebyone.core.tensor_trees import Inputs, device_of
from onebyone.networks.channel_groups import ChannelGroup, channel_groups
from onebyone.networks.surgery import in_evaluation_mode, module_at, replace_module
from onebyone.rewrites.low_rank.built import why_not_as_solved
from onebyone.rewrites.low_rank.reduced_rank import Problem, problems_of
from onebyone.rewrites.plain import why_not_plain
from onebyone.rewrites.registry import (
    LAYER_REWRITES,
    group_rewrite,
    is_group_rewrite,
    layer_rewrite,
)
from onebyone.rewrites.steps import Carried, are_exact, carry_out, problems_for

Groups = Mapping[str, ChannelGroup]

# Layers are fitted one after the other, each to what it really sees. Where passes are not resumed
# each costs two over the calibration data, and so many layers are cut into this many groups.
MOST_PASSES = 24
# All these passes together may cost this many MACs: some minutes on two cores.
PASS_MACS = 6e13
FEWEST_PASSES = 3


def groups_at(
    network: nn.Module, example: Inputs, options: Sequence[Option], *, proved: bool = True
) -> Groups:
    """Return the groups of layers that options rewrite, by their sites.

    Args:
        network: In evaluation mode. Not modified.
        example: An input.
        options: Of layers and of groups of these.
        proved: Whether it is checked on outputs that they can be rewritten.

    Raises:
        PlanError: If there is no such group, or it cannot be rewritten.
    """
    mine = [option for option in options if is_group_rewrite(option.first.rewrite)]
    if not mine:
        return {}
    found = channel_groups(in_evaluation_mode(network, device=device_of(example)), example)
    groups = {}
    for option in mine:
        group = found.at(option.site)
        if group is None:
            reason = found.reasons.get(option.site, "no other layer reads its channels alone")
            raise PlanError(f"The plan's site {option.site!r} cannot be rewritten: {reason}.")
        how = group_rewrite(option.first.rewrite)
        how.is_exact(group, option.first.settings)  # raises if the settings do not fit
        groups[option.site] = group
    if proved:
        _check_groups(network, example, mine, groups)
    return groups


def _check_groups(
    network: nn.Module, example: Inputs, options: Sequence[Option], groups: Groups
) -> None:
    for rewrite in dict.fromkeys(option.first.rewrite for option in options):
        how = group_rewrite(rewrite)
        mine = [groups[option.site] for option in options if option.first.rewrite == rewrite]
        if how.why_other(network, example, mine) is None:
            continue
        for group in mine:
            reason = how.why_other(network, example, [group])
            if reason is not None:
                raise PlanError(
                    f"The plan's site {group.site!r} cannot be rewritten: {reason}. Leave it out "
                    "of the plan."
                )


def check_plain(reference: nn.Module, witness: Inputs, options: Sequence[Option]) -> None:
    """Check that layers do what their weights say, and no more: all that is fitted follows them.

    Raises:
        PlanError: At the first that does not.
    """
    options = [option for option in options if not is_group_rewrite(option.first.rewrite)]
    for option in options:
        planned_layer(reference, option)
    found = why_not_plain(reference, witness, [option.site for option in options])
    for site, reason in found.items():
        raise PlanError(
            f"The plan's site {site!r} cannot be rewritten: {reason}. Leave it out of the plan."
        )


def leading_exact(network: nn.Module, options: Sequence[Option], groups: Groups) -> list[Option]:
    """Return the options up to the first that lowers a rank or removes a channel."""
    return list(takewhile(lambda option: _is_exact(network, option, groups), options))


def _is_exact(network: nn.Module, option: Option, groups: Groups) -> bool:
    if is_group_rewrite(option.first.rewrite):
        how = group_rewrite(option.first.rewrite)
        return how.is_exact(groups[option.site], option.first.settings)
    try:
        return are_exact(planned_layer(network, option), option.steps, site=option.site)
    except PlanError:
        return False  # the settings do not fit, which building it says with the site's name


def of_full_rank(network: nn.Module, options: Sequence[Option], groups: Groups) -> nn.Module:
    """Rewrite layers that keep their function by their kernels alone; ``network`` is modified.

    What data would add is rounding.
    """
    for option in options:
        if is_group_rewrite(option.first.rewrite):
            network, _ = _group_fitted(network, option, groups[option.site], {}, {})
            continue
        layer = planned_layer(network, option)
        network = carried_out(network, option, layer, problems_of(layer))
    return network


def carried_out(
    network: nn.Module,
    option: Option,
    module: nn.Module,
    problems: Sequence[Problem],
    *,
    steps: Sequence[Step] | None = None,
) -> nn.Module:
    """Return the network with steps carried out on a module, fitted; it may be modified.

    Args:
        network: Has the module.
        option: Whose steps they are.
        module: At the option's site.
        problems: Of each of its groups.
        steps: All of the option's by default.
    """
    after = None if steps is None else option.first
    new = module
    for carried in carry_out(module, steps or option.steps, site=option.site, after=after):
        _fit(carried, problems_for(carried.module, module, problems), option.site)
        new = carried.new
    return replace_module(network, option.site, new)


def planned_module(network: nn.Module, site: str) -> nn.Module:
    """Return the module at a plan's site.

    Raises:
        PlanError: If there is none.
    """
    try:
        return network.get_submodule(site)
    except AttributeError as error:
        raise PlanError(
            f"The plan's site {site!r} must be a layer of the network, but {error}."
        ) from error


def planned_layer(network: nn.Module, option: Option) -> nn.Module:
    """Return the layer at an option's site, which its first step takes.

    Raises:
        PlanError: If it does not take it, or the layer has several names.
    """
    site = option.site
    layer = planned_module(network, site)
    reason = layer_rewrite(option.first.rewrite).why_not(layer)
    if reason is not None:
        raise PlanError(f"The plan's site {site!r} cannot be rewritten: {reason}.")
    names = [n for n, m in network.named_modules(remove_duplicate=False) if m is layer]
    if len(names) > 1:
        raise PlanError(
            f"The plan's site {site!r} cannot be rewritten: it is one layer of several names, "
            f"{', '.join(map(repr, names))}."
        )
    return layer


def refitted(
    network: nn.Module,
    reference: nn.Module,
    options: Sequence[Option],
    data: CalibrationData | None,
    *,
    meaning: Meaning | None,
    macs: int,
    advance: Callable[[int, str], None],
    groups: Groups,
) -> nn.Module:
    """Rewrite layers, several from one pass over the data; ``network`` may be modified.

    Args:
        network: With what was rewritten before.
        reference: The original.
        options: Of layers and of groups of layers, in the order in which these are reached.
        data: The calibration data.
        meaning: Of the outputs.
        macs: Of the original.
        advance: Told of the options done.
        groups: Of layers, by the site of their options.
    """
    if not options:
        return network
    names = list(dict.fromkeys(name for option in options for name in _seen(option, groups)))
    for option in options:
        if not is_group_rewrite(option.first.rewrite):
            planned_layer(network, option)
    metrics: dict[str, Tensor] = {}
    across: Across | None = None
    parts: Iterable[Sequence[Option]] = ([option] for option in options)
    if data is not None:
        assert meaning is not None
        metrics = curvature_of(reference, names, data, macs, meaning)
        start = in_evaluation_mode(network, device=data.device)
        # Passes resume before the first layer that an option changes, which is its site.
        sites = list(dict.fromkeys([*(option.site for option in options), *names]))
        across = Across(reference, data.batches, examples=len(data), start=start, sites=sites)
        parts = _parts(options, across.resumed, _passes(macs, len(data)))
    for part in parts:
        moments: dict[str, tuple[Moments, ...]] = {}
        if data is not None and across is not None:
            seen = in_evaluation_mode(network, device=data.device)
            reached = dict.fromkeys(name for option in part for name in _seen(option, groups))
            moments = across.moments(seen, list(reached), since=[option.site for option in part])
        for option in part:
            if is_group_rewrite(option.first.rewrite):
                network, _ = _group_fitted(network, option, groups[option.site], moments, metrics)
                continue
            layer = planned_layer(network, option)
            metric = metrics.get(option.site)
            # Taken out, so that a layer's squares are gone when the next one is fitted.
            problems = problems_of(layer, moments.pop(option.site, None), metric=metric)
            network = carried_out(network, option, layer, problems)
        advance(len(part), " + ".join(part[0].rewrites))
    return network


def _seen(option: Option, groups: Groups) -> tuple[str, ...]:
    """Return the layers whose inputs an option is fitted to."""
    if is_group_rewrite(option.first.rewrite):
        return groups[option.site].readers
    return (option.site,)


def _group_fitted(
    network: nn.Module,
    option: Option,
    group: ChannelGroup,
    moments: dict[str, tuple[Moments, ...]],
    metrics: dict[str, Tensor],
) -> tuple[nn.Module, float]:
    """Return the network, modified, with a group of layers rewritten."""
    problems = [
        problem
        for name in group.readers
        for problem in problems_of(
            module_at(network, name), moments.pop(name, None), metric=metrics.get(name)
        )
    ]
    how = group_rewrite(option.first.rewrite)
    return how.fits(network, group, problems).carried_out(option.first.settings)


def _fit(carried: Carried, problems: Sequence[Problem], site: str) -> None:
    """Write the best weights into what a step made, in place.

    Raises:
        ModelError: If there are none: the layer's weights or what it sees are of extreme values.
    """
    step, new = carried.step, carried.new
    cause = None
    try:
        solved = carried.fit(problems)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        cause, reason = error, f"they cannot be computed: {str(error).rstrip('.')}"
    else:
        found = None
        if not all(bool(tensor.isfinite().all()) for tensor in new.parameters()):
            found = "some are NaN or infinite"
        if found is None and step.rewrite in LAYER_REWRITES:
            assert isinstance(new, nn.Sequential)
            found = why_not_as_solved(new, problems, carried.module, solved)
        if found is None:
            return
        reason = found
    raise ModelError(
        f"The layer {site!r} must have the weights that were solved for once rewritten as "
        f"{step.settings.get('form')!r}, but {reason}. Leave the layer as it is, or check the "
        "scale of its weights and inputs."
    ) from cause


def _parts(
    options: Sequence[Option], resumed: Collection[str], passes: int
) -> Iterator[Sequence[Option]]:
    """Yield the choices that are fitted from one pass each, in order.

    Args:
        options: All of them.
        resumed: Sites that have a pass of their own.
        passes: For the others.
    """
    size = -(-sum(option.site not in resumed for option in options) // passes)
    part: list[Option] = []
    for option in options:
        if part and (option.site in resumed or len(part) >= size):
            yield part
            part = []
        part.append(option)
    if part:
        yield part


def _passes(macs: int, examples: int) -> int:
    """Return how often both networks may run on all examples from the start."""
    affordable = int(PASS_MACS / max(2 * macs * examples, 1))
    return min(MOST_PASSES, max(FEWEST_PASSES, affordable))
