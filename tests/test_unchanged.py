"""The network that is passed in is left as it was, by every public function."""

import copy

import pytest
import torch
from torch import nn

import onebyone as obo
import onebyone.runtimes
from onebyone.calibration.collect import Across, collect
from onebyone.calibration.curvature import output_curvature
from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.inputs import as_calibration
from onebyone.core.errors import BudgetError, ModelError
from onebyone.data import TensorSplit
from onebyone.evaluation.scores import evaluate, score
from onebyone.networks.dataflow import find_neighbours
from onebyone.networks.surgery import check_finite, evaluation_copy, in_evaluation_mode
from onebyone.planning import plan
from onebyone.profiling import profile
from onebyone.profiling.trace import time_layers, trace_layers
from onebyone.rewrites import apply, restructure
from onebyone.rewrites.head import fit as head_fit
from onebyone.rewrites.head import rewrite as head
from onebyone.rewrites.low_rank import factorize, separable
from onebyone.rewrites.low_rank.reduced_rank import problems_of

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (16,), generator=torch.Generator().manual_seed(0))


def network():
    """Left in training mode, with a frozen batch norm, hooks, gradients and attributes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, padding=1, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(108, 4),
    )
    net(X).sum().backward()
    net.train()
    net[1].eval()
    for parameter in net[1].parameters():
        parameter.requires_grad = False
    net[0].register_forward_hook(lambda module, args, output: None)
    net.register_forward_pre_hook(lambda module, args: None)
    net.labels = ["a", "b"]
    return net


HOOKS = [name for name in vars(nn.Module()) if name.endswith("hooks")]


def equal(old, new):
    """Whether named or listed tensors, or None, have the same values."""
    if isinstance(old, dict):
        return list(old) == list(new) and equal(list(old.values()), list(new.values()))
    return len(old) == len(new) and all(
        a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(old, new, strict=True)
    )


class Snapshot:
    """Everything about a network that a careless function could change."""

    def __init__(self, net):
        self.identities = [(n, id(t)) for n, t in (*net.named_parameters(), *net.named_buffers())]
        self.modules = [(n, id(m), type(m), m.forward.__func__) for n, m in net.named_modules()]
        self.values = copy.deepcopy(net.state_dict())
        self.versions = [t._version for t in net.state_dict().values()]
        self.modes = {n: m.training for n, m in net.named_modules()}
        self.attributes = {n: sorted(vars(m)) for n, m in net.named_modules()}
        self.hooks = {n: [dict(getattr(m, h)) for h in HOOKS] for n, m in net.named_modules()}
        self.trained = [p.requires_grad for p in net.parameters()]
        self.gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        self.places = [(t.device, t.dtype, t.stride()) for t in net.state_dict().values()]
        self.labels = list(net.labels)

    def assert_same(self, other):
        for name, old in vars(self).items():
            new = getattr(other, name)
            same = equal(old, new) if name in {"values", "gradients"} else old == new
            assert same, f"{name} changed"


@pytest.fixture(scope="module")
def plans():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_fit, "FIT_STEPS", 5)
        net = plain()
        yield {
            "factorize": plan(net, X, budget="macs=70%", head="keep"),
            "gap": plan(net, X, budget="params=80%", head="gap"),
            "exact": plan(net, X, budget="macs=70%", head="exact"),
        }


def plain():
    net = network()
    # A layer with hooks is left alone; here all are to be rewritten.
    net[0]._forward_hooks.clear()
    return net


def rewrite_head(form):
    return lambda net: head.rewrite(net, X[:1], name="8", form=form, hidden=[])


def rewrite_layer(how, settings):
    def rewritten(net):
        chain = how.build(net[3], settings)
        how.fit(chain, problems_of(net[3]), settings, net[3])

    return rewritten


CALLS = {
    "profile": lambda net: profile(net, input_shape=(2, 3, 6, 6), rounds=3),
    "trace_layers": lambda net: trace_layers(net, X[:1]),
    "time_layers": lambda net: time_layers(net, X, trace_layers(net, X[:1]).layers, seconds=0.0),
    "evaluate": lambda net: evaluate(net, TensorSplit(X, Y)),
    "score": lambda net: score([net, net], TensorSplit(X, Y)),
    "collect": lambda net: collect(net, ["0", "3", "8"], as_calibration(X).batches),
    "Across": lambda net: Across(
        in_evaluation_mode(net),
        as_calibration(X).batches,
        examples=len(X),
        start=in_evaluation_mode(net),
        sites=["3"],
    ).moments(evaluation_copy(net), ["3"]),
    "output_curvature": lambda net: output_curvature(
        net, ["0", "8"], as_calibration(X).batches, meaning=meaning_of(net, TensorSplit(X, Y))
    ),
    "meaning_of": lambda net: meaning_of(net, TensorSplit(X, Y)),
    "find_head": lambda net: head.find_head(net, X[:1]),
    "head exact": rewrite_head("exact"),
    "head gap": rewrite_head("gap"),
    "factorize": rewrite_layer(factorize, {"form": "tucker2", "ranks": [4, 4]}),
    "separable": rewrite_layer(separable, {"form": "depthwise-pointwise", "terms": 2}),
    "fold": lambda net: onebyone.fold(net, X[:1]),
    "deepen": lambda net: onebyone.deepen(net, X[:1]),
    "deepen mlpconv": lambda net: onebyone.deepen(net, X[:1], form="mlpconv"),
    "flush_subnormals": lambda net: onebyone.flush_subnormals(net, X[:1]),
    "uniform_plan": lambda net: onebyone.uniform_plan(net, X[:1]),
    "applies": lambda net: onebyone.applies(net, X[:1]),
    "find_neighbours": lambda net: find_neighbours(net, X[:1]),
    "check_finite": check_finite,
    "runtime eager": lambda net: onebyone.runtimes.find_runtime("eager").prepare(net, X)(),
    "runtime channels-last": lambda net: onebyone.runtimes.find_runtime("channels-last").prepare(
        net, X
    )(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_network_is_left_as_it_was(call):
    net = network()
    before = Snapshot(net)
    call(net)
    before.assert_same(Snapshot(net))


@pytest.mark.parametrize("choice", ["auto", "keep", "exact", "gap"])
def test_planning_leaves_the_network_as_it_was(choice, monkeypatch):
    monkeypatch.setattr(head_fit, "FIT_STEPS", 5)
    net = network()
    before = Snapshot(net)
    plan(net, X, budget="params=90%", head=choice)
    before.assert_same(Snapshot(net))


@pytest.mark.parametrize("kind", ["factorize", "gap", "exact"])
def test_carrying_out_a_plan_leaves_the_network_as_it_was_and_shares_nothing_with_it(kind, plans):
    net = plain()
    before = Snapshot(net)
    for made in (restructure(net, plans[kind]), apply(net, plans[kind], X)):
        before.assert_same(Snapshot(net))
        mine = {t.data_ptr() for t in net.state_dict().values()}
        assert not mine & {t.data_ptr() for t in made.state_dict().values()}
        # The new network is in the mode of the old one, layer by layer.
        assert made.training
        assert not made.get_submodule("1").training
        assert made.get_submodule("3").training
        assert not any(p.requires_grad for p in made.get_submodule("1").parameters())


def test_a_failure_leaves_the_network_as_it_was_too():
    net = network()
    before = Snapshot(net)
    with pytest.raises(ModelError):
        trace_layers(net, torch.randn(1, 5, 6, 6))
    with pytest.raises(BudgetError):
        plan(net, X, budget="macs=1%", head="keep")
    before.assert_same(Snapshot(net))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda net: net.eval(),
        lambda net: net.train(),
        lambda net: net(X),  # the running statistics move
        lambda net: setattr(net[3], "total_ops", 3),
        lambda net: net[2].register_forward_hook(print),
        lambda net: net.requires_grad_(True),
        lambda net: net.zero_grad(),
        lambda net: net.double(),
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: setattr(net[3], "weight", nn.Parameter(net[3].weight.detach().clone())),
        lambda net: net[3].weight.data.mul_(1.0001),
        lambda net: net.__setitem__(5, nn.ReLU(inplace=True)),
        lambda net: net.labels.append("c"),
    ],
)
def test_the_snapshot_notices_what_careless_functions_do(spoil):
    net = network()
    before = Snapshot(net)
    spoil(net)
    with pytest.raises(AssertionError, match="changed"):
        before.assert_same(Snapshot(net))


class WritesIntoItself(nn.Module):
    """Counts its calls, and leaves its last input and the process's settings changed."""

    def __init__(self):
        super().__init__()
        self.net = plain()
        self.register_buffer("calls", torch.zeros(()))
        self.number = 0

    def forward(self, x):
        self.calls += 1
        self.number += 1
        self.seen = x
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("high")
        torch.use_deterministic_algorithms(mode=True)
        return self.net(x)


OF_ONE = {
    "profile": lambda net: obo.profile(net, input_shape=(2, 3, 6, 6), timed=False),
    "evaluate": lambda net: obo.evaluate(net, (X, Y)),
    "compare": lambda net: obo.compare(net, net, data=(X, Y), rounds=3),
    "plan": lambda net: obo.plan(net, X, budget="macs=90%", task="classification"),
    "distill": lambda net: obo.distill(net, X, teacher=net, epochs=1, learning_rate=1e-3),
    "reconstruct": lambda net: obo.reconstruct(net, teacher=net, calibration=X, steps=1),
    "flush_subnormals": lambda net: obo.flush_subnormals(net, X),
}


@pytest.mark.parametrize("name", OF_ONE)
def test_what_a_forward_writes_into_itself_and_sets_for_the_process_is_put_back(name):
    net = WritesIntoItself().eval()
    threads, attributes = torch.get_num_threads(), set(vars(net))
    torch.set_num_threads(1)
    OF_ONE[name](net)
    assert (net.calls, net.number, set(vars(net))) == (0, 0, attributes)
    seen = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert seen == 1
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()


def test_random_numbers_of_a_forward_are_the_same_for_two_networks_and_put_back():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain()

        def forward(self, x):
            return self.net(x) + torch.randn(len(x), 4)

    net = Noisy().eval()
    before = torch.get_rng_state()
    pair = obo.compare(net, net, data=X, task="classification", rounds=3).pair(1)
    assert (pair.agreement.value, pair.divergence) == (1, 0)
    obo.flush_subnormals(net, X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["compare", "distill", "evaluate", "plan", "reconstruct"])
def test_a_network_whose_outputs_change_from_run_to_run_is_refused(name):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.number = plain(), 0

        def forward(self, x):
            self.number += 1
            return self.net(x) * self.number

    with pytest.raises(ModelError, match=r"the same outputs each time .* Counts differ by"):
        OF_ONE[name](Counts().eval())
