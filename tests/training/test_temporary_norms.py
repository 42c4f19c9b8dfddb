"""Added batch norms: where they go, that they change nothing at first, and leave no trace."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onebyone.networks.layers import GlobalAverageHead
from onebyone.training.fused_chains import composed
from onebyone.training.temporary_norms import add_norms, norm_sites, take_in


class Branching(nn.Module):
    """Every reason for which a convolution gets no norm, and one that does."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)  # relu: yes
        self.bare = nn.Conv2d(8, 8, 3, padding=1, bias=False)  # relu, but no bias
        self.normed = nn.Conv2d(8, 8, 3, padding=1)  # a norm follows
        self.norm = nn.BatchNorm2d(8)
        self.added = nn.Conv2d(8, 8, 1)  # a sum
        self.twice = nn.Conv2d(8, 8, 1)  # relu, in two runs
        self.read = nn.Conv2d(8, 8, 1)  # relu and a sum
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(requires_grad=False)
        self.tied = nn.Conv2d(8, 8, 1)
        self.other = nn.Conv2d(8, 8, 1)
        self.other.weight = self.tied.weight
        self.watched = nn.Conv2d(8, 8, 1)
        self.watched.register_forward_hook(lambda *_: None)
        self.spectral = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.last = nn.Conv2d(8, 5, 1)  # the output

    def forward(self, x):
        x = torch.relu_(self.stem(x))
        x = torch.relu(self.bare(x))
        x = torch.relu(self.norm(self.normed(x)))
        x = x + self.added(x)
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        y = self.read(x)
        x = torch.relu(y) + y
        for name in ("frozen", "tied", "other", "watched", "spectral"):
            x = torch.relu(getattr(self, name)(x))
        return self.last(x)


def images(n=40, dtype=torch.float64, channels=3):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, channels, 9, 7, dtype=dtype, generator=generator)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1, padding_mode="reflect"), nn.GELU(),
        nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=4), nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(12, 4, 1, bias=False), nn.Conv2d(4, 10, (3, 1))), nn.Hardswish(),
        GlobalAverageHead(10, 5, hidden=(6,), context=1),
    ).double().eval()  # fmt: skip


SITES = ["0", "2", "4.1", "6.maps.0", "6.maps.3"]


def trained_a_little(network, added_to):
    """Move all weights and statistics, as a training does."""
    torch.manual_seed(1)
    network.train()
    network(3 * added_to + 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def test_only_convolutions_that_feed_an_activation_alone_and_can_take_a_norm_in_get_one():
    network = Branching().double().eval()
    assert norm_sites(network, images(2)) == {"stem": "stem"}


def test_a_chain_gets_its_norm_where_it_ends():
    hosts = {name: "4" if name == "4.1" else name for name in SITES}
    assert norm_sites(convolutions(), images(2)) == hosts


@pytest.mark.parametrize("training", [True, False])
def test_added_norms_start_as_the_identity(training):
    network, x = convolutions(), images()
    expected = network(x)
    added = add_norms(network, x)
    assert [each.site for each in added] == SITES
    assert not network.training
    assert_close(network.train(training)(x), expected)


def test_what_was_learned_with_norms_is_in_the_convolutions_after():
    network, x = convolutions(), images()
    before = network.state_dict()
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in before.items()}
    added = add_norms(network, x)
    trained_a_little(network, x)
    expected = network(x)
    take_in(network, added)
    assert_close(network(x), expected)
    assert {n: (t.shape, t.dtype) for n, t in network.state_dict().items()} == shapes
    assert not any(module._forward_hooks for module in network.modules())
    assert str(network) == str(convolutions())
    # Without the norms it would not be the same function: the test can fail.
    assert (convolutions()(x) - expected).abs().max() > 0.1


def test_a_norm_without_its_statistics_would_be_noticed():
    network, x = convolutions(), images()
    added = add_norms(network, x)
    trained_a_little(network, x)
    expected = network(x)
    network.get_submodule("0.added_norm").running_var.mul_(1.2)
    take_in(network, added)
    assert (network(x) - expected).abs().max() > 1e-3


def test_a_copy_has_norms_of_its_own():
    network, x = convolutions(), images()
    add_norms(network, x)
    other = copy.deepcopy(network)
    expected = network(x)
    for name, module in other.named_modules():
        if name.endswith("added_norm"):
            module.bias.data.add_(1.0)
    assert_close(network(x), expected)
    assert (other(x) - expected).abs().max() > 0.1


def test_a_chain_that_is_computed_as_one_convolution_keeps_its_norm():
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(24, 48, 3, padding=1, groups=24, bias=False), nn.Conv2d(48, 24, 1)
    )
    network, x = nn.Sequential(chain, nn.ReLU(), nn.Conv2d(24, 5, 1)).eval(), images(channels=24)
    x = x.float()
    add_norms(network, x)
    network.get_submodule("0.1.added_norm").bias.data.add_(2.0)
    expected = network(x)
    with composed(network, bf16=False, device=torch.device("cpu")):
        assert "forward" in chain.__dict__, "it is to be composed here"
        assert_close(network(x), expected)


def test_a_channel_that_never_varies_stays_finite():
    network, x = convolutions(), images()
    with torch.no_grad():
        network[0].weight[3] = 0.0
    expected = network(x)
    added = add_norms(network, x)
    assert_close(network.train()(x), expected)
    expected = network.eval()(x)
    take_in(network, added)
    assert_close(network(x), expected)


def test_a_network_without_a_place_gets_none():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    before = str(network)
    assert add_norms(network, images()) == ()
    assert str(network) == before


def test_one_and_three_dimensions_have_norms_too():
    for kind, size in ((nn.Conv1d, (11,)), (nn.Conv3d, (5, 4, 3))):
        network = nn.Sequential(kind(3, 6, 3, padding=1), nn.ReLU(), kind(6, 2, 1)).double().eval()
        x = torch.randn(20, 3, *size, dtype=torch.float64)
        added = add_norms(network, x)
        assert [each.site for each in added] == ["0"]
        trained_a_little(network, x)
        expected = network(x)
        take_in(network, added)
        assert_close(network(x), expected)
