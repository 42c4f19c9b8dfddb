"""A run copies its network a limited number of times: each copy costs memory and seconds."""

from itertools import pairwise

import tiny
import torch
from torch import nn

from onebyone.networks import surgery

# Counted: 33 (of 74 once). A few more are room for a change that needs them.
MOST = 36
LAYERS = 8


def network():
    torch.manual_seed(0)
    widths = [3, 8, 8, 12, 12, 16, 16, 16]
    convolutions = [
        layer
        for inputs, outputs in pairwise(widths)
        for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())
    ]
    return nn.Sequential(
        *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    ).eval()


def test_a_run_copies_its_network_a_limited_number_of_times(tmp_path, monkeypatch):
    copied, true_copy = [], surgery.true_copy

    def counted(model):
        layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
        if layers >= LAYERS:
            copied.append(layers)
        return true_copy(model)

    monkeypatch.setattr(surgery, "true_copy", counted)
    tiny.shrink(tmp_path / "run", net=network())
    print(f"{len(copied)} copies of networks of {LAYERS} layers or more")
    assert LAYERS <= len(copied) <= MOST
