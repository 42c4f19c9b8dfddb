"""A copy does what the network does, in its modes, and uses nothing of it."""

import functools
import types
import warnings
import weakref

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

from onebyone.core.errors import ModelError
from onebyone.networks.copies import runs_alone
from onebyone.networks.surgery import as_network, copy_network, evaluation_copy
from onebyone.profiling import profile
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites import apply
from onebyone.rewrites.deepen import deepen
from onebyone.rewrites.fold.fold import fold
from onebyone.training.train import train

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


def closure():
    model = net()
    old = model.forward
    model.forward = lambda z: old(z).float()
    return model, r"`forward` \(a function from .*test_copies.py:\d+\) of the network"


def closure_of_a_layer():
    model = net()
    layer, old = model[2], model[2].forward
    layer.forward = lambda z: old(z) * 2
    return model, r"of the module '2' still uses the original's module '2'"


def default():
    model = net()
    model[2].forward = lambda z, layer=model[0]: layer.bias.sum() + z
    return model, "the original's module '0'"


def hook():
    model = net()
    first = model[0].weight
    model[2].register_forward_hook(lambda module, args, output: output * first.sum())
    return model, "`_forward_hooks` of the module '2' still uses the original's tensor '0.weight'"


def weak():
    model = net()
    model[2].parent = weakref.ref(model)
    return model, "`parent` of the module '2' still uses the original itself"


def outside():
    """The function is bound to an object that copies itself as it is."""

    class Registry:
        def __init__(self, kept):
            self.kept = kept

        def __deepcopy__(self, memo):
            return self

    model = net()
    model.registry = Registry([model[0]])
    return model, "`registry` of the network still uses the original's module '0'"


class Itself(nn.Conv2d):
    def __deepcopy__(self, memo):
        return self


def shared_module():
    model = net()
    model[2] = Itself(16, 16, 3)
    return model, "the module '2' is the original's module '2'"


class SameWeight(nn.Conv2d):
    def __deepcopy__(self, memo):
        made = nn.Conv2d(16, 16, 3)
        made.weight = self.weight
        return made


def shared_weight():
    model = net()
    model[2] = SameWeight(16, 16, 3)
    return model, "the tensor '2.weight' lies in the original's memory"


CASES = [
    closure, closure_of_a_layer, default, hook, weak, outside, shared_module, shared_weight,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_copy_that_would_use_the_original_is_refused(case):
    model, match = case()
    with pytest.raises(ModelError, match=match):
        copy_network(model)


def test_such_a_network_is_not_trained_and_gets_no_gradients():
    model, _ = closure()
    with pytest.raises(ModelError, match="still uses"):
        train(model, (X, torch.tensor([0, 1])), epochs=1, batch_size=2)
    assert all(parameter.grad is None for parameter in model.parameters())


def bound():
    model = net()
    model[2].forward = types.MethodType(
        lambda self, z: self._conv_forward(z, self.weight * 2, self.bias), model[2]
    )
    return model


def partial():
    model = net()
    model[2]._conv_forward = functools.partial(model[2]._conv_forward)
    return model


def unregistered():
    model = net()
    model.peers = [model[0]]
    model.forward = types.MethodType(
        lambda self, z: nn.Sequential.forward(self, z) + self.peers[0](z).sum(), model
    )
    return model


@pytest.mark.parametrize("case", [bound, partial, unregistered], ids=lambda case: case.__name__)
def test_forwards_that_are_bound_to_the_copy_are_its_own(case):
    model = case()
    duplicate = copy_network(model)
    assert_close(duplicate(X), model(X))
    before = duplicate(X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(duplicate(X), before)
    with runs_alone(model):
        duplicate(X)


model = net()  # a global of the name of an attribute


def test_a_global_of_the_name_of_an_attribute_is_no_use_of_it():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, z):
            return self.model(z)

    copy_network(Wrapper(model))


class Asks(nn.Conv2d):
    """Calls what a name gives that no inspection of the copy can follow."""

    def __call__(self, z):
        return vars(__import__("builtins"))["_onebyone_test"][0](z)


def test_what_only_a_run_shows_is_refused_too(monkeypatch):
    import builtins

    model = net()
    monkeypatch.setattr(builtins, "_onebyone_test", [model[2]], raising=False)
    model[0] = nn.Conv2d(3, 16, 1)
    model[3] = Asks(3, 16, 3)
    with pytest.raises(ModelError, match="a run still uses the original's"):
        trace_layers(model, X)


def modes(network):
    return {name: module.training for name, module in network.named_modules()}


def extractor(*, training=False):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    # Statistics that a pass in training mode would change.
    return create_feature_extractor(network.train(training), ["layer1", "layer2"])


def test_a_feature_extractor_keeps_its_modes_and_attributes():
    network = extractor()
    network.labels = ["a"]
    for training in (False, True):
        network.train(training)
        network.get_submodule("bn1").eval()
        duplicate = copy_network(network)
        assert modes(duplicate) == modes(network)
        assert duplicate.labels == ["a"]
        assert list(duplicate.state_dict()) == list(network.state_dict())


def test_a_feature_extractor_of_two_graphs_takes_the_one_of_its_mode():
    network = extractor(training=True)
    evaluated = evaluation_copy(network)
    assert not any(modes(evaluated).values())
    x = torch.randn(1, 3, 32, 32)
    assert_close(evaluated(x), network.eval()(x))
    assert evaluated.train().training


def test_a_feature_extractor_that_is_rewritten_stays_in_evaluation_mode():
    network = extractor()
    x = torch.randn(1, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded, plan = fold(network, x)
    made = [folded, deepen(network, x)[0], apply(network, plan, None)]
    for rewritten in made:
        assert not any(modes(rewritten).values())
        assert_close(rewritten(x), network(x), rtol=1e-3, atol=1e-4)
    assert_close(network.state_dict(), before, rtol=0, atol=0)


class Stays(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


def test_a_module_that_stays_in_training_mode_is_named():
    model = net()
    model[3] = Stays()
    with pytest.raises(ModelError, match="module '3' of Sequential stays in training mode"):
        evaluation_copy(model)


def test_what_a_networks_own_eval_and_to_return_is_no_matter():
    class Quiet(nn.Sequential):
        def eval(self):
            super().eval()

        def to(self, *args, **kwargs):
            super().to(*args, **kwargs)

    assert not evaluation_copy(Quiet(nn.Dropout()).train(), device="cpu").training


def test_a_compiled_call_is_not_the_copys():
    model = net()
    model[2].compile(backend="eager")
    duplicate = copy_network(model)
    with runs_alone(model):
        duplicate(X)


def test_a_network_made_in_inference_mode_can_be_counted_and_trained():
    with torch.inference_mode():
        model = net()
    assert profile(model, input_shape=(1, 3, 12, 12), timed=False).macs
    trained = train(model.train(), (X, torch.tensor([0, 1])), epochs=1, batch_size=2).model
    assert not torch.equal(trained[0].weight, model[0].weight)


def test_a_copy_of_a_network_with_torchscript_inside_can_be_trained():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch warns of torch.jit
        inside = torch.jit.script(nn.Conv2d(4, 4, 1))
    net = nn.Sequential(nn.Conv2d(3, 4, 1), inside, nn.Conv2d(4, 4, 1).requires_grad_(False))
    mine, theirs = net.named_parameters(), copy_network(net).named_parameters()
    for (_, one), (name, other) in zip(mine, theirs, strict=True):
        assert other.is_leaf, name
        assert other.requires_grad == one.requires_grad, name


def test_a_compiled_part_is_refused_and_a_compiled_whole_is_not():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))
    assert as_network(torch.compile(net, backend="eager")) is net
    net[1] = torch.compile(net[1], backend="eager")
    with pytest.raises(ModelError, match=r"'1' is wrapped by torch.compile. Put its `_orig_mod`"):
        as_network(net)
    net[1] = net[1]._orig_mod
    assert as_network(net) is net


def test_an_exported_program_is_refused_by_name():
    program = torch.export.export(nn.Conv2d(3, 4, 1), (torch.zeros(2, 3, 5, 5),))
    with pytest.raises(ModelError, match="instead of an exported program, give the network"):
        evaluation_copy(program.module())
