import importlib.util

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onebyone import runtimes
from onebyone.errors import MissingExtraError, ModelError, UnknownNameError
from onebyone.records import Machine
from onebyone.runtimes import RUNTIMES, Runtime, describe_machine, find_runtime


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.9))


@pytest.mark.parametrize("name", ["eager", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 8, 8)])
def test_a_runtime_gives_what_the_network_gives_in_evaluation_mode(name, shape):
    net, x = network(), torch.randn(2, 3, 8, 8)
    if len(shape) == 3:
        net, x = nn.Linear(8, 4), torch.randn(3, 8, 8)
    forward = find_runtime(name).prepare(net, x)
    output = forward()
    assert_close(output.clone(), net.eval()(x).detach())
    assert output.is_inference()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="an extra")
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_gives_what_the_network_gives():
    net, x = network().eval(), torch.randn(2, 3, 8, 8)
    (output,) = find_runtime("onnxruntime").prepare(net, x)()
    assert_close(torch.from_numpy(output), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_each_runtime_goes_by_its_own_name():
    assert all(name == runtime.name for name, runtime in RUNTIMES.items())
    assert find_runtime("eager").installed
    assert torch.__version__.startswith(find_runtime("eager").version)


def test_an_unknown_runtime_is_told_its_neighbor():
    with pytest.raises(
        UnknownNameError, match=r"No runtime named 'onnxrt'. Did you mean 'onnxruntime'"
    ):
        find_runtime("onnxrt")


def test_a_runtime_whose_package_is_missing_says_how_to_install_it(monkeypatch):
    absent = Runtime("absent", lambda model, example: int, package="no_such_package", extra="onnx")
    monkeypatch.setitem(runtimes.RUNTIMES, "absent", absent)
    with pytest.raises(
        MissingExtraError, match=r"'absent' needs the package 'no_such_package'.*onebyone\[onnx\]"
    ):
        find_runtime("absent")


def test_a_network_that_cannot_be_copied_is_refused():
    net = nn.Linear(3, 3)
    net.kept = net.weight * 2
    with pytest.raises(ModelError, match="must be deep-copyable"):
        find_runtime("eager").prepare(net, torch.randn(1, 3))


def test_the_machine_is_described_and_saved():
    machine = describe_machine()
    assert machine.threads == torch.get_num_threads()
    assert machine.cores >= 1
    assert machine.processor
    assert torch.__version__.startswith(machine.versions["torch"])
    assert Machine.from_json(machine.to_json()) == machine
    assert "torch" in str(machine)
