"""Plans with precisions: joins are picked with both their ends, and the choice is the best one."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from onebyone.core.records import Budget, Cost, Option, Step
from onebyone.planning.joins import is_int8, is_own, rewrites_of, rows_of
from onebyone.planning.knapsack import choose
from onebyone.planning.mixed import joins_of
from onebyone.quantizing.flow import Edge, Flow

CONVERT_MS = 3.0
LAYERS = ("a", "b", "c", "d")
FLOW = Flow(
    edges=(
        Edge("a", "b", 10),
        Edge("b", "c", 10),
        Edge("b", "sum s", 10),
        Edge("c", "sum s", 10),
        Edge("sum s", "d", 10),
    ),
    sums={"sum s": ("b", "c")},
    gives=dict.fromkeys(LAYERS, 10),
)


def site_options(name, rng):
    """Return a site's options: rewritten, in int8, and both, the latter between float32 ones."""
    before = Cost(params=100, macs=1000, bytes=400, ms=10.0)

    def option(steps, saved, harm):
        after = replace(before, ms=before.ms - saved)
        return Option(
            site=name, steps=steps, before=before, after=after, occupies=(name,), harm=harm
        )

    rewrite, int8 = Step(rewrite="factorize", settings={}), Step(rewrite="int8", settings={})
    saved, harm = rng.uniform(0, 6, 2), rng.uniform(0.1, 2, 2)
    return [
        option((rewrite,), saved[0], harm[0]),
        option((int8,), saved[1] - CONVERT_MS, harm[1]),
        option((rewrite, int8), saved.sum() - CONVERT_MS, harm.sum()),
    ]


def problem(seed):
    rng = np.random.default_rng(seed)
    per_site = [site_options(name, rng) for name in LAYERS]
    options = [option for mine in per_site for option in mine]
    return per_site, [*options, *joins_of(FLOW, lambda values: CONVERT_MS * (values > 0))]


def joined_ms(int8):
    """Return what the joins save, worked out from the definition."""
    sums = {"sum s"} if {"b", "c"} <= int8 else set()
    there = int8 | sums
    saved = 0.0
    for edge in FLOW.edges:
        if edge.first in there and edge.second in there:
            ends = (edge.first, edge.second)
            saved += CONVERT_MS * sum(end not in FLOW.sums for end in ends) / 2
    return saved


def best_by_hand(per_site, needed):
    best = None
    for picks in product(*[[None, *mine] for mine in per_site]):
        taken = [option for option in picks if option is not None]
        int8 = {option.site for option in taken if is_int8(option)}
        saved = sum(option.saved.ms for option in taken) + joined_ms(int8)
        harm = sum(option.harm for option in taken)
        if saved >= needed and (best is None or harm < best):
            best = harm
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_choice_harms_least_of_all_with_conversions_counted(seed, share):
    per_site, options = problem(seed)
    before = Cost(params=400, macs=4000, bytes=1600, ms=40.0)
    most = max(
        sum(max(option.saved.ms for option in mine) for mine in per_site),
        sum(mine[2].saved.ms for mine in per_site) + joined_ms(set(LAYERS)),
    )
    needed = share * most
    budget = Budget(quantity="latency", limit=40.0 - needed, asked="latency")
    chosen = choose(options, [budget], before).options
    harm = sum(option.harm for option in chosen)
    assert harm == pytest.approx(best_by_hand(per_site, needed), abs=1e-5)
    int8 = {option.site for option in chosen if is_int8(option)}
    joins = sum(option.saved.ms for option in chosen if is_own(option))
    assert joins == pytest.approx(joined_ms(int8))


def test_a_join_needs_an_option_in_int8_at_each_end():
    _, options = problem(0)
    rows = rows_of(options)
    assert len(rows) == 2 * len(FLOW.edges) + len(FLOW.sums["sum s"])
    place = next(i for i, option in enumerate(options) if option.site == "a → b")
    picked = np.zeros(len(options), dtype=bool)
    picked[place] = True
    assert not all(row.holds(picked) for row in rows)
    for site in ("a", "b"):
        first = next(i for i, o in enumerate(options) if o.site == site and is_int8(o))
        picked[first] = True
    assert all(row.holds(picked) for row in rows)


def test_options_without_precision_have_no_rows():
    rng = np.random.default_rng(0)
    plain = [option for name in LAYERS for option in site_options(name, rng)[:1]]
    assert rows_of(plain) == []


def test_the_step_of_precision_is_no_rewrite():
    _, _, both = site_options("a", np.random.default_rng(0))
    assert [step.rewrite for step in rewrites_of(both)] == ["factorize"]
