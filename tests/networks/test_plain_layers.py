"""A layer that may do something else than its class says is skipped by name, with the reason."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from onebyone import applies, apply, deepen, fold, plan, restructure, uniform_plan
from onebyone.core.errors import PlanError
from onebyone.networks.plain_layers import why_not_its_class

X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


def bound_forward(layer):
    def forward(self, x):
        return self._conv_forward(x, self.weight * 1.5, self.bias)

    layer.forward = types.MethodType(forward, layer)


def free_forward(layer):
    layer.forward = lambda x: F.avg_pool2d(x, 3, 1)


def conv_forward(layer):
    layer._conv_forward = functools.partial(tripled, layer)


def tripled(layer, x, weight, bias):
    return F.conv2d(x, weight * 3, bias)


class CalledOtherwise(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class CalledInside(nn.Conv2d):
    def _call_impl(self, x):
        return super()._call_impl(x) * 2


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def of_class(kind):
    def changed(layer):
        layer.__class__ = kind

    changed.__name__ = kind.__name__
    return changed


def hook(layer):
    layer.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def spectral(layer):
    nn.utils.spectral_norm(layer)
    layer.requires_grad_(False)  # else torch cannot copy it


def no_parameter(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


def pruned_by_hand(layer):
    layer.out_channels = 17


class Subclass(torch.Tensor):
    pass


CASES = [
    bound_forward, free_forward, conv_forward, of_class(CalledOtherwise), of_class(CalledInside),
    of_class(OwnForward), hook, pre_hook, spectral, no_parameter, pruned_by_hand,
]  # fmt: skip


def changed_net(change):
    network = net()
    change(network[3])
    return network.eval()


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_no_function_takes_a_layer_by_its_class_alone(change):
    network = changed_net(change)
    expected = network(X)
    reasons = {s.reason for s in applies(network, X[:1]).sites if s.site == "3"}
    assert None not in reasons
    chosen = uniform_plan(network, X[:1], ranks=1)
    assert "3" not in {option.site for option in chosen.choices}
    assert "3" in {skipped.site for skipped in chosen.left_alone}
    assert "3" not in {
        option.site
        for option in plan(network, None, input_shape=(1, 3, 12, 12), budget="macs=99%").choices
    }
    folded, folds = fold(network, X[:1])
    assert not any("3" in (option.site, option.first.settings["into"]) for option in folds.choices)
    for rewritten in (apply(network, chosen, None), folded, deepen(network, X[:1])[0]):
        assert_close(rewritten(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change", [bound_forward, hook, of_class(CalledOtherwise)], ids=lambda change: change.__name__
)
def test_a_plan_for_a_plain_layer_is_refused_where_it_is_none(change):
    chosen = uniform_plan(net(), X[:1])
    assert "3" in {option.site for option in chosen.choices}
    network = changed_net(change)
    for carried_out in (lambda: apply(network, chosen, None), lambda: restructure(network, chosen)):
        with pytest.raises(
            PlanError, match=r"plan's site '3' cannot be rewritten: .*(set on|hooks|overrides)"
        ):
            carried_out()


def test_a_replaced_method_of_a_class_of_torchs_is_seen(monkeypatch):
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: F.conv2d(x, weight, bias) * 2
    )
    assert why_not_its_class(nn.Conv2d(3, 4, 3)) == "is a Conv2d, whose _conv_forward was replaced"


def test_an_activation_with_a_forward_of_its_own_is_not_deepened():
    network = net()
    network[2].forward = lambda x: x.abs() - 1
    deepened, chosen = deepen(network, X[:1])
    assert {skipped.site: skipped.reason for skipped in chosen.left_alone}["2"].startswith(
        "has a forward of its own"
    )
    assert_close(deepened(X), network(X))


def test_a_head_whose_layers_are_called_otherwise_is_skipped_with_the_reason():
    for change, reason in ((hook, "has hooks"), (free_forward, "has a forward of its own")):
        network = net()
        change(network[8])
        if change is free_forward:
            network[8].forward = lambda x: x[:, :4] * 2
        sites = applies(network, X[:1]).sites
        assert all(site.reason and reason in site.reason for site in sites if site.kind == "head")


def test_a_network_with_a_forward_of_its_own_keeps_its_head():
    network = net()
    network.forward = types.MethodType(lambda self, x: nn.Sequential.forward(self, x) * 2, network)
    heads = [
        site
        for site in applies(network, X[:1]).sites
        if site.kind == "head" or "head" in site.rewrite
    ]
    assert heads
    assert all("has a forward of its own" in site.reason for site in heads)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(3, 4, dtype=torch.complex64), "has a weight of complex64"),
        (nn.Conv1d(3, 4, 1, dtype=torch.float64), None),
        (nn.Conv2d(3, 4, 1, dtype=torch.bfloat16), None),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), None),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), None),
    ],
)
def test_types_of_weights_that_are_not_known_are_named(layer, reason):
    assert why_not_its_class(layer) == reason


def test_a_weight_of_a_type_of_its_own_is_named():
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Subclass))
    assert why_not_its_class(layer) == "has a weight of type Subclass"


def test_a_weight_of_float8_is_named():
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert why_not_its_class(layer) == "has a weight of float8_e4m3fn"
