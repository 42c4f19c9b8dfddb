"""Network In Network: parameters from the paper's widths, shapes of its pools, its three heads."""

import pytest
import torch
from torch import nn

from onebyone.core.errors import OptionError, UnknownNameError
from onebyone.networks.zoo import nin

# (input channels, classes, [(kernel, widths), ...]) of each form, from the published tables.
TABLES = {
    "cifar10": (3, 10, [(5, (192, 160, 96)), (5, (192, 192, 192)), (3, (192, 192, 10))]),
    "cifar100": (3, 100, [(5, (192, 160, 96)), (5, (192, 192, 192)), (3, (192, 192, 100))]),
    "mnist": (1, 10, [(5, (96, 64, 48)), (5, (128, 96, 48)), (5, (128, 96, 10))]),
    "svhn": (3, 10, [(5, (128, 96, 64)), (5, (320, 256, 128)), (5, (384, 256, 10))]),
    "imagenet": (
        3,
        1000,
        [(11, (96,) * 3), (5, (256,) * 3), (3, (384,) * 3), (3, (1024, 1024, 1000))],
    ),
}
SIZES = {"cifar10": 32, "cifar100": 32, "mnist": 28, "svhn": 32, "imagenet": 224}


def expected_params(form, *, batch_norm=False):
    channels, _, blocks = TABLES[form]
    total = 0
    for kernel, (first, second, third) in blocks:
        weights = channels * first * kernel**2 + first * second + second * third
        # Two numbers a channel with batch norm (scale, shift), one without (bias).
        total += weights + (2 if batch_norm else 1) * (first + second + third)
        channels = third
    return total


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_parameters_follow_from_the_widths(form, batch_norm):
    assert count(nin(form, batch_norm=batch_norm)) == expected_params(form, batch_norm=batch_norm)


def test_the_form_for_cifar10_has_the_published_number_of_parameters():
    assert count(nin("cifar10")) == 966_986  # osmr/imgclsmob, nin_cifar10


def test_the_form_for_imagenet_has_about_7_6_million_parameters():
    assert round(count(nin("imagenet")) / 1e6, 1) == 7.6  # Caffe model zoo


@pytest.mark.parametrize("form", ["cifar10", "cifar100", "mnist", "svhn"])
def test_each_pool_halves_the_map_as_caffe_does(form):
    model = nin(form).eval()
    channels, classes, _ = TABLES[form]
    x = torch.randn(1, channels, SIZES[form], SIZES[form])
    sides = []
    for child in model:
        x = child(x)
        if isinstance(child, nn.MaxPool2d):
            sides.append(x.shape[-1])
    assert sides == [SIZES[form] // 2, SIZES[form] // 4]
    assert x.shape == (1, classes)


def test_the_last_maps_for_imagenet_are_6_by_6():
    with torch.device("meta"):
        model = nin("imagenet").eval()
        maps = model[:-2](torch.empty(1, 3, 224, 224))
    assert maps.shape == (1, 1000, 6, 6)


@pytest.mark.parametrize("form", ["cifar10", "mnist"])
@pytest.mark.parametrize("head", ["fc", "fc-dropout"])
def test_the_connected_heads_keep_the_rest_and_read_the_class_maps(form, head):
    averaged, connected = nin(form), nin(form, head=head)
    side = SIZES[form] // 4
    assert count(connected) - count(averaged) == 10 * side * side * 10 + 10
    assert isinstance(connected[-1], nn.Linear)
    assert isinstance(connected[-2], nn.Dropout if head == "fc-dropout" else nn.Flatten)
    shared = {name for name, _ in averaged.named_parameters()}
    assert shared < {name for name, _ in connected.named_parameters()}


def test_dropout_follows_the_first_two_blocks():
    names = [name for name, _ in nin("cifar10").named_children()]
    assert names == [
        *("block1", "pool1", "dropout1"),
        *("block2", "pool2", "dropout2"),
        *("block3", "average", "flatten"),
    ]
    assert not any(isinstance(m, nn.Dropout) for m in nin("cifar10", dropout=0).modules())


def test_averaging_takes_any_picture_and_any_number_of_classes():
    model = nin("mnist", num_classes=3, in_channels=2).eval()
    for size in (12, 28, 40):
        assert model(torch.randn(2, 2, size, size + 4)).shape == (2, 3)


def test_a_connected_head_is_made_for_the_size_it_is_given():
    assert nin("mnist", head="fc", size=20).eval()(torch.randn(1, 1, 20, 20)).shape == (1, 10)


def test_the_signal_reaches_the_last_block_at_its_full_size():
    torch.manual_seed(0)
    model = nin("cifar10").eval()
    with torch.no_grad():
        maps = model[:-2](torch.randn(2, 3, 32, 32))
    assert 0.1 < maps.std() < 10


def test_scores_have_a_gradient_in_every_parameter():
    torch.manual_seed(0)
    model = nin("mnist", batch_norm=True)
    model(torch.randn(4, 1, 28, 28)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"form": "cifar-10"}, UnknownNameError, "No form .* Did you mean 'cifar10'"),
        ({"head": "gpa"}, UnknownNameError, "No head named 'gpa'. Did you mean 'gap'"),
        ({"dropout": 1.0}, OptionError, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"head": "fc-dropout", "dropout": 0}, OptionError, "needs `dropout` above 0"),
        ({"size": 2}, OptionError, "2×2 pixels is too small for the form 'cifar10'"),
        ({"num_classes": 0}, OptionError, "`num_classes` must be an int of at least 1, got 0"),
    ],
)
def test_refusals_say_what_must_hold(options, error, message):
    with pytest.raises(error, match=message):
        nin(**options)
