"""Layers that run several times in one pass, such as the head of a feature pyramid."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import onebyone as obo
from onebyone.calibration.collect import Across, collect
from onebyone.profiling.trace import trace_layers


class Pyramid(nn.Module):
    """A head that reads maps of three sizes, and a layer that runs on its own output."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 16, 3, padding=1)
        self.again = nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.scores = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        maps = [F.relu(self.head(F.avg_pool2d(x, step))) for step in (1, 2, 4)]
        maps = [self.again(F.relu(self.again(each))) for each in maps]
        maps = [self.down(self.down(each)) for each in maps]
        return sum(self.scores(each.mean((2, 3))) for each in maps)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Pyramid().eval()


X = torch.randn(24, 3, 12, 16, generator=torch.Generator().manual_seed(1))


def test_layers_that_keep_the_size_are_sites_and_others_say_why_not(net):
    found = obo.applies(net, X[:1]).sites
    why = {site.site: site.reason for site in found if site.rewrite == "factorize"}
    assert why["head"] is None
    assert why["again"] is None
    assert why["scores"] is None
    assert why["down"] == "runs 6 times in one pass, and changes the size of its input"


@pytest.mark.parametrize("budget", ["macs=70%", "macs=45%"])
def test_the_cost_of_a_plan_is_what_is_counted(net, budget):
    plan = obo.plan(net, X, budget=budget)
    assert "head" in {option.site for option in plan.choices}
    small = obo.apply(net, plan, X)
    counted = trace_layers(small, X[:1]).cost
    assert counted.counts == plan.after.counts


@pytest.mark.parametrize("form", ["auto", "tucker2", "expand", "spatial"])
def test_full_ranks_are_the_same_network(net, form):
    net = net.double()
    plan = obo.uniform_plan(net, X[:1].double(), ranks=1, form=form)
    assert "head" in {option.site for option in plan.choices}
    small = obo.apply(net, plan, None)
    torch.testing.assert_close(small(X.double()), net(X.double()))


def test_a_layer_is_fitted_to_the_maps_of_all_its_calls(net):
    across = Across(copy.deepcopy(net), lambda: iter([X[:12], X[12:]]))
    (found,) = across.moments(net, ["head"])["head"]
    (whole,) = collect(net, ["head"], lambda: iter([X]))["head"]
    assert found.rows == whole.rows == 24 * (12 * 16 + 6 * 8 + 3 * 4)
    torch.testing.assert_close(found.xx, whole.xx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.yx, whole.yx, rtol=1e-4, atol=1e-5)


def test_the_predicted_harm_of_one_layer_is_what_is_measured(net):
    plan = obo.plan(net, X, budget="macs=75%", leave=["stem", "again", "scores"])
    (option,) = plan.choices
    assert option.site == "head"
    small = obo.apply(net, plan, X)
    with torch.no_grad():
        wanted, given = net(X), small(X)
    variance = wanted.var(0, unbiased=False)
    measured = float(((given - wanted) ** 2 / variance).mean())
    assert plan.harm == pytest.approx(measured, rel=0.05)


def test_the_time_of_a_site_is_that_of_all_its_calls(net, machine):
    machine(noise=0, overhead=0, worth=1.0)
    plan = obo.plan(net, X, budget="latency=80%", runtime="known", num_threads=1, cache=False)
    (option,) = [each for each in plan.choices if each.site == "head"]
    of_layer = 1e-6 * option.before.macs
    assert option.before.macs == 12 * 16 * 9 * (12 * 16 + 6 * 8 + 3 * 4)
    # Beside the layer, its neighbors are timed, and they are scaled alike.
    assert option.before.ms - option.after.ms == pytest.approx(1e-6 * option.saved.macs, rel=1e-6)
    assert option.before.ms >= of_layer


def test_a_network_with_such_layers_goes_the_whole_line(net):
    run = obo.shrink(net, X, budget="macs=60%", epochs=1)
    assert "head" in {option.site for option in run.record.plan.choices}
    assert run.record.comparison.after.macs <= 0.6 * run.record.comparison.before.macs
