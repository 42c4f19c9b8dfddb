"""The plan of least harm under the budgets: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from onebyone.errors import BudgetError
from onebyone.records import Budget, Cost, Option
from onebyone.units import format_count, format_percent

# At equal harm the cheaper option wins: a hair of harm for the share of the cost that is kept.
TIE = 1e-7
SCALE = 1e4
# Choices that miss a budget by the solver's rounding are forbidden, up to this many.
MOST_CUTS = 50


def choose(
    options: Sequence[Option],
    budgets: Sequence[Budget],
    before: Cost,
    *,
    forced: Sequence[str] = (),
    obstacles: str = "",
) -> tuple[Option, ...]:
    """Return the options of least total harm that meet every budget, in the order given.

    Each module is part of one chosen option at most; harms are taken to add up.

    Args:
        options: Each with its harm.
        budgets: Upper bounds for the whole network.
        before: The network's own cost.
        forced: Sites at which some option must be chosen.
        obstacles: What stands in the way of more, in words, for the error.

    Raises:
        BudgetError: If no choice meets the budgets; says how far they can be met.
    """
    short = [b for b in budgets if _cost(before, b.quantity) > b.limit]
    if not options:
        if short:
            raise BudgetError(_unreachable(short[0], before, before, obstacles))
        return ()
    harm = np.array([max(option.harm or 0.0, 0.0) for option in options])
    kept = np.array([option.after.macs / max(before.macs, 1) for option in options])
    rows, low, high = _one_each(options, forced)
    for budget in budgets:
        saved = np.array([_cost(option.saved, budget.quantity) for option in options], float)
        total = _cost(before, budget.quantity)
        rows.append(saved / max(total, 1))
        low.append((total - budget.limit) / max(total, 1))
        high.append(np.inf)
    objective = harm / max(float(harm.max()), 1e-12) + TIE * (1 + kept)
    for _ in range(MOST_CUTS):
        picked = _solve(objective, rows, low, high)
        if picked is None:
            break
        chosen = tuple(option for option, take in zip(options, picked, strict=True) if take)
        if _meets(chosen, budgets, before):
            return chosen
        # Met to the solver's tolerance, a millionth, but not to the last MAC: never this one again.
        rows.append(np.where(picked, 1.0, -1.0))
        low.append(-np.inf)
        high.append(float(picked.sum()) - 1)
    raise _explained(options, budgets, before, forced, obstacles)


def least_cost(
    options: Sequence[Option],
    quantity: Literal["params", "macs"],
    before: Cost,
    *,
    forced: Sequence[str] = (),
) -> Cost:
    """Return the network's cost under the choice that leaves least of a quantity.

    Args:
        options: As for :func:`choose`.
        quantity: What to save.
        before: The network's own cost.
        forced: Sites at which some option must be chosen.
    """
    if not options:
        return before
    rows, low, high = _one_each(options, forced)
    saved = np.array([_cost(option.saved, quantity) for option in options], float)
    picked = _solve(-saved / max(float(np.abs(saved).max()), 1.0), rows, low, high)
    assert picked is not None
    least = before
    for option, chosen in zip(options, picked, strict=True):
        least = least - option.saved if chosen else least
    return least


def _meets(chosen: Sequence[Option], budgets: Sequence[Budget], before: Cost) -> bool:
    cost = before
    for option in chosen:
        cost = cost - option.saved
    return all(_cost(cost, budget.quantity) <= budget.limit for budget in budgets)


def _one_each(
    options: Sequence[Option], forced: Sequence[str]
) -> tuple[list[NDArray[np.float64]], list[float], list[float]]:
    """Return a row for each module, with its bounds: at most one option, exactly one if forced."""
    names = sorted({name for option in options for name in option.occupies or (option.site,)})
    rows, low, high = [], [], []
    for name in names:
        row = [float(name in (option.occupies or (option.site,))) for option in options]
        rows.append(np.array(row))
        low.append(0.0)
        high.append(1.0)
    for site in forced:
        rows.append(np.array([float(option.site == site) for option in options]))
        low.append(1.0)
        high.append(1.0)
    return rows, low, high


def _solve(
    objective: NDArray[np.float64],
    rows: list[NDArray[np.float64]],
    low: list[float],
    high: list[float],
) -> NDArray[np.bool_] | None:
    """Return what to pick for the least total of an objective whose largest part is about 1."""
    result = milp(
        # The solver stops within 1e-6 of the least: that must be less than what ties are broken by.
        objective * SCALE,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(csr_matrix(np.vstack(rows)), np.array(low), np.array(high)),
        options={"time_limit": 60.0, "mip_rel_gap": 0.0},
    )
    return None if result.x is None else np.asarray(result.x > 0.5)


def _explained(
    options: Sequence[Option],
    budgets: Sequence[Budget],
    before: Cost,
    forced: Sequence[str],
    obstacles: str,
) -> BudgetError:
    """Find the budget that cannot be met alone, and how far it can."""
    for budget in budgets:
        best = least_cost(options, budget.quantity, before, forced=forced)
        if _cost(best, budget.quantity) > budget.limit:
            return BudgetError(_unreachable(budget, before, best, obstacles))
    asked = ", ".join(budget.asked for budget in budgets)
    return BudgetError(f"The budgets {asked} can each be met, but not together. Raise one of them.")


def _unreachable(budget: Budget, before: Cost, best: Cost, obstacles: str) -> str:
    total, reached = _cost(before, budget.quantity), _cost(best, budget.quantity)
    enough = math.ceil(100 * reached / max(total, 1))
    unit = "MACs" if budget.quantity == "macs" else "parameters"
    return (
        f"The budget {budget.asked} is {format_count(budget.limit)} {unit}, but the least that "
        f"these rewrites reach is {format_count(reached)} "
        f"({format_percent(reached / max(total, 1))} of {format_count(total)}). {obstacles}"
        f"Raise the budget to `{budget.quantity}={enough}%` or more."
    )


def _cost(cost: Cost, quantity: str) -> int:
    return cost.params if quantity == "params" else cost.macs
