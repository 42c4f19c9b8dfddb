"""The plan of least harm under the budgets: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

import numpy as np
from numpy.typing import NDArray

from onebyone.core.errors import BudgetError
from onebyone.core.records import Budget, Cost, Option, Quantity
from onebyone.core.units import format_bytes, format_count, format_ms, format_percent
from onebyone.planning.exact_search import AtLeast, Groups, Solution, pick
from onebyone.planning.joins import completed, rows_of
from onebyone.planning.links import is_link, places_of
from onebyone.planning.links import rows_of as link_rows_of

# At equal harm the cheaper option wins: a hair of harm for the share of the cost that is kept.
TIE = 1e-7
# Milliseconds are counted in so many parts of the whole network's: far finer than any clock.
PARTS = 1 << 40
# Harms are weighed against the least total that is known. Where that turns out to be below this
# share of what they were weighed by, the solver's tolerance is not below it: once more.
FINE = 0.05


@dataclass(frozen=True)
class Choice:
    """The options of least harm.

    Attributes:
        gap: By which share less harm another choice might do; 0 where that is shown to be none.
    """

    options: tuple[Option, ...]
    gap: float = 0.0


def choose(
    options: Sequence[Option],
    budgets: Sequence[Budget],
    before: Cost,
    *,
    forced: Sequence[str] = (),
    obstacles: str = "",
    fastest: float | None = None,
) -> Choice:
    """Return the options of least total harm that meet every budget, in the order given.

    Each module is part of one chosen option at most; harms and times are taken to add up. Counts
    are met to the last unit; milliseconds to a billionth of the network's own.

    Args:
        options: Each with its harm, and with its milliseconds where they are bounded.
        budgets: Upper bounds for the whole network.
        before: The network's own cost.
        forced: Sites at which some option must be chosen.
        obstacles: What stands in the way of more, in words, for the error.
        fastest: Return instead the options of least total time whose harm is at most this many
            times the least.

    Raises:
        BudgetError: If no choice meets the budgets; says how far they can be met, and ``nearest``
            has the budgets that can be.
    """
    bounds = _bounds(options, budgets, before)
    if not options:
        if forced or any(bound.least > 0 for bound in bounds):
            raise _explained(options, budgets, before, forced, obstacles)
        return Choice(())
    groups = _groups(options, forced)
    harm = np.array([max(option.harm or 0.0, 0.0) for option in options])
    kept = _kept(options, before)
    found = _least_harm(harm, kept, groups, bounds)
    if found is None:
        raise _explained(options, budgets, before, forced, obstacles)
    if fastest is not None:
        # No harm at all has no multiple: what is rounding beside the greatest harm is let pass.
        least = max(float(harm @ found.picked), 1e-12 * float(harm.max()), 1e-300)
        bounds.append(_at_most(harm, fastest * least))
        scale = max(float(np.abs(kept - 1).max()), 1e-12)
        found = pick((kept - 1) / scale, groups, bounds) or found
    taken = zip(options, completed(options, found.picked), strict=True)
    return Choice(tuple(option for option, take in taken if take), found.gap)


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
        forced: Sites at which some option must be chosen; each must have one.
    """
    if any(is_link(option) for option in options):
        return _least_within(options, quantity, (), before, forced)
    least = before
    for option in _most_saving(options, quantity, forced):
        least = least - option.saved
    return least


def nearest(
    options: Sequence[Option],
    budgets: Sequence[Budget],
    before: Cost,
    *,
    forced: Sequence[str] = (),
) -> tuple[Budget, ...]:
    """Return the budgets, raised as little as makes them reachable together.

    In the order given: each is raised to the least that is left once those before it are met.

    Args:
        options: As for :func:`choose`.
        budgets: Upper bounds for the whole network; not of memory, which does not add up.
        before: The network's own cost.
        forced: Sites at which some option must be chosen.
    """
    met: list[Budget] = []
    for budget in budgets:
        trial = [*met, budget]
        if _is_reachable(options, trial, before, forced):
            met = trial
            continue
        cost = _least_within(options, budget.quantity, met, before, forced)
        amount = cost.amount(budget.quantity)
        # Of milliseconds a sum may differ in its last digit.
        amount = amount * (1 + 1e-12) if budget.quantity == "latency" else amount
        met.append(replace(budget, limit=max(amount, budget.limit)))
    return tuple(met)


def _least_harm(
    harm: NDArray[np.float64], kept: NDArray[np.float64], groups: Groups, bounds: Sequence[AtLeast]
) -> Solution | None:
    """Return the choice of least harm, however much more the options do that are not chosen."""
    weight = max(float(harm.max()), 1e-300)
    left = np.arange(len(harm))
    while True:
        objective = harm[left] / weight + TIE * (1 + kept[left])
        found = pick(objective, _among(groups, left), [_of(bound, left) for bound in bounds])
        if found is None:
            return None
        total = float(harm[left] @ found.picked)
        if not found.picked.any() or total >= FINE * weight:
            break
        # This choice's total harm is a bound: drop options that exceed it by themselves.
        left = left[harm[left] <= total]
        weight = total or 1.0
        if total == 0.0:  # of no harm at all, the cheapest
            cost = (1 + kept[left]) / max(float(np.abs(1 + kept[left]).max()), 1e-12)
            found = pick(cost, _among(groups, left), [_of(bound, left) for bound in bounds])
            assert found is not None, "what did no harm meets the bounds still"
            break
    picked = np.zeros(len(harm), dtype=bool)
    picked[left[found.picked]] = True
    return Solution(picked, found.gap)


def _among(groups: Groups, left: NDArray[np.intp]) -> Groups:
    """Return the groups with the places that items have among those that are left."""
    places = {int(item): place for place, item in enumerate(left)}

    def kept(members_of: Sequence[Sequence[int]]) -> list[list[int]]:
        return [[places[item] for item in members if item in places] for members in members_of]

    return Groups([group for group in kept(groups.exclusive) if group], kept(groups.forced))


def _of(bound: AtLeast, left: NDArray[np.intp]) -> AtLeast:
    return AtLeast(tuple(bound.amounts[int(item)] for item in left), bound.least)


def _kept(options: Sequence[Option], before: Cost) -> NDArray[np.float64]:
    """Return what options leave of the network's cost, as 1 less the share that each saves."""
    # Milliseconds where there are any: a hair of harm must not buy what costs time.
    quantity: Quantity = "macs" if before.ms is None else "latency"
    saved = np.array([option.saved.amount(quantity) for option in options], float)
    return np.asarray(1 - saved / (before.amount(quantity) or 1))


def _bounds(options: Sequence[Option], budgets: Sequence[Budget], before: Cost) -> list[AtLeast]:
    of_budgets = (_bound(options, budget, before) for budget in budgets)
    return [*of_budgets, *rows_of(options), *link_rows_of(options)]


def _bound(options: Sequence[Option], budget: Budget, before: Cost) -> AtLeast:
    """Return what must be saved, in whole units."""
    quantity, total = budget.quantity, before.amount(budget.quantity)
    saved = [option.saved.amount(quantity) for option in options]
    if quantity != "latency":
        return AtLeast(tuple(int(amount) for amount in saved), int(total) - int(budget.limit))
    if not total:
        return AtLeast(tuple(0 for _ in saved), 0)
    unit = Fraction(total) / PARTS
    amounts = tuple(math.floor(Fraction(amount) / unit) for amount in saved)
    # Each is rounded down by less than a part.
    needed = math.floor((Fraction(total) - Fraction(budget.limit)) / unit) - len(saved)
    return AtLeast(amounts, max(needed, 1) if budget.limit < total else needed)


def _at_most(amounts: NDArray[np.float64], most: float) -> AtLeast:
    """Return the bound that amounts come to no more than that, to a part in a million millions."""
    parts = (min(amount / most, 2.0) * PARTS for amount in amounts)
    return AtLeast(tuple(-math.floor(part) for part in parts), -PARTS)


def _groups(options: Sequence[Option], forced: Sequence[str]) -> Groups:
    members: dict[str, list[int]] = {}
    for place, taken in enumerate(places_of(options)):
        for name in taken:
            members.setdefault(name, []).append(place)
    at = [[i for i, option in enumerate(options) if option.site == site] for site in forced]
    return Groups(list(members.values()), at)


def _modules(option: Option) -> tuple[str, ...]:
    return option.occupies or (option.site,)


def _is_reachable(
    options: Sequence[Option], budgets: Sequence[Budget], before: Cost, forced: Sequence[str]
) -> bool:
    bounds = _bounds(options, budgets, before)
    if not options:
        return all(bound.least <= 0 for bound in bounds)
    return pick(np.zeros(len(options)), _groups(options, forced), bounds) is not None


def _least_within(
    options: Sequence[Option],
    quantity: Quantity,
    budgets: Sequence[Budget],
    before: Cost,
    forced: Sequence[str],
) -> Cost:
    """Return the network's cost with least of a quantity, other budgets met."""
    linked = any(is_link(option) for option in options)  # a choice of options, not a sum of them
    if not linked and (not budgets or not options):
        return least_cost(options, quantity, before, forced=forced)
    bounds = _bounds(options, budgets, before)
    saved = np.array([option.saved.amount(quantity) for option in options], float)
    found = pick(-saved / max(float(np.abs(saved).max()), 1e-300), _groups(options, forced), bounds)
    assert found is not None, "what can be met once can be met again"
    least = before
    for option, take in zip(options, found.picked, strict=True):
        least = least - option.saved if take else least
    return least


# ---------------------------------------------------------------- the least of one quantity


def _most_saving(
    options: Sequence[Option], quantity: Quantity, forced: Sequence[str]
) -> tuple[Option, ...]:
    """Return the options that save most of a quantity, in exact arithmetic."""
    best: dict[tuple[str, ...], Option] = {}
    for option in options:
        modules = tuple(sorted(set(_modules(option))))
        known = best.get(modules)
        if known is None or _amount(option, quantity) > _amount(known, quantity):
            best[modules] = option
    sites = [[option for option in options if option.site == site] for site in forced]
    chosen: tuple[Option, ...] = ()
    for first in product(*(_best_of_each(at, quantity) for at in sites)):
        taken = {name for option in first for name in _modules(option)}
        if len(taken) < sum(len(set(_modules(option))) for option in first):
            continue
        rest = [option for modules, option in best.items() if taken.isdisjoint(modules)]
        whole = (*first, *_packed(rest, quantity))
        if not chosen or _total(whole, quantity) > _total(chosen, quantity):
            chosen = whole
    return chosen


def _best_of_each(options: Sequence[Option], quantity: Quantity) -> list[Option]:
    best: dict[tuple[str, ...], Option] = {}
    for option in options:
        known = best.get(_modules(option))
        if known is None or _amount(option, quantity) > _amount(known, quantity):
            best[_modules(option)] = option
    return list(best.values())


def _packed(options: Sequence[Option], quantity: Quantity) -> list[Option]:
    """Return the options that save most together, of which no two have a module in common."""
    worth = [option for option in options if _amount(option, quantity) > 0]
    chosen: list[Option] = []
    while worth:
        # Those that overlap, directly or by way of others, are decided together.
        group, modules = [worth.pop()], set[str]()
        modules.update(_modules(group[0]))
        while near := [o for o in worth if not modules.isdisjoint(_modules(o))]:
            worth = [o for o in worth if modules.isdisjoint(_modules(o))]
            group += near
            modules.update(name for option in near for name in _modules(option))
        chosen += _best_apart(group, quantity)
    return chosen


def _best_apart(group: Sequence[Option], quantity: Quantity) -> list[Option]:
    """Return the best of a few overlapping options, by taking the first or leaving it."""
    if not group:
        return []
    most = max(len(_modules(option)) for option in group)
    widest = [option for option in group if len(_modules(option)) == most]
    # One from the middle cuts a chain of overlapping options in two: else it takes 2^(n/2) steps.
    first = widest[len(widest) // 2]
    others = [option for option in group if option is not first]
    apart = [option for option in others if set(_modules(option)).isdisjoint(_modules(first))]
    with_it = [first, *_packed(apart, quantity)]
    without = _packed(others, quantity)
    return max(with_it, without, key=lambda chosen: _total(chosen, quantity))


def _amount(option: Option, quantity: Quantity) -> Fraction:
    return Fraction(option.saved.amount(quantity))


def _total(options: Iterable[Option], quantity: Quantity) -> Fraction:
    return sum((_amount(option, quantity) for option in options), Fraction(0))


# ---------------------------------------------------------------- what is said of a refusal


def _explained(
    options: Sequence[Option],
    budgets: Sequence[Budget],
    before: Cost,
    forced: Sequence[str],
    obstacles: str,
) -> BudgetError:
    """Say which budget cannot be met, how far it can, and what is nearest together."""
    for site in forced:
        if not any(option.site == site for option in options):
            return BudgetError(
                f"No option of {site!r} can be chosen, though one is asked for. {obstacles}"
                "Ask for another head."
            )
    reachable = nearest(options, budgets, before, forced=forced)
    for budget in budgets:
        best = least_cost(options, budget.quantity, before, forced=forced)
        if best.amount(budget.quantity) > budget.limit:
            said = unreachable(budget, before, best.amount(budget.quantity), obstacles)
            return BudgetError(said, nearest=reachable)
    asked = ", ".join(budget.asked for budget in budgets)
    pairs = zip(budgets, reachable, strict=True)
    raised = [(budget, near.limit) for budget, near in pairs if near.limit > budget.limit]
    said = " and ".join(
        f"`{enough(budget.quantity, before.amount(budget.quantity), limit)}`"
        for budget, limit in raised
    )
    return BudgetError(
        f"The budgets {asked} can each be met, but not together. Raise one of them, for instance "
        f"to {said}, or take the nearest with `--closest` (`closest=True`).",
        nearest=reachable,
    )


def unreachable(budget: Budget, before: Cost, reached: float, obstacles: str = "") -> str:
    """Say that a budget cannot be met, how far it can, and what to do."""
    total = before.amount(budget.quantity)
    return (
        f"The budget {budget.asked} is {in_words(budget.quantity, budget.limit)}, but the least "
        f"that these rewrites reach is {in_words(budget.quantity, reached, unit=False)} "
        f"({format_percent(reached / (total or 1))} of "
        f"{in_words(budget.quantity, total, unit=False)}). {obstacles}"
        f"Raise the budget to `{enough(budget.quantity, total, reached)}` or more, or take the "
        "nearest with `--closest` (`closest=True`)."
    )


def in_words(quantity: Quantity, amount: float, *, unit: bool = True) -> str:
    """Return an amount with three significant digits and its unit."""
    form, name = {
        "macs": (format_count, " MACs"),
        "params": (format_count, " parameters"),
        "latency": (format_ms, ""),
        "size": (format_bytes, " of weights"),
        "memory": (format_bytes, ""),
    }[quantity]
    return form(amount) + (name if unit else "")


def enough(quantity: Quantity, total: float, reached: float) -> str:
    """Return a budget in whole percent that is met by what was reached."""
    if quantity == "latency":
        reached *= 1 - 2e-12  # it is met to a billionth, and :func:`nearest` adds some of that
    percent = math.ceil(100 * Fraction(reached) / Fraction(total or 1))
    if percent <= 100:
        return f"{quantity}={percent}%"
    # What is asked for, such as a new head, may cost more than the network itself.
    return (
        f"{quantity}={math.ceil(reached * 1000)}us"
        if quantity == "latency"
        else (f"{quantity}={math.ceil(reached)}")
    )
