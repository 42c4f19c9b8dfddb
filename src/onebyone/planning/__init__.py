"""From a budget to a plan: the options of least harm that meet it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from onebyone.calibration import as_calibration
from onebyone.errors import OptionError
from onebyone.planning.applies import applies
from onebyone.planning.budget import check_budgets, parse_budgets
from onebyone.planning.front import front_of
from onebyone.planning.options import HeadChoice, Survey, survey
from onebyone.planning.solve import choose
from onebyone.planning.uniform import uniform_plan
from onebyone.records import CalibrationInfo, LeftAlone, Option, Plan
from onebyone.rewrites.layerwise import LAYER_REWRITES
from onebyone.sites import check_finite, floating_type
from onebyone.units import format_percent

__all__ = ["HEAD_CHOICES", "HeadChoice", "applies", "plan", "plan_from", "uniform_plan"]

HEAD_CHOICES = ("auto", "keep", "exact", "gap")


def plan(
    model: nn.Module,
    calibration: object,
    *,
    budget: str | Iterable[str],
    head: HeadChoice = "auto",
    leave: Sequence[str] = (),
    name: str | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Plan:
    """Choose a rewrite for each site so that the budgets are met with the least harm.

    Args:
        model: Not modified.
        calibration: Unlabelled inputs: a tensor ``(n, …)``, a split, a torch data set or loader.
            A few hundred to a few thousand.
        budget: Such as ``"macs=50%"`` or ``["macs=50%", "params=2M"]``.
        head: ``auto``: a GAP head is one option among others; ``keep``: the head stays; ``exact``:
            it becomes convolutions of the same function; ``gap``: 1×1 convolutions and a global
            average.
        leave: Names of modules to leave alone, with all inside them.
        name: What to call the network; its class by default.
        device: Where to run it.
        progress: Told of the steps done.

    Raises:
        BudgetError: If a budget cannot be read or reached; says what is reachable.
        ModelError: If the network has nothing to rewrite, or cannot be run on the data.
        WeightsError: If a weight is not finite.
    """
    if head not in HEAD_CHOICES:
        raise OptionError(f"`head` must be one of {', '.join(HEAD_CHOICES)}, got {head!r}.")
    check_finite(model)
    data = as_calibration(calibration, device=device, dtype=floating_type(model))
    texts = [budget] if isinstance(budget, str) else list(budget)
    check_budgets(texts)  # a typing error should not wait for a survey
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # fresh weights of the heads that are tried
        found = survey(model, data, head_choice=head, leave=leave, progress=progress)
    planned = partial(
        plan_from,
        found,
        network=name or type(model).__name__,
        input_shape=tuple(data.example().shape),
        calibration=data.info(),
    )
    made = planned(texts)
    return replace(made, front=front_of(found, made.budgets[0].quantity, planned))


def plan_from(
    found: Survey,
    budget: str | Iterable[str],
    *,
    network: str,
    input_shape: tuple[int, ...],
    calibration: CalibrationInfo,
) -> Plan:
    """Choose among options already surveyed: a moment's work, for any number of budgets."""
    budgets = parse_budgets(budget, found.before)
    exact = found.exact if found.exact_asked else None
    start = found.before - exact.saved if exact else found.before
    chosen = choose(found.options, budgets, start, forced=found.forced, obstacles=_obstacles(found))
    if found.exact is not None and any(_is_inside(option, found.exact) for option in chosen):
        exact = found.exact
    after = found.before
    choices = chosen if exact is None else (exact, *chosen)
    for option in choices:
        after = after - option.saved
    return Plan(
        network=network,
        input_shape=input_shape,
        budgets=budgets,
        before=found.before,
        after=after,
        choices=choices,
        left_alone=_left_alone(found, choices, exact),
        calibration=calibration,
        harm=sum(option.harm or 0.0 for option in chosen),
    )


def _is_inside(option: Option, head: Option) -> bool:
    """Whether an option's site is a layer that only the exact head has."""
    return option.rewrite in LAYER_REWRITES and option.site.startswith(f"{head.site}.")


def _left_alone(
    found: Survey, choices: Sequence[Option], exact: Option | None
) -> tuple[LeftAlone, ...]:
    touched = {name for option in choices for name in (*option.occupies, option.site)}
    reasons = {item.site: item.reason for item in found.left_alone if item.site not in touched}
    for option in found.options:
        if option.site not in touched:
            reasons[option.site] = "the budget is met with less harm elsewhere"
    if found.exact is not None and exact is None:
        # The layers of the exact head are not in the network that the plan is for.
        inside = f"{found.exact.site}."
        gone = [site for site in reasons if site.startswith(inside)]
        for site in gone:
            reason = reasons.pop(site)
            if found.exact.site not in touched:
                reasons[found.exact.site] = reason
    order = {layer.name: place for place, layer in enumerate(found.layers)}
    return tuple(
        LeftAlone(site=site, reason=reason)
        for site, reason in sorted(reasons.items(), key=lambda x: order.get(x[0], len(order)))
    )


def _obstacles(found: Survey) -> str:
    """Say what share of the MACs the sites hold that cannot be rewritten."""
    fixed = {item.site for item in found.left_alone}
    held = sum(layer.macs for layer in found.layers if layer.name in fixed)
    if not held:
        return ""
    worst = max((layer for layer in found.layers if layer.name in fixed), key=lambda x: x.macs)
    reason = next(item.reason for item in found.left_alone if item.site == worst.name)
    share = format_percent(held / max(found.before.macs, 1))
    return (
        f"Layers that cannot be rewritten hold {share} of the MACs, the largest "
        f"{worst.name!r} ({reason}). "
    )
