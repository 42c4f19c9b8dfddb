"""Errors of latencies that cannot be reached, with what was measured and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from onebyone.core.errors import BudgetError
from onebyone.core.records import Budget, PlannedLatency
from onebyone.core.units import format_ms, format_percent
from onebyone.planning.latency.builds import Builds


def nothing_is_faster(budgets: Sequence[Budget], builds: Builds) -> BudgetError:
    """Return the error for a deployment in which no option is faster."""
    asked = ", ".join(budget.asked for budget in budgets)
    alone = ""
    if builds.own.alone is not None:
        left = format_percent(builds.unchanged_ms / builds.before_ms)
        alone = f"int8 alone takes {left} of float32's time, and "
    return BudgetError(
        f"The budget {asked} cannot be met in {builds.deployment}: {alone}no rewrite of any "
        f"layer is shown to be faster there. Choose another runtime (`onebyone bench` "
        f"compares them), or bound `macs` or `params` with no runtime."
    )


def too_slow(
    budgets: Sequence[Budget],
    builds: Builds,
    measured: Sequence[PlannedLatency],
    notes: Sequence[str],
) -> BudgetError:
    """Return the error for a latency that no measured network meets; it names the nearest.

    Args:
        budgets: What was asked for.
        builds: The original's times.
        measured: Those of each network that was built.
        notes: What else was found on the way.
    """
    asked = ", ".join(budget.asked for budget in budgets)
    best = max(measured, key=lambda each: each.ratio.value)
    share = 1 / best.ratio.value
    percent = min(math.ceil(100 * share) + 1, 100)
    reachable = [
        replace(budget, limit=percent / 100 * builds.before_ms)
        if budget.quantity == "latency"
        else budget
        for budget in budgets
    ]
    return BudgetError(
        f"The budget {asked} cannot be met in {builds.deployment}: of {len(measured)} networks "
        f"that were built and measured, the fastest takes {format_ms(best.after.median_ms)} "
        f"({format_percent(share)} of {format_ms(best.before.median_ms)}). Raise it to "
        f"`latency={percent}%` or more, take the nearest with `--closest` (`closest=True`), or "
        f"choose another runtime: `onebyone bench` compares them."
        f"{''.join(f' {note}' for note in notes)}",
        nearest=reachable,
    )
