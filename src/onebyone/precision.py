"""What a GPU computes float32 in: in full, or in TF32, which keeps 10 bits of the mantissa."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_in(precision: str) -> Iterator[None]:
    """Compute float32 convolutions and products on a GPU so inside; a CPU has no TF32.

    By itself torch takes TF32 for convolutions and full float32 for products. Where outputs are
    compared, that rounding would pass for a difference between the networks.

    Args:
        precision: ``float32`` or ``tf32``.
    """
    tf32, cudnn = precision == "tf32", torch.backends.cudnn
    try:
        convolutions, products = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        # The caller has set the precision of kinds of operations apart (torch 2.9 and newer), of
        # which the names above then know nothing.
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
