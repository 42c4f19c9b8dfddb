"""Subnormal weights are set to zero first, in a copy, and apart from what rewrites give."""

import pytest
import torch
from torch import nn

import onebyone
from onebyone import apply, flush_subnormals, plan, profile, uniform_plan
from onebyone.networks.subnormals import count_near, count_subnormals
from onebyone.rewrites import flush

SHAPE = (1, 3, 10, 12)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    with torch.no_grad():
        net[3].weight[:, ::3] = 1e-40
        net[0].weight[0] = 1e-36
        net[1].running_var[2] = 1e-41
    return net.eval()


def values_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def is_clean(network):
    return not count_subnormals(network) and not count_near(network)


def test_the_copy_gives_the_same_outputs_and_the_original_stays(net):
    x, before = torch.randn(4, *SHAPE[1:]), values_of(net)
    flushed, record = flush_subnormals(net, x)
    torch.testing.assert_close(flushed(x), net(x), rtol=1e-6, atol=1e-6)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), values_of(net).values(), strict=True)
    )
    assert is_clean(flushed)
    assert record.exact
    assert record.weights == {"3.weight": 16 * 6 * 9, "1.running_var": 1}
    assert record.near == {"0.weight": 27}


def test_a_network_without_them_is_copied_and_nothing_is_told(net):
    clean, _ = flush_subnormals(net, SHAPE)
    again, record = flush_subnormals(clean, SHAPE)
    assert record is None
    assert again is not clean


class Rescaled(nn.Module):
    """Divides by its weights' size: what is subnormal is all that it has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1e-39, 2e-39, 4e-39]))

    def forward(self, x):
        return x * (self.weight.double() / self.weight.double().max()).float()


def test_weights_that_the_outputs_need_are_kept_and_it_is_told():
    net = Rescaled().eval()
    kept, record = flush_subnormals(net, torch.ones(2, 3))
    assert not record.exact
    assert torch.equal(kept.weight, net.weight)
    assert any("left as they are" in line for line in record.lines())


def test_a_profile_names_them_with_their_counts(net):
    found = profile(net, input_shape=SHAPE, timed=False).subnormals
    assert found.count == 16 * 6 * 9 + 1
    assert found.activations == {}
    text = " ".join(str(profile(net, input_shape=SHAPE, timed=False)).split())
    assert "Subnormal weights (below the smallest normal number" in text
    assert "`onebyone.flush_subnormals` sets them to zero: the outputs are the same" in text


def test_a_profile_with_times_has_those_with_and_without_them(net):
    found = profile(net, input_shape=SHAPE, num_threads=1, rounds=3).subnormals
    assert set(found.before) == set(found.after) == set(found.ratio) == {"eager"}


@pytest.mark.parametrize("data", [True, False])
def test_a_plan_is_carried_out_without_them_in_old_layers_and_new_ones(net, data):
    made = uniform_plan(net, SHAPE, ranks=0.5, leave=["0"])
    small = apply(net, made, torch.randn(32, *SHAPE[1:]) if data else None)
    assert made.choices
    assert is_clean(small)


def test_a_plan_tells_of_them_apart_from_its_choices(net):
    made = plan(net, torch.randn(32, *SHAPE[1:]), budget="macs=70%")
    assert made.subnormals.count == 16 * 6 * 9 + 1
    assert "They were set to zero before all else" in " ".join(str(made).split())
    assert type(made).from_json(made.to_json()) == made


def test_the_plan_of_a_flushed_network_is_the_same(net):
    x = torch.randn(8, *SHAPE[1:])
    clean = flush_subnormals(net, x).model
    assert plan(net, x, budget="macs=70%").choices == plan(clean, x, budget="macs=70%").choices


def test_the_step_is_public():
    assert onebyone.flush_subnormals is flush.flush_subnormals
