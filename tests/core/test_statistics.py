"""How often intervals hold the truth, and how often equal things are called different."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from onebyone.core import statistics
from onebyone.core.statistics import mean_interval, ratio_of, share_interval, sign_flip_test

LOOKS = 4
ROUNDS = 9


# ---------------------------------------------------------------- means over examples


@settings(deadline=None)
@given(st.integers(1, 500), st.data())
def test_the_interval_of_a_share_holds_the_share(n, draw):
    successes = draw.draw(st.integers(0, n))
    low, high = share_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    # Wilson's ends are where the normal approximation of the binomial just allows the share.
    for end in (low, high):
        if 0 < end < 1:
            apart = abs(successes / n - end) / np.sqrt(end * (1 - end) / n)
            assert apart == pytest.approx(1.959964, rel=1e-4)


DRAWS = {
    "normal": (lambda rng, n: rng.normal(0, 1, n), 0.0, 92),
    "uniform": (lambda rng, n: rng.random(n), 0.5, 92),
    "heavy tails": (lambda rng, n: rng.standard_t(3, n), 0.0, 92),
    "exponential": (lambda rng, n: rng.exponential(1, n), 1.0, 91),
    "log-normal": (lambda rng, n: rng.lognormal(0, 1, n), np.exp(0.5), 86),
    "a rare event": (lambda rng, n: (rng.random(n) < 0.02) * 1.0, 0.02, 95),
    "an event": (lambda rng, n: (rng.random(n) < 0.1) * 1.0, 0.1, 91),
}


# Ten examples cannot show the spread of what happens in one of ten.
@pytest.mark.parametrize(
    ("name", "n"),
    [(name, n) for name in DRAWS for n in (10, 30, 100) if (name, n) != ("an event", 10)],
)
def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says(name, n):
    draw, truth, least = DRAWS[name]
    rng = np.random.default_rng(n)
    held = 0
    for _ in range(200):
        low, high, _ = mean_interval(draw(rng, n), reach=1.0)
        held += low <= truth <= high
    assert held >= 2 * least


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
)
def test_the_interval_of_a_mean_holds_the_mean_and_moves_and_turns_with_it(values, shift, reach):
    values = np.array(values)
    low, high, _ = mean_interval(values, reach=reach)
    mean = values.mean()
    assert low <= mean <= high
    assert np.isfinite([low, high]).all()
    turned = mean_interval(-values, reach=reach)
    assert (-turned[1], -turned[0]) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 1000])
def test_equal_values_do_not_make_a_mean_certain(n):
    low, high, method = mean_interval(np.full(n, 0.7), reach=0.5)
    unseen = 1 - 0.025 ** (1 / n)
    assert (low, high) == pytest.approx((0.7 - 0.5 * unseen, 0.7 + 0.5 * unseen))
    assert "rule of three" in method


def test_an_outlier_widens_the_interval_to_its_side():
    low, high, _ = mean_interval(np.array([0.0, 0.1, -0.1, 0.05, 0.0, 100.0]), reach=1)
    mean = 100.05 / 6
    assert high - mean > mean - low > 0


@pytest.mark.parametrize("n", [2, 3, 7, 11])
def test_few_differences_are_tested_with_all_their_signs(n):
    differences = np.random.default_rng(n).normal(0.8, 1, n)
    signs = np.array(list(itertools.product([-1, 1], repeat=n)))
    means = np.abs(signs @ differences)
    expected = np.mean(means >= abs(differences.sum()) * (1 - 1e-9))
    p_value, name = sign_flip_test(differences)
    assert p_value == pytest.approx(expected)
    assert name == "exact sign-flip test"


@pytest.mark.parametrize(("n", "value", "p"), [(1, 1, 1), (2, 1, 0.5), (5, -3, 2**-4), (3, 0, 1)])
def test_equal_differences_are_as_likely_by_chance_as_all_signs_alike(n, value, p):
    assert sign_flip_test(np.full(n, float(value)))[0] == p


@pytest.mark.parametrize("n", [40, 700])
def test_many_differences_are_tested_as_by_students_t(n):
    differences = np.random.default_rng(1).normal(0.3, 1, n)
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert sign_flip_test(differences)[0] == pytest.approx(expected, abs=0.02)


# ---------------------------------------------------------------- ratios over rounds


def correlated(rho):
    def draw(rng, n):
        found = rng.normal(0, 1, n)
        for place in range(1, n):
            found[place] = rho * found[place - 1] + np.sqrt(1 - rho**2) * found[place]
        return found

    return draw


def bursts(rng, n):
    found, place = rng.normal(0, 1, n), 0
    while place < n:
        place += rng.geometric(0.12)
        length = rng.geometric(0.3)
        found[place : place + length] += rng.choice([-1, 1]) * 5 * rng.random()
        place += length
    return found


NOISE = {
    "independent": lambda rng, n: rng.normal(0, 1, n),
    "heavy tails": lambda rng, n: rng.standard_t(2, n),
    "correlated 0.3": correlated(0.3),
    "correlated 0.5": correlated(0.5),
    "bursts": bursts,
    "drift": lambda rng, n: rng.normal(0, 1, n) + np.linspace(-0.5, 0.5, n) * rng.choice([-1, 1]),
}


def rounds_of(noise, rng, n, gain=1.0):
    """Times of two contenders whose log ratio is noise, on a machine that others disturb alike."""
    common = np.exp(0.2 * rng.normal(0, 1, n))
    return gain * common * np.exp(0.02 * noise(rng, n)), common


@pytest.mark.parametrize("name", NOISE)
def test_equal_contenders_are_seldom_shown_to_be_faster_however_often_one_looks(name):
    rng = np.random.default_rng(5)
    faster = 0
    for _ in range(200):
        slow, fast = rounds_of(NOISE[name], rng, LOOKS * ROUNDS)
        for look in range(1, LOOKS + 1):
            ratio = ratio_of(slow[: look * ROUNDS], fast[: look * ROUNDS], looks=LOOKS)
            if ratio.verdict == "faster" or ratio.value <= 1:
                faster += ratio.verdict == "faster"
                break
    assert faster <= 0.025 * 200


@pytest.mark.parametrize("name", NOISE)
def test_equal_contenders_are_seldom_shown_to_differ(name):
    rng = np.random.default_rng(6)
    ratios = [ratio_of(*rounds_of(NOISE[name], rng, 30)) for _ in range(200)]
    assert sum(ratio.verdict != "no difference shown" for ratio in ratios) <= 0.05 * 200


@pytest.mark.parametrize(("gain", "most"), [(1.03, 36), (1.1, 18), (1.3, 9)])
def test_a_gain_is_shown_in_few_rounds(gain, most):
    rng = np.random.default_rng(7)
    shown = 0
    for _ in range(50):
        slow, fast = rounds_of(NOISE["independent"], rng, most, gain=gain)
        shown += ratio_of(slow, fast, looks=LOOKS).verdict == "faster"
    assert shown >= 45


@settings(deadline=None)
@given(st.integers(3, 40), st.integers(0, 1000))
def test_a_ratio_lies_in_its_interval_and_turns_over_with_its_contenders(n, seed):
    rng = np.random.default_rng(seed)
    slow, fast = rng.lognormal(0, 0.3, n), rng.lognormal(0, 0.3, n)
    there, back = ratio_of(slow, fast), ratio_of(fast, slow)
    assert there.low <= there.value <= there.high
    turned = 1 / back.low, 1 / back.value, 1 / back.high
    assert turned == pytest.approx((there.high, there.value, there.low))
    assert there.rounds == n


def test_more_looks_and_more_intervals_make_each_wider():
    rng = np.random.default_rng(0)
    slow, fast = rounds_of(NOISE["independent"], rng, 20)
    once, often = ratio_of(slow, fast), ratio_of(slow, fast, looks=2, together=3)
    assert often.low < once.low < once.high < often.high
    assert (often.looks, often.together) == (2, 3)
    assert ratio_of(slow, fast, looks=6).low == often.low


@pytest.mark.parametrize("n", [3, 4, 9])
def test_rounds_without_spread_are_equal_or_not(n):
    times = np.full(n, 3.0)
    assert ratio_of(times, times).verdict == "no difference shown"
    assert ratio_of(times * (1 + 1e-15), times).verdict == "no difference shown"
    assert ratio_of(2 * times, times).value == 2.0


def test_one_disturbed_round_shows_nothing():
    times = np.ones(9)
    disturbed = times.copy()
    disturbed[3] = 1e9
    assert ratio_of(disturbed, times).verdict == "no difference shown"
    assert ratio_of(times, disturbed).verdict == "no difference shown"


# ---------------------------------------------------------------- the formulas, from their sources


@settings(deadline=None)
@given(st.floats(-3, 3), st.floats(-2.5, 2.5), st.integers(2, 1000))
def test_halls_transformation_is_inverted(studentized, skewness, n):
    a = skewness / 3  # Hall (1992): x + a x² + a² x³ / 3 + skewness / (6 n)
    transformed = studentized + a * studentized**2 + a**2 * studentized**3 / 3 + a / (2 * n)
    found = statistics._halls_inverse(transformed, skewness, n)
    # Where the cubic is flat, rounding is magnified.
    assert found == pytest.approx(studentized, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("n", [3, 5, 20])
def test_of_symmetric_values_the_interval_of_a_mean_is_students(n):
    values = np.linspace(2, 4, n)
    expected = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    for unit in (1e-200, 1.0, 1e200):  # squares and cubes of which do not exist
        low, high, _ = mean_interval(unit * values, reach=1)
        assert (low / unit, high / unit) == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(3, 30), st.integers(0, 1000))
def test_the_interval_of_a_mean_is_the_farther_of_students_and_halls(n, seed):
    values = np.random.default_rng(seed).lognormal(0, 1, n)
    error = stats.sem(values)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), error)
    scale, t = error * np.sqrt(n), stats.t.ppf(0.975, n - 1) / np.sqrt(n)
    skewness = ((values - values.mean()) ** 3).mean() / scale**3
    halls = [values.mean() - scale * statistics._halls_inverse(s, skewness, n) for s in (t, -t)]
    expected = min(low, halls[0]), max(high, halls[1])
    assert mean_interval(values, reach=1)[:2] == pytest.approx(expected)


def test_more_than_500_differences_are_tested_by_students_t():
    differences = np.random.default_rng(1).normal(0.03, 1, 501)
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert sign_flip_test(differences) == (pytest.approx(expected), "paired t test")
    assert sign_flip_test(differences[:500])[1] == "sign-flip test, 9,999 draws"


def test_up_to_15_differences_are_tested_with_all_their_signs():
    differences = np.random.default_rng(2).normal(0.3, 1, 16)
    assert sign_flip_test(differences[:15])[1] == "exact sign-flip test"
    assert sign_flip_test(differences)[1] == "sign-flip test, 9,999 draws"


def test_of_drawn_signs_the_true_ones_are_one_more():
    # Forty differences of one sign: no draw of 9,999 is as far from zero.
    assert sign_flip_test(np.linspace(1, 2, 40))[0] == 1 / 10_000


@pytest.mark.parametrize("pairs", [2, 6, 20])
def test_a_mean_of_zero_is_as_likely_as_can_be(pairs):
    values = np.random.default_rng(pairs).integers(1, 99, pairs).astype(float)
    assert sign_flip_test(np.concatenate([values, -values]))[0] == 1


def test_the_seed_of_signs_and_rounds_is_0_and_counts():
    rng = np.random.default_rng(3)
    values = rng.normal(0.1, 1, 40)
    assert (
        sign_flip_test(values) == sign_flip_test(values, seed=0) != sign_flip_test(values, seed=1)
    )
    slow, fast = rounds_of(NOISE["independent"], rng, 20)
    assert ratio_of(slow, fast) == ratio_of(slow, fast, seed=0) != ratio_of(slow, fast, seed=1)


RHOS = st.floats(0.02, 0.9)


@settings(deadline=None)
@given(RHOS, st.integers(1, 40))
def test_blocks_see_of_correlation_what_a_sum_of_so_many_does(rho, length):
    lags = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    assert statistics._longrun(rho, length) == pytest.approx((rho**lags).sum() / length)


@settings(deadline=None)
@given(RHOS)
def test_long_blocks_see_all_of_correlation(rho):
    lengths = np.array([1000, 2000])
    first, second = (statistics._longrun(rho, int(length)) for length in lengths)
    limit = 2 * second - first  # what is missing goes with one over the length
    assert statistics._longrun(rho) == pytest.approx(limit, rel=1e-6)


@settings(deadline=None)
@given(RHOS, st.integers(30, 3000))
def test_blocks_are_as_long_as_politis_and_white_say(rho, n):
    lags = np.arange(-2000, 2001)
    autocovariances = rho ** np.abs(lags)
    g = (np.abs(lags) * autocovariances).sum()
    d = 4 / 3 * autocovariances.sum() ** 2  # of the circular bootstrap
    expected = (2 * g**2 / d * n) ** (1 / 3)
    length = statistics._block_length(rho, n)
    if length < n // 3:
        assert expected - 1e-6 <= length < expected + 1 + 1e-6
    else:
        assert length == n // 3 <= expected + 1


@pytest.mark.parametrize("n", [1, 2, 3, 100])
def test_independent_rounds_are_resampled_one_by_one(n):
    assert statistics._block_length(0.0, n) == 1


@pytest.mark.parametrize(("n", "length"), [(3, 1), (4, 2), (5, 3)])
def test_the_error_of_a_median_is_that_over_all_resamples(monkeypatch, n, length):
    monkeypatch.setattr(statistics, "RESAMPLES", 100_000)
    logs = np.array([0.0, 5.0, 1.0, 3.0, 9.0])[:n]
    medians = []
    for starts in itertools.product(range(n), repeat=-(-n // length)):
        places = [(start + step) % n for start in starts for step in range(length)][:n]
        medians.append(np.median(logs[places]))
    found = statistics._median_error(logs, length, 0)
    assert found == pytest.approx(np.std(medians), rel=0.01)


@pytest.mark.parametrize(("looks", "together"), [(1, 1), (4, 1), (2, 3)])
def test_of_independent_rounds_the_interval_is_students(monkeypatch, looks, together):
    n, error = 9, 0.01
    monkeypatch.setattr(statistics, "_autocorrelation", lambda logs: 0.0)
    monkeypatch.setattr(statistics, "_median_error", lambda logs, length, seed: error)
    # The bootstrap divides by n; as everywhere, n - 1 makes it unbiased.
    unbiased = error * np.sqrt(n / (n - 1))
    reach = stats.t.ppf(1 - 0.025 / (looks * together), n - 1) * unbiased
    options = {} if (looks, together) == (1, 1) else {"looks": looks, "together": together}
    found = ratio_of(np.full(n, 3.0), np.ones(n), **options)
    assert (found.low, found.high) == pytest.approx((3 * np.exp(-reach), 3 * np.exp(reach)))


def test_two_rounds_give_an_interval():
    found = ratio_of(np.array([2.0, 2.2]), np.array([1.0, 1.0]))
    assert found.low < found.value < found.high


def test_times_however_far_apart_give_a_finite_interval():
    slow = np.array([1e-150, 1e150, 1e-150, 1e150, 1e-150, 1e150, 1.0])
    found = ratio_of(slow, np.ones(7))
    assert 0 < found.low < found.value < found.high < np.inf


@settings(deadline=None)
@given(st.integers(6, 60), st.integers(0, 1000), st.floats(0.1, 10), st.floats(-5, 5))
def test_the_autocorrelation_is_of_the_shape_of_the_rounds_alone(n, seed, scale, shift):
    logs = np.random.default_rng(seed).normal(0, 1, n).cumsum()
    found = statistics._autocorrelation(logs)
    assert 0 <= found <= 0.9
    assert statistics._autocorrelation(scale * logs + shift) == pytest.approx(found, abs=1e-9)
    assert statistics._autocorrelation(logs[::-1]) == pytest.approx(found, abs=1e-9)


def test_of_few_rounds_the_autocorrelation_is_right_on_average(monkeypatch):
    """But for the standard error that is added to it."""
    rho, n = 0.4, 40
    rng = np.random.default_rng(0)
    draw = correlated(rho)
    samples = [draw(rng, n + 20)[20:] for _ in range(5000)]
    safe = [statistics._autocorrelation(logs) for logs in samples[:50]]
    monkeypatch.setattr(statistics, "SAFE", 0.0)
    found = [statistics._autocorrelation(logs) for logs in samples]
    assert np.mean(found) == pytest.approx(rho, abs=0.007)
    wanted = np.clip(np.array(found[:50]) + 1 / np.sqrt(n), 0, 0.9)
    assert np.array(safe)[np.array(found[:50]) > 0] == pytest.approx(
        wanted[np.array(found[:50]) > 0]
    )


@pytest.mark.parametrize("n", [1, 2, 5])
def test_of_fewer_than_six_rounds_no_autocorrelation_is_found(n):
    assert statistics._autocorrelation(np.arange(float(n))) == 0
    assert statistics._autocorrelation(np.arange(6.0)) > 0  # of six it is
    assert statistics._autocorrelation(np.ones(6)) == 0


def test_a_round_far_out_does_not_hide_the_autocorrelation_of_the_others():
    logs = np.sin(np.arange(60) / 5)
    disturbed = logs.copy()
    disturbed[30] = 1e6
    assert statistics._autocorrelation(disturbed) == pytest.approx(0.9, abs=0.1)


def test_more_of_equal_rounds_than_half_still_show_an_autocorrelation():
    """Their median distance is then 0: nothing is clipped to it."""
    logs = np.repeat([0.0, 1.0, 0.0, 0.0], 10)
    assert statistics._autocorrelation(logs) > 0.8
