"""Plans that choose each layer's precision, of networks whose head can be rewritten exactly."""

import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone.calibration.inputs import as_calibration
from onebyone.core.budget import parse_budgets
from onebyone.core.records import CalibrationInfo, InputSpec
from onebyone.planning.choosing import plan_within
from onebyone.planning.latency.precision import prepare_int8
from onebyone.planning.mixed import translated, with_int8
from onebyone.planning.survey import survey

LAYERS = ("0", "2", "5.0")  # as surveyed, with the exact head
X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(512, 6)).eval()


@pytest.fixture(scope="module")
def found(net):
    return survey(net, as_calibration(X))


@pytest.mark.parametrize("harmful", LAYERS)
@pytest.mark.parametrize("budget", ["size=30%", "size=60%", "size=95%", "macs=60%"])
def test_what_stays_float32_are_layers_of_the_network_that_is_deployed(net, found, harmful, budget):
    assert found.exact is not None
    mixed = with_int8(found, LAYERS, {name: 1.0 * (name == harmful) for name in LAYERS})
    made = plan_within(
        mixed,
        parse_budgets(budget, found.before),
        network="net",
        inputs=InputSpec.of_shape(X.shape),
        calibration=CalibrationInfo(data="x", examples=len(X), seed=0),
    )
    made = translated(made, net, LAYERS)
    small = obo.restructure(net, made)
    names = {name for name, _ in small.named_modules()}
    kept = {item.site for item in made.float32_layers}
    assert kept <= names
    if made.precision == "int8":
        in_int8 = {n for n, m in small.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        assert in_int8 - kept
        alone = {item.site for item in made.left_alone if item.reason == "in int8 as it is"}
        assert alone <= names


def test_layers_of_equal_weights_are_told_apart():
    pytest.importorskip("onnxscript")
    layers = [nn.Conv2d(3, 3, 1) for _ in range(3)]
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
    network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).eval()
    before = {name: each.clone() for name, each in network.state_dict().items()}
    content = prepare_int8(lambda content, _: content, network, X[:1], float32=["2"])
    assert b"0.weight" in content
    assert all(torch.equal(network.state_dict()[name], each) for name, each in before.items())
