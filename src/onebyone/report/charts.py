"""Charts as records: their data, a description in words, and a table of their numbers.

:func:`onebyone.report.html.chart` puts a chart into a page, where Observable Plot draws it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from onebyone.core.tables import Table
from onebyone.core.units import format_percent

Chart: TypeAlias = "LineChart | IntervalChart | ScatterChart"

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
    """An entry of a chart's legend: a line, or a dot."""

    name: str
    color: int
    dot: bool = False


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines over a common axis, such as learning curves.

    Attributes:
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        percent: Whether ``y`` is a fraction to show as a percentage.
        marks: Labelled positions on the horizontal axis.
        caption: A line below the chart: how the figures were measured.
        height: Height in pixels.
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
            "marks": [{"x": x, "label": label} for x, label in (self.marks or {}).items()],
            "series": [
                {"name": line.name, "color": line.color % COLORS, "points": _points(line)}
                for line in self.series
            ],
        }

    def table(self) -> Table:
        """Return a table of the numbers, with a row for each position on the horizontal axis."""
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
    """A value with its interval; a row of an :class:`IntervalChart`."""

    name: str
    value: float
    low: float
    high: float
    color: int = 0


@dataclass(frozen=True, kw_only=True)
class IntervalChart:
    """Values with their intervals, one in each row.

    Attributes:
        x: Name of the axis.
        percent: Whether the values are fractions to show as percentages.
        reference: A value that is marked by a dashed line, such as 1 for ratios.
        log: Whether the axis is logarithmic.
    """

    title: str
    x: str
    rows: tuple[Interval, ...]
    percent: bool = False
    log: bool = False
    reference: float | None = None
    caption: str = ""

    @property
    def keys(self) -> list[Key]:
        """The legend, which is empty: each row has its name."""
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
            "log": self.log,
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


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a :class:`ScatterChart`, with its intervals if given.

    Attributes:
        name: Its name in the legend and in the tooltip.
        label: Text beside it; may be empty.
        small: Whether it is small and has no entry in the legend.
    """

    name: str
    x: float
    y: float
    color: int = 0
    label: str = ""
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis of a :class:`ScatterChart` shows.

    Attributes:
        percent: Whether the values are fractions to show as percentages.
        log: Whether the axis is logarithmic.
        floor: On a logarithmic axis, the position of zero and of smaller values.
        signed: Whether values are differences, shown with their sign.
        reference: A value that is marked by a dashed line.
        unit: The unit shown after a value.
    """

    name: str
    percent: bool = False
    log: bool = False
    floor: float | None = None
    signed: bool = False
    reference: float | None = None
    unit: str = ""

    def text(self, value: float) -> str:
        """Return a value as text."""
        if self.signed:
            shown = f"{100 * value:+.2f}" if self.percent else f"{value:+.4g}"
            return shown.replace("-", "−") + self.unit
        return (format_percent(value, 1) if self.percent else f"{value:.3g}") + self.unit

    def place(self, value: float) -> float:
        """Return the position at which a value is drawn."""
        return value if self.floor is None else max(value, self.floor)


@dataclass(frozen=True, kw_only=True)
class ScatterChart:
    """Points in two quantities, and lines that join some: a trade-off."""

    title: str
    x: Axis
    y: Axis
    points: tuple[Point, ...]
    lines: tuple[Series, ...] = ()
    caption: str = ""
    height: int = 300

    @property
    def keys(self) -> list[Key]:
        """The legend."""
        named = [point for point in self.points if not point.small]
        lines = [Key(name=line.name, color=line.color % COLORS) for line in self.lines]
        return lines + [
            Key(name=point.name, color=point.color % COLORS, dot=True) for point in named
        ]

    @property
    def alternative(self) -> str:
        """The chart in words."""
        parts = [
            f"{point.name}: {self.x.text(point.x)}, {self.y.text(point.y)}"
            for point in self.points
            if not point.small
        ]
        parts += [
            f"{line.name}: {len(line.x)} points from {self.y.text(line.y[0])} at "
            f"{self.x.text(line.x[0])} to {self.y.text(line.y[-1])} at {self.x.text(line.x[-1])}"
            for line in self.lines
            if line.x
        ]
        return f"{self.title}, {self.y.name} against {self.x.name}. " + "; ".join(parts) + "."

    def data(self) -> dict[str, Any]:
        """Return what ``page.js`` draws; values that an axis cannot show are left out."""
        return {
            "kind": "scatter",
            "height": self.height,
            "x": self._axis(self.x),
            "y": self._axis(self.y),
            "lines": [
                {
                    "color": line.color % COLORS,
                    "points": [
                        [self.x.place(x), self.y.place(y), self._title(line.name, x, y)]
                        for x, y in zip(line.x, line.y, strict=True)
                        if self._drawable(x, y)
                    ],
                }
                for line in self.lines
            ],
            "points": [
                self._point(point) for point in self.points if self._drawable(point.x, point.y)
            ],
        }

    def table(self) -> Table:
        """Return a table of the numbers, with a row for each point."""
        both = [
            (line.name, x, y) for line in self.lines for x, y in zip(line.x, line.y, strict=True)
        ]
        rows = [[name, self.x.text(x), "", self.y.text(y), ""] for name, x, y in both]
        rows += [
            [
                point.name,
                self.x.text(point.x),
                _interval_text(self.x, point.x_interval),
                self.y.text(point.y),
                _interval_text(self.y, point.y_interval),
            ]
            for point in self.points
        ]
        columns = ["", f">{self.x.name}", ">interval", f">{self.y.name}", ">interval"]
        if not any(row[2] or row[4] for row in rows):
            columns, *rows = ([row[0], row[1], row[3]] for row in (columns, *rows))
        return Table(columns=tuple(columns), rows=rows, title=self.title)

    def _drawable(self, x: float, y: float) -> bool:
        # A logarithm has neither zero nor negative values.
        pairs = ((self.x, x), (self.y, y))
        return _finite((x, y)) and all(not a.log or a.place(value) > 0 for a, value in pairs)

    def _axis(self, axis: Axis) -> dict[str, Any]:
        return {
            "name": axis.name,
            "percent": axis.percent,
            "log": axis.log,
            "signed": axis.signed,
            "zero": axis.reference,
            "unit": axis.unit,
        }

    def _point(self, point: Point) -> dict[str, Any]:
        drawn: dict[str, Any] = {
            "x": self.x.place(point.x),
            "y": self.y.place(point.y),
            "color": point.color % COLORS,
            "title": self._title(point.name, point.x, point.y),
            "label": point.label,
            "small": point.small,
        }
        for name, interval in (("xi", point.x_interval), ("yi", point.y_interval)):
            if interval is not None and _finite(interval):
                drawn[name] = list(interval)
        return drawn

    def _title(self, name: str, x: float, y: float) -> str:
        return f"{name}\n{self.x.name}: {self.x.text(x)}\n{self.y.name}: {self.y.text(y)}"


def _interval_text(axis: Axis, interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{axis.text(interval[0])} … {axis.text(interval[1])}"


def _points(line: Series) -> list[list[float]]:
    bands = (line.low, line.high) if line.low is not None and line.high is not None else ()
    return [list(point) for point in zip(line.x, line.y, *bands, strict=True) if _finite(point)]


def _finite(point: Sequence[float]) -> bool:
    return all(map(math.isfinite, point))
