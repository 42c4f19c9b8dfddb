"""Estimates the harm of every option from the measured harm of some of them.

The closed form predicts an option's harm from the error of its layer and from the curvature. The
prediction is wrong by a factor that depends on the site and grows with the error. The factor is
measured for some or all options of a site. A few examples make up most of its mean, so with few
examples it is mostly noise. It is therefore shrunk towards the mean factor of all sites (Morris
1983, "Parametric empirical Bayes inference").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The mean of all sites weighs as much as so many examples of a site itself. The logarithms of
# factors differ by about 0.5 between sites, and an example's divergence differs from the mean by
# about three times the mean.
PRIOR_EXAMPLES = 36
# A site with fewer measured options does not count in the mean of all sites.
FEWEST_FOR_CURVE = 4
# Harms below this share of the greatest are rounding. A user's own divergence may be in any unit.
LEAST = 1e-12


@dataclass(frozen=True)
class SiteHarms:
    """What is known of a site's options, in order of their predicted harm.

    Attributes:
        predicted: Of each option.
        measured: Place among the options -> the harm of that option, as measured.
    """

    predicted: Sequence[float]
    measured: Mapping[int, float]

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
    # In units of the greatest, so that what is rounding does not depend on the divergence's unit.
    predicted = _greatest(site.predicted for site in sites)
    measured = _greatest(site.measured.values() for site in sites)
    scaled = [_in_units(site, predicted, measured) for site in sites]
    return [[measured * harm for harm in harms] for harms in _pooled(scaled, examples)]


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
