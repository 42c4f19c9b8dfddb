"""The article's networks have its parameters and shapes, and are what they are said to be."""

import pytest
import torch
from torch.testing import assert_close

from onebyone.core.errors import OptionError
from onebyone.networks.zoo import classic, convolution_only, extra_nonlinearity


def conv(inputs, outputs, side):
    return inputs * outputs * side * side + outputs


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_classic_has_the_articles_parameters():
    expected = conv(1, 3, 3) + conv(3, 64, 3) + (64 * 7 * 7 * 100 + 100) + (100 * 10 + 10)
    assert count(classic()) == expected == 316_532
    assert count(classic().head) == 314_710


def test_convolution_only_has_the_articles_parameters():
    expected = conv(1, 3, 3) + conv(3, 64, 3) + conv(64, 32, 1) + conv(32, 10, 1)
    assert count(convolution_only()) == expected == 4_232


def test_the_article_rounds_its_75_times_fairly():
    assert round(count(classic()) / count(convolution_only())) == 75


def test_the_extra_nonlinearity_costs_72_parameters():
    with_it, without = extra_nonlinearity(), extra_nonlinearity(pointwise=False)
    assert count(without) == conv(1, 3, 3) + conv(3, 8, 3)
    assert count(with_it) - count(without) == conv(8, 8, 1) == 72


@pytest.mark.parametrize("pointwise", [True, False])
def test_the_extra_nonlinearity_extracts_features_and_classifies_where_asked(pointwise):
    x = torch.randn(2, 1, 28, 28)
    assert extra_nonlinearity(pointwise=pointwise)(x).shape == (2, 8, 7, 7)
    classifier = extra_nonlinearity(pointwise=pointwise, classifier=True, num_classes=4)
    assert classifier(x).shape == (2, 4)
    assert count(classifier.head) == 8 * 7 * 7 * 4 + 4


@pytest.mark.parametrize("make", [classic, convolution_only])
def test_both_share_their_convolutions_and_take_the_same_pictures(make):
    torch.manual_seed(3)
    model = make(num_classes=4, in_channels=2, size=20)
    assert model(torch.randn(3, 2, 20, 20)).shape == (3, 4)
    assert [name for name, _ in model.named_children()] == ["features", "head"]


def test_the_networks_return_logits():
    torch.manual_seed(0)
    x = torch.randn(16, 1, 28, 28)
    for make in (classic, convolution_only):
        scores = make()(x)
        assert (scores < 0).any(), "a sigmoid would leave no negative score"


def test_a_map_repeated_four_times_has_the_same_scores():
    model = convolution_only().double()
    features = torch.randn(2, 64, 7, 7, dtype=torch.float64)
    tiled = features.repeat(1, 1, 2, 2)
    assert_close(model.head(tiled), model.head(features))


@pytest.mark.parametrize("make", [classic, convolution_only, extra_nonlinearity])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 3}, "`size` must be at least 4 pixels"),
        ({"size": 0}, "`size` must be an int of at least 1, got 0"),
        ({"in_channels": 0}, "`in_channels` must be an int of at least 1, got 0"),
    ],
)
def test_refusals_say_what_must_hold(make, options, message):
    with pytest.raises(OptionError, match=message):
        make(**options)
