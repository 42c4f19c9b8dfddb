"""Any text is a budget that is above zero, or is refused by name; so with amounts and arguments."""

import math

from cases import some
from edited_json import VALUES
from hypothesis import example, given
from hypothesis import strategies as st

from onebyone.core.arguments import KINDS
from onebyone.core.budget import check_budgets, parse_budgets
from onebyone.core.errors import OneByOneError, UsageError
from onebyone.core.records import Budget, Cost
from onebyone.core.units import (
    format_bytes,
    format_count,
    format_ms,
    format_seconds,
    parse_bytes,
    parse_count,
    parse_ms,
    parse_percent,
)

WORDS = [
    "macs", "params", "latency", "memory", "mac", "=", "==", ",", "50", "%", "0", "5", ".", "-",
    "k", "M", "G", "T", "ms", "s", "us", "µs", "MB", "KiB", "e", "1e400", "nan", "inf", " ", "\n",
    "９", "½", "_", "9" * 400, "0." + "0" * 400 + "1", "\0", "é",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map("".join) | st.text(max_size=12)
BEFORE = Cost(params=1_000, macs=1_000_000, ms=3.0, bytes=4 * 1_000)


@some()
@given(TEXTS)
@example("macs=" + "9" * 400)
@example("macs=" + "9" * 400 + "%")
@example("latency=" + "9" * 400 + "ms")
@example("memory=" + "9" * 400 + "MB")
@example("params=0." + "0" * 400 + "1%")
def test_budgets(text):
    for read in (check_budgets, lambda t: parse_budgets(t, BEFORE, memory_bytes=10_000)):
        try:
            found = read(text)
        except UsageError as error:
            assert len(str(error)) < 900
        else:
            for budget in found:
                if isinstance(budget, Budget):
                    assert 0 < budget.limit < math.inf
                    assert Budget.from_json(budget.to_json()) == budget


@some()
@given(VALUES | st.binary(max_size=3) | st.lists(TEXTS, max_size=3))
def test_budgets_of_any_type(value):
    try:
        check_budgets(value)
    except UsageError as error:
        assert str(error)


@some()
@given(TEXTS)
@example("9" * 400)
@example("9" * 5000)
def test_amounts(text):
    for parse in (parse_count, parse_ms, parse_bytes, parse_percent):
        value = parse(text)
        assert value is None or 0 <= value < math.inf or (parse is parse_percent and value < 0)


@some()
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30))
def test_numbers_are_shown(value):
    for show in (format_count, format_ms, format_bytes, format_seconds):
        assert show(value)


@some()
@given(st.sampled_from(sorted(KINDS)), VALUES | st.binary(max_size=3) | st.floats())
@example("seed", 10**5000)
@example("input_shape", [10**5000])
@example("mean", [10**400])
@example("task", "")
@example("task", "a" * 399)
def test_arguments_of_any_type(name, value):
    try:
        plain = KINDS[name](name, value)
    except OneByOneError as error:
        assert f"`{name}`" in str(error) or str(error).startswith(f"No {name} named ")
        assert len(str(error)) < 400
    else:
        assert not isinstance(plain, float) or math.isfinite(plain)
