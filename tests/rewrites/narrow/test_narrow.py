"""Laws of narrowing: the function, the cost, the structure, and what it leaves as it was."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.errors import PlanError
from onebyone.core.records import InputSpec, Option, Plan
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites.low_rank import reduced_rank
from onebyone.rewrites.narrow import rewrite as narrow


class Block(nn.Module):
    """A residual block with a depthwise convolution and squeeze-and-excitation inside."""

    def __init__(self):
        super().__init__()
        self.expand, self.norm = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down, self.up = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 6, 1, bias=False)

    def forward(self, x):
        inner = self.depthwise(self.norm(self.expand(x)).relu())
        gate = self.up(self.down(inner.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x + self.project(inner * gate)


def network_of(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.PReLU(6),
        nn.ConvTranspose2d(6, 6, 2, stride=2), nn.ReLU(),
        Block(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 4),
    ).double()  # fmt: skip
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def inputs(n=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=generator)


def plan_of(network, widths):
    example = inputs(1)
    traced = trace_layers(network, example)
    layers = {layer.name: layer for layer in traced.layers}
    found = narrow.find(network, example)
    after, choices = traced.cost, []
    for site, width in widths.items():
        group = found.at(site)
        assert group is not None, found.reasons
        settings = {"channels": width}
        option = Option.of(
            "narrow",
            settings,
            site=site,
            before=narrow.cost(network, group, layers, None),
            after=narrow.cost(network, group, layers, settings),
            occupies=group.members,
        )
        choices.append(option)
        after = after - option.saved
    return Plan(
        network="n",
        inputs=InputSpec.of_shape((1, 3, 8, 8)),
        budgets=(),
        before=traced.cost,
        after=after,
        choices=tuple(choices),
        left_alone=(),
    )


SITES = {"0": 8, "3": 6, "7.expand": 12, "7.down": 4, "10": 10}


def test_every_kind_of_hidden_channels_is_found():
    found = narrow.find(network_of(), inputs(1))
    assert {group.site: group.channels for group in found.groups} == SITES
    assert "a sum" in found.reasons["5"]


@pytest.mark.parametrize("site", SITES)
def test_narrowed_network_costs_what_the_plan_says(site):
    network = network_of()
    plan = plan_of(network, {site: SITES[site] // 2})
    new = obo.apply(network, plan, inputs())
    assert trace_layers(new, inputs(1)).cost == plan.after
    assert plan.choices[0].saved.macs > 0


@pytest.mark.parametrize("site", SITES)
def test_full_width_changes_nothing(site):
    network = network_of()
    new = obo.apply(network, plan_of(network, {site: SITES[site]}), inputs())
    assert_close(new(inputs()), network(inputs()), rtol=0, atol=0)
    assert new.state_dict().keys() == network.state_dict().keys()


def ignoring_half(network, site):
    """Make the layers that read a site's channels ignore every second one of these."""
    group = narrow.find(network, inputs(1)).at(site)
    with torch.no_grad():
        for name in group.readers:
            layer = network.get_submodule(name)
            weight = layer.weight
            if isinstance(layer, nn.ConvTranspose2d):
                weight = weight.transpose(0, 1)
            each = weight.shape[1] // group.channels
            for channel in range(0, group.channels, 2):
                weight[:, channel * each : (channel + 1) * each] = 0


@pytest.mark.parametrize("site", SITES)
def test_channels_that_nothing_uses_are_removed_without_a_change(site):
    network = network_of()
    ignoring_half(network, site)
    new = obo.apply(network, plan_of(network, {site: SITES[site] // 2}), inputs())
    assert_close(new(inputs(8, seed=2)), network(inputs(8, seed=2)), rtol=1e-6, atol=1e-8)


def test_repeated_channels_are_removed_without_a_change():
    network = network_of()
    first, norm = network[0], network[1]
    with torch.no_grad():
        first.weight[4:] = first.weight[:4]
        first.bias[4:] = first.bias[:4]
        for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            values[4:] = values[:4]
    new = obo.apply(network, plan_of(network, {"0": 4}), inputs())
    given, expected = new(inputs(8, seed=2)), network(inputs(8, seed=2))
    assert_close(given, expected, rtol=0, atol=2e-3 * float(expected.detach().abs().max()))


def test_refitted_readers_are_nearer_than_those_that_only_lose_channels():
    network, data = network_of(), inputs()
    plan = plan_of(network, {"0": 5, "3": 4})
    fitted = obo.apply(network, plan, data)
    alone = obo.apply(network, plan, None)
    wanted, fresh = network(inputs(64, seed=2)), inputs(64, seed=2)
    errors = [float((each(fresh) - wanted).detach().square().mean()) for each in (fitted, alone)]
    assert errors[0] < 0.5 * errors[1]


def test_all_groups_of_a_chain_at_once():
    network = network_of()
    plan = plan_of(network, {site: width // 2 for site, width in SITES.items()})
    before = {key: value.clone() for key, value in network.state_dict().items()}
    new = obo.apply(network, plan, inputs())
    assert new(inputs()).isfinite().all()
    assert new[3].in_channels == 4
    assert new[3].out_channels == 3
    now = network.state_dict()
    assert all(torch.equal(before[key], now[key]) for key in before)


def test_structure_from_the_plans_file_takes_the_weights(tmp_path):
    network = network_of()
    plan = plan_of(network, {"0": 5, "7.expand": 7, "10": 3})
    new = obo.apply(network, plan, inputs())
    plan.save(tmp_path / "plan.json")
    blank = obo.restructure(network, tmp_path / "plan.json")
    blank.load_state_dict(new.state_dict())
    assert_close(blank(inputs()), new(inputs()), rtol=0, atol=0)


def test_frozen_layers_stay_frozen():
    network = network_of()
    network[0].requires_grad_(requires_grad=False)
    new = obo.apply(network, plan_of(network, {"0": 4}), inputs())
    assert not new[0].weight.requires_grad
    assert new[3].weight.requires_grad


@pytest.mark.parametrize("width", [0, 9, "4"])
def test_a_width_that_the_group_has_not_is_refused(width):
    network = network_of()
    plan = plan_of(network, {"0": 4})
    option = Option.of(
        "narrow",
        {"channels": width},
        site="0",
        before=plan.before,
        after=plan.after,
        occupies=plan.choices[0].occupies,
    )
    with pytest.raises(PlanError, match="must be a whole number from 1 up to 8"):
        obo.apply(network, replace(plan, choices=(option,)), inputs())


def test_a_site_that_shares_its_channels_is_refused():
    network = network_of()
    plan = plan_of(network, {"0": 4})
    wrong = replace(plan.choices[0], site="5")
    with pytest.raises(PlanError, match="'5' cannot be rewritten: a sum"):
        obo.restructure(network, replace(plan, choices=(wrong,)))


class Hidden(nn.Module):
    """Reads the mean over channels by a function that the data flow cannot tell from others."""

    def __init__(self, what):
        super().__init__()
        self.first, self.second, self.what = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), what

    def forward(self, x):
        return self.second(self.what(self, self.first(x)))


def test_what_relies_on_the_number_of_channels_is_refused():
    network = Hidden(lambda _, x: x + x.clone().fill_(x.shape[1]).relu())
    found = narrow.find(network.double().eval(), inputs(1))
    assert found.at("first") is None


def test_mean_over_channels_is_refused():
    network = Hidden(lambda _, x: x - x.mean(1, keepdim=True))
    found = narrow.find(network.double().eval(), inputs(1))
    assert found.at("first") is None


def test_shared_weights_are_refused():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)).double().eval()
    network[2].weight = network[0].weight
    found = narrow.find(network, inputs(1))
    assert "shared with another layer" in found.reasons["0"]


def test_hooks_are_not_lost():
    network = network_of()
    network[3].register_forward_hook(lambda *_: None)
    found = narrow.find(network, inputs(1))
    assert "has hooks" in found.reasons["0"]


def test_a_reader_of_many_outputs_is_refitted_as_well_in_the_space_of_its_outputs(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(8, 60)
    ).double()  # fmt: skip
    network.eval()
    x = inputs()
    plan = plan_of(network, {"0": 5})
    whole = obo.apply(network, plan, x, task="embedding")(x)
    monkeypatch.setattr(reduced_rank, "MANY_OUTPUTS", 16)
    spanned = obo.apply(network, plan, x, task="embedding")(x)
    assert_close(spanned, whole, rtol=0.02, atol=0.02)
    assert (spanned - whole).abs().max() > 0  # by other equations
