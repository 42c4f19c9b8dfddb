import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from onebyone.core.errors import ModelError, OptionError, PlanError
from onebyone.core.records import Plan
from onebyone.networks.layers import MLPConv, Pointwise
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites import deepen

BOUNDS = [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-0.3, 4.0)]
CURVES = [
    nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.2), nn.ELU(), nn.SELU(), nn.CELU(),
    nn.Mish(), nn.PReLU(init=0.1), nn.RReLU(),
]  # fmt: skip


def plain(activation, *, norm=False, axes=2, dtype=torch.float64):
    """A plain network: convolution (batch norm) activation, twice; channels all differ."""
    torch.manual_seed(0)
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    batch_norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[axes]
    parts = []
    for before, after in ((3, 5), (5, 7)):
        parts.append(convolution(before, after, 3, padding=1))
        parts += [batch_norm(after)] if norm else []
        parts.append(copy.deepcopy(activation))
    return nn.Sequential(*parts).to(dtype).eval()


def image(*size, channels=3, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *(size or (6, 5)), generator=generator, dtype=dtype)


def state_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


# ---------------------------------------------------------------- the same function


@pytest.mark.parametrize("activation", BOUNDS + CURVES, ids=repr)
@pytest.mark.parametrize("form", ["pointwise", "mlpconv"])
def test_the_outputs_are_the_same_bit_for_bit(activation, form):
    network, x = plain(activation), image()
    deeper, plan = deepen.deepen(network, x, form=form)
    assert len(plan.choices) == 2
    assert torch.equal(deeper(x), network(x))
    kind = type(activation).__name__ if activation in BOUNDS else "PReLU"
    assert {option.first.settings["activation"] for option in plan.choices} == {kind}
    added = [m for n, m in deeper.named_modules() if "activation" in n.split(".")[-1][:-1]]
    assert len(added) >= len(plan.choices) * deepen.FORMS[form]
    # On other inputs too, of other sizes.
    other = 20 * image(4, 9)
    assert torch.equal(deeper(other), network(other))


def test_with_the_same_curve_twice_the_function_would_change():
    for activation in CURVES:
        curve = copy.deepcopy(activation).double().eval()
        once = curve(image())
        assert not torch.allclose(curve(once), once, atol=1e-3), activation


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 2, 3]), st.booleans(), st.integers(0, 99))
def test_any_map_is_left_as_it_is(channels, axes, training, seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.ReLU()).train(training)
    x = 10 * torch.randn(2, channels, *(4, 3, 2)[:axes])
    deeper, _ = deepen.deepen(network, x)
    assert torch.equal(deeper(x), x.relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", [False, True])
def test_of_every_type_and_with_batch_norm(dtype, norm):
    network, x = plain(nn.ReLU(), norm=norm, dtype=dtype), image(dtype=dtype)
    deeper, _ = deepen.deepen(network, x, form="mlpconv")
    assert {p.dtype for p in deeper.parameters()} == {dtype}
    assert torch.equal(deeper(x), network(x))


class Functional(nn.Module):
    """Activations that are functions, one module for several places, and a sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv3, self.conv4 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.shared = nn.ReLU6(inplace=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.shared(self.norm(self.conv2(x)))
        x = self.shared(self.conv3(x) + x)
        x = F.gelu(self.conv4(x))
        return self.fc(x.mean((2, 3))).relu()


def test_functions_and_shared_modules_are_deepened_after_the_layer_before_them():
    network, x = Functional().double().eval(), image()
    deeper, plan = deepen.deepen(network, x)
    assert torch.equal(deeper(x), network(x))
    found = {
        o.site: (o.first.settings["where"], o.first.settings["activation"]) for o in plan.choices
    }
    assert found == {
        "conv1": ("before", "ReLU"),
        "norm": ("before", "ReLU6"),
        "conv4": ("before", "PReLU"),
    }
    reasons = {item.site: item.reason for item in plan.left_alone}
    assert set(reasons) == {"shared", "fc"}
    assert "on the output of `add`" in reasons["shared"]
    assert "vectors" in reasons["fc"]
    assert type(deeper.conv1[1]) is nn.ReLU
    assert type(deeper.norm[1]) is nn.ReLU6


def test_a_sum_that_a_function_is_applied_to_is_left_alone_by_name():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return F.relu(self.a(x)) + F.relu(x.mean() + self.b(x))

    options, left_alone = deepen.find(Sum(), torch.zeros(1, 3, 5, 6))
    assert [option.site for option in options] == ["a"]
    assert [item.site for item in left_alone] == ["`relu` in the network"]


def test_what_reads_the_layers_own_attributes_is_left_alone():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = plain(nn.ReLU(), dtype=torch.float32)
            self.conv, self.act = nn.Conv2d(7, 4, 3), nn.ReLU()

        def forward(self, x):
            x = F.relu(self.conv(self.body(x)))
            return x * self.conv.stride[0]

    options, left_alone = deepen.find(Reads(), torch.zeros(1, 3, 5, 6))
    assert [option.site for option in options] == ["body.1", "body.3"]
    reasons = {item.site: item.reason for item in left_alone}
    assert "no attribute 'stride'" in reasons["conv"]
    assert reasons["act"] == "it does not run"


# ---------------------------------------------------------------- the form of Network In Network


@pytest.mark.parametrize("norm", [False, True])
def test_the_mlpconv_form_makes_blocks_of_the_layers_of_mlpconv(norm):
    network, x = plain(nn.ReLU(), norm=norm), image()
    deeper, _ = deepen.deepen(network, x, form="mlpconv")
    leaves = [m for m in deeper.modules() if not list(m.children())]
    block = [type(m) for m in MLPConv(3, (5, 5, 5), kernel_size=3)]
    assert [type(m) for m in leaves if not isinstance(m, nn.BatchNorm2d)] == 2 * block


def test_its_weights_in_an_mlpconv_are_the_same_function():
    network, x = plain(nn.ReLU()), image()
    deeper, _ = deepen.deepen(network, x, form="mlpconv")
    block = MLPConv(3, (5, 5, 5), kernel_size=3, padding=1).double()
    theirs = [m for m in deeper.modules() if isinstance(m, nn.Conv2d)][:3]
    for mine, other in zip((block.conv, block.pointwise1, block.pointwise2), theirs, strict=True):
        mine.load_state_dict(other.state_dict())
    assert torch.equal(block(x), network[:2](x))


def test_a_convolution_that_is_1x1_already_gets_no_mlpconv():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Pointwise(4, 6), nn.ReLU())
    options, left_alone = deepen.find(network, torch.zeros(1, 3, 5, 6), form="mlpconv")
    assert [option.site for option in options] == ["1"]
    assert "1×1 already" in left_alone[0].reason
    everywhere, _ = deepen.find(network, torch.zeros(1, 3, 5, 6))
    assert [option.site for option in everywhere] == ["1", "3"]


def random_network(name, **options):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.startswith("timm:"):
            return timm.create_model(name.removeprefix("timm:"), **options).eval()
        network = torchvision.models.get_model(name, weights=None, **options).eval()
    if name in ("alexnet", "vgg11"):
        # A hundred million weights that see no map.
        network.classifier = nn.Flatten()
    return network


@pytest.mark.parametrize(
    ("name", "form", "size", "places"),
    [
        ("alexnet", "mlpconv", 64, 5),
        ("vgg11", "mlpconv", 32, 8),
        ("resnet18", "pointwise", 32, 9),
        ("densenet121", "pointwise", 32, 121),
        ("mobilenet_v3_small", "pointwise", 32, 32),
        ("timm:convnext_atto", "pointwise", 32, 12),
    ],
)
def test_real_networks_keep_their_outputs(name, form, size, places):
    network, x = random_network(name, num_classes=3), torch.randn(1, 3, size, size)
    deeper, plan = deepen.deepen(network, x, form=form)
    assert len(plan.choices) == places
    with torch.no_grad():
        assert_close(deeper(x), network(x), rtol=0, atol=1e-6)
    counted = trace_layers(deeper, x)
    assert counted.cost == plan.after


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.GELU()], ids=repr)
@pytest.mark.parametrize("form", ["pointwise", "mlpconv"])
def test_gradients_reach_every_new_weight_and_a_step_lowers_the_loss(activation, form):
    network = nn.Sequential(plain(activation), nn.Flatten(), nn.Linear(210, 4).double())
    deeper, plan = deepen.deepen(network.train(), image(), form=form)
    x, labels = image(batch=16), torch.arange(16) % 4
    before = state_of(deeper)
    loss = F.cross_entropy(deeper(x), labels)
    loss.backward()
    for name, parameter in deeper.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name
    torch.optim.SGD(deeper.parameters(), lr=0.05).step()
    new = [n for n in before if "pointwise" in n]
    assert len(new) == 2 * len(plan.choices) * deepen.FORMS[form]
    assert all(not torch.equal(before[n], deeper.state_dict()[n]) for n in new)
    assert F.cross_entropy(deeper(x), labels) < loss


# ---------------------------------------------------------------- cost


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([nn.ReLU(), nn.GELU()]), st.sampled_from([1, 2, 3]),
    st.sampled_from(["pointwise", "mlpconv"]), st.integers(1, 3),
)  # fmt: skip
def test_the_predicted_cost_is_the_cost_counted_after_building(activation, axes, form, batch):
    network = plain(activation, axes=axes)
    x = image(*(6, 5, 4)[:axes], batch=batch)
    deeper, plan = deepen.deepen(network, x, form=form)
    counted = trace_layers(deeper, x)
    assert counted.cost == plan.after
    assert (plan.before.params, plan.before.macs) == tuple(
        getattr(trace_layers(network, x), name) for name in ("params", "macs")
    )


# ---------------------------------------------------------------- the network, its copies, its files


def test_the_original_and_the_callers_random_numbers_are_untouched():
    network, x = Functional().train(), image(dtype=torch.float32)
    network.conv1.eval().requires_grad_(requires_grad=False)
    handle = network.conv2.register_forward_hook(lambda *_: None)
    before, text = state_of(network), repr(network)
    modes = [module.training for module in network.modules()]
    random = torch.get_rng_state()
    deeper, _ = deepen.deepen(network, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert repr(network) == text
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert list(network.conv2._forward_hooks) == [handle.id]
    assert not network.conv1.weight.requires_grad
    # In the copy the old layers keep their modes, and the new ones are there to be trained.
    assert not deeper.conv1.layer.training
    assert not deeper.conv1.layer.weight.requires_grad
    assert deeper.conv1.pointwise1.weight.requires_grad
    assert deeper.training


@pytest.mark.parametrize("make", [lambda: plain(nn.GELU()), lambda: Functional().double().eval()])
def test_a_plan_that_was_saved_gives_the_same_network(make, tmp_path):
    network, x = make(), image()
    deeper, plan = deepen.deepen(network, x)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    again = deepen.rewrite_all(make(), torch.zeros_like(x), loaded.choices)
    assert repr(again) == repr(deeper)
    again.load_state_dict(deeper.state_dict())
    assert torch.equal(again(x), deeper(x))
    one_by_one = make()
    for option in loaded.choices:
        one_by_one = deepen.rewrite(one_by_one, x, site=option.site, settings=option.first.settings)
    assert repr(one_by_one) == repr(deeper)


def test_it_can_be_copied_deepened_again_and_exported():
    network, x = Functional().double().eval(), image()
    deeper, _ = deepen.deepen(network, x)
    assert torch.equal(copy.deepcopy(deeper)(x), network(x))
    twice, plan = deepen.deepen(deeper, x)
    assert torch.equal(twice(x), network(x))
    assert plan.choices
    exported = torch.export.export(deeper, (x,)).module()
    assert_close(exported(x), network(x))


def test_the_network_itself_may_be_the_activation_or_the_layer():
    x = image()
    deeper, plan = deepen.deepen(nn.ReLU(), x.float())
    assert [option.site for option in plan.choices] == [""]
    assert torch.equal(deeper(x.float()), x.float().relu())


def test_only_the_chosen_sites_are_deepened():
    network, x = plain(nn.ReLU()), image()
    deeper, plan = deepen.deepen(network, x, sites=["3"])
    assert [option.site for option in plan.choices] == ["3"]
    assert type(deeper[1]) is nn.ReLU


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("network", "size", "reason"),
    [
        (nn.Sequential(nn.Linear(5, 4), nn.ReLU()), (6, 5), "on the last axis"),
        (nn.Sequential(nn.Flatten(), nn.Linear(90, 4), nn.ReLU()), (6, 5), "vectors, not a map"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()), (6, 5), "gives weights or scores"),
        (nn.Sequential(nn.LayerNorm(5), nn.GELU()), (6, 5), "on the last axis"),
    ],
)
def test_where_nothing_can_be_inserted_the_reason_is_told(network, size, reason):
    with pytest.raises(ModelError, match=reason):
        deepen.deepen(network, image(*size, dtype=torch.float32))


def test_layers_without_a_batch_are_left_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    _, left_alone = deepen.find(network, torch.zeros(3, 6, 5))
    assert "has no batch" in left_alone[0].reason


def test_what_is_asked_for_must_be_there():
    network, x = plain(nn.ReLU()), image()
    with pytest.raises(OptionError, match="must be one of pointwise, mlpconv, got 'nin'"):
        deepen.deepen(network, x, form="nin")
    with pytest.raises(OptionError, match="Nothing can be inserted at '0': the places are 1, 3"):
        deepen.deepen(network, x, sites=["0"])


@pytest.mark.parametrize(
    ("site", "changes", "message"),
    [
        ("0", {}, "cannot be deepened: no activation is there"),
        ("9", {}, "cannot be deepened"),
        ("1", {"form": "nin"}, "The `form` of '1' must be one of pointwise, mlpconv, got 'nin'"),
        ("1", {"where": "before"}, "The `where` of '1' must be one of after"),
        ("1", {"activation": "GELU"}, "must be one of ReLU, PReLU, got 'GELU'"),
        ("3", {"form": "mlpconv"}, "must be one of pointwise, got 'mlpconv'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(site, changes, message):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Pointwise(4, 6), nn.ReLU())
    options = {"form": "pointwise", "where": "after", "activation": "ReLU", **changes}
    with pytest.raises(PlanError, match=message):
        deepen.rewrite(network, torch.zeros(1, 3, 5, 6), site=site, settings=options)


def test_prelu_can_be_asked_for_where_a_bound_would_do():
    network, x = plain(nn.ReLU()), image()
    options = {"form": "pointwise", "where": "after", "activation": "PReLU"}
    deeper = deepen.rewrite(network, x, site="1", settings=options)
    assert type(deeper[1].activation1) is nn.PReLU
    assert torch.equal(deeper(x), network(x))
