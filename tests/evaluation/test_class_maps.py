"""Class activation maps: what they must equal, and that they lie where the evidence lies."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

from onebyone.core.errors import ModelError, OptionError, UnknownNameError
from onebyone.evaluation.class_maps import (
    class_activation,
    exact_class_maps,
    feature_maps,
    grad_cam,
)
from onebyone.networks.layers import GlobalAverageHead
from onebyone.networks.zoo import build
from onebyone.rewrites.head.score_map import ScoreMapHead

CLASSES = 6


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 20, 28, dtype=torch.float64)


def features():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True),
        nn.Conv2d(5, 7, (3, 2), bias=False), nn.ReLU(),
    )  # fmt: skip


class Averaging(nn.Module):
    """Features, an average written in one of the usual ways, and a linear layer."""

    def __init__(self, way: str, *, bias: bool = True) -> None:
        super().__init__()
        self.features = features()
        self.way = way
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(7, CLASSES, bias=bias)

    def forward(self, x):
        x = self.features(x)
        if self.way == "mean":
            x = x.mean((2, 3))
        elif self.way == "module":
            x = torch.flatten(self.pool(x), 1)
        elif self.way == "functional":
            x = F.adaptive_avg_pool2d(F.relu(x), 1).view(x.size(0), -1)
        return self.linear(self.drop(x))


def by_hand(network, images):
    """The features weighted by the linear layer's rows, and its bias at every pixel."""
    maps = torch.einsum("kc,nchw->nkhw", network.linear.weight, network.features(images))
    bias = network.linear.bias
    return maps if bias is None else maps + bias[:, None, None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["mean", "module", "functional"])
@torch.no_grad()
def test_maps_of_an_averaging_network_are_its_features_weighted_by_the_linear_rows(
    way, bias, images
):
    network = Averaging(way, bias=bias).double().eval()
    found = exact_class_maps(network, images)
    assert found is not None
    assert found.layer == "linear"
    assert_close(found.maps, by_hand(network, images))
    assert_close(found.maps.mean((2, 3)), network(images))


@torch.no_grad()
def test_the_mean_of_a_global_average_heads_map_is_its_score(images):
    torch.manual_seed(0)
    network = nn.Sequential(features(), GlobalAverageHead(7, CLASSES, (4,))).double().eval()
    found = exact_class_maps(network, images)
    assert found.layer == "1.maps"
    assert_close(found.maps.mean((2, 3)), network(images))
    assert_close(found.maps, network[1].class_maps(network[0](images)))


@torch.no_grad()
def test_the_maps_of_network_in_network_are_its_last_mlpconv():
    torch.manual_seed(0)
    network = build("onebyone:nin-cifar10").eval()
    images = torch.randn(2, 3, 32, 32)
    found = exact_class_maps(network, images)
    assert found.layer == "block3"
    before = network[: list(dict(network.named_children())).index("average")](images)
    assert_close(found.maps, before)


@torch.no_grad()
def test_a_larger_image_gives_a_score_map_head_its_maps(images):
    torch.manual_seed(0)
    network = nn.Sequential(features(), ScoreMapHead(nn.Conv2d(7, CLASSES, 5))).double().eval()
    found = class_activation(network, images)
    assert (found.method, found.layer) == ("exact", "")
    assert_close(found.exact.maps, network(images))
    assert_close(found.scores, network(images).mean((2, 3)))


def test_grad_cam_of_an_averaging_network_is_the_positive_part_of_its_exact_maps(images):
    network = Averaging("mean").double().eval()
    found = grad_cam(network, images, top=CLASSES)
    with torch.no_grad():
        maps = by_hand(network, images) - network.linear.bias[:, None, None]
    height, width = maps.shape[2:]
    for place in range(2):
        exact = maps[place, found.classes[place]].relu() / (height * width)
        assert_close(found.maps[place], exact)


def test_grad_cam_weighs_each_channel_by_the_mean_of_its_gradient(images):
    network = nn.Sequential(features(), nn.Flatten(), nn.Linear(7 * 8 * 13, CLASSES))
    network = network.double().eval()
    found = grad_cam(network, images, top=1)
    with torch.no_grad():
        weights = network[2].weight.view(CLASSES, 7, 8, 13).mean((2, 3))[found.classes[:, 0]]
        maps = torch.einsum("nc,nchw->nhw", weights, network[0](images)).relu()
    assert_close(found.maps[:, 0], maps)


def test_top_classes_come_first_and_have_their_own_maps(images):
    network = Averaging("module").double().eval()
    found = class_activation(network, images, top=2)
    scores = network(images)
    assert_close(found.classes, scores.topk(2).indices)
    centered = by_hand(network, images)
    centered = centered - centered.mean(1, keepdim=True)
    assert_close(found.maps[1, 0], centered[1, found.classes[1, 0]])
    assert class_activation(network, images, top=99).maps.shape[1] == CLASSES


def bright_or_dark(head: str) -> nn.Module:
    """A network that is certain of class 1 where the image is bright."""
    conv = nn.Conv2d(1, 2, 1)
    linear = nn.Linear(2 * 5 * 9 if head == "flatten" else 2, 2)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
        conv.bias.zero_()
        linear.weight.zero_()
        linear.bias.zero_()
        for own, weights in enumerate(linear.weight.view(2, 2, -1)):
            weights[own] = 1.0
    average = nn.Flatten() if head == "flatten" else nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )  # fmt: skip
    return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(4), average, linear).eval()


@pytest.mark.parametrize("head", ["average", "flatten"])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 7), (4, 2)])
def test_a_bright_square_lights_up_where_it_is(head, row, column):
    image = torch.zeros(1, 1, 20, 36)
    image[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    found = class_activation(bright_or_dark(head), image, top=1)
    assert found.method == ("exact" if head == "average" else "grad-cam")
    assert found.classes.tolist() == [[1]]
    single = found.maps[0, 0]
    assert single.shape == (5, 9)
    assert divmod(int(single.argmax()), 9) == (row, column)
    assert float(single[row, column]) > 10 * float(single.abs().sum() - single[row, column])


class ChannelsLast(nn.Module):
    """Keeps its channels last, as the stages of a Swin transformer do, and flattens them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 40, 4, 4)
        self.stage = nn.Sequential(nn.Linear(40, 40), nn.ReLU())
        self.head = nn.Linear(40, CLASSES)

    def forward(self, x):
        x = self.stage(self.embed(x).permute(0, 2, 3, 1))
        return self.head((x * x).mean((1, 2)))


def test_maps_that_have_their_channels_last_are_turned(images):
    torch.manual_seed(0)
    network = ChannelsLast().double().eval()
    found = class_activation(network, images)
    assert (found.method, found.layer) == ("grad-cam", "stage")
    assert found.maps.shape[2:] == (5, 7)
    assert feature_maps(network, images, "stage").shape == (2, 40, 5, 7)


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (torchvision.models.resnet18, "exact"),
        (torchvision.models.squeezenet1_1, "exact"),
        (torchvision.models.mobilenet_v3_small, "grad-cam"),
        (lambda: timm.create_model("regnety_002"), "exact"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), "grad-cam"),
    ],
)
def test_networks_of_torchvision_and_timm_have_maps(make, method):
    torch.manual_seed(0)
    network = make().eval()
    images = torch.randn(1, 3, 224, 224)
    found = class_activation(network, images)
    assert found.method == method
    assert_close(found.scores, network(images).detach(), rtol=1e-3, atol=1e-4)
    if found.exact is not None:
        assert_close(found.exact.maps.mean((2, 3)), found.scores, rtol=1e-3, atol=1e-4)
    else:
        assert float(found.maps.min()) >= 0
        assert float(found.maps.max()) > 0


def test_a_first_layer_that_works_in_place_neither_fails_nor_writes_into_the_images(images):
    network = nn.Sequential(
        nn.ReLU(inplace=True), features(), nn.Flatten(), nn.Linear(7 * 8 * 13, CLASSES)
    )
    before = images.clone()
    assert class_activation(network.double().eval(), images).method == "grad-cam"
    assert_close(images, before)


@torch.no_grad()
def test_feature_maps_are_those_that_the_layer_gave_before_a_later_one_changed_them(images):
    network = Averaging("mean").double().eval()
    maps = feature_maps(network, images, "features.1")
    assert_close(maps, network.features[1](network.features[0](images)))
    assert float(maps.min()) < 0


@pytest.mark.parametrize("way", ["mean", "module"])
def test_the_network_is_left_as_it_was(way, images):
    network = Averaging(way).double().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    class_activation(network, images)
    grad_cam(network, images)
    feature_maps(network, images, "features.0")
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    for name, value in network.state_dict().items():
        assert_close(value, state[name], rtol=0, atol=0)


def test_gradients_are_found_inside_inference_mode(images):
    network = nn.Sequential(features(), nn.Flatten(), nn.Linear(7 * 8 * 13, CLASSES)).double()
    with torch.no_grad():
        assert float(class_activation(network, images).maps.max()) > 0


def test_what_cannot_be_explained_is_refused(images):
    with pytest.raises(OptionError, match="`top` must be 1 or more, got 0"):
        class_activation(Averaging("mean").double(), images, top=0)
    with pytest.raises(ModelError, match=r"must give class scores.*got \(2, 7, 8\)"):
        class_activation(nn.Sequential(features(), Mean(3)).double(), images)
    with pytest.raises(ModelError, match="none of its layers gives one"):
        class_activation(
            nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 28, CLASSES)).double(), images
        )


class Mean(nn.Module):
    def __init__(self, dim) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return x.mean(self.dim)


def test_layers_that_have_no_maps_are_refused_by_name(images):
    network = Averaging("mean").double()
    with pytest.raises(UnknownNameError, match=r"No layer named 'feature\.0'\. Did you mean"):
        feature_maps(network, images, "feature.0")
    with pytest.raises(OptionError, match=r"'linear' gives \(2, 6\)"):
        feature_maps(network, images, "linear")
    with pytest.raises(OptionError, match="'pool' is not run"):
        feature_maps(network, images, "pool")
