import ctypes
import itertools
import os
import re
import threading
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebyone.core.errors import BudgetError, RecordError
from onebyone.core.records import Budget, Cost, Option
from onebyone.planning import exact_search
from onebyone.planning.exact_search import AtLeast, Groups, pick
from onebyone.planning.knapsack import choose, least_cost, nearest


def option(site, params, macs, harm, *, before=(100, 1000), occupies=None):
    return Option.of(
        "factorize",
        {"form": "pair", "ranks": [1]},
        site=site,
        before=Cost(params=before[0], macs=before[1], bytes=4 * before[0]),
        after=Cost(params=params, macs=macs, bytes=4 * params),
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
    before = Cost(params=300, macs=3000, bytes=1200)
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
    chosen = choose(options, budgets, before, forced=forced).options
    best = min(sum(o.harm for o in some) for some in possible)
    assert sum(o.harm for o in chosen) <= best * (1 + 2e-4) + 1e-6
    assert all(getattr(after(before, chosen), b.quantity) <= b.limit for b in budgets)
    assert set(forced) <= {o.site for o in chosen}
    assert [options.index(o) for o in chosen] == sorted(options.index(o) for o in chosen)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(10**8, 10**9), min_size=2, max_size=5))
def test_a_budget_is_met_to_the_last_mac(short, sizes):
    # Costs of real networks: a tolerance of a millionth would be a thousand MACs over.
    before = Cost(params=len(sizes), macs=2 * sum(sizes), bytes=4 * len(sizes))
    options = [option(f"s{i}", 1, 0, 0.1 + i, before=(1, size)) for i, size in enumerate(sizes)]
    extra = option("extra", 0, 0, 99.0, before=(0, 10**9))
    limit = before.macs - sizes[0] - short
    chosen = choose([*options, extra], [budget("macs", limit)], before).options
    assert after(before, chosen).macs <= limit


def test_nothing_is_chosen_where_nothing_is_needed():
    before = Cost(params=100, macs=1000, bytes=400)
    assert not choose([option("a", 1, 1, 0.5)], [budget("macs", 1000)], before).options
    assert not choose([], [budget("macs", 1000)], before).options


def test_of_equal_harm_the_cheaper_is_chosen():
    options = [option("a", 50, 600, 0.5), option("a", 50, 400, 0.5), option("a", 50, 500, 0.5)]
    chosen = choose(options, [budget("macs", 700)], Cost(params=100, macs=1000, bytes=400)).options
    assert chosen == (options[1],)


def test_an_unreachable_budget_says_what_is_reachable_and_that_is_true():
    options = [option("a", 50, 333, 0.5), option("b", 10, 900, 0.1)]
    before = Cost(params=1000, macs=10_000, bytes=4000)
    with pytest.raises(BudgetError) as caught:
        choose(options, [budget("macs", 100)], before, obstacles="The rest is grouped. ")
    text = str(caught.value)
    assert "the least that these rewrites reach is 9.23 k (92.3 % of 10.0 k)" in text
    assert "The rest is grouped. Raise the budget" in text
    share = int(re.search(r"`macs=(\d+)%` or more", text)[1])
    assert choose(options, [budget("macs", share * 100)], before)


def test_without_options_the_budget_is_unreachable():
    with pytest.raises(BudgetError, match=r"reach is 1.00 k \(100.0 % of 1.00 k\).*`macs=100%`"):
        choose([], [budget("macs", 10)], Cost(params=100, macs=1000, bytes=400))


def test_budgets_that_can_only_be_met_apart_are_told():
    options = [option("a", 100, 10, 0.1), option("a", 1, 1000, 0.1)]
    before, both = (
        Cost(params=100, macs=1000, bytes=400),
        [budget("macs", 500), budget("params", 50)],
    )
    said = r"macs=500, params=50 can each be met, but not together.*to `params=100%`, or.*--closest"
    with pytest.raises(BudgetError, match=said) as caught:
        choose(options, both, before)
    assert [b.limit for b in caught.value.nearest] == [500, 100]
    assert choose(options, caught.value.nearest, before).options == (options[0],)


@pytest.mark.skipif(os.name != "posix", reason="C's buffer cannot be emptied from here")
@pytest.mark.timeout(600, method="signal")  # the other method has a thread of its own
def test_what_the_solver_prints_is_not_heard(monkeypatch, capfd):
    """HiGHS prints to C's standard output, silent or not; what we write there may be JSON."""
    if threading.active_count() > 1:
        pytest.skip("output is not redirected where other threads run, as in a worker of xdist")
    library = ctypes.CDLL(None)
    real = exact_search.milp

    def printing(*args, **kwargs):
        library.printf(b"from the solver\n")
        return real(*args, **kwargs)

    monkeypatch.setattr(exact_search, "milp", printing)
    print("before", flush=True)
    library.printf(b"before, in C\n")
    before = Cost(params=100, macs=1000, bytes=400)
    assert choose([option("a", 50, 400, 0.5)], [budget("macs", 700)], before).options
    os.write(1, b"after\n")  # not print, whose stream pytest has replaced by one of its own
    library.fflush(None)
    assert capfd.readouterr().out.splitlines() == ["before", "before, in C", "after"]


@pytest.mark.timeout(600, method="signal")
def test_where_other_threads_print_nothing_of_theirs_is_lost(monkeypatch, capfd):
    real = exact_search.milp
    running = threading.Event()

    def printing(*args, **kwargs):
        os.write(1, b"of the caller's own\n")
        return real(*args, **kwargs)

    monkeypatch.setattr(exact_search, "milp", printing)
    other = threading.Thread(target=running.wait)
    other.start()
    try:
        choose(
            [option("a", 50, 400, 0.5)],
            [budget("macs", 700)],
            Cost(params=100, macs=1000, bytes=400),
        )
    finally:
        running.set()
        other.join()
    assert "of the caller's own" in capfd.readouterr().out


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("sites", [20, 50])
@pytest.mark.parametrize("short", [0, 1])
def test_equal_layers_are_solved_to_the_last_mac(sites, short):
    """One MAC below what half of them save needs one layer more, of very many equal choices."""
    half = sites // 2
    options = [option(f"s{i}", 50, 5 * 10**8, 0.1, before=(100, 10**9)) for i in range(sites)]
    before = Cost(params=100 * sites, macs=sites * 10**9, bytes=400 * sites)
    limit = before.macs - half * 5 * 10**8 - short
    chosen = choose(options, [budget("macs", limit)], before)
    assert len(chosen.options) == half + short
    assert chosen.gap == 0


def test_nearly_equal_layers_are_solved_to_the_last_mac():
    options = [option(f"s{i}", 50, 5 * 10**11 - i, 0.1, before=(100, 10**12)) for i in range(12)]
    before = Cost(params=1200, macs=12 * 10**12, bytes=4800)
    most = sum(sorted((o.saved.macs for o in options), reverse=True)[:6])
    for limit, count in ((before.macs - most, 6), (before.macs - most - 1, 7)):
        chosen = choose(options, [budget("macs", limit)], before).options
        assert len(chosen) == count
        assert after(before, chosen).macs <= limit


# Groups, what each option saves, its harm, and what must be saved: the solver's tolerance of a
# millionth once made it call the first two impossible, and find a worse choice for the others.
NEARLY_EQUAL = [
    ([[0], [1, 2]], [999_999, 1_000_000, 999_999], [0.25] * 3, 1_999_999),
    ([[0, 1], [2]], [10_000_000, 9_999_997, 9_999_998], [0.4, 0.1, 0.6], 19_999_998),
    (
        [[0], [1, 2], [3], [4]],
        [999_999, 999_999, 1_000_000, 1_000_000, 999_999],
        [0.2, 0.5, 0.8, 0.9, 0.1],
        2_999_998,
    ),
    (
        [[0], [1], [2, 3], [4, 5]],
        [999_996, 999_997, 999_997, 999_992, 999_994, 999_990],
        [0.2, 0.6, 0.1, 0.6, 0.1, 0.6],
        2_999_987,
    ),
]


@pytest.mark.parametrize(("groups", "saved", "harms", "least"), NEARLY_EQUAL)
def test_the_solvers_tolerance_hides_no_choice(groups, saved, harms, least):
    met = []
    for picks in itertools.product(*([None, *group] for group in groups)):
        chosen = [i for i in picks if i is not None]
        if sum(saved[i] for i in chosen) >= least:
            met.append(sum(harms[i] for i in chosen))
    found = pick(np.array(harms), Groups(groups), [AtLeast(tuple(saved), least)])
    assert found is not None
    assert np.array(saved) @ found.picked >= least
    assert np.array(harms) @ found.picked == pytest.approx(min(met))


@st.composite
def hard_instances(draw):
    """Costs of any size, nearly equal or not, harms of any size or none, latency in floats."""
    size = 10 ** draw(st.integers(1, 12))
    spread = draw(st.sampled_from([1, 3, size]))
    harms = draw(
        st.sampled_from(
            [
                st.just(0.0),
                st.just(0.25),
                st.floats(1e-12, 1e-9),
                st.floats(1e-3, 1e6),
                st.sampled_from([0.0, 1e-12, 1e-6, 1.0, 1e9]),
            ]
        )
    )
    options, sites = [], [f"s{i}" for i in range(draw(st.integers(1, 5)))]
    for site in sites:
        for _ in range(draw(st.integers(1, 2))):
            left = draw(st.integers(0, min(spread, size)))
            ms = draw(st.floats(0.0, 1.0))
            mine = option(site, left, left, draw(harms), before=(size, size))
            options.append(timed(mine, 1.0, ms))
    total = Cost(params=size * len(sites), macs=size * len(sites), bytes=0, ms=float(len(sites)))
    sums = [sum(o.saved.macs for o in options[:k]) for k in range(len(options) + 1)]
    budgets = []
    for quantity in draw(st.sets(st.sampled_from(["macs", "params", "latency"]), min_size=1)):
        if quantity == "latency":
            limit = draw(st.floats(0.0, 1.1)) * total.ms
        else:
            limit = total.macs - draw(st.sampled_from(sums)) + draw(st.integers(-2, 2))
        budgets.append(budget(quantity, max(limit, 0)))
    return options, budgets, total


def timed(made, before, after_ms):
    costs = replace(made.before, ms=before), replace(made.after, ms=after_ms)
    return replace(made, before=costs[0], after=costs[1])


def exactly_met(chosen, budgets, before, slack=Fraction(0)):
    for b in budgets:
        saved = sum((Fraction(o.saved.amount(b.quantity)) for o in chosen), Fraction(0))
        allowed = slack * Fraction(before.ms) if b.quantity == "latency" else 0
        if Fraction(before.amount(b.quantity)) - saved > Fraction(b.limit) + allowed:
            return False
    return True


def all_choices(options):
    for flags in itertools.product([False, True], repeat=len(options)):
        chosen = [o for o, flag in zip(options, flags, strict=True) if flag]
        names = [name for o in chosen for name in o.occupies]
        if len(names) == len(set(names)):
            yield chosen


def harm_of(chosen):
    return sum((Fraction(o.harm) for o in chosen), Fraction(0))


@settings(max_examples=200, deadline=None)
@given(hard_instances())
def test_the_choice_is_exact_whatever_the_sizes(instance):
    options, budgets, before = instance
    met = [c for c in all_choices(options) if exactly_met(c, budgets, before)]
    slack = Fraction(1, 10**9)
    if not any(exactly_met(c, budgets, before, slack=slack) for c in all_choices(options)):
        with pytest.raises(BudgetError) as caught:
            choose(options, budgets, before)
        assert choose(options, caught.value.nearest, before).gap == 0
        return
    if not met:
        return  # a time within its billionth: met or not
    found = choose(options, budgets, before)
    assert exactly_met(found.options, budgets, before, slack=slack)
    best = min(harm_of(c) for c in met)
    assert harm_of(found.options) <= best * (1 + Fraction(1, 10**4))


@settings(max_examples=60, deadline=None)
@given(hard_instances(), st.sampled_from(["macs", "params", "latency"]))
def test_the_least_cost_is_the_least_of_all_choices(instance, quantity):
    options, _, before = instance
    least = min(after(before, c).amount(quantity) for c in all_choices(options))
    assert least_cost(options, quantity, before).amount(quantity) == pytest.approx(
        least, rel=1e-12, abs=1e-12
    )


def test_the_least_cost_of_overlapping_options_is_exact():
    whole = option("head", 0, 10**12 - 3, 0.1, before=(0, 10**12), occupies=("a", "b"))
    apart = [option(n, 0, 10**12 - 2, 0.1, before=(0, 10**12)) for n in ("a", "b")]
    before = Cost(params=0, macs=3 * 10**12, bytes=0)
    assert least_cost([whole, *apart], "macs", before).macs == before.macs - 4
    assert least_cost([whole, *apart], "macs", before, forced=("head",)).macs == before.macs - 3


def test_an_option_of_immense_harm_does_not_hide_the_others():
    """Harms are weighed against the least total, not against the largest of any option."""
    options = [option("a", 1, 400, 1e12), option("a", 1, 500, 2e-6), option("b", 1, 500, 1e-6)]
    chosen = choose(options, [budget("macs", 1500)], Cost(params=200, macs=2000, bytes=800)).options
    assert chosen == (options[2],)


@pytest.mark.parametrize("harm", [float("nan"), float("inf")])
def test_no_option_has_a_harm_that_is_not_finite(harm):
    with pytest.raises(RecordError, match="`harm` must be a finite number"):
        option("a", 1, 1, harm)


def test_a_forced_site_without_an_option_is_told():
    with pytest.raises(BudgetError, match=r"No option of 'head' can be chosen"):
        choose(
            [option("a", 1, 1, 1.0)],
            [budget("macs", 1)],
            Cost(params=1, macs=9, bytes=4),
            forced=["head"],
        )


def test_budgets_are_raised_in_the_order_given_and_no_further_than_needed():
    options = [option("a", 100, 10, 0.1), option("a", 1, 1000, 0.1)]
    before = Cost(params=100, macs=1000, bytes=400)
    given_order = [budget("params", 50), budget("macs", 500)]
    assert [b.limit for b in nearest(options, given_order, before)] == [50, 1000]
    assert nearest(options, [budget("macs", 10)], before) == (budget("macs", 10),)
    assert [b.limit for b in nearest(options, [budget("macs", 9)], before)] == [10]


def test_a_search_that_time_ends_says_how_much_better_another_may_be(monkeypatch):
    monkeypatch.setattr(exact_search, "milp", _stopped(exact_search.milp, x=True))
    bounds = [AtLeast((3, 5), 5)]
    found = pick(np.array([0.5, 1.0]), Groups([[0], [1]]), bounds)
    assert found.gap == 0.25
    options, before = [option("a", 1, 500, 1.0)], Cost(params=100, macs=1000, bytes=400)
    assert choose(options, [budget("macs", 600)], before).gap == 0.25


def test_a_search_that_time_ends_without_a_choice_does_not_say_impossible(monkeypatch):
    monkeypatch.setattr(exact_search, "milp", _stopped(exact_search.milp, x=False))
    with pytest.raises(BudgetError, match=r"was found in 60 s, nor shown to be impossible"):
        pick(np.array([0.5, 1.0]), Groups([[0], [1]]), [AtLeast((3, 5), 5)])


def _stopped(real, *, x):
    """Return the solver as it answers at its time limit, with a choice or none."""

    def stopped(*args, **kwargs):
        result = real(*args, **kwargs)
        result.status, result.mip_gap = 1, 0.25
        if not x:
            result.x = None
        return result

    return stopped


# ---------------------------------------------------------------- bytes are a quantity of their own


def quantized(site, harm, *, before=(100, 1000)):
    """Return an option of as many parameters and MACs, in a quarter of the bytes."""
    same = option(site, *before, harm, before=before)
    return replace(same, after=replace(same.after, bytes=same.before.bytes // 4))


def test_a_budget_of_bytes_is_met_where_no_parameter_is_saved():
    before = Cost(params=200, macs=2000, bytes=800)
    options = [quantized("a", 0.2), quantized("b", 0.1), option("a", 40, 400, 0.5)]
    chosen = choose(options, [budget("size", 500)], before).options
    assert [(each.site, each.harm) for each in chosen] == [("b", 0.1)]
    assert after(before, chosen).bytes == 500
    both = choose(options, [budget("size", 400), budget("params", 150)], before).options
    assert [each.after.params for each in both] == [100, 40]
    with pytest.raises(BudgetError, match=r"size=100 is 100 B of weights, .* reach is 200 B"):
        choose(options, [budget("size", 100)], before)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 90), st.integers(0, 400)),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2400),
)
def test_the_choice_under_a_budget_of_bytes_is_the_best_of_all(saved, limit):
    before = Cost(params=600, macs=6000, bytes=2400)
    options = []
    for place, (params, harm, held) in enumerate(saved):
        made = option(f"{place % 3}", 100 - params, 1000, harm)
        options.append(replace(made, after=replace(made.after, bytes=held)))
    ways = [
        chosen
        for count in range(4)
        for chosen in itertools.combinations(options, count)
        if len({each.site for each in chosen}) == count and after(before, chosen).bytes <= limit
    ]
    if not ways:
        with pytest.raises(BudgetError):
            choose(options, [budget("size", limit)], before)
        return
    chosen = choose(options, [budget("size", limit)], before).options
    assert after(before, chosen).bytes <= limit
    assert sum(each.harm for each in chosen) == min(sum(e.harm for e in way) for way in ways)


def test_harm_below_zero_is_rounding_and_no_gain():
    before = Cost(params=300, macs=3000, bytes=1200)
    limit = [budget("macs", 2500)]

    def chosen(harm):
        options = [option("a", 10, 100, harm), option("b", 20, 200, 0.0), option("c", 5, 900, harm)]
        return [each.site for each in choose(options, limit, before).options]

    assert chosen(-0.5) == chosen(0.0)
