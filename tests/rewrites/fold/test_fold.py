import copy
import math

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.errors import PlanError
from onebyone.core.records import Plan
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites.fold import fold
from onebyone.rewrites.fold import merge_layers as merging
from onebyone.rewrites.low_rank import factorize
from onebyone.rewrites.low_rank.reduced_rank import problems_of

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = (9, 8, 7)


def with_statistics(network, seed=0):
    """Give every batch norm a scale and a shift, for a fresh one has none."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if merging.is_batch_norm(module) and module.running_mean is not None:
            with torch.no_grad():
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
    return network


def exact(network, seed=0):
    return with_statistics(network, seed).double().eval()


def inputs_of(layer, *, batch=2):
    """Random inputs of a layer, all sizes different."""
    if isinstance(layer, nn.Linear):
        return torch.randn(batch, layer.in_features, dtype=torch.float64)
    sizes = SIZES[: len(layer.kernel_size)]
    return torch.randn(batch, layer.in_channels, *sizes, dtype=torch.float64)


def check(network, x, *, forms=None):
    """Fold, and check that outputs are the same and costs as predicted."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    smaller, plan = obo.fold(network, x)
    with torch.no_grad():
        assert_close(smaller(x), network(x), rtol=1e-9, atol=1e-11)
    counted = trace_layers(smaller, x)
    assert counted.cost == plan.after
    assert_close(network.state_dict(), before, rtol=0, atol=0)
    if forms is not None:
        assert [option.first.settings["form"] for option in plan.choices] == forms
    return smaller, plan


def reasons(plan):
    return {item.site: item.reason for item in plan.left_alone}


@st.composite
def layers(draw, *, channels=None, pointwise=False, dimensions=None, groups=True):
    """A convolution, transposed convolution or linear layer of any geometry, in float64."""
    axes = draw(st.integers(0, 3)) if dimensions is None else dimensions
    parts = draw(st.sampled_from([1, 1, 2, 3])) if groups and axes else 1
    if channels is None:
        channels = parts * draw(st.integers(1, 3))
    parts = math.gcd(parts, channels)
    out = parts * draw(st.integers(1, 3))
    bias = draw(st.booleans())
    if axes == 0:
        return nn.Linear(channels, out, bias=bias, dtype=torch.float64)

    def each(strategy):
        return draw(st.tuples(*[strategy] * axes))

    size = (1,) * axes if pointwise else each(st.integers(1, 3))
    options = {"groups": parts, "bias": bias, "dtype": torch.float64}
    options["stride"] = each(st.integers(1, 2))
    if not pointwise and draw(st.integers(0, 3)) == 0:
        options |= {"dilation": each(st.integers(1, 2)), "padding": each(st.integers(0, 1))}
        return TRANSPOSED[axes](channels, out, size, **options)
    if not pointwise:
        options |= {
            "dilation": each(st.integers(1, 2)),
            "padding": each(st.integers(0, 2)),
            "padding_mode": draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
        }
    return CONVOLUTIONS[axes](channels, out, size, **options)


def axes_of(layer):
    return 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)


def runs(network, x):
    """Whether every map in between is large enough."""
    try:
        network(x)
    except RuntimeError:
        return False
    return True


# ---------------------------------------------------------------- batch norms


@settings(max_examples=20, deadline=None)
@given(layers(), st.booleans(), st.integers(0, 99))
def test_a_batch_norm_goes_into_any_layer_before_it(layer, affine, seed):
    torch.manual_seed(seed)
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    norm = NORMS[axes_of(layer)](out, affine=affine)
    network = exact(nn.Sequential(layer, norm, nn.ReLU()), seed)
    smaller, plan = check(network, inputs_of(layer), forms=["norm-before"])
    assert type(smaller[1]) is nn.Identity
    assert type(smaller[0]) is type(layer)
    assert not plan.left_alone


@settings(max_examples=25, deadline=None)
@given(layers(), st.booleans(), st.integers(0, 99))
def test_a_batch_norm_goes_into_the_layer_after_it_where_no_border_shows(layer, shifted, seed):
    torch.manual_seed(seed)
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    norm = NORMS[axes_of(layer)](channels)
    network = exact(nn.Sequential(nn.ReLU(), norm, layer), seed)
    if not shifted:
        norm.running_mean.zero_()
        norm.bias.data.zero_()
    _, plan = check(network, inputs_of(layer))
    transposed = isinstance(layer, tuple(TRANSPOSED.values()))
    border = not isinstance(layer, nn.Linear) and (
        (transposed and {*layer.kernel_size, *layer.stride} != {1})
        or (any(layer.padding) and (transposed or layer.padding_mode == "zeros"))
    )
    assert bool(plan.choices) == (not border or not shifted)
    if not plan.choices:
        words = "do not all meet" if transposed else "zeros that the convolution pads with"
        assert words in reasons(plan)["1"]


def test_batch_norms_fold_in_every_kind_of_layer_that_has_them():
    act = timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU)
    frozen_act = timm.layers.FrozenBatchNormAct2d(5)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.SyncBatchNorm(4),
        timm.layers.StdConv2d(4, 6, 3, padding="same", bias=False),
        act,
        timm.layers.ScaledStdConv2dSame(6, 5, 3, stride=2),
        frozen_act,
        nn.utils.parametrizations.weight_norm(nn.Conv2d(5, 4, 1)),
        torchvision.ops.FrozenBatchNorm2d(4),
        timm.layers.create_conv2d(4, 4, 3, stride=2, padding="same", depthwise=True),
        nn.BatchNorm2d(4),
    )
    smaller, plan = check(exact(network), torch.randn(2, 3, 9, 14, dtype=torch.float64))
    # Each convolution takes the norm behind it; what is then next to one another merges or not.
    assert {o.site for o in plan.choices} >= {"1", "3", "5", "7", "9"}
    assert not any(merging.is_batch_norm(module) for module in smaller.modules())
    assert type(smaller[2]) is nn.Conv2d
    assert type(smaller[3].act) is nn.SiLU
    assert type(smaller[5].act) is nn.ReLU


def test_a_batch_norm_with_an_activation_goes_only_backwards():
    norm = timm.layers.BatchNormAct2d(3)
    network = exact(nn.Sequential(nn.ReLU(), norm, nn.Conv2d(3, 4, 1)))
    _, plan = check(network, torch.randn(2, 3, 5, 7, dtype=torch.float64), forms=[])
    assert "activation of its own" in reasons(plan)["1"] or "ReLU" in reasons(plan)["1"]


# ---------------------------------------------------------------- two layers as one


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(0, 99))
def test_a_merge_is_exact_wherever_it_is_not_refused(data, seed):
    torch.manual_seed(seed)
    pointwise_first = data.draw(st.booleans())
    first = data.draw(layers(pointwise=pointwise_first))
    middle = first.out_features if isinstance(first, nn.Linear) else first.out_channels
    second = data.draw(
        layers(channels=middle, pointwise=not pointwise_first, dimensions=axes_of(first))
    )
    network = nn.Sequential(first, second)
    x = inputs_of(first)
    assume(runs(network, x))
    _, plan = check(network, x)
    if plan.choices:
        assert plan.after.macs <= plan.before.macs
        assert plan.after.params <= plan.before.params
    else:
        assert plan.left_alone


@settings(max_examples=20, deadline=None)
@given(st.data(), st.integers(0, 99))
def test_a_merge_that_is_dearer_is_exact_too(data, seed):
    # As a plan edited by hand may ask for: what it costs is not looked at, nor are the weights.
    torch.manual_seed(seed)
    first = data.draw(layers())
    middle = first.out_features if isinstance(first, nn.Linear) else first.out_channels
    second = data.draw(layers(channels=middle, pointwise=True, dimensions=axes_of(first)))
    network, x = nn.Sequential(first, second), inputs_of(first)
    assume(runs(network, x))
    asked = {"site": "1", "settings": {"form": "merge", "into": "0"}}
    try:
        smaller = fold.rewrite(network, x, **asked, structure_only=True)
    except PlanError as error:
        assert "stride of the 1×1" in str(error)  # noqa: PT017 - not every drawn pair can merge
        return
    assert_close(smaller(x), network(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_before_padding_is_merged_only_where_it_is_padded_too(mode, bias):
    network = nn.Sequential(
        nn.Conv2d(3, 40, 1, bias=bias), nn.Conv2d(40, 4, 3, padding=1, padding_mode=mode)
    ).double()
    smaller, plan = check(network, torch.randn(2, 3, 5, 7, dtype=torch.float64))
    assert bool(plan.choices) == (mode == "circular" or not bias)
    if plan.choices:
        assert type(smaller[0]) is nn.Identity
        assert smaller[1].padding_mode == mode
    else:
        assert "zeros that the convolution pads with" in reasons(plan)["0"]


def test_dropout_between_two_layers_keeps_them_apart_unless_it_never_drops():
    x = torch.randn(3, 6, dtype=torch.float64)
    for p, forms in ((0.5, []), (0.0, ["merge"])):
        network = nn.Sequential(nn.Linear(6, 40), nn.Dropout(p), nn.Linear(40, 5)).double()
        check(network.eval(), x, forms=forms)


def test_strides_of_both_layers_multiply():
    network = nn.Sequential(
        nn.Conv2d(3, 50, (3, 2), stride=(2, 1), padding=(1, 0)), nn.Conv2d(50, 4, 1, stride=(1, 3))
    ).double()
    smaller, _ = check(network, torch.randn(2, 3, 15, 17, dtype=torch.float64), forms=["merge"])
    assert smaller[0].stride == (2, 3)
    network = nn.Sequential(
        nn.Conv2d(3, 90, 1, stride=(1, 2), bias=False),
        nn.Conv2d(90, 4, 3, stride=(2, 1), padding=(1, 2)),
    ).double()
    smaller, _ = check(network, torch.randn(2, 3, 15, 18, dtype=torch.float64), forms=["merge"])
    assert (smaller[1].stride, smaller[1].dilation) == ((2, 2), (1, 2))
    assert smaller[1].padding == (1, 4)


def test_a_merge_that_would_cost_more_is_left_alone_with_both_figures():
    network = nn.Sequential(nn.Conv2d(16, 2, 1, bias=False), nn.Conv2d(2, 16, 3)).double()
    _, plan = check(network, torch.randn(1, 16, 5, 7, dtype=torch.float64), forms=[])
    # 16·2 at 35 places and 2·9·16 at 15, against 16·9·16 at 15.
    assert "34,560 MACs, not 5,440" in reasons(plan)["0"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(5, 6, 3, padding=1),
        nn.Conv2d(6, 4, (3, 2), stride=2, groups=2, padding_mode="reflect", padding=1),
        nn.Conv2d(6, 7, 1, stride=2),
        nn.ConvTranspose2d(4, 5, 3, stride=2),
        nn.Linear(6, 5),
        nn.Conv1d(5, 6, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_folding_undoes_factorizing_at_full_rank(layer):
    torch.manual_seed(0)
    layer = layer.double()
    for form in set(factorize.forms_of(layer)) - set(factorize.SPATIAL):  # those with 1×1 factors
        options = {"form": form, "ranks": list(factorize.full_ranks(layer, form))}
        chain = factorize.build(layer, options)
        factorize.fit(chain, problems_of(layer, None), options, layer)
        network = nn.Sequential(nn.ReLU(), copy.deepcopy(chain), nn.ReLU())
        smaller, plan = check(network, inputs_of(layer))
        assert [option.first.rewrite for option in plan.choices] == ["fold"] * (len(chain) - 1)
        assert type(smaller[1]) is type(layer)
        assert_close(smaller[1].weight, layer.weight, rtol=1e-9, atol=1e-11)
        assert_close(smaller[1].bias, layer.bias, rtol=1e-9, atol=1e-11)
        root, _ = check(chain, inputs_of(layer))
        assert type(root) is type(layer)


# ---------------------------------------------------------------- real networks


def _torchvision(name):
    silent = {"init_weights": False} if name in {"inception_v3", "googlenet"} else {}
    return torchvision.models.get_model(name, weights=None, **silent)


@pytest.mark.parametrize(
    ("name", "side", "norms"),
    [
        ("torchvision:resnet18", 33, 0),
        ("torchvision:mobilenet_v2", 33, 0),
        pytest.param("torchvision:densenet121", 33, 62, marks=pytest.mark.slow),
        pytest.param("torchvision:inception_v3", 79, 2, marks=pytest.mark.slow),
        pytest.param("torchvision:googlenet", 33, 2, marks=pytest.mark.slow),
        pytest.param("torchvision:efficientnet_b0", 33, 0, marks=pytest.mark.slow),
        ("timm:resnet18", 33, 0),
        ("timm:efficientnet_lite0", 33, 0),
        ("timm:tf_mobilenetv3_small_minimal_100", 33, 0),
        ("timm:convnext_atto", 33, 0),
        ("timm:repvgg_a0", 33, 17),
        ("timm:ghostnet_050", 33, 0),
        ("timm:nf_resnet26", 33, 0),
        ("timm:regnetx_002", 33, 0),
    ],
)
def test_real_networks_keep_their_outputs(name, side, norms):
    torch.manual_seed(0)
    library, _, model = name.partition(":")
    network = _torchvision(model) if library == "torchvision" else timm.create_model(model)
    network = exact(network)
    smaller, plan = check(network, torch.randn(1, 3, side, side + 3, dtype=torch.float64))
    left = [n for n, m in smaller.named_modules() if merging.is_batch_norm(m)]
    assert len(left) == norms
    assert set(left) <= set(reasons(plan))
    assert bool(plan.choices) == any(merging.is_batch_norm(m) for m in network.modules())


def test_a_detection_network_with_frozen_norms_keeps_what_its_boxes_come_from():
    torch.manual_seed(0)
    network = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, norm_layer=torchvision.ops.FrozenBatchNorm2d
    )
    network = with_statistics(network).eval()
    example = ([torch.rand(3, 40, 50)],)
    smaller, plan = obo.fold(network, example)
    assert not any(merging.is_batch_norm(module) for module in smaller.modules())
    assert len(plan.choices) == sum(merging.is_batch_norm(module) for module in network.modules())
    # Which boxes are kept may turn on a rounding; what they are made from does not.
    x = torch.rand(1, 3, 96, 128, dtype=torch.float64)

    def raw(detector):
        detector = detector.double()
        with torch.no_grad():
            return detector.head(list(detector.backbone(x).values()))

    exactly, _ = obo.fold(network.double(), ([torch.rand(3, 40, 50, dtype=torch.float64)],))
    assert_close(raw(exactly), raw(network), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- what is left alone


class _Forward(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def _hooked(network, name, kind="register_forward_hook"):
    getattr(network.get_submodule(name), kind)(lambda *_: None)
    return network


def _shared_weight():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    network[3].weight = network[0].weight
    return network


def _own_forward():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    return nn.Sequential(nn.Conv2d(3, 3, 1), Doubled(3))


def _two_names():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    network.add_module("again", nn.ModuleList([network[1]]))
    return _Forward(lambda n, x: n.body[1](n.body[0](x)), body=network)


CONV_NORM = {"conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3)}


@pytest.mark.parametrize(
    ("network", "site", "reason"),
    [
        (
            lambda: _hooked(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), "0"),
            "1",
            "hooks of '0'",
        ),
        (
            lambda: _hooked(
                nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
                "0",
                "register_forward_pre_hook",
            ),
            "1",
            "hooks of '0'",
        ),
        (
            lambda: _hooked(
                nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)), "0"
            ),
            "1",
            "hooks of '0'",
        ),
        (_shared_weight, "1", "'0' shares a weight with '3'"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout2d(), nn.BatchNorm2d(3)),
            "2",
            "Dropout2d is between, which acts in training",
        ),
        (_own_forward, "1", "Doubled has a forward of its own"),
        (_two_names, "body.1", "one module of several names"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
            "1",
            "keeps no running statistics",
        ),
        (
            lambda: _Forward(lambda n, x: n.bn(n.conv(n.conv(x))), **CONV_NORM),
            "bn",
            "'conv', but it runs 2 times",
        ),
        (lambda: _Forward(lambda n, x: n.bn(n.bn(n.conv(x))), **CONV_NORM), "bn", "runs 2 times"),
        (lambda: _Forward(lambda n, x: n.bn(F.relu(n.conv(x))), **CONV_NORM), "bn", "`relu`"),
        (
            lambda: _Forward(lambda n, x: n.bn(y := n.conv(x)) + y, **CONV_NORM),
            "bn",
            "read more than once",
        ),
        (lambda: _Forward(lambda n, x: x, **CONV_NORM), "bn", "does not run"),
        (
            lambda: _Forward(lambda n, x: n.bn(n.conv(x)) * n.conv.weight.sum(), **CONV_NORM),
            "bn",
            "the forward of the network reads the weight of 'conv'",
        ),
        (
            lambda: _Forward(lambda n, x: n.bn(n.conv(x)) / n.bn.num_features, **CONV_NORM),
            "bn",
            "does not run without it: .*num_features",
        ),
        (
            lambda: _Forward(lambda n, x: n.bn(n.conv(x)) * len(list(n.parameters())), **CONV_NORM),
            "bn",
            "without it the outputs differ",
        ),
    ],
)
def test_what_depends_on_a_layer_leaves_it_alone_by_name(network, site, reason):
    import re

    network = exact(copy.deepcopy(network()))
    _, plan = check(network, torch.randn(2, 3, 5, 7, dtype=torch.float64), forms=[])
    assert re.search(reason, reasons(plan)[site])


def test_one_fold_that_breaks_the_network_does_not_stop_the_others():
    def function(network, x):
        for place in range(0, 10, 2):
            x = network.body[place + 1](network.body[place](x)).relu()
        return x / network.body[5].num_features

    parts = [part for _ in range(5) for part in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))]
    network = exact(_Forward(function, body=nn.Sequential(*parts)))
    smaller, plan = check(network, torch.randn(2, 3, 5, 7, dtype=torch.float64))
    assert [option.site for option in plan.choices] == [f"body.{n}" for n in (1, 3, 7, 9)]
    assert list(reasons(plan)) == ["body.5"]
    assert isinstance(smaller.body[5], nn.BatchNorm2d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_wrong_fold_is_refused_in_every_type(dtype, monkeypatch):
    network = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype).eval()
    x = torch.randn(2, 3, 5, 7, dtype=dtype)
    smaller, plan = obo.fold(network, x)
    assert len(plan.choices) == 1
    with torch.no_grad():
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
        assert smaller(x).dtype == dtype
        assert_close(smaller(x), network(x), rtol=tolerance, atol=tolerance)
    right = merging.affine_of
    monkeypatch.setattr(merging, "affine_of", lambda norm: [t * 1.0001 for t in right(norm)])
    _, plan = obo.fold(network, x)
    assert not plan.choices
    assert "outputs differ" in reasons(plan)["1"]


# ---------------------------------------------------------------- what stays


def test_frozen_layers_and_modes_stay_as_they_are():
    network = with_statistics(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1)
        )
    ).train()
    network[1].eval()
    for part in (network[0], network[1]):
        part.requires_grad_(requires_grad=False)
    smaller, _ = obo.fold(network, (2, 3, 5, 7))
    assert [module.training for module in smaller] == [True, False, True, True]
    assert smaller.training
    assert network[1].weight is not None
    assert [p.requires_grad for p in smaller[0].parameters()] == [False, False]
    assert [p.requires_grad for p in smaller[3].parameters()] == [True, True]
    smaller(torch.randn(2, 3, 5, 7)).sum().backward()
    assert smaller[3].weight.grad is not None


def test_a_frozen_and_a_trained_layer_are_not_merged():
    network = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 4, 1)).double()
    network[0].requires_grad_(requires_grad=False)
    _, plan = check(network, torch.randn(2, 3, 5, 7, dtype=torch.float64), forms=[])
    assert "one is frozen and the other is trained" in reasons(plan)["1"]


def test_a_saved_plan_gives_the_same_network_again(tmp_path):
    torch.manual_seed(0)
    network = with_statistics(timm.create_model("test_efficientnet")).eval()
    x = torch.randn(1, 3, 33, 40)
    smaller, plan = obo.fold(network, x, name="efficient")
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    again = fold.rewrite_all(network, x, loaded.choices)
    assert_close(again.state_dict(), smaller.state_dict(), rtol=0, atol=0)
    blank = fold.rewrite_all(
        timm.create_model("test_efficientnet"),
        torch.zeros_like(x),
        loaded.choices,
        structure_only=True,
    )
    blank.load_state_dict(smaller.state_dict())
    with torch.no_grad():
        assert_close(blank.eval()(x), smaller(x), rtol=0, atol=0)
    one = loaded.choices[0]
    single = fold.rewrite(network, x, site=one.site, settings=one.first.settings)
    assert not merging.is_batch_norm(single.get_submodule(one.site))


@pytest.mark.parametrize(
    ("site", "asked", "reason"),
    [
        ("1", {"form": "norm-before", "into": "3"}, "its output|feeds"),
        ("1", {"form": "norm", "into": "0"}, "one of norm-before, norm-after, merge"),
        ("1", {"form": "norm-before", "into": "conv"}, "must be a layer of the network"),
        ("1", {"form": "norm-before"}, "must have a `form`"),
        ("3", {"form": "merge", "into": "0"}, "output of the network"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(site, asked, reason):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    with pytest.raises(PlanError, match=reason):
        fold.rewrite(network, torch.zeros(1, 3, 5, 7), site=site, settings=asked)
