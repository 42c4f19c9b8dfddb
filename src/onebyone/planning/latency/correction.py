"""What milliseconds that layers save alone come to in the whole network, as it was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from onebyone.core.records import Ratio

# A network's saving is taken to be no less than this share of its layers': more never saves less.
LEAST_SHARE = 0.01
# Beyond the last network measured, times fall straight to this share of its own, then ever slower:
# no network takes no time.
TAIL = 0.25
STEEPEST = 30.0  # an exponent below which a time would round to none
# An interval narrower than this share of the original's time says no more than one so wide.
SURE = 0.01


@dataclass(frozen=True)
class _Point:
    alone_ms: float
    saved_ms: float
    weight: float


@dataclass(frozen=True)
class Worth:
    """A rising curve from what layers save by themselves to what the network saves.

    It starts at nothing for nothing, goes straight from one measured network to the next, and
    evens out measurements by which more would save less.

    Attributes:
        before_ms: The original's time, which savings stay below.
        measured: The networks measured.
    """

    before_ms: float
    measured: tuple[_Point, ...] = ()

    def learned(self, alone_ms: float, ratio: Ratio) -> Worth:
        """Return the curve that knows of one network more.

        Args:
            alone_ms: What its layers save by themselves; a network that saves nothing is no news.
            ratio: The original's time / the network's.
        """
        if alone_ms <= 0:
            return self
        saved = self.before_ms * (1 - 1 / ratio.value)
        width = max(1 / ratio.low - 1 / ratio.high, SURE)
        point = _Point(alone_ms, max(saved, LEAST_SHARE * alone_ms), width**-2)
        return replace(self, measured=(*self.measured, point))

    def saved(self, alone_ms: float) -> float:
        """Return what the network saves whose layers save so much by themselves."""
        alone, saved = self._knots()
        if alone_ms <= alone[-1]:
            return float(np.interp(alone_ms, alone, saved))
        left, share = self.before_ms - saved[-1], self._last_share()
        straight = left - share * (alone_ms - alone[-1])
        bent = TAIL * left
        if straight < bent:
            straight = bent * math.exp(max(straight / bent - 1, -STEEPEST))
        return float(self.before_ms - straight)

    def alone(self, saved_ms: float) -> float:
        """Return what layers must save by themselves for the network to save so much."""
        alone, saved = self._knots()
        if saved_ms <= saved[-1]:
            return float(np.interp(saved_ms, saved, alone))
        left, share = self.before_ms - saved[-1], self._last_share()
        bent, wanted = TAIL * left, self.before_ms - saved_ms
        straight = wanted if wanted >= bent else bent * (1 + math.log(wanted / bent))
        return float(alone[-1] + (left - straight) / share)

    def share(self, alone_ms: float) -> float:
        """Return what a millisecond is worth where layers save so many by themselves."""
        if alone_ms > 0:
            return self.saved(alone_ms) / alone_ms
        alone, saved = self._knots()
        return float(saved[1] / alone[1]) if len(alone) > 1 else 1.0

    def _last_share(self) -> float:
        alone, saved = self._knots()
        return float(saved[-1] / alone[-1]) if len(alone) > 1 else 1.0

    def _knots(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the curve's corners, of which both coordinates rise."""
        if not self.measured:
            return np.zeros(1), np.zeros(1)
        points = sorted(self.measured, key=lambda point: point.alone_ms)
        alone = np.array([point.alone_ms for point in points])
        weight = np.array([point.weight for point in points])
        saved = np.array([point.saved_ms for point in points])
        even = isotonic_regression(_of_equal(alone, saved, weight), weights=weight).x
        blocks = [even == level for level in np.unique(even)]
        corners = [float(np.average(alone[block], weights=weight[block])) for block in blocks]
        levels = [float(even[block][0]) for block in blocks]
        return np.array([0.0, *corners]), np.array([0.0, *levels])


def _of_equal(
    alone: NDArray[np.float64], saved: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return savings of which equal networks have the same, their mean."""
    means = {x: np.average(saved[alone == x], weights=weight[alone == x]) for x in np.unique(alone)}
    return np.array([means[x] for x in alone])
