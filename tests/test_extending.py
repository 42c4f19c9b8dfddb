"""What docs/extending.md shows is what works, in a plan and in `bench`."""

import importlib.metadata
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone.core import plugins
from onebyone.core.errors import PluginError, UnknownNameError
from onebyone.core.records import Step
from onebyone.rewrites import registry
from onebyone.rewrites.registry import layer_rewrite, layer_rewrites

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def blocks(language):
    return re.findall(
        rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
    )


@pytest.fixture
def page(monkeypatch):
    """Execute the page's blocks, and install what it makes as if it were a package's."""
    thin = types.ModuleType("page_thin")
    rewrite, check, runtime, check_runtime = blocks("python")
    exec(rewrite, vars(thin))
    scope = {"thin": thin}
    for block in (check, runtime, check_runtime):
        exec(block, scope)
    made = types.ModuleType("page_runtimes")
    made.double = scope["double"]
    monkeypatch.setitem(sys.modules, "page_thin", thin)
    monkeypatch.setitem(sys.modules, "page_runtimes", made)
    entries = {
        "onebyone.rewrites": ("thin", "page_thin"),
        "onebyone.runtimes": ("double", "page_runtimes:double"),
    }

    def entry_points(group):
        if group not in entries:
            return ()
        name, value = entries[group]
        return (importlib.metadata.EntryPoint(name, value, group),)

    monkeypatch.setattr(plugins, "_entries", entry_points)


def network():
    torch.manual_seed(0)
    low = nn.Linear(64, 48)
    with torch.no_grad():  # of rank 4: the rewrite loses nothing there
        low.weight.copy_(torch.randn(48, 4) @ torch.randn(4, 64) / 8)
    return nn.Sequential(nn.Flatten(), low, nn.ReLU(), nn.Linear(48, 3)).eval()


def test_the_entry_points_are_those_of_the_page():
    assert set(re.findall(r'entry-points\."(.*?)"', "".join(blocks("toml")))) == {
        registry.PLUGINS,
        registry.GROUP_PLUGINS,
        "onebyone.runtimes",
    }


def test_a_rewrite_of_another_package_is_in_plans_and_is_carried_out(page):
    net, inputs = network(), torch.randn(64, 64)
    assert "thin" in layer_rewrites()
    reasons = obo.applies(net, (1, 64))
    assert any(row.rewrite == "thin" and row.reason is None for row in reasons.sites)
    plan = obo.plan(net, inputs, budget="macs=60%", leave=["3"])
    (choice,) = plan.choices
    thin = replace(choice, steps=(Step(rewrite="thin", settings={"rank": 4}),))
    small = obo.apply(net, replace(plan, choices=(thin,)), inputs)
    with torch.no_grad():
        torch.testing.assert_close(small(inputs), net(inputs), rtol=1e-4, atol=1e-5)
    assert isinstance(small[1], nn.Sequential)


def test_a_runtime_of_another_package_is_timed(page):
    record = obo.bench(network(), input_shape=(1, 64), runtimes=["eager", "double"], rounds=3)
    assert [entry.runtime for entry in record.entries] == ["eager", "double"]
    assert record.entries[1].same


def test_an_unknown_rewrite_lists_what_packages_add(page):
    with pytest.raises(UnknownNameError, match="'thin'"):
        layer_rewrite("thim")


def test_a_rewrite_without_its_functions_is_refused(page, monkeypatch):
    monkeypatch.delattr(sys.modules["page_thin"], "fit")
    with pytest.raises(PluginError, match="fit"):
        layer_rewrite("thin")
