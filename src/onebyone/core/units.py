"""Formats numbers with units, and parses them: 1_234_567 <-> "1.23 M"."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_SCALES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DIGITS = r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"
# ASCII digits only: a number must look like one to every reader.
_NUMBER = re.compile(_DIGITS + r"\s*([kKMGT]?)\s*\Z", re.ASCII)
_AMOUNT = re.compile(_DIGITS + r"\s*([a-zA-Zµμ]+)\s*\Z", re.ASCII)
_PERCENT = re.compile(r"\s*([+-]?)" + _DIGITS + r"\s*%\s*\Z", re.ASCII)


def format_count(count: float) -> str:
    """Format a count with three significant digits and a decimal prefix.

    Examples:
        >>> format_count(1_234_567), format_count(316_532), format_count(999)
        ('1.23 M', '317 k', '999')
    """
    if abs(count) < 1000:
        return f"{count:.0f}"
    for prefix, scale in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        scaled = count / scale
        if abs(scaled) < 999.5 or prefix == "T":
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f} {prefix}"
    raise AssertionError("unreachable")


def format_ms(ms: float) -> str:
    """Format milliseconds with three significant digits and the unit that reads best.

    Examples:
        >>> format_ms(0.0123), format_ms(1.5), format_ms(33.14), format_ms(12_000)
        ('12.3 µs', '1.50 ms', '33.1 ms', '12.0 s')
    """
    value, unit = ms / 1e3, "s"
    if ms < 0.9995:
        value, unit = ms * 1e3, "µs"
    elif ms < 9999.5:
        value, unit = ms, "ms"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_bytes(count: float) -> str:
    """Format bytes with a decimal prefix: ``1_270_000`` is ``1.27 MB``."""
    return f"{format_count(count)}B" if count >= 1000 else f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Format a duration for people: ``75`` is ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_percent(fraction: float, digits: int = 1) -> str:
    """Format a fraction as a percentage: ``0.915`` is ``91.5 %``."""
    return f"{100 * fraction:.{digits}f} %"


def format_points(difference: float, digits: int = 2) -> str:
    """Format a difference of two fractions in percentage points, with its sign."""
    return f"{100 * difference:+.{digits}f}".replace("-", "−")


def format_ratio(ratio: float) -> str:
    """Format a factor: ``2.3×``."""
    digits = 0 if abs(ratio) >= 99.5 else 1 if abs(ratio) >= 9.95 else 2
    return f"{ratio:.{digits}f}×"


def capitalized(text: str) -> str:
    """Return text with a capital first letter, unless its first word has capitals already.

    Examples:
        >>> capitalized("accuracy of both"), capitalized("mIoU of both")
        ('Accuracy of both', 'mIoU of both')
    """
    first = text.split(maxsplit=1)[:1]
    return text if first and first[0] != first[0].lower() else text[:1].upper() + text[1:]


def plural(count: int, noun: str) -> str:
    """Return a number with its noun: ``1 thread``, ``2 threads``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def parse_count(text: str) -> int | None:
    """Read ``"20M"``, ``"1.5k"``, ``"1e6"`` or ``"4232"``; ``None`` if the text is not a count."""
    match = _NUMBER.match(text)
    if match is None:
        return None
    count = float(match[1]) * _SCALES[match[2]]
    return round(count) if math.isfinite(count) else None


def parse_ms(text: str) -> float | None:
    """Read ``"5ms"``, ``"0.8 s"`` or ``"250us"`` in milliseconds; ``None`` if it is not a time.

    Examples:
        >>> parse_ms("5ms"), parse_ms("0.5 s"), parse_ms("250us"), parse_ms("5")
        (5.0, 500.0, 0.25, None)
    """
    return _with_unit(text, {"s": 1e3, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "μs": 1e-3})


def parse_bytes(text: str) -> int | None:
    """Read ``"5MB"``, ``"1.5 GB"`` or ``"800000"`` in bytes; ``None`` if it is not a size.

    Examples:
        >>> parse_bytes("5MB"), parse_bytes("64 KiB"), parse_bytes("800000"), parse_bytes("5MW")
        (5000000, 65536, 800000, None)
    """
    decimal = {prefix + "B": scale for prefix, scale in _SCALES.items()}
    binary = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    value = _with_unit(text, {**decimal, **binary})
    return parse_count(text) if value is None else round(value)


def _with_unit(text: str, units: Mapping[str, float]) -> float | None:
    match = _AMOUNT.match(text)
    if match is None or match[2] not in units:
        return None
    amount = float(match[1]) * units[match[2]]
    return amount if math.isfinite(amount) else None


def parse_percent(text: str) -> float | None:
    """Read ``"60%"`` as 0.6; ``None`` if the text is not a percentage."""
    match = _PERCENT.match(text)
    if match is None:
        return None
    value = float(match[1] + match[2]) / 100
    return value if math.isfinite(value) else None
