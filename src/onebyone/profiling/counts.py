"""Counts the MACs (multiply-accumulates) of an operation from its shapes.

An operation either has a rule, or is known to have no matrix product, or is reported as uncounted.
So a new operation is never silently counted as free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

Shape = Sequence[int]


def convolution_macs(
    input_shape: Shape, weight_shape: Shape, output_shape: Shape, *, transposed: bool = False
) -> int:
    """Return the MACs of a convolution; bias additions are not counted.

    Args:
        input_shape: ``(batch, channels, *spatial)``.
        weight_shape: In PyTorch's layout; the second size is already divided by the groups.
        output_shape: ``(batch, channels, *spatial)``.
        transposed: Whether the convolution is transposed: the kernel is applied at each input
            position instead of each output position.

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


def macs_of(operation: Any, args: Sequence[Any], output: Any) -> int | None:
    """Return the MACs of one call of an operation; ``None`` if they are unknown.

    Args:
        operation: The operation, as passed to a dispatch mode.
        args: Its positional arguments.
        output: Its output.
    """
    rule = RULES.get(name_of(operation))
    if rule is not None:
        return rule(args, output)
    return 0 if _is_free(operation) else None


def has_rule(operation: Any) -> bool:
    """Whether an operation has its own rule, so that it need not be decomposed."""
    return name_of(operation) in RULES


@cache
def name_of(operation: Any) -> str:
    """Return an operation's name, such as ``aten.mm``; in-place variants have the same name."""
    packet = getattr(operation, "_overloadpacket", operation)
    name = str(packet)
    return name.removesuffix("_") if name.startswith("aten.") else name


@cache
def _is_free(operation: Any) -> bool:
    """Whether an operation is known to contain no matrix product or convolution."""
    if getattr(operation, "is_view", False) or name_of(operation) in _FREE_OF_OTHERS:
        return True
    space, _, name = name_of(operation).partition(".")
    if space not in ("aten", "prims", "prim"):
        return space == "profiler"  # the start and end of a named range, as of DataParallel
    if name in _FREE or name.endswith("_copy") or name.startswith(_FREE_KINDS):
        return True
    # Elementwise operations are free. Torch tags the out-of-place ones, but not all in-place ones.
    plain = getattr(torch.ops.aten, name, None) if space == "aten" else None
    overloads = [operation]
    if plain is not None:
        overloads += [getattr(plain, overload) for overload in plain.overloads()]
    return any(torch.Tag.pointwise in getattr(each, "tags", ()) for each in overloads)


# ---------------------------------------------------------------- rules


def _convolution(args: Sequence[Any], output: Any) -> int:
    return convolution_macs(args[0].shape, args[1].shape, output.shape, transposed=args[6])


def _plain_convolution(args: Sequence[Any], output: Any) -> int:
    return convolution_macs(args[0].shape, args[1].shape, output.shape)


def _transposed_convolution(args: Sequence[Any], output: Any) -> int:
    return convolution_macs(args[0].shape, args[1].shape, output.shape, transposed=True)


def _attention(args: Sequence[Any], _: Any) -> int:
    return attention_macs(args[0].shape, args[1].shape, args[2].shape)


def _product(args: Sequence[Any], _: Any) -> int:
    return matmul_macs(args[0].shape, args[1].shape)


def _added_product(args: Sequence[Any], _: Any) -> int:
    return matmul_macs(args[1].shape, args[2].shape)


def _recurrent(args: Sequence[Any], _: Any) -> int:
    """Return the MACs of recurrent layers: each matrix is applied at each step of a sequence."""
    steps: int = math.prod(args[0].shape[:-1])
    weights: int = sum(weight.numel() for weight in args[1] if weight.ndim == 2)
    return steps * weights


def _mkldnn_recurrent(args: Sequence[Any], _: Any) -> int:
    steps: int = math.prod(args[0].shape[:-1])
    weights: int = args[1].numel() + args[2].numel()
    return steps * weights


Rule = Callable[[Sequence[Any], Any], int]

RULES: dict[str, Rule] = {
    "aten.convolution": _convolution,
    "aten._convolution": _convolution,
    "aten.convolution_overrideable": _convolution,
    "aten.mm": _product,
    "aten._int_mm": _product,
    "aten._scaled_mm": _product,
    "aten.bmm": _product,
    "aten.addmm": _added_product,
    "aten._addmm_activation": _added_product,
    "aten.baddbmm": _added_product,
    "aten.addbmm": _added_product,
    "aten.mkldnn_linear": lambda args, _: math.prod(args[0].shape) * args[1].shape[0],
    "aten.mv": lambda args, _: math.prod(args[0].shape),
    "aten.addmv": lambda args, _: math.prod(args[1].shape),
    "aten.dot": lambda args, _: math.prod(args[0].shape),
    "aten.vdot": lambda args, _: math.prod(args[0].shape),
    "aten.addr": lambda args, _: args[1].numel() * args[2].numel(),
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_cudnn_attention": _attention,
    "aten.mkldnn_rnn_layer": _mkldnn_recurrent,
    "aten._cudnn_rnn": _recurrent,
    # The kernel is applied at each output position; shifting its positions costs no MACs.
    "torchvision.deform_conv2d": _plain_convolution,
    **dict.fromkeys(
        (
            "aten.mkldnn_convolution", "aten._conv_depthwise2d", "aten.conv_depthwise3d",
            "aten._slow_conv2d_forward", "aten.slow_conv3d_forward", "aten.slow_conv_dilated2d",
            "aten.slow_conv_dilated3d", "aten._nnpack_spatial_convolution",
            "aten.cudnn_convolution", "aten.cudnn_convolution_relu",
            "aten.cudnn_convolution_add_relu", "aten.miopen_convolution",
            "aten.miopen_depthwise_convolution", "aten._mps_convolution",
        ),
        _plain_convolution,
    ),
    **dict.fromkeys(
        (
            "aten.slow_conv_transpose2d", "aten.slow_conv_transpose3d",
            "aten.cudnn_convolution_transpose", "aten.miopen_convolution_transpose",
        ),
        _transposed_convolution,
    ),
}  # fmt: skip

# ---------------------------------------------------------------- what multiplies nothing

_FREE_OF_OTHERS = frozenset({"torchvision.nms", "torchvision.roi_pool", "prim.device"})
# Pooling, normalization, softmax, interpolation at fixed positions, padding, random, creation.
_FREE_KINDS = (
    "max_pool", "avg_pool", "adaptive_", "_adaptive_", "fractional_max_pool", "max_unpool",
    "native_batch_norm", "_native_batch_norm", "_batch_norm", "batch_norm", "cudnn_batch_norm",
    "miopen_batch_norm", "native_layer_norm", "native_group_norm", "native_norm",
    "_fused_rms_norm", "upsample_", "_upsample_", "reflection_pad", "replication_pad",
    "constant_pad", "new_", "empty", "rand", "ones", "zeros", "full", "scatter", "index",
    "masked_", "_assert", "_to_", "_has_", "is_", "_functional_", "split", "unsafe_split",
    "sym_", "_unique", "unique", "tril", "triu", "arange", "argm", "argsort",
)  # fmt: skip
_FREE = frozenset(
    (
        "_add_relu", "_aminmax", "_chunk_cat", "_conj", "_copy_from", "_cummax_helper",
        "_cummin_helper", "_embedding_bag", "_embedding_bag_forward_only",
        "_fake_quantize_learnable_per_channel_affine",
        "_fake_quantize_learnable_per_tensor_affine",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_index_put_impl",
        "_is_all_true", "_is_any_true", "_lazy_clone", "_local_scalar_dense", "_log_softmax",
        "_logcumsumexp", "_masked_scale", "_masked_softmax", "_pack_padded_sequence",
        "_pin_memory", "_prelu_kernel", "_reshape_alias", "_safe_softmax", "_softmax", "_stack",
        "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell", "_unsafe_index", "_unsafe_index_put",
        "_unsafe_masked_index", "_unsafe_view", "_weight_norm_interface", "abs", "add", "addcdiv",
        "addcmul", "all", "allclose", "amax", "amin", "aminmax", "any", "as_strided",
        "as_strided_scatter", "bernoulli", "binary_cross_entropy", "bincount", "bitwise_and",
        "bitwise_not", "bitwise_or", "block_diag", "bucketize", "cat", "cauchy", "ceil", "celu",
        "channel_shuffle", "clamp", "clamp_max", "clamp_min", "clone", "col2im", "complex",
        "copy", "cos", "count_nonzero", "cummax", "cummin", "cumprod", "cumsum", "detach",
        "diag_embed", "diagonal_scatter", "dist", "div", "elu", "embedding", "eq", "equal", "erf",
        "exp", "expm1", "exponential", "eye", "fake_quantize_per_channel_affine_cachemask",
        "fake_quantize_per_tensor_affine_cachemask", "fill", "flip", "floor", "floor_divide",
        "fmod", "frac", "gather", "ge", "gelu", "geometric", "glu", "gt", "hardshrink",
        "hardsigmoid", "hardswish", "hardtanh", "histc", "huber_loss", "im2col", "imag",
        "int_repr", "isfinite", "isin", "isinf", "isnan", "item", "kthvalue", "le", "leaky_relu",
        "lerp", "lift", "lift_fresh", "linalg_cross", "linalg_vector_norm", "linspace", "log",
        "log10", "log1p", "log2", "log_normal", "log_sigmoid_forward", "log_softmax",
        "logcumsumexp", "logical_and", "logical_not", "logical_or", "logical_xor", "logit",
        "logspace", "logsumexp", "lt", "max", "maximum", "mean", "median", "min", "minimum",
        "mish", "mode", "mse_loss", "mul", "multinomial", "nan_to_num", "nanmedian", "nansum",
        "narrow", "native_channel_shuffle", "native_dropout", "ne", "neg", "nll_loss2d_forward",
        "nll_loss_forward", "nonzero", "nonzero_static", "norm", "normal", "normal_functional",
        "pixel_shuffle", "pixel_unshuffle", "polar", "pow", "prod", "put", "random", "real",
        "reciprocal", "record_stream", "relu", "relu6", "remainder", "renorm", "repeat",
        "repeat_interleave", "resize", "roll", "rot90", "round", "rrelu_with_noise", "rsqrt",
        "rsub", "scalar_tensor", "searchsorted", "select_scatter", "selu", "set", "sigmoid",
        "sign", "silu", "sin", "slice_scatter", "smooth_l1_loss", "softmax", "softplus",
        "softshrink", "sort", "sqrt", "square", "squeeze", "stack", "std", "std_mean", "sub",
        "sum", "t", "take", "tan", "tanh", "threshold", "to", "topk", "trace", "transpose",
        "trunc", "unfold", "uniform", "unsqueeze", "var", "var_mean", "where", "zero",
    )
)  # fmt: skip
