"""Networks whose layers look plain: a full rank is the same function, or the layer is named."""

import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.errors import PlanError
from onebyone.core.records import Cost, InputSpec, Option, Plan
from onebyone.networks.conv_layers import why_unknown
from onebyone.rewrites.low_rank import separable
from onebyone.rewrites.plain import plain_layer, why_not_plain

X = torch.randn(6, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
OTHERS = (X, X[:1], X * 3 + 1, torch.zeros_like(X[:2]), -X)


class Net(nn.Module):
    """Three convolutions and a linear layer; what is done with the second one differs."""

    def __init__(self, use=None, layer=None):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=1) if layer is None else layer
        self.c = nn.Conv2d(6, 6, 3, padding=1)
        self.d = nn.Linear(6, 4)
        self.use = use

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.b(x) if self.use is None else self.use(self, x)
        return self.d(F.relu(self.c(F.relu(x))).mean((2, 3)))


class Doubled(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Raised(nn.Conv2d):
    def _call_impl(self, *args, **kwargs):
        return super()._call_impl(*args, **kwargs) + 1


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class Rounded(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.round(decimals=1), bias)


class Scaled(nn.Linear):
    def __call__(self, x):
        return 3 * super().__call__(x)


def with_layer(kind, **settings):
    return Net(layer=kind(6, 6, 3, padding=1, **settings))


def patched_forward():
    network = Net()
    network.b.forward = types.MethodType(
        lambda layer, x: F.conv2d(x, layer.weight, layer.bias, padding=1) * 1.1, network.b
    )
    return network


def patched_convolution():
    network = Net()
    network.b._conv_forward = types.MethodType(
        lambda _, x, weight, bias: F.conv2d(x, weight * 0.9, bias, padding=1), network.b
    )
    return network


def changed_later(**attributes):
    network = Net()
    vars(network.b).update(attributes)
    return network


def pruned_by_hand():
    network = Net(lambda n, x: F.pad(n.b(x), (0, 0, 0, 0, 0, 2)))
    network.b.weight = nn.Parameter(network.b.weight[:4].detach())
    network.b.bias = nn.Parameter(network.b.bias[:4].detach())
    return network


def tied():
    network = Net()
    network.c.weight = network.b.weight
    return network


def one_storage():
    network = Net()
    network.c.weight = nn.Parameter(network.b.weight.data)
    return network


def shared():
    network = Net()
    network.c = network.b
    return network


def hooked():
    network = Net()
    network.b.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    return network


# Networks in which the second layer cannot be rewritten, with the reason.
UNLIKE = {
    "patched forward": (patched_forward, "has a forward of its own, set on the instance"),
    "patched convolution": (
        patched_convolution,
        "has a _conv_forward of its own, set on the instance",
    ),
    "own call": (lambda: with_layer(Doubled), "is a Doubled, whose class overrides __call__"),
    "own call around hooks": (
        lambda: with_layer(Raised),
        "is a Raised, whose class overrides _call_impl",
    ),
    "own forward": (lambda: with_layer(OwnForward), "has a forward of its own"),
    "own convolution": (lambda: with_layer(Rounded), "in its own way"),
    "pruned by hand": (pruned_by_hand, r"weight is 4×6×3×3, but .* 6×6×3×3"),
    "tied": (tied, "shared with another layer"),
    "shared": (shared, "the same layer as 'c'"),
    "hooked": (hooked, "has hooks"),
    "functional": (
        lambda: Net(lambda n, x: F.conv2d(x, n.b.weight, n.b.bias, padding=1)),
        "does not run|read by the network",
    ),
    "functional too": (
        lambda: Net(lambda n, x: n.b(x) + F.conv2d(x, n.b.weight, padding=1)),
        "read by the network",
    ),
    "norm of the weight": (lambda: Net(lambda n, x: n.b(x) * n.b.weight.norm()), "read by"),
    "width": (lambda: Net(lambda n, x: n.b(x) * n.b.out_channels), "out_channels"),
    "width with a default": (
        lambda: Net(lambda n, x: n.b(x) * getattr(n.b, "out_channels", 1)),
        "the outputs differ",
    ),
    "class": (lambda: Net(lambda n, x: n.b(x) * (1 + isinstance(n.b, nn.Conv2d))), "differ"),
    "children": (lambda: Net(lambda n, x: n.b(x) * (1 + len(list(n.b.children())))), "differ"),
    "parameters": (
        lambda: Net(lambda n, x: n.b(x) * sum(p.numel() for p in n.b.parameters()) / 100),
        "differ",
    ),
    "not called": (lambda: Net(lambda n, x: n.b.forward(x)), "read by the network"),
}

# Networks in which the second layer is what it seems, however it is called and set up.
LIKE = {
    "plain": Net,
    "by name": lambda: Net(lambda n, x: n.b(input=x)),
    "twice": lambda: Net(lambda n, x: n.b(n.b(x))),
    "one at a time": lambda: Net(lambda n, x: torch.stack([n.b(x[0])]) if len(x) == 1 else n.b(x)),
    "output used twice": lambda: Net(lambda n, x: (y := n.b(x)) + y.relu()),
    "input written": lambda: Net(lambda n, x: n.b(x.relu_()) + x),
    "branch": lambda: Net(lambda n, x: n.b(x) if x.mean() > 0.3 else n.b(2 * x)),
    "in float32": lambda: Net(lambda n, x: n.b(x.float().double())),
    "checkpointed": lambda: Net(
        lambda n, x: torch.utils.checkpoint.checkpoint(n.b, x, use_reentrant=False)
    ),
    "one storage": one_storage,
    "padding mode set later": lambda: changed_later(padding_mode="circular"),
    "padding set later": lambda: changed_later(padding=(0, 2)),
    "stride set later": lambda: changed_later(stride=(2, 1)),
    "reflect": lambda: with_layer(nn.Conv2d, padding_mode="reflect"),
    "circular": lambda: with_layer(nn.Conv2d, padding_mode="circular"),
    "replicate": lambda: with_layer(nn.Conv2d, padding_mode="replicate"),
    "same": lambda: Net(layer=nn.Conv2d(6, 6, 5, padding="same", dilation=2)),
    "dilated": lambda: with_layer(nn.Conv2d, dilation=(2, 3)),
    "grouped": lambda: with_layer(nn.Conv2d, groups=3),
    "depthwise": lambda: with_layer(nn.Conv2d, groups=6),
    "even kernel": lambda: Net(layer=nn.Conv2d(6, 6, (4, 2), stride=(2, 3), padding=(1, 0))),
    "transposed": lambda: Net(
        layer=nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1, output_padding=1)
    ),
    "transposed groups": lambda: Net(
        layer=nn.ConvTranspose2d(6, 6, (4, 3), stride=(2, 1), groups=2, dilation=(1, 2))
    ),
    "no bias": lambda: with_layer(nn.Conv2d, bias=False),
    "weight norm": lambda: Net(layer=parametrizations.weight_norm(nn.Conv2d(6, 6, 3))),
    "spectral norm": lambda: Net(layer=parametrizations.spectral_norm(nn.Conv2d(6, 6, 3))),
    "norm of the batch": lambda: Net(
        layer=nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))
    ),
    "norm without affine": lambda: Net(
        layer=nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, momentum=None, affine=False))
    ),
    "in place": lambda: Net(layer=nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(inplace=True))),
    "channels last": lambda: Net().to(memory_format=torch.channels_last),
    "frozen": lambda: Net().requires_grad_(False),
    "in training mode": lambda: Net(layer=nn.Sequential(nn.Conv2d(6, 6, 3), nn.Dropout())).train(),
}

NOTHING = Cost(params=0, macs=0, bytes=0)


def outputs(network, x):
    with torch.no_grad():
        return network.eval()(x.clone())


def all_terms(network):
    """Return a plan that separates every layer that can be, with all terms."""
    choices = [
        Option.of(
            "separable",
            {
                "form": form,
                "terms": separable.most_terms(network.get_submodule(item.site), form),
            },
            site=item.site, before=NOTHING, after=NOTHING,
        )
        for item, form in zip(
            obo.applies(network, X[:1]).sites,
            ("depthwise-pointwise", "pointwise-depthwise") * 10,
            strict=False,
        )
        if item.rewrite == "separable" and item.reason is None
    ]  # fmt: skip
    return Plan(
        network="net", inputs=InputSpec.of_shape((1, 3, 7, 7)), budgets=(), before=NOTHING, after=NOTHING,
        choices=tuple(choices), left_alone=(),
    )  # fmt: skip


def check_same(made, network):
    for x in OTHERS:
        wanted = outputs(network, x)
        assert_close(outputs(made, x), wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("calibration", [X, None], ids=["data", "kernels"])
@pytest.mark.parametrize("case", UNLIKE)
def test_a_layer_that_is_not_what_it_seems_is_left_alone_with_the_reason(case, calibration):
    make, reason = UNLIKE[case]
    network = make().double().eval()
    plan = obo.uniform_plan(network, X[:1], ranks=1)
    whys = {item.site: item.reason for item in plan.left_alone}
    assert re.search(reason, whys["b"])
    assert "a" not in whys
    check_same(obo.apply(network, plan, calibration), network)
    check_same(obo.apply(network, all_terms(network), calibration), network)


@pytest.mark.parametrize("form", ["auto", "spatial", "expand", "terms"])
@pytest.mark.parametrize("case", LIKE)
def test_every_layer_that_is_what_it_seems_is_the_same_function_at_full_rank(case, form):
    network = LIKE[case]().double()
    if form == "terms":
        plan = all_terms(network.eval())
    else:
        plan = obo.uniform_plan(network, X[:1], ranks=1, form=form)
    made = obo.apply(network, plan, X)
    assert next(m.training for m in made.modules()) == network.training
    check_same(made, network)
    again = obo.restructure(network, plan)
    again.load_state_dict(made.state_dict())
    check_same(again, made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_types_the_same_layers_are_left_alone(dtype):
    for make in (patched_forward, lambda: with_layer(Doubled)):
        network = make().to(dtype).eval()
        sites = obo.applies(network, X[:1].to(dtype)).sites
        found = {i.site: i.reason for i in sites if i.rewrite == "factorize"}
        assert found["b"] is not None
        assert found["a"] is None


def test_the_layer_that_a_plan_names_is_checked_again_when_it_is_applied():
    plan = obo.uniform_plan(Net().double(), X[:1], ranks=0.5)
    assert "b" in {choice.site for choice in plan.choices}
    for make in (patched_forward, lambda: with_layer(Doubled)):
        for calibration in (X, None):
            with pytest.raises(
                PlanError,
                match=r"The plan's site 'b' cannot be rewritten: .*(of its own|overrides)",
            ):
                obo.apply(make().double(), plan, calibration)


def test_a_linear_layer_that_is_called_in_its_own_way_is_named():
    network = Net().double()
    network.d = Scaled(6, 4).double()
    found = {i.site: i.reason for i in obo.applies(network, X[:1]).sites}
    assert "whose class overrides __call__" in found["d"]


def test_a_function_that_depends_on_all_parameters_is_refused_by_the_first_site_that_differs():
    network = Net(lambda n, x: n.b(x) * sum(p.numel() for p in n.parameters()) / 1e3).double()
    plan = obo.uniform_plan(Net().double(), X[:1], ranks=1)
    with pytest.raises(PlanError, match=r"the outputs differ|must keep the network's function"):
        obo.apply(network, plan, X)


def test_a_blank_example_does_not_hide_a_difference():
    network = nn.Sequential(Doubled(3, 4, 3, bias=False)).double()
    found = why_not_plain(network, torch.zeros(1, 3, 5, 5, dtype=torch.float64), ["0"])
    assert "the outputs differ" in found["0"]


def test_rounding_in_between_is_no_difference():
    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.last(self.first(x).float().to(x.dtype))

    torch.manual_seed(0)
    assert why_not_plain(Rounding(), torch.randn(2, 3, 9, 9), ["first", "last"]) == {}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, padding=1, stride=2), nn.Conv3d(2, 4, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.Linear(4, 5),
        parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.Conv2d(4, 6, 3, bias=False),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_a_plain_layer_is_the_same_function_and_shares_nothing(layer):
    layer = layer.double()
    assert why_unknown(layer) is None
    plain = plain_layer(layer)
    axes = {"Conv1d": 1, "Conv3d": 3, "Linear": 0}.get(type(layer).__name__, 2)
    x = torch.randn(2, 2 if axes == 3 else 4, *[7] * axes, dtype=torch.float64)
    assert_close(plain(x), layer(x))
    assert not {p.data_ptr() for p in plain.parameters()} & {
        p.data_ptr() for p in layer.parameters()
    }


def test_a_spectral_norm_in_training_mode_is_read_without_a_step():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6), nn.ReLU(),
            parametrizations.spectral_norm(nn.Conv2d(6, 6, 1)),
        ).double()  # fmt: skip

    trained = network().train()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    plan = obo.uniform_plan(trained, X[:1], ranks=1)
    obo.applies(trained, X[:1])
    folded, _ = obo.fold(trained, X[:1])
    made = obo.apply(trained, plan, X)
    assert_close(trained.state_dict(), before, rtol=0, atol=0)
    check_same(made, network().eval())
    check_same(folded, network().eval())
