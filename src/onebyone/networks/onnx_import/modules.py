"""Layers of ONNX that torch has not: each does exactly what its operator says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AsTensor(nn.Module):
    """Makes a tensor of numbers that were computed from sizes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = str(dtype)

    def forward(self, numbers: Any) -> Tensor:
        """Return a tensor of the numbers, nested lists of them, or one."""
        return torch.tensor(numbers, dtype=getattr(torch, self.dtype.removeprefix("torch.")))


class Filled(nn.Module):
    """Makes a tensor of one value, in a shape that was computed from sizes."""

    def __init__(self, value: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.value = value
        self.dtype = str(dtype)

    def forward(self, sizes: Sequence[int]) -> Tensor:
        """Return the tensor."""
        dtype = getattr(torch, self.dtype.removeprefix("torch."))
        return torch.full(tuple(sizes), self.value, dtype=dtype)


class Counting(nn.Module):
    """Makes the numbers from a start to a limit that was computed from sizes."""

    def forward(self, start: Any, limit: Any, step: Any) -> Tensor:
        """Return the numbers, without the limit."""
        return torch.arange(start, limit, step)


class SamePad(nn.Module):
    """Pads so that a layer with a stride gives the size of its input divided by the stride.

    Args:
        kernel: Size of the layer's window in each dimension.
        stride: Of the layer.
        dilation: Of the layer.
        upper: Whether an odd row more goes to the end.
        value: What is filled in.
    """

    def __init__(
        self,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        *,
        upper: bool,
        value: float = 0.0,
    ) -> None:
        super().__init__()
        self.windows = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
        self.stride = tuple(stride)
        self.upper = upper
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, channels, …)`` with its edges padded."""
        pads: list[int] = []
        for size, window, stride in zip(x.shape[2:], self.windows, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + window - size, 0)
            less, more = total // 2, total - total // 2
            pads = [*((less, more) if self.upper else (more, less)), *pads]
        return F.pad(x, pads, value=self.value)


class EdgePad(nn.Module):
    """Pads any dimensions with values of the tensor itself.

    Args:
        before: New entries in front, for each dimension.
        after: New entries at the end.
        mode: ``reflect``, ``edge`` or ``wrap``.
    """

    def __init__(self, before: Sequence[int], after: Sequence[int], mode: str) -> None:
        super().__init__()
        self.before = tuple(before)
        self.after = tuple(after)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded tensor; a negative number of entries cuts."""
        for axis, (before, after) in enumerate(zip(self.before, self.after, strict=True)):
            if not before and not after:
                continue
            size = x.shape[axis]
            at = torch.arange(-before, size + after, device=x.device)
            x = x.index_select(axis, self._inside(at, size))
        return x

    def _inside(self, at: Tensor, size: int) -> Tensor:
        if self.mode == "edge":
            return at.clamp(0, size - 1)
        if self.mode == "wrap":
            return at % size
        if size == 1:
            return torch.zeros_like(at)
        around = at.abs() % (2 * size - 2)
        return torch.minimum(around, 2 * size - 2 - around)


class Resize(nn.Module):
    """Resizes dimensions one after the other, by ONNX's rules of coordinates.

    Args:
        mode: ``nearest`` or ``linear``.
        coordinates: ONNX's ``coordinate_transformation_mode``.
        rounding: ONNX's ``nearest_mode``.
    """

    def __init__(self, mode: str, coordinates: str, rounding: str) -> None:
        super().__init__()
        self.mode = mode
        self.coordinates = coordinates
        self.rounding = rounding

    def forward(self, x: Tensor, axes: Any, sizes: Any, scales: Any) -> Tensor:
        """Return the tensor in its new sizes.

        Args:
            x: The tensor.
            axes: The dimensions to resize.
            sizes: Their new sizes; ``None`` where ``scales`` are given.
            scales: Ratios of the new sizes to the old ones; ``None`` where ``sizes`` are given.
        """
        for place, axis in enumerate(axes):
            old = x.shape[axis]
            scale = sizes[place] / old if scales is None else scales[place]
            new = math.floor(old * scale) if sizes is None else sizes[place]
            if new != old or scale != 1:
                x = self._along(x, axis, old, new, scale)
        return x

    def _along(self, x: Tensor, axis: int, old: int, new: int, scale: float) -> Tensor:
        at = self._coordinates(torch.arange(new, device=x.device), old, new, scale)
        if self.mode == "nearest":
            return x.index_select(axis, self._rounded(at).clamp(0, old - 1).long())
        at = at.clamp(0, old - 1)
        low = at.floor().clamp(max=max(old - 2, 0))
        share = (at - low).to(x.dtype)
        share = share.reshape([-1 if each == axis else 1 for each in range(x.dim())])
        first = x.index_select(axis, low.long())
        second = x.index_select(axis, (low.long() + 1).clamp(max=old - 1))
        return first + (second - first) * share

    def _coordinates(self, at: Tensor, old: int, new: int, scale: float) -> Tensor:
        at = at.to(torch.float32)
        if self.coordinates == "asymmetric":
            return at / scale
        if self.coordinates == "align_corners":
            return at * ((old - 1) / (new - 1) if new > 1 else 0.0)
        if self.coordinates == "pytorch_half_pixel" and new == 1:
            return at * 0
        if self.coordinates == "half_pixel_symmetric":
            adjusted = new / (scale * old)
            center = old / 2
            return center * (1 - adjusted) + (at + 0.5) / scale - 0.5
        if self.coordinates == "tf_half_pixel_for_nn":
            return (at + 0.5) / scale
        return (at + 0.5) / scale - 0.5

    def _rounded(self, at: Tensor) -> Tensor:
        if self.rounding == "floor":
            return at.floor()
        if self.rounding == "ceil":
            return at.ceil()
        if self.rounding == "round_prefer_ceil":
            return (at + 0.5).floor()
        return (at - 0.5).ceil()
