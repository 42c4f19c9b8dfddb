"""Verdicts follow the figures: turn the figures round and the sentences turn round."""

import pytest
from article_records import (
    CURED,
    EXTRA_COSTS,
    FITTED,
    LESS_FITTED,
    SCATTERED,
    WORSE,
    duel,
    layer,
    layer_times,
    record,
)

from onebyone.article import verdicts
from onebyone.core.records import Cost

SINGLE = ((1.0,), (0.9,))


def claim(found, start):
    return next(one for one in verdicts.claims(found) if one.said.startswith(start))


def test_the_counts_of_the_article_hold():
    found = record()
    assert claim(found, "A 1×1 convolution summarizes").holds
    assert claim(found, "It has 16,416").holds
    assert claim(found, "The network of convolutions").holds


def test_a_wrong_count_would_be_seen():
    costs = (
        Cost(params=300_000, macs=1, bytes=4 * 300_000),
        Cost(params=4_232, macs=1, bytes=4 * 4_232),
    )
    found = claim(record(heads=duel(FITTED, CURED, costs=costs)), "The network of convolutions")
    assert not found.holds
    assert "300,000 → 4,232: 70.9 times" in found.measured


@pytest.mark.parametrize(
    ("times", "cold", "verdict", "holds"),
    [
        ((layer_times(0.1, 2.3),), ((1, 5), (1, 5)), "holds", True),
        ((layer_times(0.1, 0.5),), ((1, 5), (1, 40)), "only in a single cold call", False),
        ((layer_times(0.1, 0.5),), ((1, 5), (1, 5)), "faster, but not 23 times", False),
        ((layer_times(0.5, 0.1),), ((1, 5), (1, 5)), "does not hold here", False),
        ((layer_times(disturbed=True),), ((1, 5), (1, 5)), "the times were disturbed", None),
    ],
)
def test_the_speed_claim_is_judged_by_what_was_timed(times, cold, verdict, holds):
    found = claim(record(layers=layer(times=times, cold=cold)), "It is 23 times faster")
    assert (found.verdict, found.holds) == (verdict, holds)


@pytest.mark.parametrize(
    ("after", "verdict", "holds", "sentence"),
    [
        (CURED, "holds", True, "here the article's remedy works"),
        (LESS_FITTED, "smaller gap, worse net", False, "that is less fitting, not a cure"),
        (WORSE, "the gap grows", False, "accuracy grows from 5.00 to 9.94 points"),
        (SCATTERED, "no difference of the gaps is shown", None, "No difference in over-fitting"),
    ],
)
def test_over_fitting_is_judged_by_the_gap_and_by_the_test_accuracy(
    after, verdict, holds, sentence
):
    heads = duel(FITTED, after)
    found = claim(record(heads=heads), "Averaged class maps")
    assert (found.verdict, found.holds) == (verdict, holds)
    assert sentence in " ".join(verdicts.overfitting(heads))


@pytest.mark.parametrize(
    ("after", "holds", "sentence"),
    [
        (CURED, True, "test accuracy rises by 2.50 points"),
        (WORSE, False, "test accuracy falls by 4.94 points"),
        (SCATTERED, None, "no difference in test accuracy is shown"),
    ],
)
def test_the_extra_nonlinearity_is_judged_by_its_test_accuracy(after, holds, sentence):
    found = duel(FITTED, after, costs=EXTRA_COSTS)
    assert claim(record(nonlinearity=found), "A 1×1 convolution and a ReLU").holds is holds
    text = verdicts.nonlinearity(found)
    assert sentence in text
    assert "adds 72 parameters and 3.14 k MACs (4.4 % more)" in text


def test_a_single_seed_gives_no_verdict():
    heads = duel(SINGLE, SINGLE)
    found = record(heads=heads, nonlinearity=duel(SINGLE, SINGLE, costs=EXTRA_COSTS))
    assert claim(found, "Averaged class maps").verdict == "one seed shows nothing"
    assert claim(found, "A 1×1 convolution and a ReLU").holds is None
    assert "a single seed does not show" in verdicts.overfitting(heads)[0]
    assert "2 are not shown either way" in verdicts.summary(found)


def test_smaller_is_called_cheaper_only_where_it_is():
    slower = verdicts.cost(duel(FITTED, CURED, ratios=(0.8, 0.5)))
    assert "74.8× fewer parameters and 1.42× fewer MACs" in slower
    assert "at batch 1 it is 1.25× slower" in slower
    assert slower.endswith("Smaller is not faster here.")
    faster = verdicts.cost(duel(FITTED, CURED, ratios=(1.5, 2.0)))
    assert "at batch 32 it is 2.00× faster" in faster
    assert "Smaller is not faster" not in faster


def test_more_macs_are_called_more():
    costs = (Cost(params=100, macs=100, bytes=400), Cost(params=50, macs=107, bytes=200))
    assert "2.00× fewer parameters and 1.07× more MACs" in verdicts.cost(
        duel(FITTED, CURED, costs=costs)
    )


def test_trainings_that_got_stuck_are_told():
    stuck = ((0.99, 0.1, 0.99, 0.98, 0.99), (0.97, 0.1, 0.97, 0.97, 0.97))
    text = " ".join(verdicts.overfitting(duel(FITTED, stuck)))
    assert "1 of 5 trainings of the convolution-only network hardly learned anything" in text


def test_the_parts_of_the_ratio_multiply_to_the_ratio():
    # 1×1: 0.12 ms, 3×3: 0.52 ms, of which 0.02 ms are the fixed cost: 5 times as long for 9 times
    # the work, so the 3×3 gets through 1.8 times as much of it a millisecond.
    text = verdicts.warm_speed(layer_times(0.12, 0.52, 0.02), layer())
    assert "17 % of the 1×1's time and 4 % of the 3×3's" in text
    assert "without this fixed cost the ratio is 5.00×" in text
    assert "24 GMAC/s in the 1×1 and 42 GMAC/s in the 3×3" in text
    assert "the 3×3 is 1.80× as fast" in text


def test_a_call_that_is_all_fixed_cost_is_not_divided_by_nothing():
    text = verdicts.warm_speed(layer_times(0.02, 0.03, 0.02), layer())
    assert "only this fixed cost is visible" in text


def test_disturbed_times_are_said_to_say_nothing():
    times = layer_times(disturbed=True)
    assert "these times show nothing" in verdicts.warm_speed(times, layer(times=(times,)))


@pytest.mark.parametrize(
    ("cold", "parts"),
    [
        (((2, 10), (4, 8)), ["23× is above all of them"]),
        (((1, 30), (1, 20)), ["23× is among them"]),
        (((30, 30), (1, 30)), ["the rest is the start of the library", "order matters as much"]),
    ],
)
def test_cold_calls_are_told_by_which_came_first(cold, parts):
    text = verdicts.cold_speed(layer(cold=cold))
    for part in parts:
        assert part in text


def test_the_order_is_not_blamed_where_it_does_not_matter():
    assert "order matters" not in verdicts.cold_speed(layer(cold=((2, 10), (2, 10))))


def test_memory_traffic_is_counted_from_the_shapes():
    # 1×1: 4 bytes × (512·144 + 32·144 + 16,416) over 2,359 thousand MACs.
    assert "at least 161 bytes of memory for every thousand MACs and the 3×3 43" in (
        verdicts.traffic(layer())
    )


def test_the_summary_counts_the_claims():
    found = record(heads=duel(FITTED, CURED), nonlinearity=duel(FITTED, WORSE, costs=EXTRA_COSTS))
    assert verdicts.summary(found).startswith("4 of the article's 6 claims hold here; 2 do not.")
