"""The harm of every option from a few measured ones, each site's with what all sites tell.

The closed form predicts an option's harm from the error of its layer and from the curvature, and
errs by a factor that depends on the site and grows with the error. That factor is measured for a
few options of each site, on examples of which a few make up most of the mean: with few examples, of
one site alone, it is mostly noise. It is drawn towards what the factor is at all sites together
(Morris 1983, "Parametric empirical Bayes inference").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# What all sites tell of a factor weighs as much as so many examples of the site itself: from one
# site to another factors differ by about 0.5 in their logarithms, and an example's divergence from
# the mean by three times the mean.
PRIOR_EXAMPLES = 36
# Harms below this are rounding.
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

    Between the measured options the factor by which the prediction errs is interpolated; more error
    is never less harm.

    Args:
        sites: Each with at least one measured option.
        examples: On which they were measured.
    """
    if not sites:
        return []
    most = max(len(site.measured) for site in sites)
    full = [site for site in sites if len(site.measured) == most]
    common = np.mean([site.factors for site in full], axis=0)
    weight = examples / (examples + PRIOR_EXAMPLES)
    found = []
    for site in sites:
        expected = np.interp(site.positions, full[0].positions, common)
        found.append(_harms(site, expected + weight * (site.factors - expected)))
    return found


def _harms(site: SiteHarms, factors: Array) -> list[float]:
    predicted = _log(site.predicted)
    known = predicted[site.places]
    # Noise of the measurement is evened out.
    harms = np.maximum.accumulate(known + factors)
    return [float(harm) for harm in np.exp(np.interp(predicted, known, harms))]
