"""Groups of layers that share channels: found where each channel stays by itself, and only there."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onebyone.networks.channel_groups import channel_groups


def found_in(network, shape=(2, 3, 8, 8)):
    return channel_groups(network.eval(), torch.randn(shape))


def group_at(network, site, shape=(2, 3, 8, 8)):
    found = found_in(network, shape)
    group = found.at(site)
    assert group is not None, found.reasons
    return group


def why_not(network, site, shape=(2, 3, 8, 8)):
    found = found_in(network, shape)
    assert found.at(site) is None
    return found.reasons[site]


def test_norm_activation_and_pool_are_between():
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1)
    )
    group = group_at(network, "0")
    assert (group.channels, group.producers, group.readers) == (6, ("0",), ("4",))
    assert group.between == ("1",)
    assert [link.name for link in group.path] == ["1", "relu", "max_pool2d_with_indices"]


def test_depthwise_convolution_and_in_place_activations_are_between():
    network = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU6(inplace=True), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)
    )
    group = group_at(network, "0")
    assert group.between == ("2",)
    assert group.members == ("0", "2", "3")


def test_linear_layer_reads_several_values_of_each_flattened_channel():
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(24, 5))
    assert group_at(network, "0").readers == ("3",)


def test_hidden_units_of_a_linear_layer_on_rows():
    network = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    assert group_at(network, "0", (2, 5, 4)).readers == ("2",)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(x + self.conv2(F.relu(self.conv1(x))))


def test_hidden_channels_of_a_residual_block_but_not_its_stream():
    network = Block()
    assert group_at(network, "conv1").readers == ("conv2",)
    assert "a sum" in why_not(network, "stem")
    assert "a sum" in why_not(network, "conv2")
    assert "output of the network" in why_not(network, "last")


class Excited(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = nn.Conv2d(3, 6, 1)
        self.down = nn.Conv2d(6, 2, 1)
        self.up = nn.Conv2d(2, 6, 1)
        self.project = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = self.expand(x)
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.project(x * gate).mean()


def test_squeeze_and_excitation_shares_its_channels():
    group = group_at(Excited(), "expand")
    assert group.producers == ("expand", "up")
    assert group.readers == ("down", "project")


class Between(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, what, channels=8, **parts):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(channels, 4, 1)
        self.what = what
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.second(self.what(self, self.first(x)))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Between(lambda _, x: x.softmax(1)), "`_softmax` in the network may mix"),
        (Between(lambda _, x: x.flip(1)), "`flip` in the network may mix"),
        (Between(lambda _, x: torch.cat([x, x], 1), 16), "`cat` in the network may mix"),
        (Between(lambda _, x: x.view(2, 4, 2, 8, 8).mean(2), 4), "does not keep its channels"),
        (Between(lambda _, x: x[:, :4], 4), "`slice` in the network does not keep"),
        (Between(lambda _, x: F.pad(x, (0, 0, 0, 0, 1, 1)), 10), "`constant_pad_nd`"),
        (
            Between(lambda net, x: x * net.scale, scale=nn.Parameter(torch.ones(8, 1, 1))),
            "that a forward reads itself",
        ),
        (
            Between(lambda net, x: net.norm(x), norm=nn.GroupNorm(2, 8)),
            "`native_group_norm` in 'norm' may mix",
        ),
        (
            Between(lambda net, x: net.conv(x), conv=nn.Conv2d(8, 8, 1, groups=2)),
            "'conv' is a grouped convolution",
        ),
        (Between(lambda net, x: net.first.weight.sum() + x), "the weight of .first. is read by"),
    ],
)
def test_what_does_not_keep_channels_apart_is_refused_with_a_reason(network, words):
    import re

    assert re.search(words.replace("`", "."), why_not(network, "first"))


def test_layer_that_runs_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.again(self.again(self.first(x)))

    assert "'again' runs 2 times" in why_not(Twice(), "first")


def test_layer_that_runs_by_another_reference_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    layers = list(network)

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.layers = network, [*layers]

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    assert "by another reference" in why_not(Listed(), "body.0")
