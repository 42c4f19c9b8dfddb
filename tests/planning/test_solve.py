import ctypes
import itertools
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebyone.errors import BudgetError
from onebyone.planning import solve
from onebyone.planning.solve import choose
from onebyone.records import Budget, Cost, Option


def option(site, params, macs, harm, *, before=(100, 1000), occupies=None):
    return Option(
        site=site,
        rewrite="factorize",
        settings={"form": "pair", "ranks": [1]},
        before=Cost(params=before[0], macs=before[1]),
        after=Cost(params=params, macs=macs),
        occupies=(site,) if occupies is None else occupies,
        harm=harm,
    )


def budget(quantity, limit):
    return Budget(quantity=quantity, limit=limit, asked=f"{quantity}={limit}")


def after(before, chosen):
    for picked in chosen:
        before = before - picked.saved
    return before


def feasible(options, budgets, before, forced=()):
    """Every choice that meets the budgets, by trying all."""
    for flags in itertools.product([False, True], repeat=len(options)):
        chosen = [o for o, flag in zip(options, flags, strict=True) if flag]
        names = [name for o in chosen for name in o.occupies]
        cost = after(before, chosen)
        met = all(getattr(cost, b.quantity) <= b.limit for b in budgets)
        if met and len(names) == len(set(names)) and set(forced) <= {o.site for o in chosen}:
            yield chosen


@st.composite
def instances(draw):
    sites = [f"s{i}" for i in range(draw(st.integers(1, 3)))]
    options = []
    for site in sites:
        for _ in range(draw(st.integers(1, 3))):
            params, macs = draw(st.integers(1, 100)), draw(st.integers(1, 1000))
            options.append(option(site, params, macs, draw(st.floats(1e-4, 1.0))))
    if draw(st.booleans()):
        spans = tuple(sites[:2])
        options.append(
            option("s0", 10, 900, draw(st.floats(1e-4, 1.0)), before=(200, 2000), occupies=spans)
        )
    before = Cost(params=300, macs=3000)
    budgets = [budget("macs", draw(st.integers(200, 3000)))]
    if draw(st.booleans()):
        budgets.append(budget("params", draw(st.integers(20, 300))))
    return options, budgets, before


@settings(max_examples=150, deadline=None)
@given(instances(), st.booleans())
def test_the_choice_is_the_best_that_trying_all_finds(instance, force):
    options, budgets, before = instance
    forced = ("s0",) if force else ()
    possible = list(feasible(options, budgets, before, forced))
    if not possible:
        with pytest.raises(BudgetError):
            choose(options, budgets, before, forced=forced)
        return
    chosen = choose(options, budgets, before, forced=forced)
    best = min(sum(o.harm for o in some) for some in possible)
    assert sum(o.harm for o in chosen) <= best * (1 + 2e-4) + 1e-6
    assert all(getattr(after(before, chosen), b.quantity) <= b.limit for b in budgets)
    assert set(forced) <= {o.site for o in chosen}
    assert [options.index(o) for o in chosen] == sorted(options.index(o) for o in chosen)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(10**8, 10**9), min_size=2, max_size=5))
def test_a_budget_is_met_to_the_last_mac(short, sizes):
    # Costs of real networks: a tolerance of a millionth would be a thousand MACs over.
    before = Cost(params=len(sizes), macs=2 * sum(sizes))
    options = [option(f"s{i}", 1, 0, 0.1 + i, before=(1, size)) for i, size in enumerate(sizes)]
    extra = option("extra", 0, 0, 99.0, before=(0, 10**9))
    limit = before.macs - sizes[0] - short
    chosen = choose([*options, extra], [budget("macs", limit)], before)
    assert after(before, chosen).macs <= limit


def test_nothing_is_chosen_where_nothing_is_needed():
    assert (
        choose([option("a", 1, 1, 0.5)], [budget("macs", 1000)], Cost(params=100, macs=1000)) == ()
    )
    assert choose([], [budget("macs", 1000)], Cost(params=100, macs=1000)) == ()


def test_of_equal_harm_the_cheaper_is_chosen():
    options = [option("a", 50, 600, 0.5), option("a", 50, 400, 0.5), option("a", 50, 500, 0.5)]
    chosen = choose(options, [budget("macs", 700)], Cost(params=100, macs=1000))
    assert chosen == (options[1],)


def test_an_unreachable_budget_says_what_is_reachable_and_that_is_true():
    options = [option("a", 50, 333, 0.5), option("b", 10, 900, 0.1)]
    before = Cost(params=1000, macs=10_000)
    with pytest.raises(BudgetError) as caught:
        choose(options, [budget("macs", 100)], before, obstacles="The rest is grouped. ")
    text = str(caught.value)
    assert "the least that these rewrites reach is 9.23 k (92.3 % of 10.0 k)" in text
    assert "The rest is grouped. Raise the budget" in text
    share = int(re.search(r"`macs=(\d+)%` or more", text)[1])
    assert choose(options, [budget("macs", share * 100)], before)


def test_without_options_the_budget_is_unreachable():
    with pytest.raises(BudgetError, match=r"reach is 1.00 k \(100.0 % of 1.00 k\).*`macs=100%`"):
        choose([], [budget("macs", 10)], Cost(params=100, macs=1000))


def test_budgets_that_can_only_be_met_apart_are_told():
    options = [option("a", 100, 10, 0.1), option("a", 1, 1000, 0.1)]
    with pytest.raises(BudgetError, match=r"macs=500, params=50 can each be met, but not together"):
        choose(options, [budget("macs", 500), budget("params", 50)], Cost(params=100, macs=1000))


@pytest.mark.skipif(os.name != "posix", reason="C's buffer cannot be emptied from here")
def test_what_the_solver_prints_is_not_heard(monkeypatch, capfd):
    """HiGHS prints to C's standard output, silent or not; what we write there may be JSON."""
    library = ctypes.CDLL(None)
    real = solve.milp

    def printing(*args, **kwargs):
        library.printf(b"from the solver\n")
        return real(*args, **kwargs)

    monkeypatch.setattr(solve, "milp", printing)
    print("before", flush=True)
    library.printf(b"before, in C\n")
    before = Cost(params=100, macs=1000)
    assert choose([option("a", 50, 400, 0.5)], [budget("macs", 700)], before)
    print("after", flush=True)
    library.fflush(None)
    assert capfd.readouterr().out.splitlines() == ["before", "before, in C", "after"]
