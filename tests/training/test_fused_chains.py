"""A chain of factors computed as one convolution: the same outputs, and the same gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from onebyone.networks.layers import Pointwise
from onebyone.rewrites.low_rank import factorize, separable
from onebyone.training import fused_chains as module
from onebyone.training.distill import distill
from onebyone.training.fused_chains import composed, composition_of
from onebyone.training.reconstruct import reconstruct

CPU = torch.device("cpu")


@pytest.fixture
def everywhere(monkeypatch):
    """All chains that can be composed are."""
    monkeypatch.setattr(module.Composition, "is_quicker", lambda *_: True)


def chains_of(layer):
    """Return the layer rewritten in every form that there is, some of each."""
    for rewrite in (factorize, separable):
        if rewrite.why_not(layer) is None:
            forms = {}
            for options in rewrite.grid(layer):
                forms.setdefault(options["form"], []).append(options)
            for options in (each for grid in forms.values() for each in grid[:: len(grid) // 2]):
                yield options, rewrite.build(layer, options)


def gradients(network, x):
    network.zero_grad()
    outputs = network(x)
    outputs.square().sum().backward()
    return outputs, {name: p.grad.clone() for name, p in network.named_parameters()}


LAYERS = {
    "plain": {"padding": 1},
    "without padding and bias": {"bias": False},
    "strided": {"padding": (1, 2), "stride": (2, 3)},
    "dilated": {"padding": (2, 3), "dilation": (2, 3)},
    "strided and dilated": {"padding": 2, "dilation": 2, "stride": 2},
    "grouped": {"padding": 1, "groups": 3},
    "uneven kernel": {"kernel_size": (5, 3), "padding": (2, 1), "stride": (1, 2)},
    "1×1, strided": {"kernel_size": 1, "stride": 2},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_rewrite_gives_the_same_outputs_and_gradients(kind, everywhere):
    torch.manual_seed(0)
    how = {"kernel_size": 3, **LAYERS[kind]}
    layer = nn.Conv2d(12, 18, **how).double()
    x = torch.randn(3, 12, 11, 14, dtype=torch.float64)
    seen = 0
    for options, chain in chains_of(layer):
        network = nn.Sequential(chain, nn.ReLU())
        for parameter in network.parameters():
            nn.init.normal_(parameter)
        expected = gradients(network, x)
        calls = []
        with composed(network, bf16=False, device=CPU):
            assert composition_of(chain) is None, "it is composed already"
            handle = chain.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            assert_close(gradients(network, x), expected, rtol=1e-9, atol=1e-9, msg=str(options))
            handle.remove()
        assert calls, "hooks of the chain itself are still called"
        assert "forward" not in chain.__dict__
        seen += 1
    assert seen >= 2


@settings(deadline=None, max_examples=40)
@given(
    widths=st.tuples(*[st.integers(1, 3)] * 3), groups=st.integers(1, 3),
    first=st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 2])),
    stride=st.integers(1, 2), pad=st.integers(0, 1),
)  # fmt: skip
def test_any_chain_is_composed_exactly_or_not_at_all(widths, groups, first, stride, pad):
    torch.manual_seed(0)
    a, b, c = (6 * width for width in widths)
    chain = nn.Sequential(
        nn.Conv2d(a, b, first, stride=(stride, 1), padding=(pad, 0), groups=groups, bias=False),
        nn.Conv2d(b, c, (1, 3), padding=(0, pad), groups=2, bias=False),
        Pointwise(c, 7, stride=stride),
    ).double()
    found = composition_of(chain)
    long_twice = first[1] > 1
    assert (found is None) == long_twice
    if found is not None:
        x = torch.randn(2, a, 9, 8, dtype=torch.float64)
        assert_close(found(x), chain(x))


def hooked(chain):
    chain[0].register_forward_hook(lambda *_: None)


def with_a_bias_before_a_padding(chain):
    chain[0].bias = nn.Parameter(torch.randn(chain[0].out_channels))


def reflecting(chain):
    chain[1].padding_mode = "reflect"


def with_a_norm(chain):
    chain.insert(1, nn.BatchNorm2d(chain[0].out_channels))


def with_a_longer_kernel_twice(chain):
    chain[0] = nn.Conv2d(8, 8, 3, padding=1, bias=False)


def with_a_stride_before_a_longer_kernel(chain):
    chain[0].stride = (2, 2)


def with_a_forward_of_its_own(chain):
    chain[0].forward = torch.zeros_like


@pytest.mark.parametrize(
    "change",
    [
        hooked, with_a_bias_before_a_padding, reflecting, with_a_norm, with_a_longer_kernel_twice,
        with_a_stride_before_a_longer_kernel, with_a_forward_of_its_own,
    ],
)  # fmt: skip
def test_what_is_not_one_convolution_is_left_alone(change, everywhere):
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8)
    ).eval()
    assert composition_of(chain) is not None
    change(chain)
    x = torch.randn(2, 8, 7, 6)
    expected = chain(x)
    with composed(chain, bf16=False, device=CPU):
        assert "forward" not in chain.__dict__
        assert_close(chain(x), expected)


class Own(nn.Sequential):
    """Another forward than a chain's."""

    def forward(self, x):
        return x + super().forward(x)


def test_a_class_of_the_users_own_is_left_alone(everywhere):
    assert composition_of(Own(Pointwise(4, 4, bias=False), Pointwise(4, 4))) is None


def separated(channels, terms, groups=1):
    layer = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
    return separable.build(layer, {"form": "depthwise-pointwise", "terms": terms})


@pytest.mark.parametrize(
    ("channels", "terms", "bf16", "quicker"),
    [
        (16, 2, True, True), (16, 2, False, True),  # 4.0, 2.3 times as quick
        (64, 2, True, True), (256, 2, True, False),  # 2.2, 0.8
        (64, 4, False, True), (128, 2, False, False),  # 1.3, 0.6
        (64, 1, True, False), (512, 1, False, False),  # 0.3, 0.1
    ],
)  # fmt: skip
def test_chains_are_composed_where_it_was_measured_to_be_quicker(channels, terms, bf16, quicker):
    chain = separated(channels, terms)
    with composed(chain, bf16=bf16, device=CPU):
        assert ("forward" in chain.__dict__) == quicker
    with composed(chain, bf16=bf16, device=torch.device("cuda")):
        assert "forward" not in chain.__dict__


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), separated(16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def test_training_and_reconstruction_come_to_the_same_weights(monkeypatch):
    teacher, student, x = network(), network(), torch.randn(64, 3, 9, 8)
    nn.init.normal_(student[3][0].weight)
    before = copy.deepcopy(student.state_dict())
    taken = []
    whole = module.Composition.__call__
    monkeypatch.setattr(
        module.Composition, "__call__", lambda self, x: (taken.append(1), whole(self, x))[1]
    )

    def both():
        settings = {"teacher": teacher, "seed": 0, "batch_size": 16, "learning_rate": 1e-3}
        settings |= {"precision": "float32", "task": "classification"}
        trained = distill(student, x, epochs=2, **settings).model
        return trained.state_dict(), reconstruct(
            student, calibration=x, steps=6, **settings
        ).model.state_dict()

    quick = both()
    assert len(taken) >= 2 * 4 + 6
    monkeypatch.setattr(module.Composition, "is_quicker", lambda *_: False)
    assert_close(both(), quick, rtol=1e-3, atol=1e-4)
    assert_close(student.state_dict(), before, rtol=0, atol=0)
