"""Options of groups of layers: listed, measured and timed as what they are carried out as."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.inputs import as_calibration
from onebyone.core.records import InputSpec, Step
from onebyone.networks.channel_groups import channel_groups
from onebyone.planning import plan_from
from onebyone.planning.groups import GroupProblems, GroupSite
from onebyone.planning.latency.group_chain import group_chain, group_text
from onebyone.planning.survey import survey
from onebyone.profiling.trace import trace_layers

X = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Excited(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.norm = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        inner = self.norm(self.expand(x)).relu()
        gate = self.up(self.down(inner.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x + self.project(inner * gate)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), Excited(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return as_calibration(X, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def found(network, data):
    return survey(network, data)


def narrow_options(found):
    return [option for option in found.options if option.first.rewrite == "narrow"]


def only(found, options, budget):
    part = replace(found, options=tuple(options))
    return plan_from(
        part, budget, network="n", inputs=InputSpec.of_shape((1, 3, 8, 8)), calibration=None
    )


def test_survey_lists_widths_of_each_group_with_fewer_macs_and_more_harm(found):
    sites = {option.site for option in narrow_options(found)}
    assert sites == {"0", "5.expand", "5.down"}
    assert {group.site for group in found.groups} == sites
    for site in sites:
        mine = [option for option in narrow_options(found) if option.site == site]
        mine.sort(key=lambda option: option.after.macs)
        errors = [option.error for option in mine]
        assert errors == sorted(errors, reverse=True)
        assert any(option.measured for option in mine)
        assert all(option.saved.macs > 0 and option.harm >= 0 for option in mine)


@pytest.mark.parametrize("site", ["0", "5.expand"])
def test_measured_harm_is_that_of_the_network_carried_out(network, data, found, site):
    meaning = meaning_of(network, data, device="cpu")
    mine = [o for o in narrow_options(found) if o.site == site and o.measured]
    option = max(mine, key=lambda option: option.harm)
    made = only(found, [option], f"macs={found.before.macs - option.saved.macs}")
    assert made.choices == (option,)
    new = obo.apply(network, made, data)
    with torch.no_grad():
        outputs = [((each(X),)) for each in (network, new)]
    reached = float(meaning.divergence(*outputs).double().mean())
    assert reached == pytest.approx(option.harm, rel=0.25)


def test_plan_of_groups_costs_what_it_says_and_uses_no_layer_twice(network, data, found):
    made = only(found, found.options, "macs=40%")
    occupied = [name for option in made.choices for name in option.occupies]
    assert len(occupied) == len(set(occupied))
    made = only(found, narrow_options(found), "macs=70%")
    assert {option.first.rewrite for option in made.choices} == {"narrow"}
    new = obo.apply(network, made, data)
    assert trace_layers(new, X[:1]).cost == made.after


def test_group_with_a_layer_that_is_left_alone_has_no_options(network, data):
    left = survey(network, data, leave=["5.norm"])
    assert {option.site for option in narrow_options(left)} == {"0", "5.down"}


@pytest.mark.parametrize("site", ["0", "5.down"])
def test_timed_chain_gives_what_the_group_gives_in_the_network(network, site):
    group = channel_groups(network, X[:2]).at(site)
    seen = {}
    handles = [
        network.get_submodule(site).register_forward_hook(lambda _, x, __: seen.update(x=x[0])),
        network.get_submodule(group.readers[-1]).register_forward_hook(
            lambda _, __, y: seen.update(y=y)
        ),
    ]
    with torch.no_grad():
        network(X[:2])
        for handle in handles:
            handle.remove()
        assert_close(group_chain(network, group, ())(seen["x"]), seen["y"])


def test_timed_chain_of_a_width_is_as_wide(network):
    group = channel_groups(network, X[:2]).at("5.expand")
    step = Step(rewrite="narrow", settings={"channels": 6})
    chain = group_chain(network, group, [step])
    assert chain[0].out_channels == 6
    assert chain[-1].in_channels == 6
    assert network[5].expand.out_channels == 16
    with torch.no_grad():
        assert chain(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)


def test_time_depends_on_what_is_done_between(network):
    texts = {
        group_text(network, channel_groups(network, X[:2]).at(site)) for site in ("0", "5.down")
    }
    assert len(texts) == 2
    assert any("relu" in text for text in texts)


def test_groups_wait_for_all_their_readers(network):
    group = channel_groups(network, X[:2]).at("5.expand")
    problems = GroupProblems([GroupSite("narrow", group, ())])
    assert list(problems.seen("0", "zero")) == []
    assert list(problems.seen("5.down", "first")) == []
    ((site, found),) = problems.seen("5.project", "second")
    assert (site.group, found) == (group, ["first", "second"])


def test_applies_tells_of_each_group(network):
    said = {s.site: s.reason for s in obo.applies(network, X[:1]).sites if s.rewrite == "narrow"}
    assert said["0"] is None
    assert "a sum" in said["2"]
    assert "output of the network" in said["8"]
