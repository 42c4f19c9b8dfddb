from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebyone.core.budget import check_budgets, counted_budgets, parse_budgets
from onebyone.core.errors import BudgetError, UnknownNameError, UsageError
from onebyone.core.records import Cost

BEFORE = Cost(params=4_000, macs=1_000_000, ms=8.0, bytes=4 * 4_000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs=50%", [("macs", 500_000)]),
        ("params=20k", [("params", 20_000)]),
        (" MACs = 1.5M ", [("macs", 1_500_000)]),
        ("params=4232", [("params", 4232)]),
        ("macs=100%", [("macs", 1_000_000)]),
        ("macs=5e5", [("macs", 500_000)]),
        ("params=100", [("params", 100)]),
        ("latency=2e3us", [("latency", 2.0)]),
        ("latency=250μs", [("latency", 0.25)]),
        ("macs=0.4%", [("macs", 4_000)]),
        ("macs=50%,params=25%", [("macs", 500_000), ("params", 1_000)]),
        ("latency=5ms", [("latency", 5.0)]),
        ("latency=250us", [("latency", 0.25)]),
        ("latency=25%", [("latency", 2.0)]),
        ("memory=1.5MB", [("memory", 1_500_000)]),
        ("memory=64KiB", [("memory", 65_536)]),
        ("memory=50%", [("memory", 500)]),
        ("size=2MB", [("size", 2_000_000)]),
        ("size=8k", [("size", 8_000)]),
        ("size=64KiB", [("size", 65_536)]),
        ("size=50%", [("size", 8_000)]),
    ],
)
def test_a_budget_in_words_is_an_upper_bound(text, expected):
    assert [
        (b.quantity, b.limit) for b in parse_budgets(text, BEFORE, memory_bytes=1_000)
    ] == expected


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("latency=50%", []),
        (["memory=8MB", "latency=5ms,params=25%"], [("params", 1_000)]),
        ("macs=50%,params=25%", [("macs", 500_000), ("params", 1_000)]),
        (["size=25%", "latency=5ms"], [("size", 4_000)]),
    ],
)
def test_counted_budgets_are_read_without_a_measurement(texts, expected):
    unmeasured = replace(BEFORE, ms=None)
    assert [(b.quantity, b.limit) for b in counted_budgets(texts, unmeasured)] == expected


def test_several_budgets_may_come_in_a_list_and_keep_what_was_asked():
    budgets = parse_budgets(["macs=50%", "params=1k"], BEFORE)
    assert [b.asked for b in budgets] == ["macs=50%", "params=1k"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"A budget must be quantity=amount, such as `latency=5ms`, `macs=50%`, `params=20k`, `size=2MB`, `memory=8MB`; got ''",
        ),
        ("50%", r"must be quantity=amount.*got '50%'"),
        ("=50%", r"must be quantity=amount"),
        ("macs=50%,", r"must be quantity=amount.*got ''"),
        ("macs", r"must be quantity=amount"),
        ("macs=fifty", r"must be a percentage or a number.*got 'fifty' in 'macs=fifty'"),
        ("macs=", r"must be a percentage or a number"),
        ("macs=nan%", r"must be a percentage or a number"),
        ("macs=-5", r"must be a percentage or a number"),
        ("macs=0%", r"above 0% and at most 100%, got 'macs=0%'"),
        ("macs=-5%", r"above 0% and at most 100%"),
        ("macs=101%", r"above 0% and at most 100%"),
        ("macs=0", r"must be above zero"),
        ("macs=0.5", r"above zero, got 'macs=0.5'.*Did you mean `macs=50%`\?"),
        ("macs=50", r"macs=50 is less than a hundredth of.*1,000,000\. Did you mean `macs=50%`\?"),
        ("params=12.5", r"Did you mean `params=12.5%`\?"),
        ("macs=inf", r"must be a percentage or a number"),
        ("macs=inf%", r"must be a percentage or a number"),
        ("macs=nan", r"must be a percentage or a number"),
        ("macs=1e400", r"must be a percentage or a number"),
        ("macs=1e400%", r"must be a percentage or a number"),
        ("macs=1e19", r"must be at most 1e\+18, got 'macs=1e19'"),
        ("macs=" + 400 * "9", r"percentage or a number.*got '9{59}…' in 'macs=9{54}…'"),
        ("macs=" + 40 * "9", r"must be at most 1e\+18, got 'macs=9{40}'"),
        ("macs=٥٠%", r"must be a percentage or a number"),
        ("macs=５０%", r"must be a percentage or a number"),
        ("latency=٥ms", r"a percentage or a time with its unit"),
        ("latency=1e999ms", r"a percentage or a time with its unit"),
        ("latency=0.5", r"Did you mean `latency=50%` or `latency=0.5ms`\?"),
        ("params=0.001%", r"must be above zero"),
        ("latency=0%", r"above 0% and at most 100%"),
        (
            "latency=5",
            r"got '5' in 'latency=5'\. Did you mean `latency=5%` or `latency=5ms`\?",
        ),
        ("latency=0ms", r"must be above zero"),
        ("memory=5ms", r"a percentage or a number of bytes"),
        ("macs=50%,macs=1M", r"bounded once, got macs=50%, macs=1M"),
    ],
)
def test_a_budget_that_cannot_be_meant_says_why(text, message):
    with pytest.raises(BudgetError, match=message):
        parse_budgets(text, BEFORE)


def test_no_budget_at_all_is_refused():
    with pytest.raises(BudgetError, match="At least one budget must be given"):
        parse_budgets([], BEFORE)


def test_an_unknown_quantity_is_told_its_neighbor():
    with pytest.raises(UnknownNameError, match=r"No budget named 'mac'. Did you mean 'macs'\?"):
        parse_budgets("mac=50%", BEFORE)


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused_by_name(text):
    try:
        budgets = parse_budgets(text, BEFORE, memory_bytes=1_000)
    except UsageError:
        return
    assert all(b.limit > 0 for b in budgets)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.5, r"must be a text.*got 0.5. Did you mean `macs=50%`\?"),
        (50, r"must be a text.*got 50. Did you mean `macs=50%`\?"),
        ({"params": 0.25}, r"must be a text.*Did you mean `params=25%`\?"),
        ({"macs": 1, "params": 2}, r"must be a text.*got \{'macs': 1, 'params': 2\}\.$"),
        (b"macs=50%", r"must be a text.*got b'macs=50%'\.$"),
        (None, r"must be a text.*got None\.$"),
        (True, r"must be a text.*got True\.$"),
        (float("nan"), r"must be a text.*got nan\.$"),
        (["macs=50%", 3], r"must be a text.*got 3. Did you mean `macs=3%`\?"),
    ],
)
def test_a_budget_that_is_no_text_says_what_it_may_have_meant(given, message):
    with pytest.raises(BudgetError, match=message):
        check_budgets(given)


def test_a_small_number_that_a_small_network_can_meet_is_no_percentage():
    assert parse_budgets("params=60", Cost(params=300, macs=5000, bytes=1200))[0].limit == 60
    assert check_budgets("params=60") == {"params"}


@given(
    st.text("0123456789.eE+-%kKMGTmsuinfa \u0665\uff15", max_size=12),
    st.sampled_from(["macs", "params", "latency", "memory"]),
)
def test_any_amount_is_read_as_a_finite_number_or_refused(amount, quantity):
    try:
        (budget,) = parse_budgets(f"{quantity}={amount}", BEFORE, memory_bytes=1_000)
    except BudgetError:
        return
    assert 0 < budget.limit <= 1e18
