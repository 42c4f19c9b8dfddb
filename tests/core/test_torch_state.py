"""What is computed does not depend on the state that the caller has set, and leaves it alone."""

import random
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.errors import OptionError
from onebyone.core.torch_state import ordinary_torch, users_defaults
from onebyone.profiling.trace import trace_layers

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


NET, TEACHER = net(), net()


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


@contextmanager
def everything_else():
    with ExitStack() as stack:
        for each in (torch.no_grad(), default_dtype(), torch.device("meta"), deterministic()):
            stack.enter_context(each)
        stack.enter_context(torch.autograd.set_detect_anomaly(mode=True))
        yield


STATES = {
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "everything else": everything_else,
}


def state():
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_num_threads(),
        torch.get_rng_state().sum().item(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
    )


def weights(network):
    return {name: tensor.double() for name, tensor in network.state_dict().items()}


CALLS = {
    "profile": lambda: obo.profile(NET, input_shape=(1, 3, 8, 8), timed=False).layers,
    "applies": lambda: obo.applies(NET, (1, 3, 8, 8)),
    "uniform_plan": lambda: obo.uniform_plan(NET, (1, 3, 8, 8)).choices,
    "plan": lambda: obo.plan(NET, X, budget="macs=60%", head="keep").choices,
    "apply": lambda: weights(
        obo.apply(NET, obo.uniform_plan(NET, (1, 3, 8, 8), ranks=0.3), X)
    ),
    "restructure": lambda: weights(obo.restructure(NET, obo.uniform_plan(NET, (1, 3, 8, 8)))),
    "fold": lambda: weights(obo.fold(NET, X[:1])[0]),
    "deepen": lambda: weights(obo.deepen(NET, X[:1])[0]),
    "evaluate": lambda: obo.evaluate(NET, (X, Y)),
    "train": lambda: weights(
        obo.train(NET, (X, Y), epochs=1, batch_size=8, precision="float32").model
    ),
    "distill": lambda: weights(
        obo.distill(
            NET, (X, Y), teacher=TEACHER, epochs=1, batch_size=8, learning_rate=1e-3, norms=False,
            precision="float32",
        ).model
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    return {name: call() for name, call in CALLS.items()}


@pytest.mark.parametrize("ambient", STATES)
@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_that_of_torchs_usual_state_and_the_callers_is_left(name, ambient, expected):
    with STATES[ambient]():
        before = state()
        found = CALLS[name]()
        assert state() == before
    if isinstance(found, dict):
        assert_close(found, expected[name], rtol=1e-6, atol=1e-7)
    else:
        assert str(found) == str(expected[name])


def test_states_are_left_alone_after_an_error_too():
    with torch.inference_mode(), torch.device("meta"), default_dtype():
        before = state()
        with pytest.raises(OptionError, match="ranks"):
            obo.uniform_plan(NET, (1, 3, 8, 8), ranks=2)
        assert state() == before


class OfTheCaller(nn.Module):
    """Makes tensors of the default type, which must be that of its weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.nn.functional.conv2d(self.conv(x), torch.ones(4, 4, 1, 1))


def test_a_network_gets_the_default_type_that_it_was_written_for():
    with default_dtype():
        network = OfTheCaller()
        assert obo.profile(network, input_shape=(1, 3, 8, 8), timed=False).macs == 36 * (108 + 16)


def test_a_default_device_is_that_of_the_inputs_while_a_network_runs():
    with torch.device("meta"), ordinary_torch():
        assert torch.zeros(1).device.type == "cpu"
        with users_defaults(torch.device("cpu")):
            assert torch.zeros(1).device.type == "cpu"


def test_a_forward_that_enters_inference_mode_is_counted_all_the_same():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            with torch.inference_mode():
                features = self.body(x)
            return self.head(features.clone())

    found = trace_layers(Frozen().eval(), X[:1])
    assert found.macs == trace_layers(NET, X[:1]).macs + 8
    assert not found.uncounted


def test_a_mode_without_data_is_refused():
    with FakeTensorMode(), pytest.raises(OptionError, match=r"FakeTensorMode.*Leave that mode"):
        obo.profile(NET, input_shape=(1, 3, 8, 8), timed=False)
