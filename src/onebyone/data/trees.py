"""Examples in memory for networks of several inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from onebyone.core.errors import DataError
from onebyone.core.randomness import generator_of
from onebyone.core.records import InputSpec
from onebyone.core.tensor_trees import (
    Inputs,
    batch_size,
    first_examples,
    has_batch,
    lists_pictures,
    map_tensors,
    spec_of,
    tensors_in,
)
from onebyone.data.split_checks import EMPTY, check_batches, check_count
from onebyone.data.splits import (
    Picture,
    as_picture,
    drawn_rows,
    on_device,
    plain_targets,
    rows_of_part,
)


class TreeSplit:
    """Examples in memory: several tensors with the examples in front.

    Args:
        inputs: A tuple of positional arguments or a mapping of keyword arguments. Tensors whose
            first size is the number of examples are divided into batches; all else is given to
            each call. Not modified.
        targets: One per example, or ``None``.

    Raises:
        DataError: If there are no examples, the number of targets differs, or values are not
            finite.
        NetworkInputError: If the inputs have no tensor, or values that no record can hold.
    """

    def __init__(self, inputs: Inputs, targets: Tensor | None = None) -> None:
        self._inputs: Any = map_tensors(_plain, inputs)
        self._n = batch_size(inputs)
        self._lists_pictures = lists_pictures(inputs)
        self._targets = None if targets is None else plain_targets(targets.detach())
        self._rows: Tensor | None = None
        self._spec = spec_of(first_examples(self._inputs, 1))
        if targets is not None and (targets.ndim == 0 or len(targets) != self._n):
            count = len(targets) if targets.ndim else 1
            raise DataError(
                f"There must be a target for each input, got {count:,} targets for "
                f"{self._n:,} inputs."
            )
        for tensor, spec in zip(tensors_in(self._inputs), self._spec.tensors, strict=True):
            if not bool(torch.isfinite(tensor).all()):
                raise DataError(f"Inputs must be finite, got NaN or infinity in {spec.name!r}.")
        if any(has_batch(tensor, 0) for tensor in tensors_in(inputs)):
            raise DataError(EMPTY)

    @property
    def inputs(self) -> InputSpec:
        """What a batch of one example gives a network."""
        return self._spec

    @property
    def targets(self) -> Tensor | None:
        """The targets of all examples, in order; ``None`` if there are none."""
        if self._targets is None or self._rows is None:
            return self._targets
        return self._targets[self._rows]

    @property
    def augmentation(self) -> str:
        """What ``augment=True`` does, in words."""
        return "none"

    def stored(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return the stored tensors, and the rows that belong to this part (``None``: all).

        They are shared, not copied, so do not modify them.
        """
        return tuple(tensors_in(self._inputs)), self._rows

    def __len__(self) -> int:
        return self._n if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        return f"TreeSplit({len(self)} × ({self.inputs.example_text()}))"

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield inputs with their targets; see :meth:`Split.batches`.

        Raises:
            DataError: If the inputs are a list of single pictures, which only go together.
        """
        check_batches(batch_size, seed, augment=augment)
        mixed = seed is not None and self._targets is not None
        if self._lists_pictures and (batch_size < self._n or self._rows is not None or mixed):
            raise DataError(
                f"Examples in memory must be tensors with the examples in front to be divided into "
                f"batches, got a list of {self._n} pictures. Stack them, or give a data set whose "
                "items are single examples."
            )
        return self._batches(batch_size, seed, torch.device(device), channels_last)

    def _batches(
        self,
        batch_size: int,
        seed: int | None,
        device: torch.device,
        channels_last: bool,  # noqa: FBT001
    ) -> Iterator[tuple[Inputs, Tensor]]:
        rows = torch.arange(self._n) if self._rows is None else self._rows
        if seed is not None:
            rows = rows[torch.randperm(len(rows), generator=generator_of(seed))]
        targets = torch.empty(self._n, 0) if self._targets is None else self._targets
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            inputs = map_tensors(
                lambda each: self._part(each, chosen, device, channels_last=channels_last),  # noqa: B023
                self._inputs,
            )
            yield inputs, targets[chosen].to(device)

    def _part(
        self, tensor: Tensor, rows: Tensor, device: torch.device, *, channels_last: bool
    ) -> Tensor:
        # Indexing copies; a network may write into its inputs.
        part = tensor[rows] if has_batch(tensor, self._n) else tensor.clone()
        return on_device(part, device, channels_last=channels_last)

    def part(self, rows: Tensor) -> TreeSplit:
        """Return the examples at some positions, int64 of shape ``(n,)``; nothing is copied."""
        other = object.__new__(TreeSplit)
        other.__dict__.update(self.__dict__)
        other._rows = rows_of_part(self._rows, rows)
        return other

    def take(self, n: int, seed: int = 0) -> TreeSplit:
        """Return ``n`` examples drawn at random, or all if there are fewer."""
        check_count(n)
        return self if n >= len(self) else self.part(drawn_rows(len(self), n, seed))

    def image(self, index: int) -> Picture | None:
        """Return the first picture among an example's inputs; ``None`` if there is none."""
        row = range(len(self))[index]
        row = row if self._rows is None else int(self._rows[row])
        tensors = (each for each in tensors_in(self._inputs) if has_batch(each, self._n))
        pictures = (as_picture(tensor[row]) for tensor in tensors)
        return next((picture for picture in pictures if picture is not None), None)


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.is_floating_point() else tensor
