"""The fastest network within a tolerated loss: chosen on validation data, by the law it states."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from onebyone import apply
from onebyone.calibration.inputs import CalibrationData
from onebyone.core.errors import BudgetError, OptionError
from onebyone.core.records import Budget, Cost, FrontPoint
from onebyone.data import TensorSplit
from onebyone.evaluation.scores import score
from onebyone.evaluation.statistics import paired_difference
from onebyone.planning import Planner
from onebyone.planning.max_drop import plan_within


@pytest.fixture(scope="module")
def blobs():
    """Pictures of five classes, each a pattern of its own in noise; labels are the pattern's."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(5, 3, 8, 9, generator=generator)
    labels = torch.randint(5, (600,), generator=generator)
    inputs = patterns[labels] + 2.0 * torch.randn(600, 3, 8, 9, generator=generator)
    return TensorSplit(inputs, labels)


@pytest.fixture(scope="module")
def net(blobs):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 4 * 5, 5),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for inputs, labels in list(blobs.batches(100)) * 4:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return net.eval()


def search(net, blobs, max_drop):
    calibration = CalibrationData(blobs.take(200, 0), "blobs", 0)
    planner = Planner(net, calibration, runtime="known", cache=False, num_threads=1, head="keep")
    return calibration, plan_within(net, planner, calibration, blobs, max_drop=max_drop)


@pytest.mark.parametrize("max_drop", [1.0, 20.0])
def test_the_network_loses_no_more_than_tolerated_on_the_validation_data(
    machine, net, blobs, max_drop
):
    machine(noise=0)
    calibration, (made, trials) = search(net, blobs, max_drop)
    assert made.choices
    small = apply(net, made, calibration)
    loss = paired_difference(*score([net, small], blobs).each)
    assert loss.value >= -max_drop / 100
    assert trials[-1].built
    assert trials[-1].difference.value == pytest.approx(loss.value, abs=1e-9)


def test_no_faster_network_of_those_tried_was_within_the_tolerance(machine, net, blobs):
    machine(noise=0)
    _, (made, trials) = search(net, blobs, 1.0)
    faster = [t for t in trials if (t.after.ms or 0) < 0.999 * made.after.ms and not t.built]
    assert faster
    assert all(trial.difference.value < -0.01 for trial in faster)


def test_more_tolerance_is_never_slower(machine, net, blobs):
    machine(noise=0)
    times = [search(net, blobs, drop)[1][0].after.ms for drop in (0.5, 5.0, 40.0)]
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0]


def test_where_nothing_is_faster_the_network_stays(machine, net, blobs):
    machine(overhead=100.0)
    _, (made, trials) = search(net, blobs, 50.0)
    assert made.choices == ()
    assert trials == ()
    assert any("no option is shown to be faster" in item.reason for item in made.left_alone)


def test_a_tolerance_below_zero_is_refused(machine, net, blobs):
    machine()
    with pytest.raises(OptionError, match="`max_drop` must be a number of 0 or more"):
        search(net, blobs, -1)


def test_a_prediction_out_of_reach_counts_so_and_the_search_goes_on():
    """What was measured since may put a point of the front out of reach: no reason to end."""
    asked = []

    class Planner:
        def predict(self, budgets):
            asked.append(budgets[0].limit)
            raise BudgetError("out of reach")

        def front(self, quantity):
            return tuple(
                FrontPoint(
                    budget=Budget(quantity=quantity, limit=ms, asked=f"latency={ms}ms"),
                    after=Cost(params=1, macs=1, ms=ms, bytes=4),
                    harm=0.0,
                    rewritten=1,
                )
                for ms in (1.0, 2.0, 3.0)
            )

        def survey(self):
            return SimpleNamespace(before=Cost(params=1, macs=1, ms=4.0, bytes=4), options=())

        def plan(self, texts):
            raise BudgetError(f"{texts} is out of reach")

    few = TensorSplit(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(BudgetError, match="not even one as slow as the original"):
        plan_within(nn.Linear(3, 2), Planner(), None, few, max_drop=1.0, metric="accuracy")
    assert {2.0, 3.0} <= set(asked), "the slower points were tried, too"
