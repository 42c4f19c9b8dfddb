"""What a runtime gives, as tensors, and how far it is from what eager float32 gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onebyone.errors import ModelError
from onebyone.records import Record

# Of the outputs' standard deviation. Float32 in another order of summing stays far below it; bf16
# and a wrong graph do not.
SAME_OUTPUTS = 1e-3


@dataclass(frozen=True, kw_only=True)
class OutputDifference(Record):
    """How far outputs are from those of eager float32 on the same input.

    Attributes:
        max_abs: Largest absolute difference of any output.
        relative: The same as a share of the standard deviation of that tensor's outputs.
    """

    max_abs: float
    relative: float

    def __str__(self) -> str:
        return f"{self.max_abs:.1e} ({self.relative:.1e} of the outputs' deviation)"


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
    # Runtimes reuse their output buffers: what is compared must be a copy.
    tensor = leaf.detach().cpu() if isinstance(leaf, Tensor) else torch.from_numpy(np.array(leaf))
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).clone()


def difference(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> OutputDifference:
    """Return how far outputs are from the reference's, the largest over all tensors.

    Args:
        reference: Of eager float32, as :func:`outputs_of` gives them. Not modified.
        outputs: As many, of the same shapes. Not modified.

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
        # NaN must not pass for a small difference, nor for the largest of several.
        gap = float("inf") if gap != gap else gap  # noqa: PLR0124 - NaN alone differs from itself
        scale = float(wide.std()) if wide.numel() > 1 else 0.0
        scale = scale or float(wide.abs().max() if wide.numel() else 0.0) or 1.0
        largest, relative = max(largest, gap), max(relative, gap / scale)
    return OutputDifference(max_abs=largest, relative=relative)
