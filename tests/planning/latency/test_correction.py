"""The curve from what layers save alone to what the network saves."""

import itertools

import numpy as np
import pytest

from onebyone.core.records import Ratio
from onebyone.planning.latency.correction import Worth


def measured(before, *pairs, width=0.01):
    """Return the curve of networks that save so much while their layers save so much."""
    worth = Worth(before)
    for alone, saved in pairs:
        value = before / (before - saved)
        ratio = Ratio(value=value, low=value * (1 - width), high=value * (1 + width), rounds=9)
        worth = worth.learned(alone, ratio)
    return worth


def test_with_nothing_measured_a_millisecond_is_worth_one():
    worth = Worth(10.0)
    assert [worth.saved(x) for x in (0.0, 2.0, 5.0)] == pytest.approx([0.0, 2.0, 5.0])
    assert worth.share(0.0) == worth.share(3.0) == pytest.approx(1.0)


def test_the_curve_goes_through_what_was_measured_and_straight_between():
    worth = measured(10.0, (8.0, 7.5), (4.0, 3.0))
    assert worth.saved(4.0) == pytest.approx(3.0)
    assert worth.saved(8.0) == pytest.approx(7.5)
    assert worth.saved(6.0) == pytest.approx((3.0 + 7.5) / 2)
    assert worth.saved(2.0) == pytest.approx(1.5)
    assert worth.share(8.0) == pytest.approx(7.5 / 8)


@pytest.mark.parametrize("seed", range(20))
def test_more_never_saves_less_nor_all_whatever_was_measured(seed):
    rng = np.random.default_rng(seed)
    pairs = [(float(x), float(rng.uniform(-2, 0.98 * 10))) for x in rng.uniform(0.1, 12, size=7)]
    worth = measured(10.0, *pairs)
    saved = [worth.saved(x) for x in np.linspace(0, 30, 200)]
    assert all(a <= b for a, b in itertools.pairwise(saved))
    assert saved[0] == 0.0
    assert saved[-1] < 10.0


@pytest.mark.parametrize("pairs", [[], [(4.0, 3.0)], [(4.0, 3.0), (8.0, 7.5)], [(3.0, 4.0)]])
def test_what_layers_must_save_is_the_inverse(pairs):
    worth = measured(10.0, *pairs)
    for alone in (0.5, 3.0, 5.0, 8.5, 11.0, 14.0):
        assert worth.alone(worth.saved(alone)) == pytest.approx(alone)


def test_equal_networks_count_once_with_the_mean_of_their_times():
    worth = measured(10.0, (4.0, 2.0), (4.0, 4.0), width=0.0)
    assert worth.saved(4.0) == pytest.approx(3.0)


def test_a_measurement_that_says_less_counts_less():
    sure, noisy = measured(10.0, (4.0, 4.0), width=0.01), measured(10.0, (5.0, 3.0), width=0.2)
    both = Worth(10.0, (*sure.measured, *noisy.measured))
    assert both.saved(4.0) > 3.9


def test_a_network_without_savings_is_no_news():
    ratio = Ratio(value=1.1, low=1.0, high=1.2, rounds=9)
    assert Worth(10.0).learned(0.0, ratio) == Worth(10.0)
