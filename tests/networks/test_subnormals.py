"""Subnormal numbers are told by their bits, and zero takes their place in copies of ours alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onebyone.networks.subnormals import (
    count_near,
    count_subnormals,
    count_values,
    flush_in_place,
    near_mask,
    subnormal_activations,
    subnormal_mask,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_is_subnormal_below_the_smallest_normal_one(dtype, sign):
    tiny = torch.finfo(dtype).tiny
    values = sign * torch.tensor([0.0, tiny / 2, tiny, 2 * tiny, 1.0], dtype=dtype)
    assert subnormal_mask(values).tolist() == [False, True, False, False, False]
    odd = torch.tensor([float("nan"), float("inf"), -0.0], dtype=dtype)
    assert not subnormal_mask(odd).any()


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="no such switch here")
def test_subnormals_are_seen_where_the_process_flushes_them():
    values = torch.tensor([1e-39, 1.0])
    torch.set_flush_denormal(True)
    try:
        assert subnormal_mask(values).tolist() == [True, False]
    finally:
        torch.set_flush_denormal(False)


@given(st.floats(width=32, allow_nan=False))
def test_subnormal_is_what_the_definition_says(value):
    mask = subnormal_mask(torch.tensor([value], dtype=torch.float32))
    assert bool(mask[0]) == (0 < abs(value) < torch.finfo(torch.float32).tiny)


def test_half_precision_and_integers_are_left_alone():
    """In float16 1e-6 is subnormal and a weight like others."""
    layer = nn.Linear(2, 2).half()
    layer.weight.data.fill_(1e-6)
    layer.register_buffer("steps", torch.tensor([1, 2]))
    assert subnormal_mask(layer.weight) is None
    assert not count_subnormals(layer)
    flush_in_place(layer)
    assert (layer.weight != 0).all()


def test_what_is_near_is_so_small_that_its_products_are_subnormal_and_no_sum_keeps_it():
    values = torch.tensor([1.0, 1e-29, 1e-31, -1e-37, 1e-39, 0.0])
    assert near_mask(values).tolist() == [False, False, True, True, False, False]
    # Beside a largest value of its own size nothing is too small to count.
    assert not near_mask(torch.tensor([1e-31, -3e-37])).any()


def network():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval()
    net[0].weight.data[0, 0, 0, 0] = 1e-40
    net[0].weight.data[0, 0, 0, 1] = 1e-35
    net[1].running_var[1] = 2e-39
    return net


def test_weights_and_buffers_are_counted_by_name_and_shared_ones_once():
    net = network()
    assert count_subnormals(net) == {"0.weight": 1, "1.running_var": 1}
    assert count_near(net) == {"0.weight": 1}
    tied = nn.Sequential(net[0], net[0])
    assert count_subnormals(tied) == {"0.weight": 1}
    assert count_values(tied) == 3 * 2 * 9 + 3


def test_flushed_values_are_zero_and_the_others_stay():
    net = network()
    weight = net[0].weight.detach().clone()
    flush_in_place(net)
    assert not count_subnormals(net)
    assert not count_near(net)
    assert torch.equal(net[0].weight.flatten()[2:], weight.flatten()[2:])
    assert net[0].weight.requires_grad


def test_weights_that_were_made_in_inference_mode_can_be_flushed():
    with torch.inference_mode():
        net = network()
    flush_in_place(net)
    assert not count_subnormals(net)


def test_activations_are_counted_by_layer():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity(), nn.ReLU())
    net[0].weight.data.fill_(1e-30)
    x = torch.tensor([[1e-9], [1.0]])
    assert subnormal_activations(net, x) == {"0": 1, "1": 1, "2": 1}
    assert subnormal_activations(net, x[1:]) == {}


def test_a_network_that_maps_over_its_examples_can_be_looked_at():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return torch.vmap(self.layer)(x)

    assert subnormal_activations(Mapped(), torch.randn(4, 3)) == {}
