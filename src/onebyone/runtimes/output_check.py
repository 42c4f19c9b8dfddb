"""Compares a runtime's outputs with those of eager float32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onebyone.core.errors import ModelError
from onebyone.core.fields import Amount
from onebyone.core.records import Record

# Largest difference that counts as rounding, as a share of the outputs' standard deviation. Float32
# with another order of summation stays far below it; bf16 or a wrong graph does not.
SAME_OUTPUTS = 1e-3


@dataclass(frozen=True, kw_only=True)
class OutputDifference(Record):
    """Difference of outputs from those of eager float32 on the same input.

    Attributes:
        max_abs: Largest absolute difference of any output.
        relative: Largest difference as a share of its output tensor's standard deviation.

    Both are ``None`` if the difference is not finite.
    """

    max_abs: Amount | None
    relative: Amount | None

    @property
    def size(self) -> float:
        """The relative difference; infinite if it is not finite."""
        return math.inf if self.relative is None else self.relative

    @property
    def same(self) -> bool:
        """Whether the outputs are the same, except for rounding."""
        return self.size <= SAME_OUTPUTS

    def __str__(self) -> str:
        if self.max_abs is None:
            return "more than any finite number"
        return f"{self.max_abs:.1e} ({self.size:.1e} of the outputs' deviation)"


def outputs_of(result: Any) -> list[Tensor]:
    """Return the tensors or arrays in a result, in order, on the CPU and in float32 or wider.

    Raises:
        ModelError: If there is none.
    """
    found = [_plain(leaf) for leaf in _leaves(result)]
    if not found:
        raise ModelError(
            f"A network must give tensors to be compared, but this one gave a "
            f"{type(result).__name__} without any."
        )
    return found


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Tensor | np.ndarray):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return []


def _plain(leaf: Any) -> Tensor:
    # Copied, because runtimes reuse their output buffers.
    tensor = leaf.detach().cpu() if isinstance(leaf, Tensor) else torch.from_numpy(np.array(leaf))
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).clone()


def difference(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> OutputDifference:
    """Return the largest difference of outputs from the reference's, over all tensors.

    Args:
        reference: Outputs of eager float32, from :func:`outputs_of`. Not modified.
        outputs: Outputs of the same number and shapes. Not modified.

    Raises:
        ModelError: If their number or a shape differs.
    """
    shapes = [tuple(t.shape) for t in reference], [tuple(t.shape) for t in outputs]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"Outputs must have the shapes of the network's own, {shapes[0]}, got {shapes[1]}."
        )
    largest = relative = 0.0
    for old, new in zip(reference, outputs, strict=True):
        wide = old.double()
        gap = float((wide - new.double()).abs().max()) if wide.numel() else 0.0
        # `max` ignores NaN, so NaN becomes infinity.
        gap = float("inf") if gap != gap else gap  # noqa: PLR0124 - NaN alone differs from itself
        scale = float(wide.std()) if wide.numel() > 1 else 0.0
        scale = scale or float(wide.abs().max() if wide.numel() else 0.0) or 1.0
        largest, relative = max(largest, gap), max(relative, gap / scale)
    if not math.isfinite(largest) or not math.isfinite(relative):
        return OutputDifference(max_abs=None, relative=None)
    return OutputDifference(max_abs=largest, relative=relative)
