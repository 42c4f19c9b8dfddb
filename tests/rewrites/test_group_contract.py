"""Every rewrite of a group keeps the contract, which catches one that does not; packages add theirs."""

import importlib.metadata
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.core import plugins
from onebyone.core.errors import ContractError, PlanError, PluginError, UnknownNameError
from onebyone.core.records import Step
from onebyone.networks.channel_groups import FoundGroups
from onebyone.rewrites import group_contract
from onebyone.rewrites.contract import check_rewrite
from onebyone.rewrites.narrow import rewrite as narrow
from onebyone.rewrites.registry import (
    GROUP_METHODS,
    GROUP_REWRITES,
    group_rewrite,
    group_rewrites,
    is_group_rewrite,
    layer_rewrite,
    layer_rewrites,
)


@pytest.mark.parametrize("name", GROUP_REWRITES)
def test_every_rewrite_of_a_group_keeps_the_contract(name):
    check_rewrite(GROUP_REWRITES[name], name=name)


def test_every_network_but_the_last_has_a_group_to_try():
    counts = [
        len(narrow.find(case.network, case.example[:2]).groups) for case in group_contract._cases()
    ]
    assert all(counts[:-1])
    assert counts[-1] == 0


# ---------------------------------------------------------------- faults


def altered(**functions):
    """Return `narrow` with some of its functions replaced."""
    kept = {name: getattr(narrow, name) for name in GROUP_METHODS}
    return SimpleNamespace(**{**kept, **functions})


def costing(**changes):
    """Return costs of options that are less than counted by so much."""

    def cost(network, group, layers, settings):
        found = narrow.cost(network, group, layers, settings)
        if settings is None:
            return found
        return replace(found, **{what: getattr(found, what) - by for what, by in changes.items()})

    return cost


def fitted(**functions):
    """Return fits of which some functions are replaced; each is given the true fits first."""

    def fits(network, group, problems):
        true = narrow.fits(network, group, problems)
        kept = {name: getattr(true, name) for name in ("error", "stand_ins", "carried_out")}
        mine = {n: lambda s, f=function: f(true, s) for n, function in functions.items()}
        return SimpleNamespace(**{**kept, **mine})

    return fits


def writing(network, example):
    with torch.no_grad():
        next(network.parameters()).mul_(2)
    return narrow.find(network, example)


def silent(network, example):
    found = narrow.find(network, example)
    return FoundGroups(found.groups, dict.fromkeys(found.reasons, ""))


def unfitted(true, settings):
    network = narrow.build(true.network, true.group, settings)
    return network, true.error(settings)


def accepting(group, settings):
    return settings == {} or narrow.is_exact(group, settings)


def of_old_readers(true, settings):
    return {name: true.network.get_submodule(name) for name in true.group.readers}


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ({"cost": costing(macs=1)}, "save .* MACs, as counted, not"),
        ({"cost": costing(params=1)}, "save .* parameters, as counted, not"),
        ({"cost": costing(bytes=4)}, "save .* bytes of weights, as counted, not"),
        ({"find": writing}, "not modify the network"),
        ({"find": silent}, "say in words why it does not take a group"),
        ({"find": lambda network, example: FoundGroups((), {})}, "at least one of the networks"),
        ({"find": lambda network, example: FoundGroups((), {"x": "no"})}, "by names of modules"),
        ({"why_other": lambda network, example, groups: "no"}, "no reason against the groups"),
        ({"is_exact": lambda group, settings: False}, "keep the function with all 8 channels"),
        ({"is_exact": lambda group, settings: True}, "be the same function where"),
        ({"is_exact": accepting}, "PlanError that names '0', got: nothing was raised"),
        ({"fits": fitted(error=lambda true, settings: 0.0)}, "it promises, 0, not"),
        ({"fits": fitted(carried_out=unfitted)}, "the same from its stand-ins as carried out"),
        ({"fits": fitted(stand_ins=of_old_readers)}, "the same from its stand-ins as carried out"),
        ({"fits": fitted(stand_ins=lambda true, settings: {})}, "stand-ins of the group's readers"),
        ({"build": lambda network, group, settings: network}, "it failed: RuntimeError"),
        ({"grid": None}, "must have the functions find, why_other"),
    ],
)
def test_a_fault_is_caught(functions, words):
    with pytest.raises(ContractError, match=words):
        check_rewrite(altered(**functions), name="mine")


# ---------------------------------------------------------------- of another package


def keep():
    """Return a rewrite that says of groups how many channels stay, in a word of its own."""

    def own(settings):
        return None if settings is None else {"channels": settings.get("keep")}

    return SimpleNamespace(
        find=narrow.find,
        why_other=narrow.why_other,
        is_exact=lambda group, settings: narrow.is_exact(group, own(settings)),
        grid=lambda group: [{"keep": group.channels // 2}],
        cost=lambda network, group, layers, settings: narrow.cost(
            network, group, layers, own(settings)
        ),
        build=lambda network, group, settings: narrow.build(network, group, own(settings)),
        fits=lambda network, group, problems: SimpleNamespace(
            error=lambda settings: narrow.fits(network, group, problems).error(own(settings)),
            stand_ins=lambda settings: narrow.fits(network, group, problems).stand_ins(
                own(settings)
            ),
            carried_out=lambda settings: narrow.fits(network, group, problems).carried_out(
                own(settings)
            ),
        ),
    )


@pytest.fixture
def installed(monkeypatch):
    """Install entry points as if they were of another package: names by their group."""
    made = SimpleNamespace(keep=keep(), nothing=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "toy_groups", made)

    def install(**names):
        entries = {
            group: tuple(
                importlib.metadata.EntryPoint(name, f"toy_groups:{name}", f"onebyone.{group}")
                for name in found
            )
            for group, found in names.items()
        }
        monkeypatch.setattr(
            plugins, "_entries", lambda group: entries.get(group.removeprefix("onebyone."), ())
        )

    return install


def network():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU())
    return made.double().eval()


X = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_rewrite_of_another_package_keeps_the_contract_too():
    check_rewrite(keep(), name="keep")


def test_a_rewrite_of_another_package_is_in_plans_and_is_carried_out(installed, tmp_path):
    installed(group_rewrites=["keep"])
    net = network()
    assert "keep" in group_rewrites()
    assert is_group_rewrite("keep")
    assert any(
        row.rewrite == "keep" and row.kind == "group" for row in obo.applies(net, X[:1]).sites
    )
    plan = obo.plan(net, X, budget="macs=75%", head="keep")
    (choice,) = [option for option in plan.choices if option.first.rewrite in ("keep", "narrow")][
        :1
    ]
    ours = replace(choice, steps=(Step(rewrite="narrow", settings={"channels": 8}),))
    theirs = replace(choice, steps=(Step(rewrite="keep", settings={"keep": 8}),))
    path = tmp_path / "plan.json"
    replace(plan, choices=(theirs,)).save(path)
    found = obo.apply(net, obo.Plan.load(path), X)
    assert found[0].out_channels == 8
    with torch.no_grad():
        assert_close(found(X), obo.apply(net, replace(plan, choices=(ours,)), X)(X))


def test_a_plan_may_choose_a_rewrite_of_another_package(installed, monkeypatch):
    installed(group_rewrites=["keep"])
    monkeypatch.setattr(narrow, "grid", lambda group: [])
    monkeypatch.setattr("onebyone.planning.layer_options.layer_rewrites", dict)
    plan = obo.plan(network(), X, budget="macs=80%", head="keep")
    assert [option.first for option in plan.choices] == [Step(rewrite="keep", settings={"keep": 8})]
    assert obo.apply(network(), plan, X)[0].out_channels == 8


def test_an_unknown_rewrite_lists_what_packages_add(installed):
    installed(group_rewrites=["keep"])
    with pytest.raises(UnknownNameError, match=r"'kepp'.*keep"):
        group_rewrite("kepp")


def test_a_rewrite_of_a_group_is_no_further_step(installed):
    installed(group_rewrites=["keep"])
    net = network()
    plan = obo.plan(net, X, budget="macs=75%", head="keep")
    first = Step(rewrite="factorize", settings={"form": "reduce", "ranks": [2]})
    two = replace(plan.choices[0], steps=(first, Step(rewrite="keep", settings={"keep": 8})))
    with pytest.raises(PlanError, match=r"'keep' .* must be a rewrite of one layer .* the group"):
        obo.apply(net, replace(plan, choices=(two,)), X)


def test_a_rewrite_among_those_of_the_other_kind_is_told_where_it_belongs(installed):
    installed(rewrites=["keep"])
    with pytest.raises(PluginError, match=r"has the functions of 'onebyone\.group_rewrites'"):
        layer_rewrite("keep")
    with pytest.warns(UserWarning, match=r"Left out: 'keep'"):
        assert "keep" not in layer_rewrites()


def test_a_rewrite_without_its_functions_is_left_out(installed):
    installed(group_rewrites=["nothing"])
    with pytest.raises(PluginError, match=r"find, why_other, .* is missing"):
        group_rewrite("nothing")
    with pytest.warns(UserWarning, match=r"Left out: 'nothing'"):
        assert list(group_rewrites()) == list(GROUP_REWRITES)


def test_one_name_of_two_kinds_is_refused(installed):
    installed(rewrites=["keep"], group_rewrites=["keep"])
    with pytest.raises(PluginError, match=r"adds 'keep' to onebyone\.group_rewrites"):
        group_rewrites()
