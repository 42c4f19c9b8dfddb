"""Charts as records: what is drawn, what it says in words, and the table of its numbers.

:func:`onebyone.report.html.chart` puts one into a page, where Observable Plot draws it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onebyone.tables import Table
from onebyone.units import format_percent

COLORS = 6  # --s0 … --s5 in page.css


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: ``y`` over ``x``, with a band from ``low`` to ``high`` if given.

    Attributes:
        color: Which of the page's six series colors.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    color: int = 0


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of a chart's legend."""

    name: str
    color: int


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines over a common axis, such as learning curves.

    Attributes:
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        percent: Whether ``y`` is a fraction to show as a percentage.
        marks: Places on the horizontal axis that carry a label.
        caption: A line beneath; how the figures were obtained.
        height: In pixels.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    percent: bool = False
    marks: Mapping[float, str] | None = None
    caption: str = ""
    height: int = 240

    @property
    def keys(self) -> list[Key]:
        """The legend."""
        return [Key(name=line.name, color=line.color % COLORS) for line in self.series]

    @property
    def alternative(self) -> str:
        """The chart in words: where each line starts and ends."""
        parts = [
            f"{line.name}: from {self._text(line.y[0])} to {self._text(line.y[-1])}"
            for line in self.series
            if line.y
        ]
        return f"{self.title}, {self.y} over {self.x}. " + "; ".join(parts) + "."

    def data(self) -> dict[str, Any]:
        """Return what ``page.js`` draws; values that are not finite are left out."""
        return {
            "kind": "lines",
            "x": self.x,
            "y": self.y,
            "percent": self.percent,
            "height": self.height,
            "xTicks": len({x for line in self.series for x in line.x}),
            "marks": [{"x": x, "label": label} for x, label in (self.marks or {}).items()],
            "series": [
                {"name": line.name, "color": line.color % COLORS, "points": _points(line)}
                for line in self.series
            ],
        }

    def table(self) -> Table:
        """Return the numbers, a line for each place on the horizontal axis."""
        lines = [dict(zip(line.x, line.y, strict=True)) for line in self.series]
        rows = [
            [f"{x:g}", *(self._text(line[x]) if x in line else "–" for line in lines)]
            for x in sorted({x for line in lines for x in line})
        ]
        columns = (self.x, *(f">{line.name}" for line in self.series))
        return Table(columns=columns, rows=rows, title=self.title)

    def _text(self, value: float) -> str:
        return format_percent(value, 2) if self.percent else f"{value:.4g}"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its interval: a row of an :class:`IntervalChart`."""

    name: str
    value: float
    low: float
    high: float
    color: int = 0


@dataclass(frozen=True, kw_only=True)
class IntervalChart:
    """Values with their intervals, a row each.

    Attributes:
        x: Name of the axis.
        percent: Whether the values are fractions to show as percentages.
        reference: A value that is marked by a dashed line, such as 1 for ratios.
    """

    title: str
    x: str
    rows: tuple[Interval, ...]
    percent: bool = False
    reference: float | None = None
    caption: str = ""

    @property
    def keys(self) -> list[Key]:
        """No legend: each row has its name."""
        return []

    @property
    def alternative(self) -> str:
        """The chart in words."""
        parts = [
            f"{row.name} {self._text(row.value)}, "
            f"interval {self._text(row.low)} to {self._text(row.high)}"
            for row in self.rows
        ]
        return f"{self.title}, {self.x}. " + "; ".join(parts) + "."

    def data(self) -> dict[str, Any]:
        """Return what ``page.js`` draws; rows that are not finite are left out."""
        return {
            "kind": "intervals",
            "x": self.x,
            "percent": self.percent,
            "zero": self.reference,
            "rows": [
                [row.name, row.value, row.low, row.high, row.color % COLORS]
                for row in self.rows
                if all(map(math.isfinite, (row.value, row.low, row.high)))
            ],
        }

    def table(self) -> Table:
        """Return the numbers."""
        rows = [
            [row.name, self._text(row.value), self._text(row.low), self._text(row.high)]
            for row in self.rows
        ]
        return Table(columns=("", f">{self.x}", ">low", ">high"), rows=rows, title=self.title)

    def _text(self, value: float) -> str:
        return format_percent(value, 2) if self.percent else f"{value:.4g}"


def _points(line: Series) -> list[list[float]]:
    bands = (line.low, line.high) if line.low is not None and line.high is not None else ()
    return [list(point) for point in zip(line.x, line.y, *bands, strict=True) if _finite(point)]


def _finite(point: tuple[float, ...]) -> bool:
    return all(map(math.isfinite, point))
