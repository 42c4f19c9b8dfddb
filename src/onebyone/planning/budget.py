"""Budgets in words -> upper bounds: ``macs=50%``, ``params=20k``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from onebyone.errors import BudgetError, UnknownNameError
from onebyone.records import Budget, Cost
from onebyone.units import parse_count, parse_percent

QUANTITIES: tuple[Literal["params"], Literal["macs"]] = ("params", "macs")
# Known words that this version cannot plan for: told apart from typing errors.
LATER = {"latency": "milliseconds", "memory": "bytes"}

EXAMPLES = "`macs=50%`, `params=20k`"


def parse_budgets(texts: str | Iterable[str], before: Cost) -> tuple[Budget, ...]:
    """Read budgets such as ``"macs=50%"``; several may be separated by commas.

    Args:
        texts: One text, or several.
        before: The network's own cost, which percentages are of.

    Raises:
        BudgetError: If a budget cannot be read, is not above zero, or comes twice.
    """
    parts = [texts] if isinstance(texts, str) else list(texts)
    words = [word for part in parts for word in part.split(",")]
    if not words:
        raise BudgetError(f"At least one budget must be given, such as {EXAMPLES}; got none.")
    budgets = tuple(_parse(word.strip(), before) for word in words)
    quantities = [budget.quantity for budget in budgets]
    if len(set(quantities)) < len(quantities):
        raise BudgetError(f"Each quantity must be bounded once, got {', '.join(words)}.")
    return budgets


def check_budgets(texts: str | Iterable[str]) -> None:
    """Check that budgets can be read, before the network's own cost is known.

    Raises:
        BudgetError: As :func:`parse_budgets`.
    """
    # Any share of so large a cost is above zero.
    parse_budgets(texts, Cost(params=10**15, macs=10**15))


def _parse(text: str, before: Cost) -> Budget:
    name, equals, amount = text.partition("=")
    name = name.strip().lower()
    if not equals or not name:
        raise BudgetError(f"A budget must be quantity=amount, such as {EXAMPLES}; got {text!r}.")
    known = {"params": before.params, "macs": before.macs}
    if name not in known and name not in LATER:
        raise UnknownNameError("budget", name, known)
    share, count = parse_percent(amount), parse_count(amount)
    if share is None and count is None and name not in LATER:
        raise BudgetError(
            f"The amount of a budget must be a percentage or a number, such as {EXAMPLES}; "
            f"got {amount!r} in {text!r}."
        )
    if share is not None and not 0 < share <= 1:
        raise BudgetError(
            f"A percentage of the original must be above 0% and at most 100%, got {text!r}."
        )
    if name in LATER:
        raise BudgetError(
            f"A budget must bound `macs` or `params`; one in {LATER[name]} cannot be planned for "
            f"yet, got {text!r}. Latency is measured and reported for every plan."
        )
    quantity: Literal["params", "macs"] = "params" if name == "params" else "macs"
    limit = round(share * known[name]) if share is not None else count
    assert limit is not None
    if limit < 1:
        raise BudgetError(f"A budget must be above zero, got {text!r}.")
    return Budget(quantity=quantity, limit=limit, asked=text)
