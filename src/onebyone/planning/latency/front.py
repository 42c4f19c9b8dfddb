"""A front for a runtime: networks along it are built and measured, which corrects the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onebyone.core.errors import BudgetError, OneByOneError
from onebyone.core.records import Budget, FrontPoint, Plan, Quantity
from onebyone.planning.front import POINTS, budget_of, point_of
from onebyone.planning.latency.planner import Deployed, MakePlan

# No network of a front is begun, and no layer timed, later after its smallest: a minute, whatever
# the network.
FRONT_SECONDS = 60.0


def timed_front(
    deployed: Deployed,
    quantity: Quantity,
    make: MakePlan,
    *,
    seconds: float,
    points: int = POINTS,
) -> tuple[FrontPoint, ...]:
    """Plan for budgets of a quantity, and measure the networks of as many as time allows.

    The smallest is always built: times far from any network that was measured are guesses, and
    those near the least the worst. The others follow so that each halves the widest gap, and each
    measurement corrects the predictions of what comes after.

    Args:
        deployed: The options, and what is known of their times.
        quantity: What is budgeted; no other budget is set.
        make: Chooses among the options under budgets.
        seconds: No other network is begun later than this after the smallest was measured.
        points: Budgets to plan for.

    Returns:
        The smallest network first, without those that another beats in harm and in the quantity;
        each says how its time was obtained.
    """
    if not deployed.options:
        return ()
    try:
        least = _built(deployed, deployed.least(quantity, make))
    except BudgetError:
        return ()
    began = time.monotonic()
    ends, times_end = began + seconds, began + FRONT_SECONDS
    before = deployed.survey().before
    whole = _predicted(deployed, budget_of(quantity, before.amount(quantity)), make)
    if whole is None:
        return ()
    first, last = _amount(least, quantity), whole.after.amount(quantity)
    if not 0 < first < last:
        return ()
    limits = np.geomspace(first, last, points).tolist()
    budgets = [budget_of(quantity, limit) for limit in limits]
    measured: dict[int, Plan] = {0: least}
    for place in _halving(points):
        if time.monotonic() >= ends:
            break
        planned = _predicted(deployed, budgets[place], make)
        if planned is not None and planned.choices:
            measured[place] = _built(deployed, planned)
    made = [
        measured.get(i)
        or _predicted(deployed, budgets[i], make, timed=time.monotonic() < times_end)
        for i in range(points)
    ]
    found = [_point(each, quantity, foreseen=deployed.foreseen(each)) for each in made if each]
    return _unbeaten(found, quantity)


def _predicted(
    deployed: Deployed, budget: Budget, make: MakePlan, *, timed: bool = True
) -> Plan | None:
    """Return a plan for one budget; none where later measurements put it out of reach."""
    try:
        return deployed.predict([budget], make, timed=timed)
    except BudgetError:
        return None


def _built(deployed: Deployed, planned: Plan) -> Plan:
    """Return a plan with its network's time, or as it is if the runtime cannot run that network."""
    try:
        return deployed.measured(planned)
    except OneByOneError:
        return planned  # the front stands beside a plan that was made: it must not undo it


def _halving(points: int) -> list[int]:
    """Return the places between the first and the last, each in the middle of the widest gap."""
    taken, order = [0, points - 1], []
    while len(taken) < points:
        gaps = np.diff(taken)
        widest = int(np.argmax(gaps))
        order.append(taken[widest] + int(gaps[widest]) // 2)
        taken = sorted([*taken, order[-1]])
    return [*order, points - 1]


def _amount(measured: Plan, quantity: Quantity) -> float:
    return _point(measured, quantity, foreseen=measured).after.amount(quantity)


def _point(planned: Plan, quantity: Quantity, *, foreseen: Plan) -> FrontPoint:
    """Return a plan's point with its measured time, if it has one, and how it was obtained."""
    point, latency, before = point_of(planned), planned.latency, planned.before.ms
    if not planned.choices:
        return replace(point, obtained="measured")
    if latency is None:
        return replace(point, obtained="corrected")
    assert before is not None
    assert foreseen.after.ms is not None
    ms = before / latency.ratio.value
    # What it took it meets, and to what is foreseen for it now the same plan leads again; of
    # milliseconds the sum may differ in its last digit.
    limit = max(ms, foreseen.after.ms) * (1 + 1e-9)
    return replace(
        point,
        budget=budget_of(quantity, limit) if quantity == "latency" else point.budget,
        after=replace(point.after, ms=ms),
        obtained="measured",
        timing=latency.after,
        ratio=latency.ratio,
        predicted_ms=planned.after.ms,
    )


def _unbeaten(points: Sequence[FrontPoint], quantity: Quantity) -> tuple[FrontPoint, ...]:
    """Return the points in order, without equal networks and those that another one beats."""
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (p.after.amount(quantity), p.harm)):
        if not kept or point.harm < kept[-1].harm:
            kept.append(point)
    return tuple(kept)
