"""Weights that are not finite are refused by name at every public entrance."""

import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone.core.errors import WeightsError
from onebyone.networks.surgery import check_finite, first_nonfinite_layer

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


GOOD = net()
PLAN = obo.uniform_plan(GOOD, X[:1])
CALLS = {
    "applies": lambda n: obo.applies(n, X[:1]),
    "uniform_plan": lambda n: obo.uniform_plan(n, X[:1]),
    "plan": lambda n: obo.plan(n, X, budget="macs=50%"),
    "apply": lambda n: obo.apply(n, PLAN, X),
    "restructure": lambda n: obo.restructure(n, PLAN),
    "fold": lambda n: obo.fold(n, X[:1]),
    "deepen": lambda n: obo.deepen(n, X[:1]),
    "evaluate": lambda n: obo.evaluate(n, (X, Y)),
    "compare": lambda n: obo.compare(GOOD, n, input_shape=(1, 3, 8, 8), rounds=3),
    "train": lambda n: obo.train(n, (X, Y), epochs=1),
    "distill": lambda n: obo.distill(GOOD, X, teacher=n, epochs=1),
    "reconstruct": lambda n: obo.reconstruct(n, teacher=GOOD, calibration=X),
    "bench": lambda n: obo.bench(n, input_shape=(1, 3, 8, 8), runtimes=("eager",)),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CALLS)
def test_every_entrance_refuses_and_names_the_tensor(name, value):
    network = net()
    with torch.no_grad():
        network[3].weight[0, 1, 2, 2] = value
    with pytest.raises(WeightsError, match=r"1 of 2,304 values of '3.weight' are NaN or infinite"):
        CALLS[name](network)


def test_export_refuses_before_anything_is_written(tmp_path):
    network = net()
    network[1].running_var[2] = float("nan")
    with pytest.raises(WeightsError, match=r"'1.running_var'"):
        obo.export(network, tmp_path / "out", formats=["pt2"], data=X)
    assert not (tmp_path / "out").exists()


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1), persistent=False)

    def forward(self, x):
        return (self.linear(x).unsqueeze(1) + self.mask).softmax(-1).sum(1)


def test_a_mask_may_be_infinite_and_not_nan():
    network = Masked()
    check_finite(network)
    network.mask[0, 1] = torch.nan
    with pytest.raises(WeightsError, match=r"values of 'mask'"):
        check_finite(network)


def test_types_without_a_test_for_it_are_looked_at_too():
    network = nn.Linear(2, 2)
    values = torch.tensor([[1.0, torch.nan], [0, 0]])
    network.weight = nn.Parameter(values.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(WeightsError, match=r"1 of 4 values of 'weight'"):
        check_finite(network)
    with pytest.raises(WeightsError, match=r"1 of 1 values of '0.weight'"):
        check_finite(nn.Sequential(complex_layer()))


def complex_layer():
    layer = nn.Linear(1, 1, bias=False, dtype=torch.complex64)
    with torch.no_grad():
        layer.weight.fill_(complex(0, torch.inf))
    return layer


def test_the_first_layer_that_overflows_is_named():
    network = net().half()
    assert first_nonfinite_layer(net(), X) is None
    with torch.no_grad():
        network[3].weight.fill_(6e4)
    assert first_nonfinite_layer(network, X.half()) == "3"
    assert not any(module._forward_hooks for module in network.modules())
