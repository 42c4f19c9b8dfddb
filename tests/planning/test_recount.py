"""A plan that was edited says what its choices cost, and no longer what others did."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone.core.records import Plan, Step
from onebyone.planning.recount import NOTE, recounted
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites import restructure


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def planned():
    net = network()
    inputs = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return net, obo.plan(net, inputs, budget="macs=50%", task="classification")


def edited(plan, settings):
    first, *others = plan.choices
    return replace(
        plan,
        choices=(replace(first, steps=(Step(rewrite="factorize", settings=settings),)), *others),
    )


def test_a_plan_as_it_was_made_stays_as_it_is(planned):
    net, plan = planned
    assert plan.choices
    assert recounted(Plan.from_json(plan.to_json()), net) == plan


def test_edited_ranks_are_counted_and_their_harm_is_unknown(planned):
    net, plan = planned
    changed = edited(plan, {"form": "tucker2", "ranks": [3, 2]})
    found = recounted(changed, net)
    counted = trace_layers(restructure(net, changed), torch.zeros(1, 3, 12, 12))
    assert (found.after.macs, found.after.params) == (counted.macs, counted.params)
    assert found.after != plan.after
    assert found.choices[0].harm is None
    assert found.harm is None
    assert NOTE in str(found).replace("\n", " ")


def test_a_choice_taken_out_is_no_longer_counted(planned):
    net, plan = planned
    found = recounted(replace(plan, choices=()), net)
    assert (found.after.macs, found.after.params) == (plan.before.macs, plan.before.params)
