"""Averaging heads fitted to a network's outputs: as near as they can be, in any unit."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onebyone.calibration.meaning import Part
from onebyone.core.task import TASKS
from onebyone.networks.layers import GlobalAverageHead
from onebyone.rewrites.head import fit


def fit_gap(new, features, targets, task="classification", **how):
    part = Part.of(TASKS[task], targets)
    return fit.fit_gap(new, features, targets, part=part, **how)


@pytest.mark.parametrize(("hidden", "context"), [([], 0), ([8], 0), ([8], 2)])
def test_a_gap_head_recovers_what_averaging_computes_exactly(hidden, context):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    features = torch.randn(600, 8, 4, 4, generator=generator).relu()
    # Examples differ in how much of each channel they show, as classes do.
    features *= torch.rand(600, 8, 1, 1, generator=generator) * 2
    # The linear layer is one and the same map at each place: the mean, then 5 scores.
    linear = nn.Linear(8 * 16, 5)
    with torch.no_grad():
        linear.weight.copy_(
            (torch.randn(5, 8, 1, generator=generator) * 8).expand(5, 8, 16).flatten(1) / 16
        )
        targets = linear(features.flatten(1))
    new = GlobalAverageHead(8, 5, hidden, context=context)
    left = fit_gap(new, features[:400], targets[:400], linear=linear)
    with torch.no_grad():
        answers = new(features[400:])
    agreement = (answers.argmax(1) == targets[400:].argmax(1)).float().mean()
    assert left < 0.05
    assert agreement > (0.9 if context else 0.95)  # one with context starts from nothing


def test_fitting_gives_the_same_head_each_time_and_leaves_the_seed_alone():
    features, targets, linear = torch.randn(40, 4, 3, 3), torch.randn(40, 3), nn.Linear(36, 6)
    heads = [GlobalAverageHead(4, 3, [4]) for _ in range(2)]
    state = torch.get_rng_state()
    losses = [fit_gap(h, features, targets, linear=linear) for h in heads]
    assert losses[0] == losses[1]
    assert_close(heads[0].state_dict(), heads[1].state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_held_out_is_not_learned_from():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(80, 4, 3, 3, generator=generator)
    targets = 3 * torch.randn(80, 5, generator=generator)  # nothing that could be known of others
    seen, unseen = (
        fit_gap(GlobalAverageHead(4, 5, [32]), features, targets, held_out=share)
        for share in (0.0, 0.25)
    )
    assert unseen > 2 * seen


@pytest.mark.parametrize(("hidden", "context"), [([], 0), ([6], 0), ([6], 2), ([], 2)])
def test_a_fit_does_not_depend_on_the_scale_of_the_channels(hidden, context):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(60, 4, 3, 5, generator=generator)
    features[:, 1] = 0  # a channel that is never on has no scale
    scale = torch.tensor([2**-10, 1.0, 8.0, 2**10])[:, None, None]  # nothing is rounded
    targets = torch.randn(60, 3, generator=generator)
    heads = [GlobalAverageHead(4, 3, hidden, context=context) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    linear = nn.Linear(4 * 15, 6)
    scaled = copy.deepcopy(linear)
    with torch.no_grad():
        scaled.weight.copy_((linear.weight.view(6, 4, 3, 5) / scale).flatten(1))
    fit_gap(heads[0], features, targets, linear=linear)
    fit_gap(heads[1], features * scale, targets, linear=scaled)
    assert_close(heads[1](features * scale), heads[0](features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero", [0.0, 4096.0])
@pytest.mark.parametrize("unit", [2**-10, 1.0, 2**10])
@pytest.mark.parametrize(("hidden", "context"), [([], 0), ([6], 0), ([6], 2)])
def test_a_fit_of_a_measure_is_as_good_in_any_unit_and_from_any_zero(hidden, context, unit, zero):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(200, 4, 3, 5, generator=generator)
    targets = features[:, :1].mean((2, 3)) - features[:, 1:2].mean((2, 3))
    head_ = GlobalAverageHead(4, 1, hidden, context=context)
    fit_gap(head_, features, unit * (targets + zero / 1024), "regression")
    with torch.no_grad():
        answers = head_(features) / unit - zero / 1024
        assert float((answers - targets).square().mean() / targets.var()) < 0.1


def test_layers_of_a_fitted_head_with_context_are_of_one_scale():
    # Later training moves all weights by steps of one size.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 8, 6, 7, generator=generator).relu()
    linear = nn.Linear(8 * 42, 5)
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
        targets = linear(features.flatten(1))
    new = GlobalAverageHead(8, 5, [8], context=3)
    fit_gap(new, features, targets, linear=linear)
    scales = [
        float(layer.weight.detach().std()) * (layer.weight[0].numel() / 2) ** 0.5
        for layer in new.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    assert max(scales) < 10 * min(scales)


def test_what_a_head_with_context_held_before_its_fit_does_not_matter():
    features, targets, linear = torch.rand(40, 4, 3, 5), torch.randn(40, 3), nn.Linear(60, 6)
    heads = [GlobalAverageHead(4, 3, [4], context=2) for _ in range(2)]
    for head_ in heads:
        nn.init.normal_(head_.maps[2].weight)
        fit_gap(head_, features, targets, linear=linear)
    assert_close(heads[0].state_dict(), heads[1].state_dict(), rtol=0, atol=0)
