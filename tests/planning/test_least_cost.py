"""Options that overlap, that are asked for, or that cost more: against trying all choices."""

import itertools
import math
import re
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onebyone.core.errors import BudgetError
from onebyone.core.records import Budget, Cost, Option
from onebyone.planning.knapsack import choose, enough, in_words, least_cost, nearest, unreachable

MODULES = "abcd"
BEFORE = Cost(params=20_000, macs=50_000, ms=64.0, bytes=4 * 20_000)


def option(occupies, *, saved, harm=0.5):
    """Return an option of these modules that saves so many parameters, MACs and milliseconds."""
    before = Cost(params=1000, macs=1000, ms=8.0, bytes=4 * 1000)
    params, macs, ms = saved
    return Option.of(
        "factorize",
        {"form": "pair", "ranks": [1]},
        site=occupies[0],
        before=before,
        after=before - Cost(params=params, macs=macs, ms=ms, bytes=4 * params),
        occupies=() if len(occupies) == 1 else tuple(occupies),
        harm=harm,
    )


@st.composite
def overlapping(draw):
    options, harms = [], st.sampled_from([None, 0.0, 0.125, 0.25, 1.0, 3.0])
    for _ in range(draw(st.integers(1, 6))):
        occupies = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=3, unique=True))
        saved = draw(st.integers(-9, 9)), draw(st.integers(-9, 9)), draw(st.integers(-8, 8)) / 4
        options.append(option(occupies, saved=saved, harm=draw(harms)))
    forced = draw(st.sampled_from([(), (options[0].site,), tuple({o.site for o in options[:2]})]))
    return options, forced


def choices(options, forced=()):
    """Every choice of options without a module in common, with one of each site asked for."""
    for flags in itertools.product([False, True], repeat=len(options)):
        chosen = [o for o, flag in zip(options, flags, strict=True) if flag]
        names = [name for o in chosen for name in o.occupies or (o.site,)]
        sites = [o.site for o in chosen]
        if len(names) == len(set(names)) and all(sites.count(site) == 1 for site in forced):
            yield chosen


def after(chosen):
    cost = BEFORE
    for each in chosen:
        cost = cost - each.saved
    return cost


def harm_of(chosen):
    return sum(each.harm or 0.0 for each in chosen)


def budget(quantity, limit):
    return Budget(quantity=quantity, limit=limit, asked=f"{quantity}={limit}")


def met(chosen, budgets):
    return all(after(chosen).amount(b.quantity) <= b.limit for b in budgets)


QUANTITIES = st.sampled_from(["params", "macs", "size", "latency"])


@settings(max_examples=300, deadline=None)
@given(overlapping(), QUANTITIES)
def test_the_least_cost_is_that_of_the_best_choice(instance, quantity):
    options, forced = instance
    possible = [after(chosen).amount(quantity) for chosen in choices(options, forced)]
    assume(possible)
    found = least_cost(options, quantity, BEFORE, forced=forced)
    assert found.amount(quantity) == min(possible)


@st.composite
def budgets_near(draw, options):
    """Budgets about what some choice comes to: there they are hard to meet."""
    budgets = []
    for quantity in draw(st.lists(QUANTITIES, min_size=1, max_size=2, unique=True)):
        some = draw(st.lists(st.sampled_from(options), max_size=3))
        reached = after({id(o): o for o in some}.values()).amount(quantity)
        budgets.append(budget(quantity, reached + draw(st.sampled_from([-1, 0, 0, 1]))))
    return budgets


@settings(max_examples=150, deadline=None)
@given(overlapping(), st.data())
def test_the_chosen_options_harm_least_of_all_that_meet_the_budgets(instance, data):
    options, forced = instance
    budgets = data.draw(budgets_near(options))
    possible = [chosen for chosen in choices(options, forced) if met(chosen, budgets)]
    assume(any(True for _ in choices(options, forced)))
    if not possible:
        with pytest.raises(BudgetError) as caught:
            choose(options, budgets, BEFORE, forced=forced)
        assert met(
            choose(options, caught.value.nearest, BEFORE, forced=forced).options,
            [replace(b, limit=b.limit * (1 + 1e-9)) for b in caught.value.nearest],
        )
        return
    found = choose(options, budgets, BEFORE, forced=forced)
    assert found.gap == 0
    assert met(found.options, [replace(b, limit=b.limit * (1 + 1e-9)) for b in budgets])
    least = min(map(harm_of, possible))
    assert harm_of(found.options) <= least + 1e-6
    # Of equal harm the fewest options, and of as many the least time.
    equal = [(len(c), after(c).ms) for c in possible if harm_of(c) == least]
    assert (len(found.options), after(found.options).ms) == pytest.approx(min(equal))


@settings(max_examples=150, deadline=None)
@given(overlapping(), st.data())
def test_budgets_are_raised_one_after_the_other_to_the_least_that_can_be(instance, data):
    options, forced = instance
    budgets = data.draw(budgets_near(options))
    left = list(choices(options, forced))
    assume(left)
    for asked, raised in zip(
        budgets, nearest(options, budgets, BEFORE, forced=forced), strict=True
    ):
        least = min(after(chosen).amount(asked.quantity) for chosen in left)
        assert raised.limit == pytest.approx(max(least, asked.limit), rel=1e-9)
        assert (raised.quantity, raised.asked) == (asked.quantity, asked.asked)
        near = replace(raised, limit=raised.limit * (1 + 1e-9))
        left = [chosen for chosen in left if met(chosen, [near])]


@settings(max_examples=150, deadline=None)
@given(overlapping(), st.sampled_from([1.0, 1.5, 4.0]))
def test_the_fastest_harms_no_more_than_so_many_times_the_least(instance, fastest):
    options, forced = instance
    possible = list(choices(options, forced))
    assume(possible)
    found = choose(options, [], BEFORE, forced=forced, fastest=fastest).options
    most = fastest * min(map(harm_of, possible))
    assert harm_of(found) <= most * (1 + 1e-6) + 1e-9
    allowed = [after(chosen).ms for chosen in possible if harm_of(chosen) <= most]
    assert after(found).ms <= min(allowed) + 1e-6


def test_the_fastest_may_do_what_is_no_harm_but_rounding():
    options = [option("a", saved=(1, 1, 1.0), harm=0.0), option("b", saved=(1, 1, 1.0), harm=1e-13)]
    options += [option("c", saved=(1, 1, 1.0), harm=1e-3), option("d", saved=(1, 1, 1.0), harm=1.0)]
    found = choose(options, [], BEFORE, fastest=2.0).options
    assert [each.site for each in found] == ["a", "b"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("rest", [0.0, 1e9])
def test_the_fastest_is_found_however_slow_the_rest_of_the_network_is(order, rest):
    before = replace(BEFORE, ms=64.0 + rest)
    options = [option("a", saved=(1, 1, ms / 2**10), harm=0.5) for ms in (1, 2, 3)]
    options = [options[place] for place in order]
    found = choose(options, [budget("macs", 49_999)], before, fastest=2.0).options
    assert found == (options[order.index(2)],)


def test_where_nothing_saves_time_the_fastest_is_what_harms_least():
    options = [option("a", saved=(1, 1, 0.0), harm=harm) for harm in (0.5, 0.25)]
    assert choose(options, [budget("macs", 49_999)], BEFORE, fastest=1.5).options == (options[1],)


@pytest.mark.parametrize("unit", [2.0**-40, 1.0, 2.0**40])
def test_budgets_are_raised_to_the_least_whatever_the_unit(unit):
    saved = {"a1": (9, 4 * unit), "a2": (5, 2 * unit), "b1": (5, 3 * unit), "b2": (1, 5 * unit)}
    options = [option(name[0], saved=(0, macs, ms)) for name, (macs, ms) in saved.items()]
    before = replace(BEFORE, ms=64.0 * unit)
    options = [
        replace(o, before=replace(o.before, ms=8 * unit), after=replace(o.after, ms=8 * unit - ms))
        for o, (_, ms) in zip(options, saved.values(), strict=True)
    ]
    asked = [budget("macs", BEFORE.macs - 10), budget("latency", unit)]
    macs, ms = nearest(options, asked, before)
    assert macs.limit == BEFORE.macs - 10
    assert ms.limit == pytest.approx((64 - 9) * unit, rel=1e-9)  # a1 and b2


def test_a_budget_that_nothing_lowers_is_raised_to_what_there_is():
    options = [option("a", saved=(0, 5, 1.0)), option("b", saved=(0, 3, 1.0))]
    asked = [budget("macs", BEFORE.macs - 8), budget("params", 1)]
    assert [b.limit for b in nearest(options, asked, BEFORE)] == [BEFORE.macs - 8, BEFORE.params]


def test_without_times_the_cheaper_has_fewer_macs():
    before = Cost(params=100, macs=100, bytes=4 * 100)
    plain = [option("a", saved=(0, macs, 0.0), harm=0.25) for macs in (3, 5, 4)]
    options = [
        replace(o, before=replace(o.before, ms=None), after=replace(o.after, ms=None))
        for o in plain
    ]
    assert choose(options, [budget("macs", 97)], before).options == (options[1],)
    none = [replace(o, harm=None) for o in options]
    assert choose(none, [budget("macs", 97)], before).options == (none[1],)


@settings(deadline=None)
@given(st.floats(1e-3, 1e6), st.floats(0.0, 1.0), st.integers(1, 4))
def test_milliseconds_are_met_to_a_billionth(total, share, parts):
    """So far from a budget a choice is refused or taken by the clock, not by rounding."""
    before = Cost(params=9, macs=9, ms=total, bytes=4 * 9)
    saved = share * total / parts
    options = [
        replace(
            option(MODULES[i], saved=(0, 0, 0.0)),
            before=before,
            after=replace(before, ms=total - saved),
        )
        for i in range(parts)
    ]
    exact = sum((Fraction(o.saved.ms) for o in options), Fraction(0))
    limit = float(Fraction(total) - exact)
    found = choose(options, [budget("latency", limit * (1 + 1e-9) + total * 1e-9)], before)
    assert len(found.options) <= parts
    if 1e-6 < share < 1 - 1e-6:
        with pytest.raises(BudgetError):
            choose(options, [budget("latency", limit - total * 1e-9)], before)


# ---------------------------------------------------------------- what is said


@settings(deadline=None)
@given(QUANTITIES, st.integers(1, 10**9), st.integers(0, 2 * 10**9))
def test_enough_is_the_least_budget_in_whole_percent_that_is_met(quantity, total, reached):
    name, number, unit = re.fullmatch(
        r"(\w+)=(\d+)(%|us|)", enough(quantity, total, reached)
    ).groups()
    assert name == quantity
    # Times are met to a billionth.
    near = Fraction(1, 10**9) * reached if quantity == "latency" else 0
    if unit == "%":
        percent = int(number)
        assert Fraction(percent - 1, 100) * total < reached + near
        assert reached - near <= Fraction(percent, 100) * total
        assert percent <= 100
    else:
        # More than the network itself: thousandths of a millisecond, or a plain count.
        assert reached + near > total
        assert float(number) == pytest.approx(reached * (1000 if near else 1), rel=1e-9)


def test_a_network_that_costs_nothing_needs_no_budget():
    assert enough("macs", 0, 0) == "macs=0%"


@pytest.mark.parametrize(
    ("quantity", "amount", "words", "bare"),
    [
        ("macs", 1_500_000, "1.50 M MACs", "1.50 M"),
        ("params", 1_500, "1.50 k parameters", "1.50 k"),
        ("latency", 1.5, "1.50 ms", "1.50 ms"),
        ("memory", 1_500_000, "1.50 MB", "1.50 MB"),
    ],
)
def test_amounts_are_told_with_their_units(quantity, amount, words, bare):
    assert in_words(quantity, amount) == words
    assert in_words(quantity, amount, unit=False) == bare


def test_a_budget_that_cannot_be_met_says_how_far_it_can():
    text = unreachable(
        budget("params", 3), Cost(params=2000, macs=1, bytes=4 * 2000), 1000, "So it is. "
    )
    assert text.startswith("The budget params=3 is 3 parameters, but the least ")
    assert "reach is 1.00 k (50.0 % of 2.00 k). So it is. Raise the budget to `params=50%`" in text
    nothing = unreachable(budget("params", 3), Cost(params=0, macs=1, bytes=0), 0)
    assert "(0.0 % of 0)" in nothing


def test_each_budget_that_must_be_raised_is_told():
    """Alone each can be met; of three that cannot together, two must be raised."""
    kinds = [(900, 0, 0.0), (0, 900, 0.0), (0, 0, 6.0)]
    options = [option("a", saved=saved) for saved in kinds]
    budgets = [budget("params", 19_100), budget("macs", 49_100), budget("latency", 58.0)]
    with pytest.raises(BudgetError, match=r"to `macs=100%` and `latency=100%`, or") as caught:
        choose(options, budgets, BEFORE)
    assert [b.limit for b in caught.value.nearest] == pytest.approx([19_100, 50_000, 64.0])


def test_a_forced_option_that_costs_more_is_allowed_for():
    head = option("a", saved=(-5000, -9000, -8.0), harm=0.0)
    with pytest.raises(BudgetError, match=r"Raise the budget to `macs=59000` or more") as caught:
        choose([head], [budget("macs", 50_000)], BEFORE, forced=["a"])
    assert choose([head], caught.value.nearest, BEFORE, forced=["a"]).options == (head,)
    with pytest.raises(BudgetError, match=r"`latency=72000us` or more"):
        choose([head], [budget("latency", 64.0)], BEFORE, forced=["a"])


def test_without_options_nothing_is_chosen_and_nothing_may_be_asked_for():
    assert choose([], [budget("macs", 50_000)], BEFORE).options == ()
    assert choose([], [budget("macs", 50_000)], BEFORE).gap == 0
    with pytest.raises(BudgetError, match="No option of 'a' can be chosen"):
        choose([], [budget("macs", 50_000)], BEFORE, forced=["a"])
    with pytest.raises(BudgetError, match=r"reach is 50\.0 k"):
        choose([], [budget("macs", 49_999)], BEFORE)
    assert math.isclose(nearest([], [budget("latency", 3.0)], BEFORE)[0].limit, 64.0)
