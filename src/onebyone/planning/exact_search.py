"""A multiple-choice knapsack in whole numbers: its bounds hold to the last unit."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from onebyone.core.c_output import c_output_dropped
from onebyone.core.errors import BudgetError

# The solver stops within 1e-6 of the least: the objective, whose largest part is about 1, is
# multiplied so that this is less than what breaks ties.
SCALE = 1e4
# The solver meets a row to about a millionth. Rows are tightened by more than that where a row in
# digits is not decided in time.
TOLERANCE = 4e-6
# Rows of fractions are loosened by this first: the solver may miss a choice that meets a row by
# less than its millionth. What meets a bound only so is found out in whole numbers.
LOOSER = 2e-6
# Of a row in digits: small enough that a millionth of it is far below one unit.
BASE = 1 << 15
# All searches for one choice together, at most.
SECONDS = 60.0
_OUT_OF_TIME = 1
_INFEASIBLE = 2


@dataclass(frozen=True)
class AtLeast:
    """A bound in whole units: the amounts of what is picked must come to ``least`` or more."""

    amounts: tuple[int, ...]
    least: int

    def holds(self, picked: NDArray[np.bool_]) -> bool:
        """Whether a choice meets the bound, in exact arithmetic."""
        chosen = (a for a, take in zip(self.amounts, picked, strict=True) if take)
        return sum(chosen) >= self.least

    def reduced(self) -> AtLeast:
        """Return the same bound in the largest unit that divides all amounts."""
        unit = math.gcd(*self.amounts)
        if unit <= 1:
            return self
        amounts = tuple(amount // unit for amount in self.amounts)
        return AtLeast(amounts, -(-self.least // unit))


@dataclass(frozen=True)
class Solution:
    """What to pick.

    Attributes:
        gap: By which share of it the objective might be less still; 0 where it is shown that it
            cannot, to the solver's tolerance.
    """

    picked: NDArray[np.bool_]
    gap: float = 0.0


@dataclass(frozen=True)
class Groups:
    """Which picks exclude each other, and of which groups one must be picked."""

    exclusive: Sequence[Sequence[int]]
    forced: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class _Row:
    values: NDArray[np.float64]
    low: float
    high: float


@dataclass(frozen=True)
class _Found:
    """What the solver said: a choice or none, whether it finished, and a bound from below."""

    picked: NDArray[np.bool_] | None
    finished: bool
    lowest: float
    gap: float


def pick(
    objective: NDArray[np.float64], groups: Groups, bounds: Sequence[AtLeast]
) -> Solution | None:
    """Return what to pick for the least total of an objective whose largest part is about 1.

    Args:
        objective: Of each item.
        groups: What excludes what.
        bounds: What the picked items must come to.

    Returns:
        The choice; ``None`` where none meets the bounds.

    Raises:
        BudgetError: If time ended the search before there was a choice.
    """
    ends = time.monotonic() + SECONDS
    bounds = [bound.reduced() for bound in bounds]
    fixed = _group_rows(groups, len(objective))
    plain = _search(objective, [*fixed, *(_row(bound, by=-LOOSER) for bound in bounds)], ends)
    if plain.picked is not None and _hold(bounds, plain.picked):
        return Solution(plain.picked, plain.gap)
    # The solver's tolerance let a bound be missed by a few units, or hid the few choices that there
    # are: the same rows digit by digit.
    digits = _search_in_digits(objective, fixed, bounds, ends)
    if digits.picked is None and digits.finished:
        return None
    if digits.picked is not None and _hold(bounds, digits.picked):
        return Solution(digits.picked, digits.gap)
    tight = [_row(bound, by=TOLERANCE) for bound in bounds]
    last = _search(objective, [*fixed, *tight], max(ends, time.monotonic() + SECONDS / 6))
    if last.picked is None or not _hold(bounds, last.picked):
        raise BudgetError(
            f"No choice of rewrites that meets the budgets was found in {SECONDS:.0f} s, nor shown "
            "to be impossible. Raise a budget, or leave some layers out of the plan with `leave`."
        )
    reached = float(objective @ last.picked)
    lowest = min(plain.lowest, reached)
    return Solution(last.picked, (reached - lowest) / max(abs(reached), 1e-300))


def _hold(bounds: Sequence[AtLeast], picked: NDArray[np.bool_]) -> bool:
    return all(bound.holds(picked) for bound in bounds)


def _group_rows(groups: Groups, items: int) -> list[_Row]:
    rows = []
    for low, members_of in ((0.0, groups.exclusive), (1.0, groups.forced)):
        for members in members_of:
            values = np.zeros(items)
            values[list(members)] = 1.0
            rows.append(_Row(values, low, 1.0))
    return rows


def _row(bound: AtLeast, *, by: float) -> _Row:
    """Return a bound in shares of its largest number, tightened by such a share."""
    scale = max(*(abs(amount) for amount in bound.amounts), abs(bound.least), 1)
    values = np.array([amount / scale for amount in bound.amounts])
    return _Row(values, bound.least / scale + by, np.inf)


def _search_in_digits(
    objective: NDArray[np.float64], fixed: Sequence[_Row], bounds: Sequence[AtLeast], ends: float
) -> _Found:
    """Search with each bound as a sum by digits, with whole carries from digit to digit.

    A number of a million millions has more digits than the solver's arithmetic; each row here has
    five, which it holds to far less than one.
    """
    items = len(objective)
    rows: list[tuple[dict[int, float], float]] = []
    ranges: list[tuple[int, int]] = []  # of the carries
    for bound in bounds:
        carry: int | None = None
        for place, (digits, least) in enumerate(places := _in_places(bound)):
            row = {i: float(digit) for i, digit in enumerate(digits) if digit}
            highest = sum(max(digit, 0) for digit in digits)
            if carry is not None:
                row[carry] = 1.0
                highest += ranges[carry - items][1]
            if place < len(places) - 1:
                carry = items + len(ranges)
                row[carry] = -float(BASE)
                # Less is never of use: what the lower digits come to is at least nothing.
                lowest = min(-least, 0) // BASE - 1 + (0 if place == 0 else min(ranges[-1][0], 0))
                ranges.append((lowest, (highest - least) // BASE + 1))
            rows.append((row, float(least)))
    width = items + len(ranges)
    wide = [_Row(np.pad(row.values, (0, len(ranges))), row.low, row.high) for row in fixed]
    for numbers, least_value in rows:
        values = np.zeros(width)
        values[list(numbers)] = list(numbers.values())
        wide.append(_Row(values, least_value, np.inf))
    return _search(np.pad(objective, (0, len(ranges))), wide, ends, carries=ranges)


def _in_places(bound: AtLeast) -> list[tuple[list[int], int]]:
    """Return a bound's numbers by their digits, the lowest first; the last may be negative."""
    amounts, least = list(bound.amounts), bound.least
    places = []
    while max(*(abs(amount) for amount in amounts), abs(least)) >= BASE:
        pairs = [divmod(amount, BASE) for amount in amounts]
        higher, lower = divmod(least, BASE)
        places.append(([low for _, low in pairs], lower))
        amounts, least = [high for high, _ in pairs], higher
    return [*places, (amounts, least)]


def _search(
    objective: NDArray[np.float64],
    rows: Sequence[_Row],
    ends: float,
    *,
    carries: Sequence[tuple[int, int]] = (),
) -> _Found:
    items = len(objective) - len(carries)
    constraints = LinearConstraint(
        csr_matrix(np.vstack([row.values for row in rows])),
        np.array([row.low for row in rows]),
        np.array([row.high for row in rows]),
    )
    low = np.array([0.0] * items + [float(least) for least, _ in carries])
    high = np.array([1.0] * items + [float(most) for _, most in carries])
    left = ends - time.monotonic()
    if left <= 0:
        return _Found(None, finished=False, lowest=-math.inf, gap=math.inf)
    # HiGHS 1.12 prints a line though it was told to be silent (its issue 2783).
    with c_output_dropped():
        result = milp(
            objective * SCALE,
            integrality=np.ones(len(objective)),
            bounds=Bounds(low, high),
            constraints=constraints,
            options={"time_limit": left, "mip_rel_gap": 0.0},
        )
    finished = result.status in (0, _INFEASIBLE)
    lowest = result.get("mip_dual_bound")
    lowest = -math.inf if lowest is None else float(lowest) / SCALE
    if result.x is None:
        return _Found(None, finished=finished, lowest=lowest, gap=math.inf)
    picked = np.asarray(result.x[:items] > 0.5)
    gap = float(result.get("mip_gap") or 0.0) if result.status == _OUT_OF_TIME else 0.0
    return _Found(picked, finished=finished, lowest=lowest, gap=gap)
