"""The front is what planning for each of its budgets gives; nothing on it is beaten."""

import itertools

import pytest
import torch
from torch import nn

from onebyone.core.errors import BudgetError
from onebyone.core.records import FORMAT, FrontPoint, Plan
from onebyone.planning import plan
from onebyone.planning.front import POINTS
from onebyone.rewrites.head import fit as head_fit


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 20, (3, 5), padding=(1, 2)),
        nn.ReLU(),
        nn.Conv2d(20, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 12, 5),
    )


EXAMPLES = torch.randn(48, 3, 6, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def short_fits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_fit, "FIT_STEPS", 20)
        yield


@pytest.fixture(scope="module", params=["macs", "params"])
def planned(request):
    return plan(network(), EXAMPLES, budget=f"{request.param}=60%", head="keep")


def test_harm_falls_as_the_network_grows(planned):
    quantity = planned.budgets[0].quantity
    assert POINTS // 2 < len(planned.front) <= POINTS
    for smaller, larger in itertools.pairwise(planned.front):
        assert getattr(smaller.after, quantity) < getattr(larger.after, quantity)
        assert smaller.harm > larger.harm


def test_each_point_meets_its_budget_and_the_last_is_the_original(planned):
    quantity = planned.budgets[0].quantity
    for point in planned.front:
        assert point.budget.quantity == quantity
        assert getattr(point.after, quantity) <= point.budget.limit
    last = planned.front[-1]
    assert (last.after, last.harm, last.rewritten) == (planned.before, 0.0, 0)


def test_nothing_on_the_front_beats_the_plan(planned):
    quantity = planned.budgets[0].quantity
    for point in planned.front:
        assert point.harm >= planned.harm or getattr(point.after, quantity) > getattr(
            planned.after, quantity
        )


def test_the_first_point_is_the_least_that_can_be_reached(planned):
    quantity, first = planned.budgets[0].quantity, planned.front[0]
    reached = getattr(first.after, quantity)
    again = plan(network(), EXAMPLES, budget=f"{quantity}={reached}", head="keep")
    assert (again.after, again.harm) == (first.after, pytest.approx(first.harm))
    with pytest.raises(BudgetError, match="the least that these rewrites reach"):
        plan(network(), EXAMPLES, budget=f"{quantity}={reached - 1}", head="keep")


def test_a_head_that_is_asked_for_is_in_every_point():
    planned = plan(network(), EXAMPLES, budget="params=60%", head="gap")
    assert all(point.rewritten >= 1 for point in planned.front)
    assert planned.front[-1].harm > 0
    # No budget is wasted on networks larger than any that has the head.
    assert len(planned.front) > POINTS // 2


def test_a_saved_plan_keeps_its_front_and_need_not_have_one(planned):
    assert Plan.from_json(planned.to_json()) == planned
    text = planned.to_json()
    without = text[: text.index('"front"')] + f'"format": {FORMAT}}}'
    assert Plan.from_json(without).front == ()


def test_a_front_that_was_saved_before_its_times_were_measured_is_read():
    old = (
        '{"budget": {"quantity": "latency", "limit": 5.0, "asked": "latency=5ms"}, '
        '"after": {"params": 10, "macs": 20, "bytes": 40, "ms": 5.0}, "harm": 0.5, "rewritten": 3}'
    )
    point = FrontPoint.from_json(old)
    assert (point.obtained, point.timing, point.ratio, point.predicted_ms) == (None,) * 4
    assert point.how == "predicted"
