"""A layer that a network runs by another reference than its name is never called rewritten."""

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.errors import ModelError, PlanError
from onebyone.networks.dataflow import find_neighbours
from onebyone.networks.surgery import replace_module
from onebyone.planning.uniform import uniform_plan
from onebyone.training.temporary_norms import norm_sites

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Held(nn.Module):
    """A convolution, a norm and a ReLU between layers that are run by their names."""

    def __init__(self, hold):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.n = nn.BatchNorm2d(16)
        self.r = nn.ReLU()
        self.d = nn.Linear(16, 4)
        hold(self)

    def forward(self, x):
        return self.d(self.r(self.held(self.a(x))).mean((2, 3)))


def as_an_attribute(net):
    for name in ("b", "n", "r"):
        object.__setattr__(net, f"_{name}", getattr(net, name))


def as_parts(net):
    net.parts = {name: functools.partial(getattr(net, name)) for name in ("b", "n", "r")}


class ByList(Held):
    def __init__(self):
        super().__init__(lambda net: setattr(net, "steps", [net.b, net.n, net.r]))

    def held(self, x):
        for step in self.steps:
            x = step(x)
        return x


class ByAttribute(Held):
    def __init__(self):
        super().__init__(as_an_attribute)

    def held(self, x):
        return self._r(self._n(self._b(x)))


class ByParts(Held):
    def __init__(self):
        super().__init__(as_parts)

    def held(self, x):
        return self.parts["r"](self.parts["n"](self.parts["b"](x)))


class ByName(Held):
    def __init__(self):
        super().__init__(lambda net: None)
        self.parent = [self.b]  # kept, but not used to run it

    def held(self, x):
        return self.r(self.n(self.b(x)))


KINDS = pytest.mark.parametrize("kind", [ByList, ByAttribute, ByParts])


@KINDS
def test_such_layers_are_found_and_no_others(kind):
    assert find_neighbours(kind().eval(), X).called_elsewhere == {"b", "n", "r"}
    assert not find_neighbours(ByName().eval(), X).called_elsewhere


@KINDS
def test_the_network_stays_as_it_is(kind):
    net = kind().eval()
    before, modules = net(X), dict(net.named_modules())
    find_neighbours(net, X)
    assert dict(net.named_modules()) == modules
    assert_close(net(X), before, rtol=0, atol=0)


@KINDS
def test_no_rewrite_takes_them(kind):
    net = kind().eval()
    reasons = {s.rewrite: s.reason for s in obo.applies(net, X).sites if s.site == "b"}
    assert all("by another reference than its name" in str(r) for r in reasons.values()), reasons
    chosen = {choice.site for choice in obo.uniform_plan(net, tuple(X.shape), ranks=0.5).choices}
    assert "b" not in chosen
    _, folded = obo.fold(net, X)
    assert not folded.choices
    assert any("by another reference" in left.reason for left in folded.left_alone)
    assert "b" not in norm_sites(net.train(), X)
    with pytest.raises(ModelError, match="by another reference than its name"):
        obo.deepen(net, X)


@KINDS
def test_a_plan_made_for_another_network_is_refused_there(kind):
    plan = uniform_plan(ByName().eval(), tuple(X.shape), ranks=0.5)
    assert "b" in {choice.site for choice in plan.choices}
    with pytest.raises(PlanError, match="by another reference than its name"):
        obo.apply(kind().eval(), plan, X)


def test_what_is_run_by_its_name_is_rewritten_though_it_is_held_too():
    net = ByName().eval()
    plan = uniform_plan(net, tuple(X.shape), ranks=0.5)
    small = obo.apply(net, plan, X)
    assert not torch.equal(small(X), net(X))
    broken = replace_module(small, "b", nn.Conv2d(16, 16, 3, padding=1))
    assert not torch.equal(broken(X), net(X))


class Compares(ByList):
    """Its forward tells its layers apart by identity."""

    def held(self, x):
        for step in self.steps:
            assert any(step is each for each in self.children())
            x = step(x)
        return x


def test_a_network_that_compares_its_layers_can_still_be_looked_at():
    found = find_neighbours(Compares().eval(), X)
    assert [call.module for call in found.calls] == ["", "a", "b", "n", "r", "r", "d"]
