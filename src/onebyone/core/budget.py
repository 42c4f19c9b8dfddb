"""Budgets as text, such as ``latency=5ms`` or ``macs=50%``, parsed into upper bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from onebyone.core.errors import BudgetError, UnknownNameError
from onebyone.core.records import COUNTED, Budget, Cost, Quantity
from onebyone.core.units import parse_bytes, parse_count, parse_ms, parse_percent

EXAMPLES = "`latency=5ms`, `macs=50%`, `params=20k`, `size=2MB`, `memory=8MB`"

Parse = Callable[[str], float | None]
# How an amount is parsed, and the forms that an error names.
_AMOUNTS: dict[Quantity, tuple[Parse, str]] = {
    "params": (parse_count, "a percentage or a number, such as `params=20k`"),
    "macs": (parse_count, "a percentage or a number, such as `macs=50%`"),
    "latency": (parse_ms, "a percentage or a time with its unit, such as `latency=5ms`"),
    "size": (parse_bytes, "a percentage or a number of bytes, such as `size=2MB`"),
    "memory": (parse_bytes, "a percentage or a number of bytes, such as `memory=8MB`"),
}
# A total so large that any percentage of it is above zero.
_ENDLESS = 1e15
# More than any network costs, and a whole number that every file format can hold.
_MOST = 1e18
# A bare number up to this is taken for a percentage without its sign, if it is less than a
# hundredth of the network's cost.
_PERCENT_AT_MOST = 100
# The number of characters of the input that an error shows.
_SHOWN = 60


def parse_budgets(
    texts: str | Iterable[str], before: Cost, *, memory_bytes: int | None = None
) -> tuple[Budget, ...]:
    """Read budgets such as ``"macs=50%"``; several may be separated by commas.

    Args:
        texts: One text, or several.
        before: The network's cost, which percentages refer to. It needs milliseconds if latency
            may be bounded.
        memory_bytes: Memory of the network's weights and peak activations, if memory may be
            bounded.

    Raises:
        BudgetError: If a budget cannot be read, is not above zero, or is given twice.
        UnknownNameError: If there is no such quantity.
    """
    totals: dict[Quantity, float | None] = {
        "params": before.params,
        "macs": before.macs,
        "latency": before.ms,
        "size": before.bytes,
        "memory": memory_bytes,
    }
    budgets = _read(texts, totals)
    for budget in budgets:
        _check_meant(budget, totals[budget.quantity])
    return budgets


def check_budgets(texts: str | Iterable[str]) -> frozenset[Quantity]:
    """Check that budgets can be read, before the network's cost is known.

    Returns:
        The quantities that they bound.

    Raises:
        BudgetError: As :func:`parse_budgets`.
        UnknownNameError: As :func:`parse_budgets`.
    """
    read = _read(texts, dict.fromkeys(_AMOUNTS, _ENDLESS))
    return frozenset(budget.quantity for budget in read)


def counted_budgets(texts: str | Iterable[str], before: Cost) -> tuple[Budget, ...]:
    """Read the budgets that need no measurement: those of MACs, parameters and bytes of weights.

    Args:
        texts: As for :func:`parse_budgets`.
        before: The network's cost, which percentages refer to.

    Raises:
        BudgetError: As :func:`parse_budgets`.
        UnknownNameError: As :func:`parse_budgets`.
    """
    words = [word for word in _words(texts) if check_budgets(word) <= COUNTED]
    return parse_budgets(words, before) if words else ()


def budget_texts(given: object) -> list[str]:
    """Return one text, or several, as a list.

    Raises:
        BudgetError: If it is neither.
    """
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
    parts: list[object] = list(given) if several else [given]  # type: ignore[call-overload]
    texts: list[str] = []
    for part in parts:
        if not isinstance(part, str):
            raise BudgetError(
                f"A budget must be a text, such as {EXAMPLES}; got {_short(repr(part))}."
                f"{_meant(part)}"
            )
        texts.append(part)
    return texts


def _meant(given: object) -> str:
    """Suggest a percentage that a number, or a mapping to one, probably stands for."""
    name: object = "macs"
    if isinstance(given, Mapping) and len(given) == 1:
        name, given = next(iter(given.items()))
    if isinstance(given, bool) or not isinstance(given, int | float) or name not in _AMOUNTS:
        return ""
    percent = _percent(given)
    return "" if percent is None else f" Did you mean `{name}={percent}`?"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _words(texts: str | Iterable[str]) -> list[str]:
    return [word for part in budget_texts(texts) for word in part.split(",")]


def _read(
    texts: str | Iterable[str], totals: Mapping[Quantity, float | None]
) -> tuple[Budget, ...]:
    words = _words(texts)
    if not words:
        raise BudgetError(f"At least one budget must be given, such as {EXAMPLES}; got none.")
    budgets = tuple(_parse(word.strip(), totals) for word in words)
    quantities = [budget.quantity for budget in budgets]
    if len(set(quantities)) < len(quantities):
        raise BudgetError(f"Each quantity must be bounded once, got {_short(', '.join(words))}.")
    return budgets


def _check_meant(budget: Budget, total: float | None) -> None:
    """Refuse a bare number that no plan can reach and that is probably a percentage."""
    meant = _in_percent(budget.quantity, budget.asked.partition("=")[2])
    if total is not None and meant and budget.limit < total / 100:
        raise BudgetError(
            f"The budget {budget.asked} is less than a hundredth of the network's {total:,.0f}."
            f"{meant}"
        )


def _parse(text: str, totals: Mapping[Quantity, float | None]) -> Budget:
    name, equals, amount = text.partition("=")
    name = name.strip().lower()
    got = repr(_short(text))
    if not equals or not name:
        raise BudgetError(f"A budget must be quantity=amount, such as {EXAMPLES}; got {got}.")
    if name not in _AMOUNTS:
        raise UnknownNameError("budget", _short(name), _AMOUNTS)
    quantity: Quantity = name
    read, expected = _AMOUNTS[quantity]
    share, number = parse_percent(amount), read(amount)
    if share is None and number is None:
        raise BudgetError(
            f"The amount of a budget must be {expected}; got {_short(amount)!r} in {got}."
            f"{_in_percent(quantity, amount)}"
        )
    if share is not None and not 0 < share <= 1:
        raise BudgetError(
            f"A percentage of the original must be above 0% and at most 100%, got {got}."
        )
    if share is not None:
        total = totals[quantity]
        assert total is not None, f"the network's own {quantity} was not measured"
        number = share * total if quantity == "latency" else round(share * total)
    assert number is not None
    if number <= 0:
        raise BudgetError(
            f"A budget must be above zero, got {got}. A share is given in percent."
            f"{_in_percent(quantity, amount)}"
        )
    if number > _MOST:
        raise BudgetError(f"A budget must be at most {_MOST:.0e}, got {got}. Give less, or none.")
    return Budget(quantity=quantity, limit=number, asked=text)


def _in_percent(quantity: Quantity, amount: str) -> str:
    """Suggest a percentage for a bare number, if it may stand for one."""
    share = parse_percent(f"{amount.strip()}%")
    percent = None if share is None else _percent(100 * share)
    if percent is None:
        return ""
    ms = f" or `latency={amount.strip()}ms`" if quantity == "latency" else ""
    return f" Did you mean `{quantity}={percent}`{ms}?"


def _percent(number: float) -> str | None:
    """Return the percentage that a bare number may stand for: 50 % for both 50 and 0.5."""
    percent = 100 * number if number < 1 else number
    return f"{percent:g}%" if 0 < percent <= _PERCENT_AT_MOST else None
