"""The exact head on torchvision's and timm's networks."""

import copy
import io
import pickle

import pytest
import timm.models.vgg
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from onebyone.networks.layers import GlobalAverageHead
from onebyone.rewrites.head import rewrite as head
from onebyone.rewrites.head.rewrite import HeadSite, NoHead, find_head


def small_vgg():
    """VGG whose adaptive pool does nothing on 64×64 images, as the usual one on 224×224."""
    layers = torchvision.models.vgg.make_layers([4, "M", 5, "M", 6, "M", 7, "M"], batch_norm=True)
    network = torchvision.models.VGG(layers, num_classes=10, init_weights=False)
    network.avgpool = nn.AdaptiveAvgPool2d(4)
    return with_small_head(network, 7 * 4 * 4)


def small_alexnet():
    with torch.device("meta"):
        network = torchvision.models.alexnet(num_classes=10)
    network.features.to_empty(device="cpu").apply(
        lambda m: m.reset_parameters() if isinstance(m, nn.Conv2d) else None
    )
    return with_small_head(network, 256 * 6 * 6)


def with_small_head(network, features):
    """Replace the millions of weights, which would take longer to draw than all else here."""
    linears = [i for i, m in enumerate(network.classifier) if isinstance(m, nn.Linear)]
    widths = [features, 16, 12, 10]
    for index, before, after in zip(linears, widths[:-1], widths[1:], strict=True):
        network.classifier[index] = nn.Linear(before, after)
    return network


def small_convnext():
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(8, 12, 1), block(12, None, 1)], num_classes=10)


def small_densenet():
    return torchvision.models.DenseNet(
        growth_rate=4, block_config=(2, 3), num_init_features=8, num_classes=10
    )


def inception():
    return torchvision.models.inception_v3(num_classes=10, init_weights=False)


def googlenet():
    return torchvision.models.googlenet(num_classes=10, init_weights=False)


TORCHVISION = {
    "alexnet": (small_alexnet, 64),
    "convnext": (small_convnext, 32),
    "densenet": (small_densenet, 32),
    "efficientnet": (lambda: torchvision.models.efficientnet_b0(num_classes=10), 32),
    "googlenet": (googlenet, 32),
    "inception": (inception, 75),
    "mnasnet": (lambda: torchvision.models.MNASNet(0.25, num_classes=10), 32),
    "mobilenet_v2": (lambda: torchvision.models.MobileNetV2(10, width_mult=0.25), 32),
    "mobilenet_v3": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), 32),
    "regnet": (lambda: torchvision.models.regnet_y_400mf(num_classes=10), 32),
    "resnet": (lambda: torchvision.models.resnet18(num_classes=10), 32),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), 32),
    "vgg": (small_vgg, 64),
}
TIMM = [
    "efficientvit_b0",
    "edgenext_xx_small",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "ghostnet_050",
    "inception_next_atto",
    "lcnet_035",
    "mnasnet_small",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "regnetx_002",
    "repghostnet_050",
    "resnet10t",
    "starnet_s050",
    "test_byobnet",
    "test_convnext",
    "test_convnext2",
    "test_efficientnet",
    "test_nfnet",
    "test_resnet",
]


def exact(network, example):
    site = find_head(network, example)
    assert isinstance(site, HeadSite), site
    return site, head.rewrite(network, example, name=site.name, form="exact", hidden=[])


def scores(network, example):
    with torch.no_grad():
        return network.eval()(example)


def assert_exact(network, size):
    """The rewritten network is the same function, of the same kind, with the same weights."""
    network = network.double().train()
    example = torch.randn(2, 3, size, size, dtype=torch.float64)
    before = copy.deepcopy(network.state_dict())
    site, rewritten = exact(network, example)
    assert isinstance(rewritten, type(network))
    assert rewritten.training
    expected = scores(network, example)
    # What the scores differ by between inputs is what must be kept.
    assert expected.std() > 0
    assert_close(
        scores(rewritten, example), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())
    )
    assert_close(network.state_dict(), before, rtol=0, atol=0)
    after = rewritten.state_dict()
    kept = {key for key in before if not key.startswith(site.occupies)}
    assert kept == {key for key in after if not key.startswith(site.occupies)}
    assert_close({k: after[k] for k in kept}, {k: before[k] for k in kept}, rtol=0, atol=0)
    again = find_head(rewritten, example)
    assert isinstance(again, NoHead)
    assert "already convolutions" in again.reason
    return rewritten


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_keep_their_logits_their_class_and_their_weights(name):
    torch.manual_seed(0)
    make, size = TORCHVISION[name]
    assert_exact(make(), size)


@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_keep_their_logits_their_class_and_their_weights(name):
    torch.manual_seed(0)
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    network = timm.create_model(name, num_classes=10)
    rewritten = assert_exact(network, 64)
    # All of timm's heads are of modules, so that no forward had to change.
    assert type(rewritten) is type(network)


def test_timms_vgg_keeps_the_convolutions_of_its_head():
    torch.manual_seed(0)
    network = timm.models.vgg.VGG(cfg=[4, "M", 5, "M"], num_classes=10)
    network.pre_logits.fc1 = nn.Conv2d(5, 8, 7)
    network.pre_logits.fc2 = nn.Conv2d(8, 6, 1)
    network.head.fc = nn.Linear(6, 10)
    rewritten = assert_exact(network, 32)
    assert isinstance(rewritten.head.fc, GlobalAverageHead)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torchvision.models.squeezenet1_1(num_classes=10), "'classifier.1' gives"),
        (lambda: timm.create_model("dla46x_c", num_classes=10), "'fc' gives"),
    ],
    ids=["squeezenet", "dla"],
)
def test_a_head_of_convolutions_is_left_and_said_to_be_one(make, reason):
    found = find_head(make(), torch.randn(1, 3, 64, 64))
    assert isinstance(found, NoHead)
    assert f"its head is already convolutions: {reason} the scores" == found.reason


def test_an_adaptive_pool_that_is_not_the_identity_stays_and_is_told_of():
    torch.manual_seed(0)
    network = small_alexnet().eval()
    site, rewritten = exact(network, torch.randn(1, 3, 64, 64))
    assert "makes 1×1 maps 6×6, so it stays before the head" in site.note
    for size in (64, 96, 130):
        image = torch.randn(1, 3, size, size + 32)
        assert_close(scores(rewritten, image), scores(network, image), rtol=1e-4, atol=1e-5)


def test_after_an_adaptive_pool_that_was_the_identity_a_larger_image_gives_a_map():
    torch.manual_seed(0)
    network = small_vgg().eval()
    site, rewritten = exact(network, torch.randn(1, 3, 64, 64))
    assert site.note == ""
    assert type(rewritten.avgpool) is nn.Identity
    assert scores(rewritten, torch.randn(1, 3, 96, 160)).shape == (1, 10, 3, 7)


# ---------------------------------------------------------------- training


def same_when_training(network, rewritten, example):
    """The same random numbers give the same outputs; gradients flow, and are the same."""
    outputs = []
    for net in (network, rewritten):
        net.train()
        torch.manual_seed(1)
        output = net(example)
        parts = [output] if isinstance(output, torch.Tensor) else list(output)
        outputs.append(parts)
        sum(part.square().sum() for part in parts).backward()
    assert len(outputs[0]) == len(outputs[1])
    for mine, theirs in zip(*outputs, strict=True):
        assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    theirs = dict(rewritten.named_parameters())
    pairs = [(p.grad, theirs[n].grad) for n, p in network.named_parameters() if n in theirs]
    # Biases before a batch norm have gradients of rounding only.
    scale = max(float(mine.abs().max()) for mine, _ in pairs)
    for mine, other in pairs:
        assert_close(other.reshape_as(mine), mine, rtol=1e-6, atol=1e-9 * scale)
    return outputs[0]


@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v3", "mobilenet_v2"])
def test_dropout_stays_on_while_training(name):
    torch.manual_seed(0)
    make, size = TORCHVISION[name]
    network = make().double()
    example = torch.randn(3, 3, size, size, dtype=torch.float64)
    _, rewritten = exact(network, example)
    same_when_training(network, rewritten, example)
    torch.manual_seed(2)
    first, second = rewritten(example), rewritten(example)
    assert not torch.allclose(first, second)


def test_functional_dropout_stays_on_while_training():
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10, drop_rate=0.4).double()
    example = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    _, rewritten = exact(network, example)
    same_when_training(network, rewritten, example)


def test_googlenet_keeps_its_auxiliary_heads():
    torch.manual_seed(0)
    network = googlenet().double()
    example = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    _, rewritten = exact(network, example)
    outputs = same_when_training(network, rewritten, example)
    assert [part.shape for part in outputs] == [(2, 10)] * 3
    assert type(rewritten(example)) is type(network(example))
    assert isinstance(rewritten.eval()(example), torch.Tensor)


# ---------------------------------------------------------------- what users do with a network


@pytest.fixture(scope="module")
def edited():
    """A network whose forward had to change, and its rewritten copy."""
    torch.manual_seed(0)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=10).eval()
    return network, exact(network, torch.randn(1, 3, 32, 32))[1]


def saved_and_loaded(network):
    file = io.BytesIO()
    torch.save(network, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def loaded_into_a_copy(network):
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(network.state_dict())
    return other


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda net: pickle.loads(pickle.dumps(net)),
        saved_and_loaded,
        loaded_into_a_copy,
        lambda net: torch.export.export(net, (torch.randn(2, 3, 32, 32),)).module(),
        lambda net: torch.compile(net, backend="eager"),
        torch.fx.symbolic_trace,
    ],
    ids=["copied", "pickled", "saved", "loaded", "exported", "compiled", "traced"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_network_with_an_edited_forward_is_still(edited, again):
    network, rewritten = edited
    example = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        made = again(rewritten)
        assert_close(made(example), network(example), rtol=1e-4, atol=1e-5)


def test_an_edited_forward_keeps_the_rest_of_the_class(edited):
    network, rewritten = edited
    assert isinstance(rewritten, torchvision.models.ShuffleNetV2)
    assert type(rewritten).__name__ == "ShuffleNetV2"
    assert type(copy.deepcopy(rewritten)) is type(rewritten)
    assert type(network) is torchvision.models.ShuffleNetV2
    assert rewritten._stage_out_channels == network._stage_out_channels


def test_the_class_maps_of_an_averaging_network_are_the_linear_layers_scores_of_each_place(edited):
    network, rewritten = edited
    seen = []
    handle = rewritten.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.randn(1, 3, 96, 160)
    expected = scores(rewritten, image)
    handle.remove()
    maps = rewritten.fc.class_maps(seen[0])
    assert maps.shape == (1, 10, 3, 5)
    with torch.no_grad():
        by_place = network.fc(seen[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_close(maps, by_place, rtol=1e-4, atol=1e-5)
    assert_close(maps.mean((2, 3)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_onnx_file_of_a_rewritten_network_gives_the_same_scores(edited, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network, rewritten = edited
    example = torch.randn(1, 3, 32, 32)
    file = tmp_path / "net.onnx"
    torch.onnx.export(rewritten, (example,), file, dynamo=False, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    assert_close(torch.from_numpy(found), scores(network, example), rtol=1e-3, atol=1e-5)
