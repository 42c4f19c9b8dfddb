"""Checks of what a user gives a split: inputs, labels, statistics, sizes of batches and parts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from onebyone.core.errors import DataError, OptionError
from onebyone.core.randomness import generator_of

EMPTY = "A data set must have at least one example, got 0. Check the path or the filter."
_INPUT_TYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_values(inputs: Tensor) -> None:
    """Check that inputs have values, in a supported type."""
    if 0 in inputs.shape[1:]:
        raise DataError(
            f"Each input must have at least one value, got inputs of shape {tuple(inputs.shape)}."
        )
    if inputs.layout != torch.strided or inputs.device.type == "meta":
        raise DataError(
            f"`inputs` must be a dense tensor with values, got {inputs.layout} on {inputs.device}. "
            "Give `inputs.to_dense()`."
        )
    if inputs.dtype not in _INPUT_TYPES:
        raise DataError(
            f"`inputs` must be uint8 or floating point (16 to 64 bits), got {inputs.dtype}. "
            "Convert them first, as by `inputs.float()`."
        )


def check_inputs(inputs: Tensor, targets: Tensor | None) -> None:
    """Check the inputs and targets of a split in memory."""
    if inputs.ndim < 2 or len(inputs) == 0:
        if inputs.ndim >= 1 and len(inputs) == 0:
            raise DataError(EMPTY)
        raise DataError(
            "`inputs` must be of shape (n, …), one example per row, got shape "
            f"{tuple(inputs.shape)}. Add a dimension with `inputs[:, None]`."
        )
    _check_values(inputs)
    if inputs.dtype == torch.uint8 and inputs.ndim == 4:
        channels_first = inputs.shape[1] <= 4 or inputs.shape[3] > 4
        if not channels_first:
            raise DataError(
                "Images must be of shape (n, channels, height, width), got "
                f"{tuple(inputs.shape)}, whose channels come last. "
                "Give `inputs.permute(0, 3, 1, 2)`."
            )
    elif inputs.dtype == torch.uint8:
        raise DataError(
            "uint8 images must be of shape (n, channels, height, width), got "
            f"{tuple(inputs.shape)}. For gray images give `inputs[:, None]`."
        )
    elif not bool(torch.isfinite(inputs.detach()).all()):
        bad = int((~torch.isfinite(inputs.detach().flatten(1)).all(1)).nonzero()[0])
        raise DataError(f"`inputs` must be finite, got NaN or infinity in example {bad}.")
    if targets is not None and (targets.ndim == 0 or len(targets) != len(inputs)):
        count = len(targets) if targets.ndim else 1
        raise DataError(
            f"There must be a target for each input, got {count:,} targets for "
            f"{len(inputs):,} inputs."
        )


def checked_statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, inputs: Tensor
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and standard deviation of each channel; 0 and 1 for pixels by default."""
    if mean is None and std is None:
        if inputs.dtype != torch.uint8:
            return None, None
        return (0.0,) * inputs.shape[1], (1.0,) * inputs.shape[1]
    channels = inputs.shape[1]
    if mean is None or std is None or not len(mean) == len(std) == channels:
        raise OptionError(
            f"`mean` and `std` must have a value for each of the {channels} channels, "
            f"got {mean} and {std}."
        )
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise OptionError(
            f"`mean` must be finite and `std` above 0 in every channel, got {mean} and {std}."
        )
    return tuple(map(float, mean)), tuple(map(float, std))


def check_batches(batch_size: int, seed: int | None, *, augment: bool) -> None:
    """Check the arguments of :meth:`Split.batches`."""
    if batch_size < 1:
        raise OptionError(f"`batch_size` must be at least 1, got {batch_size}.")
    if seed is not None:
        generator_of(seed)
    if augment and seed is None:
        raise OptionError(
            "`augment=True` draws at random and needs a `seed`, got None. Give a seed "
            "that changes each epoch."
        )


def check_count(n: int) -> None:
    """Check the number of examples to take."""
    if n < 1:
        raise OptionError(f"`n` must be at least 1 example, got {n}.")


def check_labels(part: str, targets: Tensor | None, classes: int, ignore_index: int | None) -> None:
    """Check that every label of a part is one of the classes."""
    if targets is None or targets.ndim != 1 or targets.is_floating_point():
        return
    targets = targets if ignore_index is None else targets[targets != ignore_index]
    if not len(targets):
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"The labels of `{part}` must lie in 0…{classes - 1}, one for each of the {classes} "
            f"classes, got {low}…{high}. If a number marks no class, give it as "
            "`ignore_index`."
        )
