"""The search in whole numbers: its parts one by one, and the whole against trying all choices."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebyone.core.errors import BudgetError
from onebyone.planning import exact_search
from onebyone.planning.exact_search import BASE, AtLeast, Groups, pick

LARGE = st.one_of(st.integers(-20, 20), st.integers(-(10**15), 10**15))


def choices(items, groups):
    """Every choice that the groups allow, as booleans."""
    for flags in itertools.product([False, True], repeat=items):
        counts = [sum(flags[i] for i in group) for group in groups.exclusive]
        must = [sum(flags[i] for i in group) for group in groups.forced]
        if all(count <= 1 for count in counts) and all(count == 1 for count in must):
            yield np.array(flags)


def least_of_all(objective, groups, bounds):
    """The least total among all choices that meet the bounds, ``None`` where there is none."""
    met = [
        float(objective @ flags)
        for flags in choices(len(objective), groups)
        if all(sum(itertools.compress(b.amounts, flags)) >= b.least for b in bounds)
    ]
    return min(met, default=None)


@st.composite
def problems(draw):
    items = draw(st.integers(1, 6))
    places = list(range(items))
    group = st.lists(st.sampled_from(places), min_size=1, max_size=3, unique=True)
    groups = Groups(
        draw(st.lists(group, min_size=1, max_size=3)), draw(st.lists(group, max_size=1))
    )
    objective = np.array(draw(st.lists(st.integers(-8, 8), min_size=items, max_size=items))) / 8
    kind = draw(st.sampled_from([st.integers(-20, 20), LARGE, st.integers(10**12 - 2, 10**12)]))
    bounds = []
    for _ in range(draw(st.integers(1, 2))):
        amounts = tuple(draw(st.lists(kind, min_size=items, max_size=items)))
        # About what some choice comes to: that is where a bound is hard.
        some = draw(st.lists(st.booleans(), min_size=items, max_size=items))
        least = sum(itertools.compress(amounts, some)) + draw(st.integers(-1, 1))
        bounds.append(AtLeast(amounts, least))
    return objective, groups, bounds


@settings(max_examples=100, deadline=None)
@given(problems())
def test_what_is_picked_is_the_least_of_all_choices(problem):
    objective, groups, bounds = problem
    found, least = pick(objective, groups, bounds), least_of_all(objective, groups, bounds)
    assert (found is None) == (least is None)
    if found is not None:
        assert all(bound.holds(found.picked) for bound in bounds)
        assert objective @ found.picked == pytest.approx(least, abs=1e-5)
        assert found.gap == 0


@settings(max_examples=100, deadline=None)
@given(problems())
def test_digit_by_digit_the_least_is_found_without_any_tolerance(problem):
    objective, groups, bounds = problem
    fixed = exact_search._group_rows(groups, len(objective))
    ends = time.monotonic() + 60
    found = exact_search._search_in_digits(objective, fixed, bounds, ends)
    least = least_of_all(objective, groups, bounds)
    assert found.finished
    assert (found.picked is None) == (least is None)
    if found.picked is not None:
        assert all(bound.holds(found.picked) for bound in bounds)
        assert objective @ found.picked == pytest.approx(least, abs=1e-5)


@pytest.mark.parametrize("size", [10**5, 10**10, 10**14])
def test_digit_by_digit_a_bound_is_met_that_one_choice_just_meets(size):
    """Borrowing from higher digits, and with negative numbers too."""
    rng = np.random.default_rng(0)
    groups = Groups([[0, 1], [2], [3, 4]])
    for _ in range(25):
        some = [tuple(int(a) for a in rng.integers(-size, size, 5)) for _ in range(2)]
        allowed = list(choices(5, groups))
        just = allowed[rng.integers(len(allowed))]
        bounds = [AtLeast(amounts, sum(itertools.compress(amounts, just))) for amounts in some]
        objective = rng.integers(-8, 8, 5) / 8
        fixed = exact_search._group_rows(groups, 5)
        ends = time.monotonic() + 60
        found = exact_search._search_in_digits(objective, fixed, bounds, ends)
        assert all(bound.holds(found.picked) for bound in bounds)
        least = least_of_all(objective, groups, bounds)
        assert objective @ found.picked == pytest.approx(least, abs=1e-5)


@settings(deadline=None)
@given(st.lists(LARGE, min_size=1, max_size=5), LARGE)
def test_the_digits_of_a_bound_make_up_its_numbers(amounts, least):
    places = exact_search._in_places(AtLeast(tuple(amounts), least))
    for item, amount in enumerate(amounts):
        assert sum(digits[item] * BASE**place for place, (digits, _) in enumerate(places)) == amount
    assert sum(digit * BASE**place for place, (_, digit) in enumerate(places)) == least
    for digits, lowest in places[:-1]:
        assert all(0 <= digit < BASE for digit in (*digits, lowest))
    assert all(abs(digit) < BASE for digit in (*places[-1][0], places[-1][1]))
    largest = max(abs(number) for number in (*amounts, least))
    assert len(places) == 1 if largest < BASE else len(places) > 1


@settings(deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=5), st.integers(1, 10**9), LARGE)
def test_a_bound_in_its_largest_unit_allows_the_same_choices(amounts, unit, least):
    bound = AtLeast(tuple(amount * unit for amount in amounts), least)
    reduced = bound.reduced()
    assert math.gcd(*reduced.amounts) <= 1
    for flags in itertools.product([False, True], repeat=len(amounts)):
        assert bound.holds(np.array(flags)) == reduced.holds(np.array(flags))


@settings(deadline=None)
@given(st.lists(LARGE, min_size=1, max_size=5), LARGE, st.sampled_from([0.0, 0.25, -0.25]))
def test_a_row_is_a_bound_in_shares_of_its_largest_number(amounts, least, by):
    row = exact_search._row(AtLeast(tuple(amounts), least), by=by)
    unit = max(1, abs(least), *(abs(amount) for amount in amounts))
    assert row.values * unit == pytest.approx(amounts)
    assert (row.low - by) * unit == pytest.approx(least, abs=unit * 1e-12)
    assert row.high == math.inf


# Two layers a unit short of what the third of them gives: the solver's tolerance does not see it.
SHORT = AtLeast((10**12, 10**12 - 1, 10**12 + 1), 2 * 10**12 + 1)
PAIRS = Groups([[0], [1], [2]])


def unfinished(*_args, **_kwargs):
    return exact_search._Found(None, finished=False, lowest=-math.inf, gap=math.inf)


def test_where_digits_are_not_decided_in_time_a_tightened_bound_is_met(monkeypatch):
    monkeypatch.setattr(exact_search, "_search_in_digits", unfinished)
    objective = np.array([0.25, 0.5, 1.0])
    found = pick(objective, PAIRS, [SHORT])
    assert found.picked.all()  # any two are within the tolerance of the bound
    assert SHORT.holds(found.picked)
    # The loosened search found what harms least of all: it bounds what another choice may save.
    assert found.gap == pytest.approx((1.75 - 0.75) / 1.75, rel=1e-6)


def test_a_tightened_bound_of_items_that_harm_nothing_leaves_no_gap(monkeypatch):
    monkeypatch.setattr(exact_search, "_search_in_digits", unfinished)
    found = pick(np.zeros(3), PAIRS, [SHORT])
    assert SHORT.holds(found.picked)
    assert found.gap == 0


def test_where_digits_took_all_the_time_a_last_search_has_some_more(monkeypatch):
    now = [0.0]

    def late(*_args):
        now[0] += 1000
        return unfinished()

    monkeypatch.setattr(exact_search, "_search_in_digits", late)
    monkeypatch.setattr(exact_search.time, "monotonic", lambda: now[0])
    assert pick(np.array([0.25, 0.5, 1.0]), PAIRS, [SHORT]).picked.all()


def test_where_no_choice_meets_a_tightened_bound_in_time_it_is_not_called_impossible(monkeypatch):
    monkeypatch.setattr(exact_search, "_search_in_digits", unfinished)
    bound = AtLeast((10**12, 10**12 - 1), 2 * 10**12)
    with pytest.raises(BudgetError, match="nor shown to be impossible"):
        pick(np.array([0.5, 1.0]), Groups([[0], [1]]), [bound])


def test_a_search_whose_time_is_over_finds_nothing():
    row = exact_search._row(AtLeast((1,), 1), by=0.0)
    found = exact_search._search(np.array([1.0]), [row], time.monotonic() - 0.5)
    assert (found.picked, found.finished) == (None, False)
    assert found.lowest == -math.inf


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_a_search_says_how_low_the_objective_can_be(scale):
    row = exact_search._row(AtLeast((1, 1), 1), by=0.0)
    objective = np.array([0.5, 0.25]) * scale
    found = exact_search._search(objective, [row], time.monotonic() + 60)
    assert (found.picked.tolist(), found.finished, found.gap) == ([False, True], True, 0.0)
    assert found.lowest == pytest.approx(0.25 * scale, rel=1e-6)


def test_of_choices_that_differ_by_a_ten_millionth_the_less_is_picked():
    """So much is what a tie is broken by."""
    for place in range(4):
        objective = np.ones(4)
        objective[place] -= 1e-7
        found = pick(objective, Groups([range(4)], [range(4)]), [AtLeast((1, 1, 1, 1), 1)])
        assert np.flatnonzero(found.picked).tolist() == [place]
