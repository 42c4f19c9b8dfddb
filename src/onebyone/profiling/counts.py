"""Shapes in, multiply-accumulates out, for each operation that multiplies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten

Shape = Sequence[int]


def convolution_macs(
    input_shape: Shape, weight_shape: Shape, output_shape: Shape, *, transposed: bool = False
) -> int:
    """Return the MACs of a convolution; bias additions are not counted.

    Args:
        input_shape: ``(batch, channels, *spatial)``.
        weight_shape: As PyTorch keeps it; the second size is already divided by the groups.
        output_shape: ``(batch, channels, *spatial)``.
        transposed: Whether each input place, not each output place, meets the whole kernel.

    Examples:
        >>> convolution_macs((1, 512, 12, 12), (32, 512, 1, 1), (1, 32, 12, 12))
        2359296
    """
    places = input_shape[2:] if transposed else output_shape[2:]
    return input_shape[0] * math.prod(places) * math.prod(weight_shape)


def matmul_macs(left: Shape, right: Shape) -> int:
    """Return the MACs of (batched) matrix products ``(…, m, k) @ (…, k, n)``."""
    return math.prod(left) * right[-1]


def attention_macs(query: Shape, key: Shape, value: Shape) -> int:
    """Return the MACs of scaled dot-product attention: scores, then weighted values."""
    scores = math.prod(query) * key[-2]
    return scores + math.prod(query[:-1]) * key[-2] * value[-1]


def _convolution(args: Sequence[Any], output: Any) -> int:
    transposed = bool(args[6]) if len(args) > 6 else False
    return convolution_macs(args[0].shape, args[1].shape, output.shape, transposed=transposed)


def _attention(args: Sequence[Any], _: Any) -> int:
    return attention_macs(args[0].shape, args[1].shape, args[2].shape)


Rule = Callable[[Sequence[Any], Any], int]

RULES: dict[Any, Rule] = {
    aten.convolution: _convolution,
    aten._convolution: _convolution,  # noqa: SLF001
    aten.mm: lambda args, _: matmul_macs(args[0].shape, args[1].shape),
    aten.bmm: lambda args, _: matmul_macs(args[0].shape, args[1].shape),
    aten.addmm: lambda args, _: matmul_macs(args[1].shape, args[2].shape),
    aten.baddbmm: lambda args, _: matmul_macs(args[1].shape, args[2].shape),
    aten.mv: lambda args, _: math.prod(args[0].shape),
    aten.addmv: lambda args, _: math.prod(args[1].shape),
    aten.dot: lambda args, _: math.prod(args[0].shape),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # noqa: SLF001
    aten._scaled_dot_product_flash_attention: _attention,  # noqa: SLF001
    aten._scaled_dot_product_efficient_attention: _attention,  # noqa: SLF001
    aten._scaled_dot_product_cudnn_attention: _attention,  # noqa: SLF001
}

# These multiply too, but what they cost depends on more than shapes: they are named, not guessed.
UNCOUNTED = frozenset(
    {
        aten.mkldnn_rnn_layer,
        aten._cudnn_rnn,  # noqa: SLF001
        aten._native_multi_head_attention,  # noqa: SLF001
        aten._transformer_encoder_layer_fwd,  # noqa: SLF001
        aten.grid_sampler_2d,
        aten._fft_r2c,  # noqa: SLF001
        aten._fft_c2c,  # noqa: SLF001
        aten._cdist_forward,  # noqa: SLF001
    }
)
