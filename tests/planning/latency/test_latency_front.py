"""A front for a runtime: what is said of its times holds, on machines where times do not add up."""

import itertools

import pytest
import torch
from test_latency_planner import SHAPE, planned
from torch import nn

from onebyone import restructure
from onebyone.core.errors import ModelError
from onebyone.core.records import Plan
from onebyone.planning import Planner
from onebyone.planning.front import budget_of
from onebyone.planning.latency import front as timed_front
from onebyone.planning.latency import planner as deployed
from onebyone.profiling.trace import trace_layers

# Networks' times by those of their layers: little is gained at first; much at first; a floor.
MACHINES = {
    "slow start": lambda ms: 0.3 + 0.02 * ms**2,
    "fast start": lambda ms: 0.3 + 4 * ms**0.5,
    "floor": lambda ms: max(0.2 * ms, 0.9 * ms - 3.0),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 48, 3, padding=1)
        self.two = nn.Conv2d(48, 64, 3, padding=1, stride=2)
        self.three = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x):
        return self.three(self.two(self.one(x).relu()).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def planner(net, **settings):
    return Planner(
        net, None, input_shape=SHAPE, runtime="known", cache=False, num_threads=1, **settings
    )


def true_ms(machine, net, made):
    """Return what a plan's network takes on a machine without noise."""
    layers = trace_layers(restructure(net, made), torch.zeros(SHAPE)).layers
    alone = sum(machine.overhead + machine.per_mac * layer.macs for layer in layers if layer.macs)
    return machine.whole(alone)


@pytest.mark.parametrize("shape", MACHINES)
def test_a_front_that_was_measured_is_right_where_times_do_not_add_up(machine, net, shape):
    known = machine(noise=0, whole=MACHINES[shape])
    mine = planner(net)
    front = [point for point in mine.front("latency", measured=True) if point.rewritten]
    assert len(front) >= 6
    assert all(point.obtained == "measured" and point.ratio is not None for point in front)
    for point in front:
        again = mine.predict([point.budget])
        assert point.after.ms == pytest.approx(true_ms(known, net, again), rel=0.02)


@pytest.mark.parametrize("shape", MACHINES)
def test_between_measured_points_the_corrected_prediction_holds(machine, net, shape):
    known = machine(noise=0, whole=MACHINES[shape])
    mine = planner(net)
    front = [point for point in mine.front("latency", measured=True) if point.rewritten]
    # A straight line cuts off a corner: no more than this, as far apart as measured points are.
    most = 0.1 if shape == "floor" else 0.05
    for near, far in itertools.pairwise(front):
        made = mine.predict([budget_of("latency", (near.after.ms * far.after.ms) ** 0.5)])
        assert made.after.ms == pytest.approx(true_ms(known, net, made), rel=most)


def test_without_measuring_the_front_only_its_smallest_network_is_built(machine, net):
    known = machine()
    mine = planner(net)
    built = known.prepared
    front = mine.front("latency")
    assert known.prepared >= built + 1
    assert sum("after" in names for names in known.sampled) == 1
    assert front[0].obtained == "measured"
    assert {p.obtained for p in front[1:] if p.rewritten} == {"corrected"}
    assert all(p.ratio is None and p.timing is None for p in front[1:])


def test_no_network_is_begun_after_the_time_is_over(machine, net, monkeypatch):
    machine()
    monkeypatch.setattr(timed_front, "FRONT_SECONDS", 0.0)
    monkeypatch.setattr("onebyone.planning.planner.FRONT_SECONDS", 0.0)
    front = planner(net).front("latency", measured=True)
    assert sum(point.ratio is not None for point in front) == 1


@pytest.mark.parametrize("measured", [False, True])
def test_no_layer_is_timed_after_the_time_is_over(machine, net, monkeypatch, measured):
    known = machine()
    mine = planner(net)
    monkeypatch.setattr(timed_front, "FRONT_SECONDS", 0.0)
    monkeypatch.setattr("onebyone.planning.planner.FRONT_SECONDS", 0.0)
    first = len(known.sampled)
    front = mine.front("latency", measured=measured)
    after = known.sampled[first:]
    built = next(place for place, names in enumerate(after) if "after" in names)
    # The most that is asked for is planned for as well, to know where the front ends.
    assert len(after[built + 1 :]) <= 2
    assert len(front) >= 6
    for near, far in itertools.pairwise(front):
        assert near.after.ms < far.after.ms


def test_a_network_that_the_runtime_cannot_run_leaves_the_front_predicted(
    machine, net, monkeypatch
):
    machine()
    mine = planner(net)

    def fails(self, made):
        raise ModelError("it cannot be exported")

    monkeypatch.setattr(deployed.Deployed, "measured", fails)
    front = [point for point in mine.front("latency", measured=True) if point.rewritten]
    assert len(front) >= 6
    assert {point.how for point in front} == {"predicted, corrected"}


def test_every_time_says_how_it_was_obtained_on_screen_and_when_read_again(machine, net):
    machine()
    made = planned(net, "latency=80%", measure_front=True)
    assert len(made.front) >= 8
    for point in made.front:
        assert point.obtained == "measured"
        if point.rewritten:
            assert point.ratio.low <= made.before.ms / point.after.ms <= point.ratio.high
            assert point.timing.q1_ms <= point.timing.median_ms <= point.timing.q3_ms
            assert point.predicted_ms > 0
    shown = made.front_table()
    assert all(row[1].startswith("measured") for row in shown.rows)
    assert any("measured in turns with the original in known" in note for note in shown.notes)
    assert Plan.from_json(made.to_json()) == made


def test_nothing_on_a_measured_front_is_beaten(machine, net):
    machine(noise=0.02)
    front = planner(net).front("latency", measured=True)
    for fast, slow in itertools.pairwise(front):
        assert fast.after.ms <= slow.after.ms
        assert fast.harm > slow.harm


def test_a_front_of_macs_has_measured_times_too(machine, net):
    machine()
    made = planned(net, "macs=70%", measure_front=True)
    macs = [point.after.macs for point in made.front]
    assert macs == sorted(macs)
    assert all(point.after.macs <= point.budget.limit for point in made.front)
    assert all(point.obtained == "measured" for point in made.front)


def test_a_front_within_the_noise_is_made_all_the_same(machine, net):
    machine(noise=0.05, worth=0.02)
    front = planner(net).front("latency", measured=True)
    for fast, slow in itertools.pairwise(front):
        assert fast.after.ms <= slow.after.ms
        assert fast.harm > slow.harm


def test_halving_takes_every_place_once_and_far_ones_first():
    order = timed_front._halving(9)
    assert sorted(order) == list(range(1, 9))
    assert order[:3] == [4, 2, 6]


def test_a_front_of_counts_without_a_runtime_has_no_times(net):
    made = Planner(net, None, input_shape=SHAPE).front("macs")
    assert made
    assert all(point.obtained is None and point.after.ms is None for point in made)
