"""The front: what every other budget of the same quantity would come to, from one survey."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onebyone.core.records import Budget, FrontPoint, Plan, Quantity
from onebyone.planning.knapsack import least_cost
from onebyone.planning.survey import Survey

# From the least that the rewrites reach to what harms least, in equal ratios.
POINTS = 10


def front_of(
    found: Survey,
    quantity: Quantity,
    plan_for: Callable[[Survey, Sequence[Budget]], Plan],
    *,
    points: int = POINTS,
) -> tuple[FrontPoint, ...]:
    """Plan for budgets of what is counted, from the least reachable to what harms least.

    Args:
        found: What could be done.
        quantity: What is budgeted; no other budget is set. Memory has no front: it does not add up.
            Of latency, which is measured, see :mod:`onebyone.planning.latency.front`.
        plan_for: Chooses among the options under budgets.
        points: Budgets to plan for.

    Returns:
        The least predicted harm under each, the smallest network first. Budgets that lead to the
        same cost are one point.
    """
    if quantity == "memory":
        return ()
    least = least_cost(found.options, quantity, found.start, forced=found.forced).amount(quantity)
    whole = max(found.before.amount(quantity), found.start.amount(quantity))
    if not 0 < least < whole:
        return ()

    def within(limit: float) -> Plan:
        return plan_for(found, [budget_of(quantity, limit)])

    # What is asked for, such as a new head, may forbid the larger part of the way.
    most = max(least, within(whole).after.amount(quantity))
    made: dict[tuple[int, ...], FrontPoint] = {}
    # The first as it is, not as a power gives it: the least must stay reachable.
    for limit in (least, *np.geomspace(least, most, points)[1:]):
        point = point_of(within(float(limit)))
        made.setdefault(point.after.counts, point)
    return tuple(made.values())


def budget_of(quantity: Quantity, limit: float) -> Budget:
    """Return a budget as it would be asked for; counts are whole."""
    if quantity == "latency":
        return Budget(quantity=quantity, limit=limit, asked=f"latency={limit:.4g}ms")
    limit = int(np.ceil(limit))
    return Budget(quantity=quantity, limit=limit, asked=f"{quantity}={limit}")


def point_of(planned: Plan) -> FrontPoint:
    """Return what a plan for one budget came to, as it was predicted."""
    return FrontPoint(
        budget=planned.budgets[0],
        after=planned.after,
        harm=planned.harm or 0.0,
        rewritten=len(planned.choices),
    )
