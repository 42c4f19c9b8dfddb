"""A plan carried out on a copy: the structure alone, or with weights fitted to data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.calibration import (
    Across,
    CalibrationData,
    Moments,
    as_calibration,
    curvature_of,
)
from onebyone.errors import PlanError, UnknownNameError
from onebyone.layers import GlobalAverageHead
from onebyone.precision import float32_in
from onebyone.randomness import seeded
from onebyone.records import Option, Plan
from onebyone.rewrites import deepen, fold, head
from onebyone.rewrites.layerwise import LAYER_REWRITES, layer_rewrite
from onebyone.rewrites.regression import problems_of
from onebyone.sites import (
    as_network,
    copy_network,
    evaluation_copy,
    floating_type,
    hooks_removed,
    in_evaluation_mode,
    replace_module,
)

Progress = Callable[[int, int, str], None]

# Layers are fitted one after the other, each to what it really sees. Where passes are not resumed
# each costs two over the calibration data, and so many layers are cut into this many groups.
MOST_PASSES = 24
# All these passes together may cost this many MACs: some minutes on two cores.
PASS_MACS = 6e13
FEWEST_PASSES = 3

# Rewrites that need to know which layer feeds which; they keep the function as it is.
GRAPH_REWRITES = ("fold", "deepen")
_LAYERWISE = "layerwise"


def restructure(model: nn.Module, plan: Plan | str | Path) -> nn.Module:
    """Return a copy of a network with the structure that a plan gives, but not its weights.

    For weights that are loaded afterwards. See :func:`apply` for the weights.

    Args:
        model: Not modified.
        plan: Read for ``site``, ``rewrite`` and ``settings`` of its choices; or the file of one.

    Raises:
        PlanError: If the plan does not fit the network.
    """
    model, plan = as_network(model), _as_plan(plan)
    network = copy_network(model)
    example = _example(model, plan)
    with seeded(0, example.device):  # fresh weights
        for kind, group in groupby(plan.choices, key=_kind):
            options = list(group)
            if kind in GRAPH_REWRITES:
                network = _regraphed(network, options, example, structure_only=True)
            else:
                for option in options:
                    network = _restructured(network, option, example)
    return network


@float32_in("float32")
def apply(
    model: nn.Module,
    plan: Plan | str | Path,
    calibration: object,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> nn.Module:
    """Return a copy of a network rewritten as planned, its weights fitted to calibration data.

    Factorized layers are fitted in order of execution, each to give what the original layer gave
    from what the layer really sees now, so that it mends the errors of those before it.

    Args:
        model: Not modified.
        plan: Read for ``site``, ``rewrite`` and ``settings`` of its choices; or the file of one,
            which may be edited by hand.
        calibration: Unlabelled inputs: a tensor ``(n, …)``, a split, a torch data set or loader.
            ``None``: the weights come from the kernels alone, which is far less accurate.
        device: Where the passes over the data run. The result is on the network's own device.
        progress: Told of the layers done.

    Returns:
        A new network in the mode of the old one.

    Raises:
        PlanError: If the plan does not fit the network.
        DataError: If the calibration data is empty or of an unknown form.
    """
    model, plan = as_network(model), _as_plan(plan)
    data = None
    if calibration is not None:
        data = as_calibration(calibration, device=device, dtype=floating_type(model))
    example = _example(model, plan)
    home = example.device
    example = example.to(device)
    network = copy_network(model).to(device)
    reference = evaluation_copy(model, device=device)
    total, done = len(plan.choices), 0

    def advance(count: int, message: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, message)

    with seeded(0, device):  # fresh weights
        for kind, group in groupby(plan.choices, key=_kind):
            options = list(group)
            if kind in GRAPH_REWRITES:
                # The same function under new names: later choices refer to these.
                network = _regraphed(network, options, example)
                reference = _regraphed(reference, options, example)
                advance(len(options), kind)
            elif kind == _LAYERWISE:
                network = _refitted(
                    network, reference, options, data, macs=plan.before.macs, advance=advance
                )
            else:
                for option in options:
                    network = _restructured(network, option, example)
                    if option.settings.get("form") == "exact":
                        reference = _restructured(reference, option, example)
                    else:
                        _fit_head(network, reference, option, data)
                    advance(1, option.rewrite)
    return network.to(home)


def _kind(option: Option) -> str:
    """Return what choices in a row are carried out together."""
    return _LAYERWISE if option.rewrite in LAYER_REWRITES else option.rewrite


def _regraphed(
    network: nn.Module, options: Sequence[Option], example: Tensor, *, structure_only: bool = False
) -> nn.Module:
    """Return a copy of a network after rewrites that need to know which layer feeds which."""
    if options[0].rewrite == "fold":
        return fold.rewrite_all(network, example, options, structure_only=structure_only)
    return deepen.rewrite_all(network, example, options)


def _as_plan(plan: Plan | str | Path) -> Plan:
    if isinstance(plan, str | Path):
        return Plan.load(plan)
    if not isinstance(plan, Plan):
        raise PlanError(
            f"A plan must be a Plan or the file of one, got {type(plan).__name__}. Make it by "
            "`onebyone.plan`."
        )
    return plan


def _example(model: nn.Module, plan: Plan) -> Tensor:
    """Return a blank input of the plan's shape, of the network's type and on its device."""
    home = next(model.parameters(), torch.empty(0)).device
    return torch.zeros(1, *plan.input_shape[1:], dtype=floating_type(model), device=home)


def _restructured(network: nn.Module, option: Option, example: Tensor) -> nn.Module:
    """Return the network with one site's structure changed; ``network`` may be modified."""
    if option.rewrite in LAYER_REWRITES:
        old = _layer_at(network, option)
        chain = layer_rewrite(option.rewrite).build(old, option.settings, site=option.site)
        return replace_module(network, option.site, chain)
    if option.rewrite == "head":
        form, hidden, context = head.form_and_widths(option.settings, site=option.site)
        return head.rewrite(
            network, example, name=option.site, form=form, hidden=hidden, context=context
        )
    raise UnknownNameError("rewrite", option.rewrite, (*LAYER_REWRITES, *GRAPH_REWRITES, "head"))


def _layer_at(network: nn.Module, option: Option) -> nn.Module:
    site = option.site
    try:
        layer = network.get_submodule(site)
    except AttributeError as error:
        raise PlanError(
            f"The plan's site {site!r} must be a layer of the network, but {error}."
        ) from error
    reason = layer_rewrite(option.rewrite).why_not(layer)
    if reason is not None:
        raise PlanError(f"The plan's site {site!r} cannot be rewritten: {reason}.")
    names = [n for n, m in network.named_modules(remove_duplicate=False) if m is layer]
    if len(names) > 1:
        raise PlanError(
            f"The plan's site {site!r} cannot be rewritten: it is one layer of several names, "
            f"{', '.join(map(repr, names))}."
        )
    return layer


def _refitted(
    network: nn.Module,
    reference: nn.Module,
    options: Sequence[Option],
    data: CalibrationData | None,
    *,
    macs: int,
    advance: Callable[[int, str], None],
) -> nn.Module:
    """Rewrite layers group by group; ``network`` may be modified."""
    names = [option.site for option in options]
    for option in options:
        _layer_at(network, option)
    metrics: dict[str, Tensor] = {}
    across: Across | None = None
    groups: Iterable[Sequence[Option]] = ([option] for option in options)
    if data is not None:
        metrics = curvature_of(reference, names, data, macs)
        start = in_evaluation_mode(network, device=data.device)
        across = Across(reference, data.batches, examples=len(data), start=start, sites=names)
        groups = _groups(options, across.resumed, _passes(macs, len(data)))
    for part in groups:
        moments: dict[str, tuple[Moments, ...]] = {}
        if data is not None and across is not None:
            seen = in_evaluation_mode(network, device=data.device)
            moments = across.moments(seen, [option.site for option in part])
        for option in part:
            layer, how = _layer_at(network, option), layer_rewrite(option.rewrite)
            chain = how.build(layer, option.settings, site=option.site)
            metric = metrics.get(option.site)
            # Taken out, so that a layer's squares are gone when the next one is fitted.
            problems = problems_of(layer, moments.pop(option.site, None), metric=metric)
            how.fit(chain, problems, option.settings, layer)
            network = replace_module(network, option.site, chain)
        advance(len(part), part[0].rewrite)
    return network


def _groups(
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


def _fit_head(
    network: nn.Module, reference: nn.Module, option: Option, data: CalibrationData | None
) -> None:
    """Fit the averaging head of a network, in place, to the reference's outputs."""
    if data is None:
        raise PlanError(
            f"The head {option.site!r} as 'gap' needs calibration data to be fitted to, got None."
        )
    new = network.get_submodule(option.site)
    assert isinstance(new, GlobalAverageHead)
    features, targets = head_data(
        in_evaluation_mode(network, device=data.device), reference, option.site, data
    )
    linear = reference.get_submodule(option.site)
    head.fit_gap(new, features, targets, linear=linear if isinstance(linear, nn.Linear) else None)


def head_data(
    network: nn.Module, reference: nn.Module, site: str, data: CalibrationData
) -> tuple[Tensor, Tensor]:
    """Return the maps that a head sees and the reference's outputs, on the CPU.

    Args:
        network: In evaluation mode; has the head at ``site``.
        reference: In evaluation mode.
        site: The head's name.
        data: The inputs.

    Returns:
        Maps ``(n, channels, height, width)`` and outputs ``(n, classes)``.
    """
    maps: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        maps.append(args[0].detach().float().cpu())

    targets = []
    handle = network.get_submodule(site).register_forward_pre_hook(keep)
    with hooks_removed([handle]), torch.no_grad():
        for inputs in data.batches():
            network(inputs)
            targets.append(reference(inputs).float().cpu())
    return torch.cat(maps), torch.cat(targets)
