"""The public names: all there, all documented, loaded only when they are used."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import onebyone as obo
from onebyone.data import as_split
from onebyone.errors import ModelError


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, onebyone; sys.exit(bool({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there_and_documented():
    for name in obo.__all__:
        assert getattr(obo, name) is not None
        if name != "__version__":
            assert getattr(obo, name).__doc__


def test_functions_stay_functions_after_their_modules_are_imported():
    import onebyone.planning
    import onebyone.profiling
    import onebyone.runs  # noqa: F401

    for name in ("profile", "plan", "apply", "shrink", "compare", "train", "distill"):
        assert callable(getattr(obo, name)), name


# ---------------------------------------------------------------- what is given as a network

SHAPE = (1, 3, 7, 6)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
        ).eval()  # fmt: skip


def images():
    return torch.randn(40, *SHAPE[1:], generator=torch.Generator().manual_seed(1))


def labelled():
    return TensorDataset(images(), torch.arange(40) % 4)


class LazyNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.LazyConv2d(5, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def on_meta():
    with torch.device("meta"):
        return network()


def scripted():
    return torch.jit.trace(network(), torch.zeros(SHAPE))


READ = {
    "profile": lambda net: obo.profile(net, input_shape=SHAPE, timed=False),
    "evaluate": lambda net: obo.evaluate(net, as_split(labelled())),
    "compare": lambda net: obo.compare(network(), net, input_shape=SHAPE, rounds=3),
    "distill, from": lambda net: obo.distill(
        network(), labelled(), teacher=net, epochs=1, learning_rate=1e-3
    ),
    "reconstruct, to": lambda net: obo.reconstruct(
        network(), teacher=net, calibration=images(), steps=1
    ),
}
REWRITTEN = {
    "plan": lambda net: obo.plan(net, images(), budget="macs=90%"),
    "applies": lambda net: obo.applies(net, SHAPE),
    "apply": lambda net: obo.apply(net, obo.uniform_plan(network(), SHAPE), images()),
    "restructure": lambda net: obo.restructure(net, obo.uniform_plan(network(), SHAPE)),
    "uniform_plan": lambda net: obo.uniform_plan(net, SHAPE),
    "fold": lambda net: obo.fold(net, SHAPE),
    "deepen": lambda net: obo.deepen(net, SHAPE),
    "bench": lambda net: obo.bench(net, input_shape=SHAPE, runtimes=["eager"], rounds=3),
    "train": lambda net: obo.train(net, labelled(), epochs=1),
    "distill": lambda net: obo.distill(
        net, labelled(), teacher=network(), epochs=1, learning_rate=1e-3
    ),
    "reconstruct": lambda net: obo.reconstruct(
        net, teacher=network(), calibration=images(), steps=1
    ),
    "shrink": lambda net: obo.shrink(net, labelled(), budget="macs=90%"),
    "explain": lambda net: obo.explain(net, "no.png"),
    "export": lambda net: obo.export(net, "no", input_shape=SHAPE),
}
NO_NETWORKS = {
    "weights": (lambda: network().state_dict(), "got OrderedDict.*load_state_dict"),
    "nothing": (lambda: None, "got NoneType.*load_model"),
    "a class": (lambda: nn.Sequential, "got type.*instance"),
    "lazy": (LazyNetwork, "'conv.weight' has no shape yet.*Call the network"),
    "meta": (on_meta, "'0.weight' is on the meta device"),
}


@pytest.mark.parametrize("given", NO_NETWORKS)
@pytest.mark.parametrize("name", [*READ, *REWRITTEN])
def test_what_is_no_network_is_refused_with_what_to_do(name, given):
    make, words = NO_NETWORKS[given]
    with pytest.raises(ModelError, match=f"A network must be .*{words}"):
        (READ | REWRITTEN)[name](make())


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
@pytest.mark.parametrize("name", [*READ, *REWRITTEN])
def test_a_program_of_torchscript_is_read_and_not_rewritten(name):
    if name in READ:
        READ[name](scripted())
    else:
        with pytest.raises(ModelError, match=r"program of TorchScript.*that it was made from"):
            REWRITTEN[name](scripted())


@pytest.mark.parametrize("name", ["plan", "applies", "apply", "fold", "deepen", "uniform_plan"])
def test_of_a_compiled_network_the_one_inside_is_taken(name):
    plain, compiled = network(), torch.compile(network())
    expected, found = REWRITTEN[name](plain), REWRITTEN[name](compiled)
    if isinstance(expected, nn.Module):
        assert list(found.state_dict()) == list(expected.state_dict())
        torch.testing.assert_close(found(images()), expected(images()))
    else:
        assert str(found) == str(expected)
    assert isinstance(compiled, type(torch.compile(plain)))


def test_training_and_comparing_compile_nothing():
    def never(*_):
        raise AssertionError("it was called as it was compiled")

    compiled = torch.compile(network(), backend=never)
    for name in ("train", "distill", "distill, from", "reconstruct", "compare", "evaluate"):
        (READ | REWRITTEN)[name](compiled)
