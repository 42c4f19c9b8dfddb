import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from onebyone.profiling.counts import attention_macs, convolution_macs, matmul_macs

SIZES = st.integers(1, 5)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.integers(1, 2), st.booleans())
def test_a_convolution_costs_half_of_what_torch_counts_as_flops(
    n, inputs, outputs, side, groups, transposed
):
    x = torch.zeros(n, inputs * groups, 7, 6)
    function = F.conv_transpose2d if transposed else F.conv2d
    shape = (inputs * groups, outputs) if transposed else (outputs * groups, inputs)
    weight = torch.zeros(*shape, side, 2)
    with FlopCounterMode(display=False) as flops:
        y = function(x, weight, stride=2, padding=1 if side > 1 else 0, groups=groups)
    assert (
        2 * convolution_macs(x.shape, weight.shape, y.shape, transposed=transposed)
        == flops.get_total_flops()
    )


@given(st.lists(SIZES, max_size=2), SIZES, SIZES, SIZES)
def test_a_matrix_product_costs_rows_times_inner_times_columns(batch, m, k, n):
    assert matmul_macs((*batch, m, k), (*batch, k, n)) == math.prod(batch) * m * k * n


def test_attention_costs_scores_and_weighted_values():
    query, key, value = (torch.zeros(2, 3, n, d) for n, d in ((5, 4), (7, 4), (7, 6)))
    by_hand = 2 * 3 * (5 * 4 * 7 + 5 * 7 * 6)
    assert attention_macs(query.shape, key.shape, value.shape) == by_hand


@pytest.mark.parametrize(
    ("kernel", "macs"), [((32, 512, 1, 1), 16_384 * 144), ((32, 512, 3, 3), 147_456 * 144)]
)
def test_the_articles_layers(kernel, macs):
    assert convolution_macs((1, 512, 12, 12), kernel, (1, 32, 12, 12)) == macs
