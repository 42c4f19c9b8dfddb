"""The public names: all there, all documented, loaded only when they are used."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import onebyone as obo
from onebyone.core.errors import BudgetError, ModelError, OptionError, PlanError, RecordError
from onebyone.data import as_split


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, onebyone; sys.exit(bool({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there_and_documented():
    for name in obo.__all__:
        assert getattr(obo, name) is not None
        if name != "__version__":
            assert getattr(obo, name).__doc__


def test_functions_stay_functions_after_their_modules_are_imported():

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
    "flush_subnormals": lambda net: obo.flush_subnormals(net, SHAPE),
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
        with pytest.raises(ModelError, match=r"TorchScript program.*that it was made from"):
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


# ---------------------------------------------------------------- mistakes that are easily made


def small_plan():
    return obo.uniform_plan(network(), SHAPE)


MISTAKES = {
    "a shape as a text": (
        lambda: obo.profile(network(), input_shape="1x3x7x6"),
        OptionError, r"`input_shape` must be positive sizes with the batch in front.*'1x3x7x6'",
    ),
    "a size that is no int": (
        lambda: obo.bench(network(), input_shape=(1, 3, 7.0, 6)), OptionError, r"got \(1, 3, 7.0",
    ),
    "a tensor for a shape": (
        lambda: obo.export(network(), "no", input_shape=images()),
        OptionError, r"got a tensor of shape \(40, 3, 7, 6\)",
    ),
    "no batch": (
        lambda: obo.fold(network(), SHAPE[1:]), ModelError, "the batch comes first",
    ),
    "a budget as a number": (
        lambda: obo.plan(network(), images(), budget=0.5), BudgetError, "must be a text.*got 0.5",
    ),
    "a share not in percent": (
        lambda: obo.plan(network(), images(), budget="macs=0.5"), BudgetError, "`macs=50%`",
    ),
    "a module to leave that is not there": (
        lambda: obo.plan(network(), images(), budget="macs=90%", leave=["conv1"]),
        OptionError, "no module named 'conv1'",
    ),
    "a device that there is not": (
        lambda: obo.plan(network(), images(), budget="macs=90%", device="gpu"),
        OptionError, "device must be one that torch knows.*'gpu'",
    ),
    "the same where it is trained": (
        lambda: obo.train(network(), labelled(), epochs=1, device="gpu"), OptionError, "'gpu'",
    ),
    "a batch of none": (
        lambda: obo.train(network(), labelled(), epochs=1, batch_size=0),
        OptionError, "`batch_size` must be 1 or more, got 0",
    ),
    "what is no plan": (
        lambda: obo.apply(network(), {"macs": "50%"}, images()), PlanError, "got dict.*onebyone.plan",
    ),
    "a plan's file that is not there": (
        lambda: obo.apply(network(), "no/plan.json", images()), RecordError, "no/plan.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_by_what_must_hold(name):
    call, kind, words = MISTAKES[name]
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_not_to_be():
    for call in (
        lambda: obo.profile(network(), input_shape=SHAPE, device="cuda"),
        lambda: obo.evaluate(network(), labelled(), device="cuda"),
        lambda: obo.plan(network(), images(), budget="macs=90%", device="cuda"),
        lambda: obo.shrink(network(), labelled(), budget="macs=90%", device="cuda"),
    ):
        with pytest.raises(OptionError, match="torch sees no GPU"):
            call()


def test_what_is_meant_is_taken_where_it_is_plain(tmp_path):
    net, plan = network(), small_plan()
    plan.save(tmp_path / "plan.json")
    by_file = obo.apply(net, tmp_path / "plan.json", images()).state_dict()
    torch.testing.assert_close(by_file, obo.apply(net, plan, images()).state_dict())
    assert str(obo.restructure(net, str(tmp_path / "plan.json"))) == str(obo.restructure(net, plan))
    left = obo.plan(net, images(), budget="macs=100%", leave="0").left_alone
    assert [each.reason for each in left if each.site == "0"] == ["left alone as asked"]
    pair = obo.compare([net, network()], input_shape=list(SHAPE), rounds=3)
    assert len(pair.contenders) == 2
    record = obo.export(net, tmp_path / "out", formats="safetensors", input_shape=SHAPE)
    assert [check.format for check in record.checks] == ["safetensors"]
    assert record.inputs.tensors[0].sample == SHAPE[1:]
