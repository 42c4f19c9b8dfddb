"""The layers compute what their definitions say, at any size, and refuse what cannot be."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onebyone.core.errors import OptionError
from onebyone.networks.layers import GlobalAverageHead, MLPConv, Pointwise

BATCH, HEIGHT, WIDTH = 2, 5, 7  # all different, so that a swapped axis shows


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def picture(channels, height=HEIGHT, width=WIDTH):
    return torch.randn(BATCH, channels, height, width, dtype=torch.float64)


def test_pointwise_is_the_same_linear_map_at_every_pixel():
    layer = Pointwise(3, 4, dtype=torch.float64)
    x = picture(3)
    expected = torch.einsum("oc,nchw->nohw", layer.weight[:, :, 0, 0], x)
    assert_close(layer(x), expected + layer.bias[:, None, None])


def test_pointwise_of_weight_four_multiplies_one_map_by_four():
    layer = Pointwise(1, 1, bias=False)
    nn.init.constant_(layer.weight, 4.0)
    x = torch.randn(1, 1, HEIGHT, WIDTH)
    assert torch.equal(layer(x), 4 * x)


def test_pointwise_keeps_stride_groups_and_absent_bias():
    layer = Pointwise(4, 6, stride=2, groups=2, bias=False)
    plain = nn.Conv2d(4, 6, 1, stride=2, groups=2, bias=False)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(BATCH, 4, HEIGHT, WIDTH)
    assert torch.equal(layer(x), plain(x))
    assert layer(x).shape == (BATCH, 6, 3, 4)
    assert repr(layer) == "Pointwise(4, 6, stride=2, groups=2, bias=False)"


@pytest.mark.parametrize(("inputs", "outputs"), [(512, 32), (1, 1), (7, 3)])
def test_pointwise_has_a_parameter_for_each_pair_of_channels_and_each_output(inputs, outputs):
    layer = Pointwise(inputs, outputs)
    assert sum(p.numel() for p in layer.parameters()) == inputs * outputs + outputs


@pytest.mark.parametrize(
    "make", [lambda: Pointwise(3, 4), lambda: MLPConv(3, (4, 5, 6), kernel_size=3)]
)
def test_layers_can_be_copied_and_reloaded(make):
    layer = make()
    twin = make()
    twin.load_state_dict(copy.deepcopy(layer).state_dict())
    x = torch.randn(BATCH, 3, HEIGHT, WIDTH)
    assert torch.equal(layer(x), twin(x))


def test_mlpconv_is_a_convolution_then_a_perceptron_at_every_pixel():
    block = MLPConv(3, (4, 6, 5), kernel_size=3, stride=2, padding=1).double()
    x = picture(3)
    y = nn.functional.conv2d(x, block.conv.weight, block.conv.bias, stride=2, padding=1).relu()
    for layer in (block.pointwise1, block.pointwise2):
        y = y.movedim(1, -1) @ layer.weight[:, :, 0, 0].T + layer.bias
        y = y.relu().movedim(-1, 1)
    assert_close(block(x), y)


def test_mlpconv_with_batch_norm_normalizes_each_convolution_before_its_relu():
    block = MLPConv(3, (4, 6, 5), kernel_size=3, batch_norm=True)
    kinds = [type(child).__name__ for child in block]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", *["Pointwise", "BatchNorm2d", "ReLU"] * 2]
    assert all(layer.bias is None for layer in (block.conv, block.pointwise1, block.pointwise2))


def test_mlpconv_never_gives_a_negative_value():
    assert (MLPConv(3, (4, 6, 5), kernel_size=3)(picture(3).float()) >= 0).all()


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("hidden", [(), (6,), (6, 5)])
def test_scores_are_the_means_of_the_class_maps(hidden, context):
    head = GlobalAverageHead(3, 4, hidden=hidden, context=context).double()
    x = picture(3)
    assert head.class_maps(x).shape == (BATCH, 4, HEIGHT, WIDTH)
    assert_close(head(x), head.class_maps(x).mean((2, 3)))


def test_context_starts_as_the_identity_and_lets_evidence_reach_farther():
    plain, wide = (GlobalAverageHead(3, 4, (6,), context=count).double() for count in (0, 2))
    with torch.no_grad():
        for name in ("weight", "bias"):
            for place in (0, -1):
                getattr(wide.maps[place], name).copy_(getattr(plain.maps[place], name))
    x = picture(3, 9, 10)
    assert_close(wide(x), plain(x))
    for part in wide.maps:
        if isinstance(part, nn.Conv2d) and part.groups > 1:
            nn.init.constant_(part.weight, 0.1)
    x.requires_grad = True
    wide.class_maps(x)[0, :, 4, 5].sum().backward()
    rows, columns = x.grad[0].abs().sum(0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 6, 3, 7)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 3)])
def test_the_head_takes_maps_of_any_size(size):
    head = GlobalAverageHead(3, 4, hidden=(6,), context=1)
    assert head(picture(3, *size).float()).shape == (BATCH, 4)


def test_the_head_does_not_care_where_things_are():
    head = GlobalAverageHead(3, 4, hidden=(6,)).double()
    x = picture(3)
    shuffled = x.flatten(2)[:, :, torch.randperm(HEIGHT * WIDTH)].unflatten(2, (HEIGHT, WIDTH))
    assert_close(head(shuffled), head(x))


def test_the_scores_may_be_negative():
    head = GlobalAverageHead(3, 40)
    assert (head(picture(3).float()) < 0).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pointwise(0, 4), "`in_channels` must be an int of at least 1, got 0"),
        (lambda: Pointwise(3, 2.5), "`out_channels` must be an int of at least 1, got 2.5"),
        (lambda: Pointwise(3, True), "`out_channels` must be an int of at least 1, got True"),
        (lambda: Pointwise(4, 6, groups=4), "`groups` must divide `out_channels`, got 4 and 6"),
        (lambda: MLPConv(3, (4, 5), kernel_size=3), r"`widths` must be three ints.*got \(4, 5\)"),
        (lambda: MLPConv(3, (4, 0, 5), kernel_size=3), r"`widths\[1\]` must be .* got 0"),
        (lambda: MLPConv(3, (4, 5, 6), kernel_size=3, padding=-1), "`padding` must be .* got -1"),
        (lambda: GlobalAverageHead(3, 0), "`num_classes` must be an int of at least 1, got 0"),
        (lambda: GlobalAverageHead(3, 4, hidden=(0,)), r"`hidden\[0\]` must be .* got 0"),
        (
            lambda: GlobalAverageHead(3, 4, context=-1),
            "`context` must be an int of at least 0, got -1",
        ),
    ],
)
def test_refusals_say_what_must_hold(make, message):
    with pytest.raises(OptionError, match=message):
        make()
