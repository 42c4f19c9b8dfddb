"""Confidence intervals and tests, for means over examples and ratios over timing rounds."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from onebyone.core.records import Ratio

Array = NDArray[np.float64]

ERROR = 0.05  # of a 95 % interval
# Up to this many differences all combinations of signs are tried; for more, signs are drawn.
EXACT_SIGN_FLIPS = 15
SIGN_FLIPS = 9_999
# Above this many examples Student's t test is used, which then gives the same result.
MOST_FLIPPED = 500
RESAMPLES = 500
# Values that differ by less than this share count as equal: the difference is rounding.
EQUAL = 1e-12
# The number of standard errors added to the autocorrelation of rounds, to be safe.
SAFE = 1.0
# The ends of a ratio's interval are at most a factor of e to this away.
MOST_REACH = 300.0

# ---------------------------------------------------------------- means over examples


def share_interval(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (Wilson 1927).

    Examples:
        >>> low, high = share_interval(50, 100)
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    found = stats.binomtest(successes, n).proportion_ci(1 - ERROR, method="wilson")
    return float(found.low), float(found.high)


def mean_interval(values: Array, *, reach: float) -> tuple[float, float, str]:
    """Return the 95 % interval of a mean, and the method's name.

    Each end is the outer one of two intervals: Student's, and that of Hall (1992), which
    corrects for skewness. With 10 to 100 normal, uniform, exponential or log-normal values it
    covers the mean in at least 94, 94, 93 and 90 % of samples; the percentile bootstrap in 88, 92,
    86 and 80 %, BCa in 88, 93, 89 and 82 % (1,000 samples each).

    If all values are equal, their spread is unknown. But ``n`` examples are unlikely to miss a kind
    of example whose share is above ``1 - 0.025 ** (1 / n)`` (the "rule of three"). The interval
    assumes that such a share of examples has values ``reach`` away.

    Args:
        values: Shape ``(n,)``, at least one.
        reach: The assumed distance of unseen values from the mean, if all values are equal.
    """
    n, mean = len(values), float(values.mean())
    if is_constant(values):
        unseen = 1 - (ERROR / 2) ** (1 / n)
        return mean - unseen * reach, mean + unseen * reach, "equal values, rule of three"
    apart = values - mean
    scale = float(np.abs(apart).max())  # cubes of very small or large numbers under- or overflow
    unit = float(np.sqrt(((apart / scale) ** 2).sum() / (n - 1)))
    spread = scale * unit
    t = float(stats.t.ppf(1 - ERROR / 2, n - 1))
    skewness = float(((apart / scale) ** 3).mean()) / unit**3
    steps = [t / math.sqrt(n), -t / math.sqrt(n)]
    low, high = (
        mean - spread * pick(step, _halls_inverse(step, skewness, n))
        for step, pick in zip(steps, (max, min), strict=True)
    )
    return low, high, "Student's interval, widened for skewness (Hall 1992)"


def _halls_inverse(step: float, skewness: float, n: int) -> float:
    """Invert Hall's cubic transformation of the studentized mean, ``t / sqrt(n)``."""
    shifted = step - skewness / (6 * n)
    third = skewness / 3
    if abs(third) < 1e-6:  # the transformation is then the identity
        return shifted
    return float((np.cbrt(1 + 3 * third * shifted) - 1) / third)


def is_constant(values: Array) -> bool:
    """Whether all values are equal up to rounding; a single value is."""
    return float(np.ptp(values)) <= EQUAL * float(np.abs(values).max())


def sign_flip_test(differences: Array, *, seed: int = 0) -> tuple[float, str]:
    """Return the p-value of a mean of zero, by flipping signs, and the test's name.

    The values must be symmetric if their mean is zero. For up to ``EXACT_SIGN_FLIPS`` examples all
    signs are tried; so for two examples the p-value is at least 0.5.

    Args:
        differences: Shape ``(n,)``.
        seed: Random seed of the signs.
    """
    n = len(differences)
    if not differences.any():
        return 1.0, "exact sign-flip test"
    if is_constant(differences):  # only two patterns of signs reach as far
        return 2.0 ** (1 - n), "exact sign-flip test"
    if n > MOST_FLIPPED:
        return float(stats.ttest_1samp(differences, 0.0).pvalue), "paired t test"
    # scipy's permutation_test does the same, but takes seconds: it draws sample by sample.
    exact = n <= EXACT_SIGN_FLIPS
    if exact:
        signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(SIGN_FLIPS, n))
    extreme = int((np.abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-9)).sum())
    if exact:
        return extreme / 2**n, "exact sign-flip test"
    # The observed signs count as one of the draws (Phipson and Smyth 2010).
    return (extreme + 1) / (SIGN_FLIPS + 1), f"sign-flip test, {SIGN_FLIPS:,} draws"


# ---------------------------------------------------------------- ratios over rounds


def ratio_of(
    slow: Array, fast: Array, *, looks: int = 1, together: int = 1, seed: int = 0
) -> Ratio:
    """Return how many times faster ``fast`` is than ``slow``, with the 95 % interval.

    Every statement on speed comes from it: :attr:`Ratio.verdict` is ``faster`` if the interval is
    above 1.

    Rounds are not independent: a disturbance often affects several. So the standard error of the
    median log ratio comes from a circular block bootstrap. The blocks' length follows from the
    rounds' autocorrelation (Politis and White 2004, for an autoregressive process), and the
    interval's degrees of freedom from the number of blocks.

    Args:
        slow: Times, shape ``(rounds,)``.
        fast: Times of the same rounds.
        looks: The most times that the interval decides whether to continue. The error is divided
            equally among the looks (Bonferroni), which widens the interval.
        together: The number of intervals that are read together; widens each in the same way.
        seed: Random seed of the resampling.

    Examples:
        >>> rounds = np.array([1.0, 1.1, 0.9, 1.0, 1.05, 0.95])
        >>> ratio_of(2 * rounds, rounds).verdict
        'faster'
    """
    logs = np.log(np.asarray(slow) / np.asarray(fast))
    value = math.exp(float(np.median(logs)))  # of logs: the inverse ratio gives the inverse
    correlation = _autocorrelation(logs)
    length = _block_length(correlation, len(logs))
    blocks = len(logs) / length
    missed = _longrun(correlation) / _longrun(correlation, length)
    error = _median_error(logs, length, seed) * math.sqrt(missed * blocks / (blocks - 1))
    quantile = 1 - ERROR / 2 / (looks * together)
    reach = float(stats.t.ppf(quantile, blocks - 1)) * error
    factor = math.exp(min(max(reach, EQUAL), MOST_REACH))
    return Ratio(
        value=value,
        low=value / factor,
        high=value * factor,
        rounds=len(logs),
        looks=looks,
        together=together,
    )


def _median_error(logs: Array, length: int, seed: int) -> float:
    """Return the standard error of a median by a circular block bootstrap."""
    n = len(logs)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, n, size=(RESAMPLES, math.ceil(n / length)))
    picks = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :n] % n
    return float(np.median(logs[picks], axis=1).std(ddof=1))


def _longrun(correlation: float, length: int | None = None) -> float:
    """Return the factor by which correlation raises the variance of a mean, or of block means."""
    if length is None:
        return (1 + correlation) / (1 - correlation)
    lags = np.arange(1, length)
    return 1 + 2 * float(((1 - lags / length) * correlation**lags).sum())


def _block_length(correlation: float, n: int) -> int:
    """Return the number of rounds in a block."""
    if correlation == 0:
        return 1
    wanted = (1.5 * n) ** (1 / 3) * (2 * correlation / (1 - correlation**2)) ** (2 / 3)
    return int(np.clip(math.ceil(wanted), 1, n // 3))


def _autocorrelation(logs: Array) -> float:
    """Return the autocorrelation of neighboring rounds, at least 0, and rather too high."""
    n = len(logs)
    center = float(np.median(logs))
    # Clip outliers: a single call that took ten times as long would hide the correlation.
    most = 4.5 * float(np.median(np.abs(logs - center)))
    held = np.clip(logs, center - most, center + most) if most else logs
    apart = held - held.mean()
    total = float(apart @ apart)
    if n < 6 or total == 0:
        return 0.0
    seen = float(apart[1:] @ apart[:-1]) / total
    # With few rounds the estimate is too low by about (1 + 4 rho) / n: rho / n because it sums one
    # product fewer than squares, the rest after Marriott and Pope (1954).
    return float(np.clip((n * seen + 1) / (n - 4) + SAFE / math.sqrt(n), 0.0, 0.9))
