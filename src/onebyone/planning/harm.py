"""Estimates the harm of every option from the measured harm of some of them.

Of each measured option there is the divergence, which on a few examples is mostly chance, and the
divergence at a higher temperature, which is not. A curve through all measured options leads from
the second to the first. What it gives for an option and the divergence as measured are averaged, by
how much of the latter is chance.

The closed form predicts an option's harm from the error of its layer and from the curvature. The
prediction is wrong by a factor that depends on the site and grows with the error. The factor is
measured for some or all options of a site. A few examples make up most of its mean, so with few
examples it is mostly noise. It is therefore shrunk towards the mean factor of all sites (Morris
1983, "Parametric empirical Bayes inference").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The mean of all sites weighs as much as so many examples of a site itself. The logarithms of
# factors differ by about 0.5 between sites, and an example's softened divergence differs from the
# mean by about 1.6 times the mean.
PRIOR_EXAMPLES = 12
# A site with fewer measured options does not count in the mean of all sites.
FEWEST_FOR_CURVE = 4
# Measured options that a curve of each degree needs at least, and its least slope: a greater
# softened divergence is a greater harm.
FEWEST_FOR_SLOPE, FEWEST_FOR_BEND = 6, 12
LEAST_SLOPE = 0.25
# Logarithms of harms scatter by so much about the curve.
CURVE_ERROR = 0.2
# Harms below this share of the greatest are rounding. A user's own divergence may be in any unit.
LEAST = 1e-12


class Measured(NamedTuple):
    """What replacing a module did to the outputs.

    Attributes:
        softened: Their divergence at a higher temperature.
        divergence: Their divergence itself.
        chance: Standard error of that, relative to it.
    """

    softened: float
    divergence: float
    chance: float = 0.0


@dataclass(frozen=True)
class SiteHarms:
    """What is known of a site's options, in order of their predicted harm.

    Attributes:
        predicted: Of each option.
        measured: Place among the options -> the harm of that option, as measured.
        softened: The same at a higher temperature; none if harms are to be taken as measured.
        chance: Relative standard errors of what was measured.
    """

    predicted: Sequence[float]
    measured: Mapping[int, float]
    softened: Mapping[int, float] = field(default_factory=dict)
    chance: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, predicted: Sequence[float], measured: Mapping[int, Measured]) -> SiteHarms:
        """Return what is known of a site's options.

        Args:
            predicted: Of each option.
            measured: Place among the options -> what that option did.
        """
        return cls(
            predicted,
            {place: each.divergence for place, each in measured.items()},
            {place: each.softened for place, each in measured.items()},
            {place: each.chance for place, each in measured.items()},
        )

    @property
    def places(self) -> list[int]:
        """The options that were measured."""
        return sorted(self.measured)

    @property
    def positions(self) -> Array:
        """Where they stand: from 0, the best, to 1, the worst."""
        return np.linspace(0, 1, len(self.measured))

    @property
    def factors(self) -> Array:
        """Measured by predicted harm, as logarithms, of each of them."""
        measured = [self.measured[place] for place in self.places]
        return _log(measured) - _log(self.predicted)[self.places]


def places_to_measure(options: int, count: int) -> list[int]:
    """Return which options of a site are measured: the best, the worst, and between them.

    Args:
        options: That the site has, in order of their predicted harm.
        count: How many are measured, at most; at least two. With one alone, an
            option that removes channels which the network needs would go unnoticed.
    """
    spots = np.linspace(0, options - 1, min(count, options)).round().astype(int)
    return sorted({int(spot) for spot in spots})


def _log(harms: Sequence[float]) -> Array:
    logarithms: Array = np.log(np.maximum(np.asarray(harms, dtype=float), LEAST))
    return logarithms


def pooled_harms(sites: Sequence[SiteHarms], examples: int) -> list[list[float]]:
    """Return the harm of every option of every site.

    Between the measured options the factor by which the prediction errs is interpolated.

    Args:
        sites: Each with at least one measured option.
        examples: On which they were measured.
    """
    if not sites:
        return []
    sites = smoothed(sites)
    # In units of the greatest, so that what is rounding does not depend on the divergence's unit.
    predicted = _greatest(site.predicted for site in sites)
    measured = _greatest(site.measured.values() for site in sites)
    scaled = [_in_units(site, predicted, measured) for site in sites]
    return [[measured * harm for harm in harms] for harms in _pooled(scaled, examples)]


def smoothed(sites: Sequence[SiteHarms]) -> list[SiteHarms]:
    """Return sites with the harm of each measured option, of which less is chance.

    The curve from softened divergences to harms is a parabola in logarithms, through the measured
    options of all sites.
    """
    pairs = [
        (site.softened[place], harm)
        for site in sites
        if site.softened
        for place, harm in site.measured.items()
    ]
    if all(math.isclose(*pair, rel_tol=1e-9) for pair in pairs):
        return list(sites)  # the task knows no temperature
    softened, harms = zip(*pairs, strict=True)
    units = _greatest([softened]), _greatest([harms])
    curve = _curve(
        _log([each / units[0] for each in softened]), _log([each / units[1] for each in harms])
    )
    return [_on_curve(site, curve, units) for site in sites]


def _on_curve(
    site: SiteHarms, curve: Callable[[Array], Array], units: tuple[float, float]
) -> SiteHarms:
    """Return a site with harms between those of the curve and those that were measured."""
    places = list(site.softened)
    if not places:
        return site
    expected = curve(_log([site.softened[place] / units[0] for place in places]))
    found = _log([site.measured[place] / units[1] for place in places])
    chance = np.array([site.chance[place] for place in places])
    weight = CURVE_ERROR**2 / (CURVE_ERROR**2 + chance**2)
    harms = units[1] * np.exp(expected + weight * (found - expected))
    return replace(site, measured=dict(zip(places, map(float, harms), strict=True)))


def _curve(softened: Array, harms: Array) -> Callable[[Array], Array]:
    """Return a rising curve through logarithms of harms, of at most the second degree."""
    degree = (len(softened) >= FEWEST_FOR_SLOPE) + (len(softened) >= FEWEST_FOR_BEND)
    ends = np.array([softened.min(), softened.max()])
    while degree and ends[0] < ends[1]:
        found = np.polynomial.Polynomial.fit(softened, harms, degree)
        if float(found.deriv()(ends).min()) >= LEAST_SLOPE:
            return found
        degree -= 1
    shift = float(np.mean(harms - softened))
    return lambda logarithms: logarithms + shift


def _greatest(harms: Iterable[Iterable[float]]) -> float:
    return max((h for each in harms for h in each if math.isfinite(h) and h > 0), default=1.0)


def _in_units(site: SiteHarms, predicted: float, measured: float) -> SiteHarms:
    return SiteHarms(
        [harm / predicted for harm in site.predicted],
        {place: harm / measured for place, harm in site.measured.items()},
    )


def _pooled(sites: Sequence[SiteHarms], examples: int) -> list[list[float]]:
    fewest = min(FEWEST_FOR_CURVE, max(len(site.measured) for site in sites))
    curves = [site for site in sites if len(site.measured) >= fewest]
    points = np.unique(np.concatenate([site.positions for site in curves]))
    common = np.mean([np.interp(points, each.positions, each.factors) for each in curves], axis=0)
    weight = examples / (examples + PRIOR_EXAMPLES)
    found = []
    for site in sites:
        expected = np.interp(site.positions, points, common)
        found.append(_harms(site, expected + weight * (site.factors - expected)))
    return found


def _harms(site: SiteHarms, factors: Array) -> list[float]:
    predicted = _log(site.predicted)
    known = predicted[site.places]
    harms = np.interp(predicted, known, known + factors)
    # Options that predict the same harm may do harm of their own.
    harms[site.places] = known + factors
    return [float(harm) for harm in np.exp(harms)]
