"""Makes a plan within budgets from options that are surveyed already; nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onebyone.core.budget import counted_budgets, parse_budgets
from onebyone.core.records import (
    COUNTED,
    Budget,
    CalibrationInfo,
    Deployment,
    InputSpec,
    LeftAlone,
    Option,
    Plan,
)
from onebyone.core.units import format_percent
from onebyone.planning.knapsack import choose, nearest
from onebyone.planning.latency.precision import in_precision
from onebyone.planning.links import is_link
from onebyone.planning.survey import Survey


def nearest_counted(found: Survey, budgets: Sequence[Budget]) -> tuple[Budget, ...]:
    """Return budgets with those of what is counted raised to what can be reached."""
    counted = [budget for budget in budgets if budget.quantity in COUNTED]
    reached = nearest(found.options, counted, found.start, forced=found.forced)
    raised = {budget.quantity: budget for budget in reached}
    return tuple(raised.get(budget.quantity, budget) for budget in budgets)


def check_reachable(texts: Sequence[str], deployment: Deployment | None, found: Survey) -> None:
    """Refuse budgets of what is counted that no choice of the options meets."""
    found = in_precision(found, deployment)
    budgets = counted_budgets(texts, found.before)
    choose(found.options, budgets, found.start, forced=found.forced, obstacles=_obstacles(found))


def plan_from(
    found: Survey,
    budget: str | Iterable[str],
    *,
    network: str,
    inputs: InputSpec,
    calibration: CalibrationInfo | None,
) -> Plan:
    """Choose among options already surveyed: a moment's work, for any number of budgets.

    Args:
        found: The options.
        budget: As for :func:`plan`, of what is counted: ``macs``, ``params`` and ``size``.
        network: What to call the network.
        inputs: What the network takes, with the batch that the plan is for.
        calibration: What harm was measured on.

    Raises:
        BudgetError: If a budget cannot be read or reached; says what is reachable.
    """
    budgets = parse_budgets(budget, found.before)
    return plan_within(found, budgets, network=network, inputs=inputs, calibration=calibration)


def plan_within(
    found: Survey,
    budgets: Sequence[Budget],
    *,
    network: str,
    inputs: InputSpec,
    calibration: CalibrationInfo | None,
    fastest: float | None = None,
) -> Plan:
    """Choose among options within budgets that are read already, as :func:`plan_from`.

    Args:
        found: The options.
        budgets: Upper bounds.
        network: What to call the network.
        inputs: What the network takes.
        calibration: What harm was measured on.
        fastest: How much more harm than the least the fastest choice may do; ``None`` for the
            choice of least harm.

    Raises:
        BudgetError: If a budget cannot be reached; says what is reachable.
    """
    exact = found.exact if found.exact_asked else None
    chosen = choose(
        found.options,
        budgets,
        found.start,
        forced=found.forced,
        obstacles=_obstacles(found),
        fastest=fastest,
    )
    taken = found.links.settled(chosen.options) if found.links else chosen.options
    if found.exact is not None and any(_is_inside(option, found.exact) for option in taken):
        exact = found.exact
    after = found.base
    choices = taken if exact is None else (exact, *taken)
    for option in choices:
        after = after - option.saved
    return Plan(
        network=network,
        inputs=inputs,
        budgets=tuple(budgets),
        before=found.before,
        after=after,
        choices=choices,
        left_alone=_left_alone(found, choices, exact),
        calibration=calibration,
        harm=sum(option.harm or 0.0 for option in taken),
        gap=chosen.gap,
        task=None if found.meaning is None else found.meaning.info(),
    )


def _is_inside(option: Option, head: Option) -> bool:
    """Whether an option's site is a layer that only the exact head has."""
    if option.first.rewrite == "head":  # another form of it, in its place
        return False
    return any(name.startswith(f"{head.site}.") for name in (option.site, *option.occupies))


def _left_alone(
    found: Survey, choices: Sequence[Option], exact: Option | None
) -> tuple[LeftAlone, ...]:
    touched = {name for option in choices for name in (*option.occupies, option.site)}
    reasons = {item.site: item.reason for item in found.left_alone if item.site not in touched}
    for option in found.options:
        if option.site not in touched and not is_link(option):
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
