"""Figures with their intervals, as benchmarks keep them and as their tables show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onebyone.core.records import Difference, Metric


def interval(measured: Metric | Difference | Any) -> list[float]:
    """Return a value and its 95 % interval."""
    return [measured.value, measured.low, measured.high]


def percent(values: Sequence[float], *, signed: bool = False, negated: bool = False) -> str:
    """Return a share with its interval in percent, or a difference in points."""
    value, low, high = [-v for v in (values[0], values[2], values[1])] if negated else values
    form = "{:+.2f}" if signed else "{:.2f}"
    shown, least, most = (form.format(100 * each).replace("-", "−") for each in (value, low, high))
    return f"{shown} {'points ' if signed else '% '}[{least} … {most}]"


def speed(row: Mapping[str, Any]) -> str:
    """Return a row's ``ms``, and how many times faster it is, if ``faster`` says so."""
    text = f"{row['ms']:.2f} ms"
    if row["faster"]:
        text += ", {:.2f}× [{:.2f}–{:.2f}]".format(*row["faster"])
    return text
