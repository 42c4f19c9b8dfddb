"""A layer's kernel on the rows that it meets gives what the layer gives."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from onebyone.networks import conv_layers as kernels

small = st.integers(1, 3)
pairs = st.tuples(small, small)


def assert_kernel_on_rows(module, x):
    module, x = module.double(), x.double()
    assert kernels.why_unknown(module) is None
    with torch.no_grad():
        y = module(x)
    kernel, shape = kernels.kernel_of(module), kernels.shape_of(module)
    some = kernels.choose_places(module, y, 5, torch.Generator().manual_seed(1))
    for places in (None, some):
        rows = kernels.input_rows(module, x, places=places)
        outputs = kernels.output_rows(module, y, places=places)
        parts = rows.reshape(len(rows), shape.groups, shape.values)
        got = torch.einsum("rgv,gov->rgo", parts, kernel.flatten(2)).flatten(1)
        bias = kernels.bias_of(module)
        torch.testing.assert_close(got if bias is None else got + bias, outputs)


@settings(max_examples=40, deadline=None)
@given(
    kernel=pairs, stride=pairs, dilation=pairs, padding=st.tuples(st.integers(0, 2), small),
    groups=st.sampled_from([1, 2]), bias=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)  # fmt: skip
def test_convolution(kernel, stride, dilation, padding, groups, bias, mode):
    torch.manual_seed(0)
    module = nn.Conv2d(
        4, 6, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias,
        padding_mode=mode,
    )  # fmt: skip
    assert_kernel_on_rows(module, torch.randn(2, 4, 9, 8))


@settings(max_examples=40, deadline=None)
@given(
    kernel=pairs, stride=pairs, dilation=pairs, padding=st.tuples(st.integers(0, 2), st.just(1)),
    groups=st.sampled_from([1, 2]), bias=st.booleans(), more=st.booleans(),
)  # fmt: skip
def test_transposed_convolution(kernel, stride, dilation, padding, groups, bias, more):
    torch.manual_seed(0)
    extra = tuple(int(more and max(s, d) > 1) for s, d in zip(stride, dilation, strict=True))
    module = nn.ConvTranspose2d(
        4, 6, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias,
        output_padding=extra,
    )  # fmt: skip
    assert_kernel_on_rows(module, torch.randn(2, 4, 7, 6))


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Linear(5, 7), (4, 3, 5)),
        (nn.Conv1d(6, 4, 3, stride=2, padding=1), (2, 6, 9)),
        (nn.Conv1d(6, 4, 3, padding="same"), (6, 9)),
        (nn.Conv3d(4, 6, (3, 2, 1), stride=(1, 2, 1), padding=1), (2, 4, 5, 6, 7)),
        (nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 2)), (2, 4, 9, 8)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 3)),
        (nn.ConvTranspose3d(4, 6, 3, stride=2), (2, 4, 3, 4, 5)),
        (StdConv2d(6, 8, 3), (2, 6, 9, 11)),
        (StdConv2dSame(6, 8, 3, stride=2, groups=2), (2, 6, 9, 12)),
        (ScaledStdConv2d(6, 8, 3, groups=2), (2, 6, 9, 12)),
        (ScaledStdConv2dSame(6, 8, 3, stride=2), (2, 6, 9, 11)),
        (Conv2dSame(6, 8, (3, 5), stride=2), (2, 6, 10, 11)),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), (2, 4, 5, 6)),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)).eval(), (2, 4)),
    ],
)
def test_other_layers(module, size):
    assert_kernel_on_rows(module, torch.randn(*size))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), groups=2, output_padding=(1, 0)),
        nn.Linear(4, 6),
        ScaledStdConv2dSame(4, 6, 3, stride=2),
        nn.utils.parametrizations.weight_norm(
            nn.Conv2d(4, 6, 3, padding_mode="circular", padding=1)
        ),
    ],
)
def test_a_plain_layer_of_the_same_geometry_takes_the_kernel(module):
    module = module.double()
    shape = kernels.shape_of(module)
    if isinstance(module, nn.Linear):
        plain, x = kernels.pointwise_like(module, 4, 6, bias=True), torch.randn(3, 4)
    else:
        plain = kernels.spatial_like(
            module, 4, 6, groups=shape.groups, bias=module.bias is not None
        )
        x = torch.randn(3, 4, 9, 8)
    kernels.set_kernel(plain, kernels.kernel_of(module))
    if module.bias is not None:
        plain.bias.data.copy_(module.bias.data)
    torch.testing.assert_close(plain(x.double()), module(x.double()))


def test_what_is_not_understood_is_named():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return super().forward(2 * x)

    class Own(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 2 * weight, bias)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch warns of torch.jit
        traced = torch.jit.trace(nn.Conv2d(2, 3, 1), torch.zeros(1, 2, 4, 4))
    reasons = {
        "a forward of its own": Doubled(2, 3, 1),
        "in its own way": Own(2, 3, 1),
        "has not been run yet": nn.LazyConv2d(3, 1),
        "torch.jit": traced,
        "neither a convolution nor a linear": nn.BatchNorm2d(3),
    }
    for words, module in reasons.items():
        assert words in kernels.why_unknown(module)
