"""Budgets in words -> upper bounds: ``latency=5ms``, ``macs=50%``, ``memory=8MB``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from onebyone.errors import BudgetError, UnknownNameError
from onebyone.records import Budget, Cost, Quantity
from onebyone.units import parse_bytes, parse_count, parse_ms, parse_percent

EXAMPLES = "`latency=5ms`, `macs=50%`, `params=20k`, `memory=8MB`"

Parse = Callable[[str], float | None]
# How an amount is read, and what it may look like.
_AMOUNTS: dict[Quantity, tuple[Parse, str]] = {
    "params": (parse_count, "a percentage or a number, such as `params=20k`"),
    "macs": (parse_count, "a percentage or a number, such as `macs=50%`"),
    "latency": (parse_ms, "a percentage or a time with its unit, such as `latency=5ms`"),
    "memory": (parse_bytes, "a percentage or a number of bytes, such as `memory=8MB`"),
}
# Any share of so much is above zero.
_ENDLESS = 1e15


def parse_budgets(
    texts: str | Iterable[str], before: Cost, *, memory_bytes: int | None = None
) -> tuple[Budget, ...]:
    """Read budgets such as ``"macs=50%"``; several may be separated by commas.

    Args:
        texts: One text, or several.
        before: The network's own cost, which percentages are of; with its milliseconds if there
            may be a budget for latency.
        memory_bytes: Of the network's weights and peak activations, if there may be one for memory.

    Raises:
        BudgetError: If a budget cannot be read, is not above zero, or comes twice.
        UnknownNameError: If there is no such quantity.
    """
    words = _words(texts)
    if not words:
        raise BudgetError(f"At least one budget must be given, such as {EXAMPLES}; got none.")
    totals: dict[Quantity, float | None] = {
        "params": before.params,
        "macs": before.macs,
        "latency": before.ms,
        "memory": memory_bytes,
    }
    budgets = tuple(_parse(word.strip(), totals) for word in words)
    quantities = [budget.quantity for budget in budgets]
    if len(set(quantities)) < len(quantities):
        raise BudgetError(f"Each quantity must be bounded once, got {', '.join(words)}.")
    return budgets


def check_budgets(texts: str | Iterable[str]) -> frozenset[Quantity]:
    """Check that budgets can be read, before the network's own cost is known.

    Returns:
        The quantities that they bound.

    Raises:
        BudgetError: As :func:`parse_budgets`.
        UnknownNameError: As :func:`parse_budgets`.
    """
    most = Cost(params=int(_ENDLESS), macs=int(_ENDLESS), ms=_ENDLESS)
    read = parse_budgets(texts, most, memory_bytes=int(_ENDLESS))
    return frozenset(budget.quantity for budget in read)


def counted_budgets(texts: str | Iterable[str], before: Cost) -> tuple[Budget, ...]:
    """Read those budgets that need no measurement: of MACs and parameters; there may be none.

    Args:
        texts: As for :func:`parse_budgets`.
        before: The network's own cost, which percentages are of.

    Raises:
        BudgetError: As :func:`parse_budgets`.
        UnknownNameError: As :func:`parse_budgets`.
    """
    words = [word for word in _words(texts) if check_budgets(word) <= {"macs", "params"}]
    return parse_budgets(words, before) if words else ()


def budget_texts(given: object) -> list[str]:
    """Return one text, or several, as a list.

    Raises:
        BudgetError: If it is neither.
    """
    parts = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    texts: list[str] = []
    for part in parts:
        if not isinstance(part, str):
            raise BudgetError(f"A budget must be a text, such as {EXAMPLES}; got {part!r}.")
        texts.append(part)
    return texts


def _words(texts: str | Iterable[str]) -> list[str]:
    return [word for part in budget_texts(texts) for word in part.split(",")]


def _parse(text: str, totals: Mapping[Quantity, float | None]) -> Budget:
    name, equals, amount = text.partition("=")
    name = name.strip().lower()
    if not equals or not name:
        raise BudgetError(f"A budget must be quantity=amount, such as {EXAMPLES}; got {text!r}.")
    if name not in _AMOUNTS:
        raise UnknownNameError("budget", name, _AMOUNTS)
    quantity: Quantity = name
    read, expected = _AMOUNTS[quantity]
    share, number = parse_percent(amount), read(amount)
    if share is None and number is None:
        raise BudgetError(f"The amount of a budget must be {expected}; got {amount!r} in {text!r}.")
    if share is not None and not 0 < share <= 1:
        raise BudgetError(
            f"A percentage of the original must be above 0% and at most 100%, got {text!r}."
        )
    if share is not None:
        total = totals[quantity]
        assert total is not None, f"the network's own {quantity} was not measured"
        number = share * total if quantity == "latency" else round(share * total)
    assert number is not None
    if number <= 0:
        raise BudgetError(
            f"A budget must be above zero, got {text!r}. A share is given in percent: `{name}=50%`."
        )
    return Budget(quantity=quantity, limit=number, asked=text)
