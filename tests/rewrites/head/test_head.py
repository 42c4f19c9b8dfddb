import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from onebyone.core.errors import ModelError, PlanError
from onebyone.networks.layers import GlobalAverageHead
from onebyone.networks.zoo.article import classic
from onebyone.planning import applies
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites.head import rewrite as head
from onebyone.rewrites.head.rewrite import HeadSite, NoHead, find_head

IMAGE = (2, 3, 12, 12)


class Body(nn.Module):
    """Features of 6 channels on half the pixels, then two linear layers; the forward varies."""

    def __init__(self, places=36, hidden=7, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc1 = nn.Linear(6 * places, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, 4)

    def features(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)

    def classify(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class View(Body):
    def forward(self, x):
        x = self.features(x)
        return self.classify(x.view(x.size(0), -1))


class Shape(Body):
    def forward(self, x):
        x = self.features(x)
        return self.classify(x.reshape(x.shape[0], -1))


class KnownSize(Body):
    def forward(self, x):
        return self.classify(self.features(x).view(-1, 216))


class Flatten(Body):
    def forward(self, x):
        return self.classify(self.features(x).flatten(1))


class TorchFlatten(Body):
    def forward(self, x):
        return self.classify(torch.flatten(self.features(x), start_dim=1))


class Dropped(Body):
    def forward(self, x):
        x = F.dropout(self.features(x), 0.2, training=self.training)
        x = F.gelu(self.fc1(torch.flatten(x, 1)), approximate="tanh")
        return self.fc2(F.dropout(x, p=0.3, training=self.training))


class LogSoftmax(Body):
    def forward(self, x):
        return F.log_softmax(self.classify(self.features(x).flatten(1)), dim=1)


class Mean(Body):
    def forward(self, x):
        return self.classify(self.features(x).mean([2, 3]))


class KeptMean(Body):
    def forward(self, x):
        return self.classify(torch.mean(self.features(x), dim=(-2, -1), keepdim=True)[:, :, 0, 0])


class OnePool(Body):
    def forward(self, x):
        return self.classify(F.adaptive_avg_pool2d(self.features(x), (1, 1)).flatten(1))


class AdaptiveToItself(Body):
    def forward(self, x):
        return self.classify(F.adaptive_avg_pool2d(self.features(x), (6, 6)).flatten(1))


class Permuted(Body):
    def forward(self, x):
        return self.classify(self.features(x).permute(0, 2, 3, 1).flatten(1))


class Squeezed(Body):
    def forward(self, x):
        return self.classify(F.adaptive_avg_pool2d(self.features(x), 1).squeeze(3).squeeze(2))


class Twofold(Body):
    def forward(self, x):
        return self.classify(self.features(x).flatten(1).contiguous().view(x.size(0), -1))


class Normed(Body):
    def __init__(self, places=36, hidden=7, bias=True):
        super().__init__(places, hidden, bias)
        self.batch_norm, self.layer_norm = nn.BatchNorm1d(hidden), nn.LayerNorm(hidden)
        nn.init.uniform_(self.batch_norm.running_mean)
        nn.init.uniform_(self.layer_norm.weight)

    def forward(self, x):
        x = self.fc1(self.features(x).flatten(1))
        return self.fc2(self.layer_norm(F.leaky_relu(self.batch_norm(x), 0.3)))


FLAT = [
    View,
    Shape,
    KnownSize,
    Flatten,
    TorchFlatten,
    Dropped,
    LogSoftmax,
    AdaptiveToItself,
    Permuted,
    Twofold,
    Normed,
]
AVERAGED = [Mean, KeptMean, OnePool, Squeezed]


def made(kind, **options):
    torch.manual_seed(0)
    return kind(places=1 if kind in AVERAGED else 36, **options)


def exact(network, example):
    site = find_head(network, example)
    assert isinstance(site, HeadSite), site
    return site, head.rewrite(network, example, name=site.name, form="exact", hidden=[])


def assert_same_scores(network, example, **tolerance):
    site, rewritten = exact(network, example)
    original = copy.deepcopy(network).eval()
    with torch.no_grad():
        assert_close(rewritten.eval()(example), original(example), **tolerance)
    assert_cost_is_counted(site, "exact", [], network, rewritten, example)
    return rewritten


def assert_cost_is_counted(site, form, hidden, network, rewritten, example, context=0):
    """The site's prediction is what the networks differ by."""
    before, after = trace_layers(network, example[:1]), trace_layers(rewritten, example[:1])
    predicted = head.cost(site, form, hidden, context)
    assert after.params - before.params == predicted.params - site.cost.params
    assert after.macs - before.macs == predicted.macs - site.cost.macs


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("kind", FLAT + AVERAGED)
@pytest.mark.parametrize("bias", [True, False])
def test_an_exact_head_gives_the_same_scores_however_the_map_was_flattened(kind, bias):
    network = made(kind, bias=bias)
    rewritten = assert_same_scores(network, torch.randn(IMAGE))
    assert not any(isinstance(m, nn.Linear) for m in rewritten.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [False, True])
def test_an_average_and_one_linear_layer_become_an_averaging_head(bias, dropout):
    torch.manual_seed(0)
    steps = [nn.Dropout(0.1)] if dropout else []
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *steps,
        nn.Linear(6, 4, bias=bias),
    )
    rewritten = assert_same_scores(network, torch.randn(IMAGE))
    assert any(isinstance(m, GlobalAverageHead) for m in rewritten.modules())


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, stride=3, padding=1),  # sees a border of zeros
        nn.AvgPool2d(3, divisor_override=4),
        nn.AvgPool2d(2, stride=2),  # leaves pixels out
        nn.MaxPool2d(3),
    ],
    ids=str,
)
def test_a_pooling_that_is_not_the_mean_stays(pool):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(6, 4))
    rewritten = assert_same_scores(network, torch.randn(2, 3, 5, 5))
    assert any(type(m) is type(pool) for m in rewritten.modules())


def test_the_articles_classic_network_keeps_its_logits():
    torch.manual_seed(0)
    assert_same_scores(classic(), torch.randn(3, 1, 28, 28))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (torchvision.models.squeezenet1_1(num_classes=10), "already convolutions: 'classifier.1'"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
            "does not end in linear layers on a flattened map, but in a 1×4×62×62",
        ),
        (timm.create_model("test_vit", img_size=64), "in a way that is not a flattening"),
    ],
    ids=["squeezenet", "no head", "vit"],
)
def test_a_network_without_such_a_head_is_refused_with_a_reason(network, reason):
    found = find_head(network.eval(), torch.randn(1, 3, 64, 64))
    assert isinstance(found, NoHead)
    assert reason in found.reason


class Twice(Body):
    def __init__(self, places=36):
        super().__init__(places, hidden=216)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(F.relu(self.fc1(self.features(x).flatten(1))))))


class Tied(Body):
    def __init__(self, places=36):
        super().__init__(places, hidden=216)
        self.fc3 = nn.Linear(216, 216)
        self.fc3.weight = self.fc1.weight

    def forward(self, x):
        return self.fc2(self.fc3(F.relu(self.fc1(self.features(x).flatten(1)))))


class Branched(Body):
    def forward(self, x):
        x = self.features(x).flatten(1)
        return self.classify(x) + x.sum(1, keepdim=True)


class Depends(Body):
    def forward(self, x):
        x = self.features(x)
        if x.sum() > 0:
            x = x * 2
        return self.classify(x.flatten(1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, "the linear layer 'fc1' is used 2 times"),
        (Tied, "the weight of the linear layer 'fc3' is shared with another layer"),
        (Branched, "does not end in linear layers|two places|not one tensor"),
        (Depends, "its forward cannot be traced by torch.fx"),
    ],
)
def test_a_head_that_cannot_be_rewritten_is_refused_with_the_reason(kind, reason):
    found = find_head(made(kind), torch.randn(IMAGE))
    assert isinstance(found, NoHead)
    assert re.search(reason, found.reason)


def test_a_parametrized_linear_layer_is_refused():
    network = made(Flatten)
    nn.utils.parametrizations.weight_norm(network.fc1)
    found = find_head(network, torch.randn(IMAGE))
    assert isinstance(found, NoHead)
    assert "parametrized" in found.reason


def test_the_original_keeps_no_memory_in_common_with_the_new_network():
    network = made(Flatten)
    _, rewritten = exact(network, torch.randn(IMAGE))
    mine = {p.data_ptr() for p in network.parameters()}
    assert not mine & {p.data_ptr() for p in rewritten.parameters()}


def test_modes_and_frozen_layers_carry_over():
    network = made(Dropped).train()
    network.conv.eval()
    network.fc1.requires_grad_(False)
    _, rewritten = exact(network, torch.randn(IMAGE))
    assert rewritten.training
    assert not rewritten.conv.training
    new = rewritten.fc1
    assert new.training
    assert [p.requires_grad for p in new.parameters()] == [False, False, True, True]
    assert {m.p for m in new.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_everything_before_the_head_keeps_its_class_name_and_weights():
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10)
    _, rewritten = exact(network, torch.randn(1, 3, 32, 32))
    assert type(rewritten.layer1[0]) is type(network.layer1[0])
    before, after = network.state_dict(), rewritten.state_dict()
    kept = [key for key in before if not key.startswith("fc.")]
    assert set(kept) == {key for key in after if not key.startswith("fc.")}
    assert all(torch.equal(before[key], after[key]) for key in kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_carries_over(dtype):
    network, example = made(Flatten).to(dtype).eval(), torch.randn(IMAGE, dtype=dtype)
    _, rewritten = exact(network, example)
    assert {p.dtype for p in rewritten.parameters()} == {dtype}
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-10
    assert_close(rewritten(example), network(example), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- what is refused


class Gives(Body):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        scores = self.classify(self.features(x).flatten(1))
        return self.what(scores)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda x: {"out": x, "aux": x}, "it gives a dict of 'out', 'aux', not one tensor"),
        (lambda x: (x, x), "it gives a tuple of 2, not one tensor of scores"),
        (lambda x: [x], "it gives a list of 1, not one tensor of scores"),
        (lambda x: x[:, :, None, None], "in a 2×4×1×1 output"),
    ],
)
def test_outputs_that_are_not_scores_are_refused(what, reason):
    found = find_head(Gives(what), torch.randn(IMAGE))
    assert isinstance(found, NoHead)
    assert reason in found.reason


def test_segmentation_and_detection_networks_are_refused():
    network = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    found = find_head(network, torch.randn(1, 3, 64, 64))
    assert isinstance(found, NoHead)
    assert "OrderedDict of 'out', not one tensor" in found.reason


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_linear_that_may_compute_something_else_is_refused_by_name():
    network = made(Flatten)
    network.fc1 = Doubled(216, 7)
    found = find_head(network, torch.randn(IMAGE))
    assert isinstance(found, NoHead)
    assert re.search(r"its layer 'fc1' is a .*\.Doubled, which may compute something", found.reason)


def test_a_head_module_with_hooks_is_refused_and_hooks_elsewhere_stay():
    network = made(Flatten)
    network.conv.register_forward_hook(lambda *_: None)
    network.register_forward_hook(lambda *_: None)
    _, rewritten = exact(network, torch.randn(IMAGE))
    assert len(rewritten.conv._forward_hooks) == len(rewritten._forward_hooks) == 1
    network.fc1.register_forward_hook(lambda *_: None)
    found = find_head(network, torch.randn(IMAGE))
    assert found == NoHead("its module 'fc1' has hooks, which a rewrite would lose")


def test_lazy_layers_are_refused():
    network = made(Flatten)
    network.fc1 = nn.LazyLinear(7)
    found = find_head(network, torch.randn(IMAGE))
    assert found == NoHead(
        "'fc1.weight' is a lazy parameter; run the network once to give it a shape"
    )


class AlwaysDrops(Body):
    def forward(self, x):
        return self.classify(F.dropout(self.features(x).flatten(1), 0.5))


def test_dropout_that_is_on_in_evaluation_mode_is_refused():
    found = find_head(made(AlwaysDrops), torch.randn(IMAGE))
    assert found == NoHead("its head calls dropout in evaluation mode too")


def test_an_input_that_does_not_fit_is_a_reason():
    found = find_head(made(Flatten), torch.randn(2, 3, 20, 20))
    assert isinstance(found, NoHead)
    assert "but it failed" in found.reason


# ---------------------------------------------------------------- how the forward changes


class Wild(nn.Module):
    """A forward that fx cannot trace, but whose head is of modules called one after the other."""

    def __init__(self, averaged):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.pool = nn.AdaptiveAvgPool2d(1) if averaged else nn.Identity()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(6 if averaged else 600, 5)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(5, 4)

    def forward(self, x):
        if x.shape[-1] > 4:
            x = x * 2
        x = F.relu(self.conv(x))
        return self.fc2(self.act(self.fc1(self.flatten(self.pool(x)))))


@pytest.mark.parametrize("averaged", [False, True])
def test_where_fx_cannot_trace_the_head_is_found_by_export(averaged):
    torch.manual_seed(0)
    network = Wild(averaged).double()
    rewritten = assert_same_scores(network, torch.randn(IMAGE, dtype=torch.float64))
    assert type(rewritten) is Wild


class Reused(Body):
    """One ReLU and one dropout for all places; keeps what it saw."""

    def __init__(self, places=36, hidden=7, bias=True):
        super().__init__(places, hidden, bias)
        self.relu, self.drop, self.flatten = nn.ReLU(), nn.Dropout(0.3), nn.Flatten()

    def forward(self, x, scale=1.0):
        x = self.drop(F.max_pool2d(self.relu(self.conv(x)), 2)) * scale
        self.seen = x
        x = self.drop(self.relu(self.fc1(self.drop(self.flatten(x)))))
        return self.fc2(x)


@pytest.mark.parametrize("form", ["exact", "gap"])
def test_modules_that_are_used_elsewhere_too_stay_there(form):
    network, example = made(Reused).double(), torch.randn(IMAGE, dtype=torch.float64)
    site = find_head(network, example)
    rewritten = head.rewrite(network, example, name=site.name, form=form, hidden=[])
    assert type(rewritten.relu) is nn.ReLU
    assert type(rewritten.drop) is nn.Dropout
    with torch.no_grad():
        features = F.max_pool2d(F.relu(rewritten.eval().conv(example)), 2)
        assert_close(rewritten(example), rewritten.fc1(features))
        if form == "exact":
            assert_close(rewritten(example), network.eval()(example))
    # No symbol of the tracing is left where the forward keeps what it saw.
    copy.deepcopy(rewritten)


def test_an_argument_with_a_default_is_fixed_in_an_edited_forward_and_says_so():
    network, example = made(Reused), torch.randn(IMAGE)
    _, rewritten = exact(network, example)
    rewritten.eval()(example)
    with pytest.raises(AssertionError, match="scale has been specialized"):
        rewritten(example, 2.0)


class Auxiliary(Body):
    def __init__(self, places=36, hidden=7, bias=True):
        super().__init__(places, hidden, bias)
        self.aux = nn.Linear(216, 4)

    def forward(self, x):
        x = self.features(x)
        scores = self.classify(torch.flatten(x, 1))
        return (scores, self.aux(x.flatten(1))) if self.training else scores


def test_what_the_forward_does_only_in_training_stays():
    network, example = made(Auxiliary).double(), torch.randn(IMAGE, dtype=torch.float64)
    _, rewritten = exact(network, example)
    for mine, theirs in zip(rewritten.train()(example), network.train()(example), strict=True):
        assert_close(mine, theirs)
    assert_close(rewritten.eval()(example), network.eval()(example))


def test_dropout_after_the_average_drops_whole_channels():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(6, 4)
    ).double()
    example = torch.randn(IMAGE, dtype=torch.float64)
    _, rewritten = exact(network, example)
    outputs = []
    for net in (network, rewritten):
        torch.manual_seed(1)
        outputs.append(net.train()(example))
    assert_close(*outputs)


def test_a_map_of_scores_is_refused_where_what_follows_would_mix_its_places():
    network = made(Flatten)
    network = nn.Sequential(network.conv, nn.Flatten(), nn.Linear(864, 4), nn.Softmax(dim=-1))
    _, rewritten = exact(network, torch.randn(2, 3, 12, 12))
    with pytest.raises(ModelError, match="it has 3×1 windows, and what the network does"):
        rewritten(torch.randn(2, 3, 14, 12))


# ---------------------------------------------------------------- larger images


def test_each_place_of_the_score_map_is_the_networks_answer_on_that_crop():
    torch.manual_seed(0)
    # Nothing is padded, so that a crop sees what the whole image shows there; pooling halves twice.
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 2), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(5 * 3 * 3, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3),
    ).double().eval()  # fmt: skip
    crop = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    _, rewritten = exact(network, crop)
    image = torch.randn(2, 1, 16 + 3 * 4, 16 + 2 * 4, dtype=torch.float64)
    scores = rewritten(image)
    assert scores.shape == (2, 3, 4, 3)
    for row in range(4):
        for column in range(3):
            window = image[:, :, 4 * row : 4 * row + 16, 4 * column : 4 * column + 16]
            assert_close(scores[:, :, row, column], network(window))


@pytest.mark.parametrize("kind", [Flatten, View, AdaptiveToItself, Permuted, Normed])
def test_a_larger_image_gives_a_map_of_scores(kind):
    network = made(kind).eval()
    _, rewritten = exact(network, torch.randn(IMAGE))
    image = torch.randn(2, 3, 16, 20)
    scores = rewritten(image)
    assert scores.shape == (2, 4, 3, 5)
    # The middle is not touched by the padding of the image, nor that of the crop's features.
    features = F.max_pool2d(F.relu(network.conv(image)), 2)
    network.features = lambda x: x
    assert_close(
        scores[:, :, 1, 2], network(features[:, :, 1:7, 2:8].contiguous()), rtol=1e-4, atol=1e-5
    )


# ---------------------------------------------------------------- gap


@pytest.mark.parametrize(
    ("hidden", "context"), [([], 0), ([5], 0), ([8, 6], 0), ([], 1), ([5], 2), ([8, 6], 1)]
)
@pytest.mark.parametrize("kind", [View, AdaptiveToItself])
def test_the_cost_of_a_gap_head_is_the_cost_counted(kind, hidden, context):
    network, example = made(kind), torch.randn(IMAGE)
    site = find_head(network, example)
    rewritten = head.rewrite(
        network, example, name=site.name, form="gap", hidden=hidden, context=context
    )
    assert_cost_is_counted(site, "gap", hidden, network, rewritten, example, context)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        rewritten.eval()(example[:1])
    convolution = 3 * 6 * 9 * 12 * 12
    assert flops.get_total_flops() == 2 * (
        convolution + head.cost(site, "gap", hidden, context).macs
    )


def test_the_articles_head_is_75_times_smaller():
    site = find_head(classic(), torch.zeros(1, 1, 28, 28))
    # conv1 30, conv2 1,792; the article's convolution-only network has 4,232 in all.
    assert head.cost(site, "gap", [32]).params == 4_232 - 30 - 1_792
    assert site.cost.params == 316_532 - 30 - 1_792


def test_hidden_widths_are_none_or_at_most_the_channels():
    for channels in (1, 8, 10, 64, 512):
        settings = head.gap_settings(channels)
        plain = [each["hidden"] for each in settings if "context" not in each]
        context = [each["hidden"] for each in settings if each.get("context")]
        assert plain[0] == []
        for widths in (plain[1:], context):
            assert all(1 <= w <= channels for width in widths for w in width)
            assert widths == sorted(widths)
            assert len(widths) == len({w for (w,) in widths})
            # The widest has as many as come in, unless that is fewer than a hidden layer has.
            assert widths[-1:] == ([[channels]] if channels >= head.FEWEST_HIDDEN else [])
        assert all(width in context for width in plain[1:])


def test_a_gap_head_is_no_use_where_the_map_is_averaged_already():
    site = find_head(made(Mean), torch.randn(IMAGE))
    assert head.why_not(site, "gap") == "its head averages over the map already"
    assert head.why_not(site, "exact") is None


# ---------------------------------------------------------------- plans that do not fit


def test_a_plan_for_another_head_is_refused():
    network, example = made(Flatten), torch.randn(IMAGE)
    with pytest.raises(PlanError, match=r"head starts at 'fc1', but the plan says 'fc2'"):
        head.rewrite(network, example, name="fc2", form="exact", hidden=[])
    with pytest.raises(PlanError, match=r"form of a head must be one of exact, gap, got 'gape'"):
        head.rewrite(network, example, name="fc1", form="gape", hidden=[])
    with pytest.raises(PlanError, match=r"The head 'fc1' cannot be rewritten: its forward cannot"):
        head.rewrite(made(Depends), example, name="fc1", form="exact", hidden=[])


@pytest.mark.filterwarnings("ignore")  # torch warns that its own quantization will move
@pytest.mark.parametrize(
    "pool", [nn.Flatten(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())]
)
def test_a_quantized_head_is_called_quantized(pool):
    features = 288 if isinstance(pool, nn.Flatten) else 8
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Linear(features, 4)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    (head,) = [each for each in applies(quantized, (1, 3, 8, 8)).sites if each.rewrite == "head"]
    assert "its layer '3' is quantized" in head.reason
    assert "before it is quantized" in head.reason
