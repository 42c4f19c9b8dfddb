"""Grids of activations: from minimum to maximum, or by the least error of what reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from onebyone.quantizing.record import LEVELS, Grid
from onebyone.quantizing.simulate import on_grid

Error = Callable[[Tensor], float]

# Shares of a range that are tried: outliers are clipped where the finer steps are worth more.
_COARSE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.45)
_FINE = (1.05, 0.95)
_SMALLEST = 1e-30  # of a scale: its product with a weight's must be a normal number


def grid_between(low: float, high: float) -> Grid:
    """Return the grid from ``low`` to ``high``, widened so that it holds zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(float(np.float32((high - low) / LEVELS)), _SMALLEST)
    return Grid(scale=scale, zero_point=int(min(max(round(-low / scale), 0), LEVELS)))


def min_max_grid(x: Tensor) -> Grid:
    """Return the grid from the smallest to the largest value."""
    low, high = x.aminmax()
    return grid_between(float(low), float(high))


def best_grid(x: Tensor, error: Error, *, widest: Tensor | None = None) -> Grid:
    """Return the grid with the least error: both ends are moved inwards, together and apart.

    Args:
        x: Values that are to be rounded.
        error: Of ``x`` rounded, in whatever counts.
        widest: More values, whose ends are begun with; ``x`` by default.
    """
    ends = (x if widest is None else widest).aminmax()
    low, high = min(float(ends.min), 0.0), max(float(ends.max), 0.0)
    if low == high:
        return grid_between(low, high)
    seen: dict[tuple[float, float], float] = {}

    def tried(ends: tuple[float, float]) -> float:
        if ends not in seen:
            seen[ends] = error(on_grid(x, grid_between(*ends)))
        return seen[ends]

    best = min(((low * share, high * share) for share in _COARSE), key=tried)
    best = min(_around(best, low, high), key=tried)
    return grid_between(*best)


def _around(ends: tuple[float, float], low: float, high: float) -> Iterator[tuple[float, float]]:
    """Yield ranges near one, each end moved by itself, within the values."""
    yield ends
    for share in _FINE:
        if ends[0]:
            yield max(ends[0] * share, low), ends[1]
        if ends[1]:
            yield ends[0], min(ends[1] * share, high)
    if ends[0] and ends[1]:
        for share in (0.5, 0.75):
            yield ends[0] * share, ends[1]
            yield ends[0], ends[1] * share
