"""Means and covariances of a layer's inputs and outputs, summed block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from onebyone.core import processes
from onebyone.core.errors import DataError, ModelError
from onebyone.networks.conv_layers import (
    bias_of,
    choose_places,
    input_rows,
    is_linear,
    kernel_of,
    output_places,
    output_rows,
    shape_of,
    weight_of,
)

# Sums over this many rows are exact enough in float32; blocks are then added up in float64.
ROWS_A_BLOCK = 65_536
# The product of rows with themselves is symmetric. This many of its rows are computed at once, from
# the diagonal on, which halves the multiplications of wide layers.
COLUMNS = 256
# Most values of unfolded patches in memory at once: 64 M in float32 are 256 MB.
PATCH_VALUES = 64_000_000
# Most input values of one kernel. Their covariance has this side, 0.5 GB in float64, and the
# regression needs several such matrices. For a wider layer only the outputs are kept.
MOST_VALUES = 8192
# Neighboring positions are nearly the same, so large maps are sampled: this many rows for each
# input value of the kernel. Wide layers get fewer, within the MACs of `Enough`.
ROWS_A_VALUE = 512
# Values outside this range are squared and summed in float64; in float32 their squares would
# overflow or vanish.
LARGEST, SMALLEST = 1e15, 1e-15
# A standard deviation up to this many units in the last place of the mean is rounding error.
ROUNDING_UNITS = 16


class Enough(NamedTuple):
    """How many rows of a wide layer are enough.

    Attributes:
        macs: Most MACs of their products.
        fewest: At least this many rows for each input value of the kernel, whatever the cost.
        most: At most this many, where not ``ROWS_A_VALUE``.
    """

    macs: float
    fewest: int
    most: int | None = None

    def rows(self, values: int) -> int:
        """Return how many rows are enough for a kernel of so many input values."""
        affordable = max(self.fewest * values, int(self.macs) // values**2)
        return min((self.most or ROWS_A_VALUE) * values, affordable)


TO_FIT = Enough(macs=4e11, fewest=8)
# Comparing options needs fewer rows than fitting weights: with 128 a value, the error of an option
# is off by less than a hundredth of itself.
TO_COMPARE = Enough(macs=5e10, fewest=4, most=128)


@dataclass(frozen=True)
class Moments:
    """First and second moments of inputs ``x`` and outputs ``y`` of a layer, in float64.

    A row is one position of one example: ``x`` is the patch under the kernel (channels first,
    then kernel positions; padded as the layer pads), ``y`` the output channels at that position.

    Attributes:
        rows: Number of rows summed.
        mean_x: Shape ``(d,)``.
        mean_y: Shape ``(o,)``.
        xx: Covariance of ``x``, shape ``(d, d)``; ``None`` if the layer is too wide.
        yx: Covariance of ``y`` with ``x``, shape ``(o, d)``; ``None`` in the same case.
        yy: Covariance of ``y``, shape ``(o, o)``.
    """

    rows: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor | None
    yx: Tensor | None
    yy: Tensor


@dataclass(frozen=True)
class Part:
    """The part of a batch that one of several processes runs.

    Attributes:
        start: Its first example.
        stop: After its last example.
        of: Examples of the batch.
        counts: Whether it counts here; a batch that cannot be divided counts in one process.
    """

    start: int
    stop: int
    of: int
    counts: bool = True

    def batch_of(self, y: Tensor) -> Tensor:
        """Return a tensor of the shape that the whole batch gives, without its values."""
        return y[:1].expand(len(y) * self.of // (self.stop - self.start), *y.shape[1:])

    def own(self, places: Tensor, rows: int) -> Tensor:
        """Return which of the places in the rows of the whole batch are this part's, and where.

        Args:
            places: Of the whole batch.
            rows: Of this part.
        """
        start = rows * self.start // (self.stop - self.start)
        return places[(places >= start) & (places < start + rows)] - start


class MomentSum:
    """Adds up the moments of rows, block by block, without keeping the rows.

    Args:
        outputs_only: Whether to keep only the mean of the inputs.
        rounding: Rounding unit of the type that the rows were computed in; default: their own.
    """

    def __init__(self, *, outputs_only: bool = False, rounding: float = 0.0) -> None:
        self.outputs_only = outputs_only
        self.rows = 0
        self._rounding = rounding
        self._sums: dict[str, Tensor] = {}
        self._origins: dict[str, Tensor] = {}
        # Sums of the latest rows, in their own precision: adding a float64 matrix for every few
        # rows would cost more than their products.
        self._recent: dict[str, Tensor] = {}
        self._recent_rows = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add rows of inputs ``(rows, d)`` and, if given, of outputs ``(rows, o)``."""
        self._rounding = self._rounding or torch.finfo(x.dtype).eps
        for start in range(0, len(x), ROWS_A_BLOCK):
            block = self._shifted("x", x[start : start + ROWS_A_BLOCK])
            if self._recent_rows + len(block) > ROWS_A_BLOCK or self._is_of_another_type(block):
                self._add_recent()
            self._recent_rows += len(block)
            self._sum("x", block)
            if not self.outputs_only:
                self._products("xx", block, block)
            if y is not None:
                other = self._shifted("y", y[start : start + ROWS_A_BLOCK])
                self._sum("y", other)
                self._products("yy", other, other)
                if not self.outputs_only:
                    self._products("yx", other, block)
        self.rows += len(x)

    def _shifted(self, name: str, rows: Tensor) -> Tensor:
        # Subtract the first block's mean. Otherwise float32 rounding would destroy the variance of
        # a channel that is large and hardly varies: a difference of two large numbers.
        if name not in self._origins:
            self._origins[name] = rows.mean(0)
        return rows - self._origins[name]

    def _is_of_another_type(self, rows: Tensor) -> bool:
        return any(recent.dtype != rows.dtype for recent in self._recent.values())

    def _mean(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the mean, and the mean relative to the origin of the sums."""
        shifted = self._sums[name] / self.rows
        return shifted + self._origins[name].to(shifted), shifted

    def _sum(self, name: str, rows: Tensor) -> None:
        if name not in self._recent:
            self._recent[name] = rows.new_zeros(rows.shape[1])
        self._recent[name] += rows.sum(0)

    def _products(self, name: str, first: Tensor, second: Tensor) -> None:
        """Add ``first.T @ second``; if both are the same, only on and above the diagonal."""
        wide, high = first.shape[1], second.shape[1]
        if name not in self._recent:
            self._recent[name] = first.new_zeros(wide, high)
        total = self._recent[name]
        if first is not second:
            total.addmm_(first.T, second)
            return
        for start in range(0, wide, COLUMNS):
            end = min(start + COLUMNS, wide)
            total[start:end, start:].addmm_(first[:, start:end].T, second[:, start:])

    def _add_recent(self) -> None:
        """Add the latest rows' sums to the totals, in float64 on the CPU."""
        for name in list(self._recent):
            recent = self._recent.pop(name).to(device="cpu", dtype=torch.float64)
            if name in self._sums:
                self._sums[name] += recent
            else:
                self._sums[name] = recent
        self._recent_rows = 0

    def seen(self) -> tuple[int, dict[str, Tensor]]:
        """Return the number of rows, and the origins of their sums in float64 on the CPU."""
        self._add_recent()
        return self.rows, {name: o.detach().cpu().double() for name, o in self._origins.items()}

    def add_up(self, rows: int, origins: Mapping[str, Tensor]) -> None:
        """Add the sums of all processes.

        Args:
            rows: Of all processes.
            origins: From where all are to be counted; not of this process alone.
        """
        for name in origins.keys() - self._origins.keys():  # nothing ran here
            self._origins[name] = origins[name]
            self._sums[name] = torch.zeros_like(origins[name])
        kinds = [a + b for a, b in ("xx", "yx", "yy") if {a, b} <= origins.keys()]
        kinds = [kind for kind in kinds if not self.outputs_only or kind == "yy"]
        moved = {name: self._origins[name].cpu().double() - origins[name] for name in origins}
        for kind in kinds:
            first, second = moved[kind[0]], moved[kind[1]]
            total = self._sums.setdefault(kind, first.new_zeros(len(first), len(second)))
            total.addr_(first, self._sums[kind[1]]).addr_(self._sums[kind[0]], second)
            total.addr_(first, second, alpha=self.rows)
        for name in origins:
            self._sums[name] += self.rows * moved[name]
            self._origins[name] = origins[name]
        processes.add_up([self._sums[name] for name in (*sorted(origins), *kinds)])
        self.rows = rows

    def moments(self, *, weight: Tensor | None = None, bias: Tensor | None = None) -> Moments:
        """Return the centered moments. This consumes the sums: call it once.

        Args:
            weight: Shape ``(o, d)``. If no outputs were added, their moments are computed from
                those of ``x``, for ``y = weight @ x + bias``.
            bias: Shape ``(o,)``.

        Raises:
            DataError: If no rows were added: the layer never ran.
        """
        if not self.rows:
            raise DataError("Moments need at least one row, got none: the layer never ran.")
        self._add_recent()
        n = self.rows
        mean_x, near_x = self._mean("x")
        xx = None if self.outputs_only else self._centered("xx", near_x, near_x)
        if xx is not None:
            still = self._constant_values(xx, mean_x)
            xx[still] = 0
            xx[:, still] = 0
        if "y" not in self._sums:
            assert xx is not None
            assert weight is not None
            mean_y = weight @ mean_x + (0 if bias is None else bias)
            yx = weight @ xx
            return Moments(n, mean_x, mean_y, xx, yx, yx @ weight.T)
        mean_y, near_y = self._mean("y")
        yy = self._centered("yy", near_y, near_y)
        constant = self._constant_values(yy, mean_y)
        yy[constant] = 0
        yy[:, constant] = 0
        if xx is None:
            return Moments(n, mean_x, mean_y, None, None, yy)
        yx = self._centered("yx", near_y, near_x)
        yx[constant] = 0
        yx[:, still] = 0
        return Moments(n, mean_x, mean_y, xx, yx, yy)

    def _constant_values(self, square: Tensor, mean: Tensor) -> Tensor:
        """Return which values are constant: their variance is only rounding error."""
        least = (ROUNDING_UNITS * self._rounding * mean).square()
        found: Tensor = ~(square.diagonal() > least)
        return found

    def _centered(self, name: str, first: Tensor, second: Tensor) -> Tensor:
        # In place, since each such matrix takes half a gigabyte for the widest layers.
        found = self._sums.pop(name)
        if name[0] == name[1]:
            _mirror(found)
        return found.div_(self.rows).addr_(first, second, alpha=-1)


def _mirror(square: Tensor) -> None:
    """Copy the part above the diagonal to below it, in place."""
    for start in range(0, len(square), COLUMNS):
        end = start + COLUMNS
        square[end:, start:end] = square[start:end, end:].T


class LayerSum:
    """Sums the moments of each group of one layer, over a sample of its output positions.

    Args:
        module: The layer. Not modified.
        examples: Number of examples to come. If given, the positions of large maps are sampled.
        generator: Draws the positions.
        enough: How many rows a wide layer needs.
        name: Name of the layer, for errors.
    """

    def __init__(
        self,
        module: nn.Module,
        examples: int | None,
        generator: torch.Generator,
        *,
        enough: Enough = TO_FIT,
        name: str = "",
    ) -> None:
        self.module = module
        self._name = name
        self._enough = enough
        self.shape = shape_of(module)
        self._examples = examples
        self._generator = generator
        self._outputs_only = self.shape.values > MOST_VALUES
        rounding = torch.finfo(working_precision(weight_of(module)).dtype).eps
        self._sums = [
            MomentSum(outputs_only=self._outputs_only, rounding=rounding)
            for _ in range(self.shape.groups)
        ]

    @property
    def ran(self) -> bool:
        """Whether anything was added."""
        return any(total.rows for total in self._sums)

    def add(self, x: Tensor, y: Tensor, *, own: bool, part: Part | None = None) -> None:
        """Add a batch, or a part of one.

        Args:
            x: The layer's input.
            y: Its output, or the output it should have.
            own: Whether ``y`` is the layer's own output; its moments are then computed from those
                of ``x``.
            part: Which part of the batch it is, if not all of it.

        Raises:
            ModelError: If a value is NaN or infinite.
        """
        x, y = _summable(x, y, self._name)
        places = None if self._examples is None else self._places(y, part)
        if part is not None and not part.counts:
            return
        for inputs, outputs in self._parts(x, y, places):
            rows = input_rows(self.module, inputs, places=places)
            given = None
            if self._outputs_only or not own:
                given = output_rows(self.module, outputs, places=places)
            self._add_rows(rows, given)

    def _places(self, y: Tensor, part: Part | None) -> list[Tensor] | None:
        """Draw the positions; those of a part are its own among those of the batch."""
        if part is None or y.ndim < 2:
            return choose_places(self.module, y, self._wanted(y), self._generator)
        batch = part.batch_of(y)
        places = choose_places(self.module, batch, self._wanted(batch), self._generator)
        if places is None or not is_linear(self.module):
            return places
        return [part.own(places[0], output_places(self.module, y))]

    def _wanted(self, y: Tensor) -> int:
        """Return the number of positions to sample per example (per batch for a linear layer)."""
        values = self.shape.out if self._outputs_only else self.shape.values
        rows = self._enough.rows(values)
        share = len(y) if is_linear(self.module) else 1
        return -(-rows * share // max(self._examples or 1, 1))

    def _parts(
        self, x: Tensor, y: Tensor, places: list[Tensor] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Split a batch so that its unfolded patches fit into memory."""
        if is_linear(self.module) or x.ndim == len(cast("nn.Conv2d", self.module).kernel_size) + 1:
            yield x, y  # no batch to cut
            return
        count = output_places(self.module, y) if places is None else len(places[0])
        values = count * self.shape.channels * self.shape.taps
        step = max(1, PATCH_VALUES // max(values, 1))
        for start in range(0, len(x), step):
            yield x[start : start + step], y[start : start + step]

    def _add_rows(self, rows: Tensor, given: Tensor | None) -> None:
        for group, total in enumerate(self._sums):
            out = slice(group * self.shape.group_out, (group + 1) * self.shape.group_out)
            seen = slice(group * self.shape.values, (group + 1) * self.shape.values)
            total.add(rows[:, seen], None if given is None else given[:, out])

    def add_up(self) -> None:
        """Add the sums of all processes, of which each has seen its part of every batch."""
        everywhere = processes.gathered([total.seen() for total in self._sums])
        for total, *each in zip(self._sums, *everywhere, strict=True):
            seen = [(rows, origins) for rows, origins in each if rows]
            if seen:
                total.add_up(sum(rows for rows, _ in seen), seen[0][1])

    def moments(self) -> tuple[Moments, ...]:
        """Return the centered moments of each group."""
        kernel, bias = kernel_of(self.module).flatten(2), bias_of(self.module)
        found = []
        for group, total in enumerate(self._sums):
            out = slice(group * self.shape.group_out, (group + 1) * self.shape.group_out)
            offset = None if bias is None else bias[out]
            found.append(total.moments(weight=kernel[group], bias=offset))
        return tuple(found)


def _summable(x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return a layer's inputs and outputs in a type in which their squares can be summed.

    Raises:
        ModelError: If a value is NaN or infinite.
    """
    x, y = working_precision(x), working_precision(y)
    sizes = []
    for tensor, does in ((x, "is given"), (y, "gives")):
        size = largest_absolute(tensor)
        if not math.isfinite(size):
            raise ModelError(
                f"Activations must be finite, but on the calibration data the layer {name!r} "
                f"{does} NaN or infinity. Leave out examples of extreme values, or check the scale "
                "of the weights."
            )
        sizes.append(size)
    return (x, y) if all(map(is_summable, sizes)) else (x.double(), y.double())


def largest_absolute(tensor: Tensor) -> float:
    """Return the largest absolute value; NaN or infinity if there is one."""
    if not tensor.numel():
        return 0.0
    low, high = tensor.aminmax()
    return max(abs(float(low)), abs(float(high)))


def is_summable(size: float) -> bool:
    """Whether squares of values up to that size neither overflow nor vanish in float32."""
    return size == 0 or SMALLEST <= size <= LARGEST


def working_precision(tensor: Tensor) -> Tensor:
    """Return values in the precision for sums: float64 stays, everything else becomes float32."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
