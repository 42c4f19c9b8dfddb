"""Precision of computations: bf16 where a device supports it, and on a GPU float32 or TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from onebyone.core.errors import OptionError

Precision = Literal["auto", "float32", "bf16"]
PRECISIONS = ("auto", "float32", "bf16")


def has_bf16(device: torch.device | str) -> bool:
    """Whether a device has bf16 instructions; on others bf16 is emulated, which is slow."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - no public name
    except (AttributeError, RuntimeError):
        return False


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether a training computes in bf16 on a device; weights stay float32.

    Raises:
        OptionError: If there is no such precision.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


def in_full(outputs: Tensor) -> Tensor:
    """Return bf16 outputs as float32, and all others unchanged."""
    return outputs.float() if outputs.dtype == torch.bfloat16 else outputs


@contextmanager
def float32_in(precision: str) -> Iterator[None]:
    """Set the precision of float32 convolutions and products on a GPU; a CPU has no TF32.

    TF32 keeps 10 bits of the mantissa. By default torch uses it for convolutions, but not for
    products. In a comparison, its rounding would look like a difference between the networks.

    Args:
        precision: ``float32`` or ``tf32``.
    """
    tf32, cudnn = precision == "tf32", torch.backends.cudnn
    try:
        convolutions, products = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        # The caller has set the precision for each kind of operation (torch 2.9 and newer), which
        # the settings above do not cover.
        with _kinds_in("tf32" if tf32 else "ieee"):
            yield
        return
    try:
        cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        yield
    finally:
        cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


@contextmanager
def _kinds_in(precision: str) -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    kinds: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    kept = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = precision
        yield
    finally:
        for kind, before in zip(kinds, kept, strict=True):
            kind.fp32_precision = before
