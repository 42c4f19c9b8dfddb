"""What a network is given is never written into, whatever its forward does."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.calibration.curvature import output_curvature
from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.inputs import as_calibration
from onebyone.core.tensor_trees import fresh
from onebyone.evaluation.class_maps import class_activation
from onebyone.networks.dataflow import find_neighbours
from onebyone.networks.surgery import outputs_of_modules, run, writes_into_inputs
from onebyone.profiling.activation_memory import peak_activation_bytes
from onebyone.profiling.trace import trace_layers
from onebyone.runtimes import find_runtime

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


class Adds(nn.Module):
    def forward(self, x):
        x += 1
        return x


class Scales(nn.Module):
    def forward(self, x):
        return x.mul_(0.5)


class ThroughAView(nn.Module):
    def forward(self, x):
        x.view(-1)[::2].zero_()
        return x


WRITERS = [lambda: nn.ReLU(inplace=True), Adds, Scales, ThroughAView]


def net(first):
    torch.manual_seed(0)
    return nn.Sequential(
        first(), nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


def plain(first):
    """Return the network with a first layer that gives the same and writes nowhere."""

    class OnACopy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = first()

        def forward(self, x):
            return self.first(x.clone())

    return net(OnACopy)


CALLS = {
    "trace_layers": lambda n, x: trace_layers(n, x).macs,
    "applies": lambda n, x: [s.reason for s in obo.applies(n, x).sites],
    "find_neighbours": lambda n, x: len(find_neighbours(n, x).calls) > 0,
    "peak_activation_bytes": lambda n, x: peak_activation_bytes(n, x) > 0,
    "uniform_plan": lambda n, x: obo.uniform_plan(n, x).choices,
    "plan": lambda n, x: [
        (o.site, o.first.settings) for o in obo.plan(n, x, budget="macs=60%", head="keep").choices
    ],
    "apply": lambda n, x: obo.apply(n, obo.uniform_plan(n, x, ranks=0.3), x)(x.clone()).detach(),
    "curvature": lambda n, x: output_curvature(
            n, ["1"], as_calibration(x).batches, meaning=meaning_of(n, as_calibration(x), "classification")
        )["1"],
    "fold": lambda n, x: len(obo.fold(n, x)[1].choices),
    "deepen": lambda n, x: [o.site for o in obo.deepen(n, x)[1].choices],
    "evaluate": lambda n, x: obo.evaluate(n, (x, Y)).value,
    "compare": lambda n, x: [
        c.divergence for c in obo.compare(n, n, data=(x, Y), rounds=3).contenders
    ],
    "train": lambda n, x: obo.train(n, (x, Y), epochs=1, batch_size=8, precision="float32")
    .model[1].weight.detach(),
    "distill": lambda n, x: obo.distill(
        n, x, teacher=n, epochs=1, batch_size=8, learning_rate=1e-3, precision="float32"
    ).log.epochs[0].loss,
    "reconstruct": lambda n, x: obo.reconstruct(
        n, teacher=n, calibration=x, steps=2
    ).model[1].weight.detach(),
    "class_activation": lambda n, x: class_activation(n, x).maps,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_users_inputs_stay_and_the_results_are_those_of_a_network_that_does_not_write(name):
    for first in WRITERS[:2]:
        x = X.clone()
        found = CALLS[name](net(first), x)
        assert torch.equal(x, X)
        if isinstance(found, torch.Tensor | float):
            # A layer more may be one more name, and no other number.
            if isinstance(found, torch.Tensor) and name == "curvature":
                continue
            expected = CALLS[name](plain(first), X.clone())
            assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", WRITERS)
def test_writing_is_found_and_a_run_is_given_a_copy(first):
    x = X.clone()
    assert writes_into_inputs(net(first), x)
    assert not writes_into_inputs(plain(first), x)
    run(net(first), x)
    assert torch.equal(x, X)


@pytest.mark.parametrize("runtime", ["eager", "channels-last", "packed", "onnxruntime"])
def test_a_runtime_gives_the_same_at_each_call(runtime):
    if not find_runtime(runtime).installed:
        pytest.skip(f"{runtime} is not installed")
    x = X[:1].clone()
    prepared = find_runtime(runtime).prepare(net(Scales), x)
    first = torch.as_tensor(next(iter(torch.utils._pytree.tree_leaves(prepared())))).clone()
    again = torch.as_tensor(next(iter(torch.utils._pytree.tree_leaves(prepared()))))
    assert_close(again, first)
    assert_close(first, net(Scales)(X[:1].clone()).detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, X[:1])


@pytest.mark.parametrize("first", WRITERS)
def test_folds_and_sites_are_those_of_a_network_that_does_not_write(first):
    x = X[:1].clone()
    folded, _ = obo.fold(net(first), x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())

    def sites(network):
        found = obo.applies(network, x).sites
        return {(each.site, each.rewrite, each.reason) for each in found if each.site > "1"}

    assert sites(net(first)) == sites(plain(first))
    assert torch.equal(x, X[:1])


def test_an_exported_network_does_not_write_into_what_its_file_is_given(tmp_path):
    obo.export(net(Adds), tmp_path, formats=["pt2"], data=X)
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = X.clone()
    assert_close(program(x), net(Adds)(X.clone()))
    assert torch.equal(x, X)


def test_fresh_inputs_are_copies_all_the_way_down():
    given = {"a": [X, (X[:1],)], "b": 3}
    made = fresh(given)
    made["a"][0].zero_()
    made["a"][1][0].zero_()
    made["a"].clear()
    assert X.abs().sum() > 0
    assert len(given["a"]) == 2
    assert made["b"] == 3


def test_kept_outputs_of_a_module_are_those_before_an_activation_in_place():
    network = net(nn.Identity)
    with outputs_of_modules(network, ["2"]) as kept, torch.no_grad():
        network(X)
        assert_close(kept["2"], network[:3](X))


def test_inputs_that_need_a_gradient_or_come_from_inference_mode_will_do():
    with torch.inference_mode():
        inside = torch.randn(8, 3, 8, 8)
    network = net(lambda: nn.ReLU(inplace=True))
    for x in (X.clone().requires_grad_(), inside):
        assert obo.plan(network, x.detach() if x.requires_grad else x, budget="macs=90%").choices
        assert trace_layers(network, x).macs
        trained = obo.train(network, (x.detach(), torch.arange(len(x)) % 4), epochs=1, batch_size=4)
        assert trained.log.epochs
