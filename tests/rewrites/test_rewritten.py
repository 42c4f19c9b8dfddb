"""A network after every kind of rewrite is a network like any other."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.records import Plan, Step
from onebyone.profiling.trace import trace_layers

SHAPE = (1, 3, 16, 18)


class Branching(nn.Module):
    """Residual, grouped, strided, transposed, standardized layers; batch norms; a flat head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(
            3, 16, 3, stride=(2, 1), padding=1, padding_mode="reflect", bias=False
        )
        self.norm = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.grouped = nn.Conv2d(16, 24, (3, 5), padding=(1, 2), groups=2)
        self.relu2 = nn.ReLU()
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.relu3 = nn.ReLU()
        self.down = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, stride=2, padding=1))
        self.relu4 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(16 * 8 * 18, 20)
        self.relu5 = nn.ReLU()
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x):
        x = self.relu1(self.norm(self.stem(x)))
        x = self.relu4(self.down(self.relu3(self.up(self.relu2(self.grouped(x))))))
        return self.fc2(self.relu5(self.fc1(self.flatten(x))))


def network():
    torch.manual_seed(0)
    net = Branching()
    net.norm.running_mean.uniform_(-1, 1)
    net.norm.running_var.uniform_(0.5, 2)
    return net.eval()


X = torch.randn(40, *SHAPE[1:], generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def everything():
    """A plan of folds, then layers by themselves, then 1×1 + ReLU that start as the identity."""
    net = network()
    folded, folds = obo.fold(net, SHAPE)
    halves = obo.uniform_plan(folded, SHAPE, ranks=0.5)
    sites = {option.site for option in halves.choices}
    assert {"stem", "grouped", "up", "down", "fc1", "fc2"} >= sites >= {"grouped", "down", "fc1"}
    terms = replace(
        next(option for option in halves.choices if option.site == "down"),
        steps=(Step(rewrite="separable", settings={"form": "depthwise-pointwise", "terms": 2}),),
    )
    layers = tuple(terms if option.site == "down" else option for option in halves.choices)
    half = obo.apply(folded, replace(halves, choices=layers), X)
    _, deepened = obo.deepen(half, SHAPE, sites=["relu2"])
    plan = replace(halves, choices=(*folds.choices, *layers, *deepened.choices))
    return net, plan, obo.apply(net, plan, X)


def outputs(net):
    with torch.no_grad():
        return net(X[:4])


def test_all_rewrites_are_in_one_plan_and_the_network_is_near_the_original(everything):
    net, plan, small = everything
    assert {option.first.rewrite for option in plan.choices} == {
        "fold",
        "factorize",
        "separable",
        "deepen",
    }
    assert trace_layers(small, X[:1]).macs < trace_layers(net, X[:1]).macs
    wanted = outputs(net)
    assert (outputs(small) - wanted).square().mean() < 0.5 * wanted.var()


def test_a_saved_plan_gives_the_same_network_on_a_fresh_copy(everything, tmp_path):
    _, plan, small = everything
    plan.save(tmp_path / "plan.json")
    again = obo.apply(network(), Plan.load(tmp_path / "plan.json"), X)
    assert_close(outputs(again), outputs(small), rtol=0, atol=0)
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    blank = obo.rewrites.restructure(network(), Plan.load(tmp_path / "plan.json")).eval()
    blank.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert_close(outputs(blank), outputs(small), rtol=0, atol=0)


def test_it_is_copied_moved_and_compiled(everything):
    _, _, small = everything
    wanted = outputs(small)
    assert_close(outputs(copy.deepcopy(small)), wanted, rtol=0, atol=0)
    double = copy.deepcopy(small).double()
    assert_close(double(X[:4].double()).float(), wanted, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(copy.deepcopy(small), backend="eager")
    assert_close(outputs(compiled), wanted)


def test_it_is_exported(everything):
    _, _, small = everything
    exported = torch.export.export(small, (X[:4],)).module()
    assert_close(outputs(exported), outputs(small))


def test_it_is_trained(everything):
    _, _, small = everything
    student = copy.deepcopy(small).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    nn.functional.cross_entropy(student(X), torch.arange(40) % 5).backward()
    optimizer.step()
    still = [n for n, p in student.named_parameters() if torch.equal(p, before[n])]
    assert not still


def test_it_is_rewritten_again(everything):
    _, _, small = everything
    plan = obo.uniform_plan(small, SHAPE, ranks=0.5)
    smaller = obo.apply(small, plan, X)
    counted = trace_layers(smaller, X[:1])
    assert counted.cost == plan.after
    assert counted.macs < trace_layers(small, X[:1]).macs


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ConvTranspose2d(3, 16, 2, stride=2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 3)),
    ],
)
def test_the_network_itself_may_be_the_layer(layer):
    plan = obo.uniform_plan(layer, SHAPE, ranks=1.0)
    assert [option.site for option in plan.choices] == [""]
    assert_close(outputs(obo.apply(layer, plan, X)), outputs(layer), rtol=1e-4, atol=1e-5)


def test_what_is_frozen_stays_frozen():
    net = network()
    for parameter in net.grouped.parameters():
        parameter.requires_grad = False
    small = obo.apply(net, obo.uniform_plan(net, SHAPE, ranks=0.5), X)
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in small.named_parameters() if name.startswith("grouped.")}
