"""The plan of least harm under the budgets: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from onebyone.errors import BudgetError
from onebyone.records import Budget, Cost, Option, Quantity
from onebyone.units import format_bytes, format_count, format_ms, format_percent

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
    fastest: float | None = None,
) -> tuple[Option, ...]:
    """Return the options of least total harm that meet every budget, in the order given.

    Each module is part of one chosen option at most; harms and times are taken to add up.

    Args:
        options: Each with its harm, and with its milliseconds where they are bounded.
        budgets: Upper bounds for the whole network.
        before: The network's own cost.
        forced: Sites at which some option must be chosen.
        obstacles: What stands in the way of more, in words, for the error.
        fastest: Return instead the options of least total time whose harm is at most this many
            times the least.

    Raises:
        BudgetError: If no choice meets the budgets; says how far they can be met.
    """
    short = [b for b in budgets if before.amount(b.quantity) > b.limit]
    if not options:
        if short:
            raise BudgetError(_unreachable(short[0], before, before, obstacles))
        return ()
    harm = np.array([max(option.harm or 0.0, 0.0) for option in options])
    rows, low, high = _one_each(options, forced)
    for budget in budgets:
        total = before.amount(budget.quantity)
        saved = np.array([option.saved.amount(budget.quantity) for option in options], float)
        rows.append(saved / (total or 1))
        low.append((total - budget.limit) / (total or 1))
        high.append(np.inf)
    # Milliseconds where there are any: a hair of harm must not buy what costs time.
    quantity: Quantity = "macs" if before.ms is None else "latency"
    kept = np.array([o.after.amount(quantity) - o.before.amount(quantity) for o in options])
    kept = 1 + kept / (before.amount(quantity) or 1)
    objective = harm / max(float(harm.max()), 1e-12) + TIE * (1 + kept)
    picked = _pick(options, objective, rows, low, high, budgets=budgets, before=before)
    if picked is None:
        raise _explained(options, budgets, before, forced, obstacles)
    if fastest is not None:
        rows.append(harm / max(float(harm @ picked), 1e-12))
        low.append(-np.inf)
        high.append(fastest)
        faster = _pick(options, kept - 1, rows, low, high, budgets=budgets, before=before)
        picked = picked if faster is None else faster
    return tuple(option for option, take in zip(options, picked, strict=True) if take)


def _pick(
    options: Sequence[Option],
    objective: NDArray[np.float64],
    rows: Sequence[NDArray[np.float64]],
    low: Sequence[float],
    high: Sequence[float],
    *,
    budgets: Sequence[Budget],
    before: Cost,
) -> NDArray[np.bool_] | None:
    """Return what to pick for the least total, with budgets met to the last unit."""
    rows, low, high = list(rows), list(low), list(high)
    for _ in range(MOST_CUTS):
        picked = _solve(objective, rows, low, high)
        if picked is None:
            return None
        chosen = [option for option, take in zip(options, picked, strict=True) if take]
        if _meets(chosen, budgets, before):
            return picked
        # Met to the solver's tolerance, a millionth, but not to the last MAC: never this one again.
        rows.append(np.where(picked, 1.0, -1.0))
        low.append(-np.inf)
        high.append(float(picked.sum()) - 1)
    return None


def least_cost(
    options: Sequence[Option],
    quantity: Quantity,
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
    saved = np.array([option.saved.amount(quantity) for option in options], float)
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
    return all(cost.amount(budget.quantity) <= budget.limit for budget in budgets)


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
    bounded = LinearConstraint(csr_matrix(np.vstack(rows)), np.array(low), np.array(high))
    with _unheard():
        result = milp(
            # The solver stops within 1e-6 of the least: that must be less than what breaks ties.
            objective * SCALE,
            integrality=np.ones(len(objective)),
            bounds=Bounds(0, 1),
            constraints=bounded,
            options={"time_limit": 60.0, "mip_rel_gap": 0.0},
        )
    return None if result.x is None else np.asarray(result.x > 0.5)


@contextmanager
def _unheard() -> Iterator[None]:
    """Drop what C code prints to standard output meanwhile.

    HiGHS 1.12 prints a line there though it was told to be silent (its issue 2783), between the
    lines of our tables and of our JSON.
    """
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # closed: nobody listens
        yield
        return
    _flush_c()
    try:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - its descriptor alone
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        _flush_c()
        os.dup2(kept, 1)
        os.close(kept)


def _flush_c() -> None:
    # A pipe is written to when C's buffer is full: what is in it must go where it belongs.
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


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
        if best.amount(budget.quantity) > budget.limit:
            return BudgetError(_unreachable(budget, before, best, obstacles))
    asked = ", ".join(budget.asked for budget in budgets)
    return BudgetError(f"The budgets {asked} can each be met, but not together. Raise one of them.")


def _unreachable(budget: Budget, before: Cost, best: Cost, obstacles: str) -> str:
    total, reached = before.amount(budget.quantity), best.amount(budget.quantity)
    enough = math.ceil(100 * reached / (total or 1))
    form, unit = {
        "macs": (format_count, " MACs"),
        "params": (format_count, " parameters"),
        "latency": (format_ms, ""),
        "memory": (format_bytes, ""),
    }[budget.quantity]
    return (
        f"The budget {budget.asked} is {form(budget.limit)}{unit}, but the least that "
        f"these rewrites reach is {form(reached)} "
        f"({format_percent(reached / (total or 1))} of {form(total)}). {obstacles}"
        f"Raise the budget to `{budget.quantity}={enough}%` or more."
    )
