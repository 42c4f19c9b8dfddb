import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from onebyone.profiling.counts import (
    RULES,
    attention_macs,
    convolution_macs,
    macs_of,
    matmul_macs,
    name_of,
)

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


@settings(deadline=None)
@given(st.lists(SIZES, max_size=2), SIZES, SIZES, SIZES)
def test_a_matrix_product_costs_rows_times_inner_times_columns(batch, m, k, n):
    assert matmul_macs((*batch, m, k), (*batch, k, n)) == math.prod(batch) * m * k * n


@settings(deadline=None)
@given(st.lists(SIZES, max_size=3), SIZES, SIZES, SIZES, SIZES)
def test_attention_costs_its_two_matrix_products(batch, queries, keys, inner, values):
    query, key, value = (
        (*batch, *size) for size in ((queries, inner), (keys, inner), (keys, values))
    )
    scores = matmul_macs(query, (*batch, inner, keys))
    weighted = matmul_macs((*batch, queries, keys), value)
    assert attention_macs(query, key, value) == scores + weighted


# ---------------------------------------------------------------- every rule, wherever it runs


def flops(function, *args, **kwargs):
    with FlopCounterMode(display=False) as counted:
        output = function(*args, **kwargs)
    return counted.get_total_flops(), output


# No two sizes are equal: a rule that reads a wrong one is found out.
MAP = torch.zeros(2, 3, 11, 7)
KERNELS = {False: torch.zeros(5, 3, 4, 1), True: torch.zeros(3, 5, 4, 1)}


GENERIC = {"aten.convolution", "aten._convolution", "aten.convolution_overrideable"}
CONVOLUTIONS = [
    (name, transposed)
    for name in RULES
    for transposed in (False, True)
    if "conv" in name and (name in GENERIC or transposed == ("transpose" in name))
]


@pytest.mark.parametrize(("name", "transposed"), CONVOLUTIONS)
def test_convolutions_of_every_backend_cost_what_torchs_own_costs(name, transposed):
    function = F.conv_transpose2d if transposed else F.conv2d
    expected, output = flops(function, MAP, KERNELS[transposed], stride=2)
    args = [MAP, KERNELS[transposed], None, [2, 2], [0, 0], [1, 1]]
    args += [transposed, [0, 0], 1] if name in GENERIC else []
    assert 2 * macs_of(name, args, output) == expected


A, B, C = torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(2, 5)
QUERY, KEY, VALUE = (torch.zeros(2, *size) for size in ((7, 3), (5, 3), (5, 4)))
# Arguments as the operation takes them -> its products, for a loop over all of them.
PRODUCTS = {
    "aten.mm": ((A, B), 2 * 3 * 5),
    "aten._int_mm": ((A, B), 2 * 3 * 5),
    "aten._scaled_mm": ((A, B), 2 * 3 * 5),
    "aten.bmm": ((A[None], B[None]), 2 * 3 * 5),
    "aten.addmm": ((C[0], A, B), 2 * 3 * 5),
    "aten._addmm_activation": ((C[0], A, B), 2 * 3 * 5),
    "aten.baddbmm": ((C[:, :1], A[None], B[None]), 2 * 3 * 5),
    "aten.addbmm": ((C[0], A[None], B[None]), 2 * 3 * 5),
    "aten.mkldnn_linear": ((torch.zeros(7, 2, 3), torch.zeros(5, 3), None), 7 * 2 * 3 * 5),
    "aten.mv": ((A, A[0]), 2 * 3),
    "aten.addmv": ((C[0, :1], A, A[0]), 2 * 3),
    "aten.dot": ((A[0], A[1]), 3),
    "aten.vdot": ((A[0], A[1]), 3),
    "aten.addr": ((B, A[0], B[0]), 3 * 5),
    **dict.fromkeys(
        (
            "aten._scaled_dot_product_flash_attention_for_cpu",
            "aten._scaled_dot_product_flash_attention",
            "aten._scaled_dot_product_efficient_attention",
            "aten._scaled_dot_product_cudnn_attention",
        ),
        ((QUERY, KEY, VALUE, 0.0), 2 * (7 * 3 * 5 + 7 * 5 * 4)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_rule_counts_what_a_loop_over_the_products_counts(name):
    args, products = PRODUCTS[name]
    assert macs_of(name, args, None) == products


@pytest.mark.parametrize("name", ["aten._cudnn_rnn", "aten.mkldnn_rnn_layer"])
def test_recurrent_layers_of_every_backend_cost_each_matrix_at_each_step(name):
    x, layer = torch.zeros(7, 2, 3), torch.nn.LSTM(3, 5)
    inward, recurrent, *biases = layer._flat_weights
    args = [x, inward, recurrent, *biases]
    if name == "aten._cudnn_rnn":
        buffer, states = torch.zeros(9), [torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)]
        args = [x, [inward, recurrent, *biases], 4, buffer, *states]
    assert macs_of(name, args, None) == 7 * 2 * (4 * 5 * 3 + 4 * 5 * 5)


def test_every_rule_is_checked_here():
    recurrent = {"aten._cudnn_rnn", "aten.mkldnn_rnn_layer"}
    assert set(RULES) == {*PRODUCTS, *recurrent, *(name for name, _ in CONVOLUTIONS)}


def test_what_is_known_in_place_is_known_out_of_place():
    aten = torch.ops.aten
    for operation in (aten.copysign_.Tensor, aten.gcd_.default, aten.lcm_.default):
        assert torch.Tag.pointwise not in operation.tags  # else the tag alone would do
        assert macs_of(operation, (), None) == 0


def test_an_unknown_operation_of_another_library_is_not_free():
    assert macs_of("theirs.add_", (), None) is None
    assert name_of("theirs.add_") == "theirs.add_"


@pytest.mark.parametrize(
    ("kernel", "macs"), [((32, 512, 1, 1), 16_384 * 144), ((32, 512, 3, 3), 147_456 * 144)]
)
def test_the_articles_layers(kernel, macs):
    assert convolution_macs((1, 512, 12, 12), kernel, (1, 32, 12, 12)) == macs
