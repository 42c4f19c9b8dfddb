"""The front: what every other budget of the same quantity would come to, from one survey."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from onebyone.planning.options import Survey
from onebyone.planning.solve import least_cost
from onebyone.records import FrontPoint, Plan

# From the least that the rewrites reach to what harms least, in equal ratios.
POINTS = 10


def front_of(
    found: Survey,
    quantity: Literal["params", "macs"],
    plan_for: Callable[[str], Plan],
    *,
    points: int = POINTS,
) -> tuple[FrontPoint, ...]:
    """Plan for budgets of a quantity from the least reachable to what harms least.

    Args:
        found: What could be done.
        quantity: What is budgeted; no other budget is set.
        plan_for: Chooses among the same options under a budget such as ``"macs=1200"``.
        points: Budgets to plan for.

    Returns:
        The least predicted harm under each, the smallest network first. Budgets that lead to the
        same cost are one point.
    """
    exact = found.exact if found.exact_asked else None
    start = found.before - exact.saved if exact else found.before
    least = getattr(least_cost(found.options, quantity, start, forced=found.forced), quantity)
    whole = max(getattr(found.before, quantity), getattr(start, quantity))
    if not 0 < least < whole:
        return ()
    # What is asked for, such as a new head, may forbid the larger part of the way.
    most = max(least, getattr(plan_for(f"{quantity}={whole}").after, quantity))
    # Rounded up, and the first as it is: the least must stay reachable.
    limits = [least, *(int(np.ceil(x)) for x in np.geomspace(least, most, points)[1:])]
    made: dict[tuple[int, int], FrontPoint] = {}
    for limit in dict.fromkeys(limits):
        planned = plan_for(f"{quantity}={limit}")
        point = FrontPoint(
            budget=planned.budgets[0],
            after=planned.after,
            harm=planned.harm or 0.0,
            rewritten=len(planned.choices),
        )
        made.setdefault((point.after.params, point.after.macs), point)
    return tuple(made.values())
