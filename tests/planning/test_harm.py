import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebyone.planning.harm import (
    PRIOR_EXAMPLES,
    Measured,
    SiteHarms,
    places_to_measure,
    pooled_harms,
    smoothed,
)

PREDICTED = [1e-4, 1e-3, 1e-2, 1e-1]


def site(*factors, predicted=PREDICTED):
    places = np.linspace(0, len(predicted) - 1, len(factors)).round().astype(int)
    measured = {int(p): f * predicted[p] for p, f in zip(places, factors, strict=True)}
    return SiteHarms(predicted, measured)


def test_many_examples_of_a_site_are_believed():
    sites = [site(1, 2, 3, 4), site(5, 6, 7, 8)]
    for one, harms in zip(sites, pooled_harms(sites, 10**9), strict=True):
        assert harms == pytest.approx([one.measured[place] for place in range(4)])


def test_without_examples_all_sites_err_by_the_same_factors():
    sites = [site(1, 2, 3, 4), site(4, 8, 12, 16)]
    for harms in pooled_harms(sites, 0):
        assert harms == pytest.approx(
            [p * 2 * f for p, f in zip(PREDICTED, (1, 2, 3, 4), strict=True)]
        )


def test_as_many_examples_as_the_prior_weighs_meet_it_halfway():
    sites = [site(1, 1), site(16, 16)]
    low, high = pooled_harms(sites, PRIOR_EXAMPLES)
    assert low == pytest.approx([2 * p for p in PREDICTED])
    assert high == pytest.approx([8 * p for p in PREDICTED])


def test_one_site_alone_is_as_measured():
    assert pooled_harms([site(3, 5)], 1)[0][::3] == pytest.approx([3e-4, 5e-1])


def test_a_site_of_few_options_is_compared_with_the_best_and_the_worst_of_others():
    few = site(1, 1, predicted=[1e-3, 1e-2])
    sites = [site(4, 4, 4, 4), few]
    assert pooled_harms(sites, 0)[1] == pytest.approx([4e-3, 4e-2])


@pytest.mark.parametrize("options", [1, 2, 3, 60])
def test_the_best_and_the_worst_options_are_measured(options):
    for count in (2, 3, 100):
        places = places_to_measure(options, count)
        assert (places[0], places[-1], len(places)) == (0, options - 1, min(count, options))
        assert places == sorted(set(places))


@given(st.lists(st.floats(0, 10), min_size=2, max_size=5), st.integers(0, 600))
def test_an_option_does_harm_between_that_of_its_measured_neighbors(measured, examples):
    predicted = sorted(np.geomspace(1e-6, 1, 2 * len(measured) - 1))
    one = SiteHarms(predicted, {2 * place: harm for place, harm in enumerate(measured)})
    for harms in pooled_harms([one, site(1, 2)], examples)[:1]:
        for below, between, above in zip(harms[::2], harms[1::2], harms[2::2], strict=False):
            assert min(below, above) * (1 - 1e-9) <= between <= max(below, above) * (1 + 1e-9)


def test_options_of_the_same_error_keep_the_harm_that_was_measured_of_each():
    one = SiteHarms([1e-3, 1e-3, 1e-2, 1e-2], {0: 0.5, 1: 0.001, 2: 0.2, 3: 0.4})
    assert pooled_harms([one], 10**9)[0] == pytest.approx([0.5, 0.001, 0.2, 0.4])


def test_nothing_gives_nothing():
    assert pooled_harms([], 5) == []


@given(st.integers(-100, 100), st.integers(-100, 100))
def test_the_unit_of_a_divergence_changes_nothing(predicted, measured):
    sites = [site(1, 2, 3, 4), site(5, 1e-6, 7, 0)]
    scaled = [
        SiteHarms(
            [2.0**predicted * harm for harm in one.predicted],
            {place: 2.0**measured * harm for place, harm in one.measured.items()},
        )
        for one in sites
    ]
    for one, other in zip(pooled_harms(sites, 50), pooled_harms(scaled, 50), strict=True):
        assert [2.0**measured * harm for harm in one] == pytest.approx(other, rel=1e-9)


def softened(scatter, power=1.5, options=6, sites=5, told=None):
    """Sites whose harms are a power of the softened ones, but for chance."""
    drawn = np.random.default_rng(0)
    found = []
    for _ in range(sites):
        soft = np.sort(np.exp(drawn.uniform(-8, 0, options)))
        chance = np.exp(scatter * drawn.standard_normal(options))
        pairs = zip(soft, 3 * soft**power * chance, strict=True)
        found.append(
            SiteHarms.of(
                soft, {i: Measured(*pair, told or scatter) for i, pair in enumerate(pairs)}
            )
        )
    return found


def test_harms_follow_the_softened_ones_and_not_chance():
    apart = {}
    for told in (0.0, 0.8):
        found = smoothed(softened(scatter=0.8, told=told or 1e-9))
        errors = [
            np.log(harm) - np.log(3 * one.softened[place] ** 1.5)
            for one in found
            for place, harm in one.measured.items()
        ]
        apart[told] = np.std(errors)
    assert apart[0.0] > 0.6  # what is said to be no chance is kept
    assert apart[0.8] < 0.4 * apart[0.0]


def test_harms_without_chance_are_as_measured():
    sites = softened(scatter=0)
    for one, before in zip(smoothed(sites), sites, strict=True):
        assert list(one.measured.values()) == pytest.approx(list(before.measured.values()))


def test_where_temperature_says_nothing_harms_stay_as_measured():
    one = SiteHarms.of([1, 2, 3], {0: Measured(0.1, 0.1), 2: Measured(0.5, 0.5)})
    assert smoothed([one]) == [one]


def test_few_measured_options_keep_the_ratios_of_their_softened_harms():
    one = SiteHarms.of([1, 2], {0: Measured(0.1, 0.4, 1e9), 1: Measured(0.2, 0.2, 1e9)})
    low, high = smoothed([one])[0].measured.values()
    assert high == pytest.approx(2 * low)
    assert low * high == pytest.approx(0.4 * 0.2)
