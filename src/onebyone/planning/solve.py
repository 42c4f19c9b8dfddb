"""The plan of least harm under the budgets: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from onebyone.errors import BudgetError
from onebyone.records import Budget, Cost, Option
from onebyone.units import format_count, format_percent

# At equal harm the cheaper option wins: a hair of harm for the share of the cost that is kept.
TIE = 1e-7


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
    constraint = LinearConstraint(csr_matrix(np.vstack(rows)), np.array(low), np.array(high))
    tie = TIE * max(float(harm.max()), 1e-12)
    picked = _solve(harm + tie * (1 + kept), constraint)
    if picked is None:
        raise _explained(options, budgets, before, forced, obstacles)
    return tuple(option for option, chosen in zip(options, picked, strict=True) if chosen)


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
    objective: NDArray[np.float64], constraint: LinearConstraint
) -> NDArray[np.bool_] | None:
    result = milp(
        objective,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=constraint,
        options={"time_limit": 60.0, "mip_rel_gap": 1e-4},
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
    rows, low, high = _one_each(options, forced)
    constraint = LinearConstraint(csr_matrix(np.vstack(rows)), np.array(low), np.array(high))
    for budget in budgets:
        saved = np.array([_cost(option.saved, budget.quantity) for option in options], float)
        picked = _solve(-saved, constraint)
        assert picked is not None
        best = before - Cost(params=0, macs=0)
        for option, chosen in zip(options, picked, strict=True):
            best = best - option.saved if chosen else best
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
