import torch
from torch import nn
from torchvision.models import mobilenet_v2

import onebyone as obo
from onebyone.planning.applicability import Applicability


class Awkward(nn.Module):
    """A network with a layer for each reason to leave one alone."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.alias = nn.Conv2d(8, 8, 3, padding=1)
        self.other_name = self.alias
        self.hooked = nn.Conv2d(8, 8, 1)
        self.hooked.register_forward_hook(lambda *_: None)
        self.tied = nn.Conv2d(8, 8, 1)
        self.tied_too = nn.Conv2d(8, 8, 1)
        self.tied_too.weight = self.tied.weight
        self.idle = nn.Linear(4, 4)
        self.asked = nn.Conv2d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.peeked = nn.Conv2d(8, 8, 1)
        self.peeked_too = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.twice(self.twice(self.plain(x)))
        x = self.tied_too(self.tied(self.hooked(self.alias(x))))
        x = self.peeked(x.to(self.peeked.weight.dtype)) * self.peeked_too.out_channels
        row = self.attention(*3 * [self.peeked_too(x).mean((2, 3))])[0]
        return self.asked(x) + row[:, :, None, None]


def reasons(model, inputs):
    return {s.site: s.reason for s in obo.applies(model, inputs).sites if s.rewrite == "factorize"}


def test_each_layer_that_must_be_left_alone_says_why():
    why = reasons(Awkward(), (1, 3, 6, 7))
    assert why["plain"] is None
    assert why["twice"] is None
    assert why["alias"] == "shared: the same layer as 'other_name'"
    assert why["hooked"] == "has hooks, which a rewrite would lose"
    assert why["tied"] == why["tied_too"] == "its weight is shared with another layer"
    assert why["idle"] == "does not run on this input"
    assert why["asked"] is None
    assert why["attention.out_proj"] == "its weight is read by 'attention' itself"
    assert why["peeked"].startswith("the network's forward reads it itself: 'Sequential' object")
    assert "has no attribute 'out_channels'" in why["peeked_too"]


def test_every_convolution_and_linear_layer_of_a_network_is_a_site():
    model = mobilenet_v2()
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(reasons(model, (1, 3, 32, 32))) == layers


def test_a_head_applies_where_there_is_one_and_says_why_not_elsewhere():
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5))
    found = {s.rewrite: s for s in obo.applies(flat, torch.randn(1, 3, 6, 6)).sites}
    assert found["head exact"].reason is None
    assert found["head gap"].reason is None
    averaged = {s.rewrite: s.reason for s in obo.applies(mobilenet_v2(), (1, 3, 32, 32)).sites}
    assert averaged["head exact"] is None
    assert averaged["head gap"] == "its head averages over the map already"
    none = {s.rewrite: s.reason for s in obo.applies(nn.Conv2d(3, 4, 3), (1, 3, 6, 6)).sites}
    assert none["head"]


def test_the_list_is_a_record_that_prints_and_loads_again():
    found = obo.applies(Awkward(), (1, 3, 6, 7))
    assert Applicability.from_json(found.to_json()) == found
    assert "runs 2 times" in str(found)


def test_inputs_may_be_a_tuple_of_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images, scale):
            return [self.conv(image) * scale for image in images]

    inputs = ([torch.randn(1, 3, 5, 6)], torch.ones(1))
    assert reasons(Two(), inputs) == {"conv": None}
