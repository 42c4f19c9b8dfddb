"""Data sets and their parts (splits), which yield normalized, reproducible batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebyone.core.errors import DataError, OptionError
from onebyone.core.memory import free_bytes
from onebyone.core.randomness import generator_of
from onebyone.core.records import DataInfo, InputSpec
from onebyone.core.task import Task, find_task
from onebyone.core.tensor_trees import Inputs
from onebyone.data.augment import Augmentation, augment, draw
from onebyone.data.split_checks import (
    check_batches,
    check_count,
    check_inputs,
    check_labels,
    checked_statistics,
)

Picture = NDArray[np.uint8]
Mine = Callable[[int], Sequence[int]]
"""Takes the number of examples in a batch; returns the places of those that are loaded."""


@runtime_checkable
class Split(Protocol):
    """A part of a data set, such as its training examples.

    Attributes:
        inputs: What a batch of one example gives a network.
        targets: The targets of all examples, or ``None`` if they are not known in advance.
        augmentation: What ``augment=True`` does, in words.
    """

    @property
    def inputs(self) -> InputSpec:
        """What a batch of one example gives a network."""
        ...

    @property
    def targets(self) -> Tensor | None:
        """The targets of all examples, in order, or ``None`` if they are not known in advance."""
        ...

    @property
    def augmentation(self) -> str:
        """What ``augment=True`` does, in words."""
        ...

    def __len__(self) -> int: ...

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield normalized float32 inputs with their targets.

        Args:
            batch_size: Examples per batch; the last batch has the rest.
            seed: Random seed for shuffling and augmentation; without it, examples come in order.
            augment: Whether to augment; needs a seed.
            device: Device of the tensors.
            channels_last: Whether images are in channels-last layout.

        Yields:
            Inputs, a tensor ``(batch, …)`` or what else the network is called with, and targets:
            int64 of shape ``(batch,)`` for classes, any tensor for others, and shape ``(batch, 0)``
            without targets.
        """
        ...

    def take(self, n: int, seed: int = 0) -> Split:
        """Return ``n`` examples drawn at random, or all if there are fewer."""
        ...

    def image(self, index: int) -> Picture | None:
        """Return an input as a picture, uint8 of shape ``(height, width, 3)``.

        ``None`` if the input is not a picture.
        """
        ...


def tensor_batches(
    split: Split,
    batch_size: int,
    *,
    stage: str,
    seed: int | None = None,
    augment: bool = False,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the batches of a split whose inputs are one tensor; see :meth:`Split.batches`.

    Args:
        split: The examples.
        batch_size: As for :meth:`Split.batches`, as are all that follow but the stage.
        stage: What takes them, for the message.
        seed: Random seed.
        augment: Whether to augment.
        device: Device of the tensors.
        channels_last: Whether images are in channels-last layout.

    Raises:
        NetworkInputError: If its inputs are several tensors, or values beside a tensor.
    """
    split.inputs.single(stage)
    how: Any = {"seed": seed, "augment": augment, "channels_last": channels_last}
    batches: Any = split.batches(batch_size, device=device, **how)
    typed: Iterator[tuple[Tensor, Tensor]] = batches
    return typed


class TensorSplit:
    """Examples in memory; shuffled, augmented and normalized batch by batch.

    Pixels stay uint8 until a batch is made, which takes a quarter of float32's memory. A part
    from :meth:`take` or :meth:`part` shares its parent's memory.

    Args:
        inputs: Shape ``(n, …)``: uint8 images ``(n, channels, height, width)``, or
            floating point of any shape. Not modified.
        targets: One per example: integers for classes, any tensor for others, or ``None``.
        mean: Mean of each channel, on the scale of 0…1 for uint8 images. Give it with ``std``.
        std: Standard deviation of each channel, on the same scale.
        augmentation: What ``augment=True`` does to an image.

    Raises:
        DataError: If there are no examples, the number of targets differs, values are not
            finite, or the channels of images do not come first.
        OptionError: If the mean, the standard deviation or the augmentation does not fit.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        check_inputs(inputs, targets)
        self._inputs = inputs.detach()
        if inputs.dtype != torch.uint8:
            self._inputs = self._inputs.to(torch.float32)
        self._targets = None if targets is None else plain_targets(targets.detach())
        self._rows: Tensor | None = None
        self._augment = augmentation or Augmentation()
        if self._augment and (inputs.ndim != 4 or (targets is not None and targets.ndim > 2)):
            raise OptionError(
                "Only images with a label each can be augmented: `inputs` must be of shape "
                f"(n, channels, height, width) and `targets` of one or two dimensions, got "
                f"{tuple(inputs.shape)} and {None if targets is None else tuple(targets.shape)}. "
                "Leave `augmentation` out."
            )
        self.mean, self.std = checked_statistics(mean, std, inputs)

    @property
    def inputs(self) -> InputSpec:
        """What a batch of one example gives a network."""
        return InputSpec.of_shape((1, *self._inputs.shape[1:]))

    @property
    def holds_pixels(self) -> bool:
        """Whether inputs are uint8 images, which :attr:`mean` and :attr:`std` normalize."""
        return self._inputs.dtype == torch.uint8

    @property
    def targets(self) -> Tensor | None:
        """The targets of all examples, in order; ``None`` if there are none."""
        if self._targets is None or self._rows is None:
            return self._targets
        return self._targets[self._rows]

    @property
    def augmentation(self) -> str:
        """What ``augment=True`` does, in words."""
        return str(self._augment)

    def __len__(self) -> int:
        return len(self._inputs if self._rows is None else self._rows)

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """Return the stored inputs, and the rows that belong to this part (``None``: all).

        They are shared, not copied, so do not modify them.
        """
        return self._inputs, self._rows

    def __repr__(self) -> str:
        return f"TensorSplit({len(self)} × {self.inputs.example_text()})"

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized float32 inputs with their targets; see :meth:`Split.batches`."""
        check_batches(batch_size, seed, augment=augment)
        return self._batches(batch_size, seed, augment, torch.device(device), channels_last)

    def _batches(
        self,
        batch_size: int,
        seed: int | None,
        augmented: bool,  # noqa: FBT001
        device: torch.device,
        channels_last: bool,  # noqa: FBT001
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = generator_of(0 if seed is None else seed)
        order = self._order(generator if seed is not None else None)
        draws = draw(self._augment, len(self), generator) if augmented and self._augment else None
        inputs, targets = self._resident(device)
        # Moved as a whole: a copy for each batch would wait for the step before.
        order = None if order is None else order.to(inputs.device)
        draws = None if draws is None else draws.to(device)
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            if order is None:
                images, labels = inputs[start:stop], targets[start:stop]
            else:
                rows = order[start:stop]
                images, labels = inputs.index_select(0, rows), targets.index_select(0, rows)
            images = images.to(device, non_blocking=True)
            if draws is not None:
                images = augment(images, self._augment, draws.part(start, stop))
            yield (
                normalized(images, self.mean, self.std, channels_last=channels_last),
                labels.to(device, non_blocking=True),
            )

    def _order(self, generator: torch.Generator | None) -> Tensor | None:
        if generator is None:
            return self._rows
        shuffled = torch.randperm(len(self), generator=generator)
        return shuffled if self._rows is None else self._rows[shuffled]

    def _resident(self, device: torch.device) -> tuple[Tensor, Tensor]:
        targets = self._targets
        if targets is None:
            targets = torch.empty(len(self._inputs), 0)
        free = free_bytes(str(device)) if device.type == "cuda" else None
        if free is not None and self._inputs.nbytes < free // 4:
            # One copy per epoch instead of one per batch, if that leaves room for the network.
            return self._inputs.to(device), targets.to(device)
        return self._inputs, targets

    def part(self, rows: Tensor, *, augmentation: Augmentation | None = None) -> TensorSplit:
        """Return the examples at some positions; their inputs are shared, not copied.

        Args:
            rows: Positions in this part, int64 of shape ``(n,)``.
            augmentation: Another augmentation, or ``None`` for the same.
        """
        other = object.__new__(TensorSplit)
        other._inputs, other._targets = self._inputs, self._targets
        other._rows = rows_of_part(self._rows, rows)
        other._augment = self._augment if augmentation is None else augmentation
        other.mean, other.std = self.mean, self.std
        return other

    def with_statistics(self, *, mean: Sequence[float], std: Sequence[float]) -> TensorSplit:
        """Return the same examples with another normalization.

        Args:
            mean: Mean of each channel, on the scale of 0…1 for uint8 images.
            std: Standard deviation of each channel, on the same scale.
        """
        other = copy.copy(self)
        other.mean, other.std = checked_statistics(mean, std, self._inputs)
        return other

    def take(self, n: int, seed: int = 0) -> TensorSplit:
        """Return ``n`` examples drawn at random, or all if there are fewer."""
        check_count(n)
        return self if n >= len(self) else self.part(drawn_rows(len(self), n, seed))

    def image(self, index: int) -> Picture | None:
        """Return an input as a picture, uint8 of shape ``(height, width, 3)``.

        A gray image is repeated for the three colors. Floating-point images are scaled from their
        smallest to their largest value. ``None`` if the input is not a picture.
        """
        row = range(len(self))[index]
        return as_picture(self._inputs[row if self._rows is None else int(self._rows[row])])


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set with its training, validation and test parts.

    Attributes:
        name: Name of the data set.
        train: Examples to train on.
        validation: Examples for choosing between networks or settings.
        test: Examples for reporting results.
        classes: Names of the classes; empty if the targets are not classes.
        seed: Random seed of the division into parts.
        crop: Share of a picture's shorter side that the center crop kept.
        task: What a network's outputs mean: the name of a task, or a task of your own; by default
            inferred from the targets, if certain.
        ignore_index: A label that every count and loss ignores, such as 255 or -1.

    Raises:
        DataError: If the parts' inputs differ in shape, or a label is not a class.
        UnknownNameError: If there is no such task.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...] = ()
    seed: int = 0
    crop: float = 1.0
    task: str | Task | None = None
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if self.task is not None:
            find_task(self.task)
        for part in ("train", "validation", "test"):
            split: Split = getattr(self, part)
            if not split.inputs.same_examples(self.train.inputs):
                raise DataError(
                    "The inputs of all parts must be of one shape: `train` has "
                    f"{self.train.inputs.example_text()}, `{part}` has "
                    f"{split.inputs.example_text()}. "
                    "Resize one of them."
                )
            if self.classes:
                check_labels(part, split.targets, len(self.classes), self.ignore_index)

    @property
    def inputs(self) -> InputSpec:
        """What a batch of one example gives a network."""
        return self.train.inputs

    def info(self) -> DataInfo:
        """Return sizes, classes, shape and normalization as a record."""
        mean, std = _pixel_statistics(self.test)
        return DataInfo(
            name=self.name,
            train=len(self.train),
            validation=len(self.validation),
            test=len(self.test),
            classes=self.classes,
            inputs=self.inputs,
            seed=self.seed,
            mean=mean,
            std=std,
            crop=self.crop,
        )

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.train):,} to train, {len(self.validation):,} to choose, "
            f"{len(self.test):,} to test, {self.inputs.example_text()}, "
            f"{len(self.classes) or 'no'} classes"
            + (f", {loading}" if (loading := getattr(self.train, "loading", None)) else "")
        )


def held_out(
    n: int, count: int, *, seed: int, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Divide ``n`` positions at random into ``count`` held-out ones and the rest.

    Args:
        n: Number of positions.
        count: Number of positions to hold out, from 1 to ``n - 1``.
        seed: Random seed.
        targets: Integer labels of shape ``(n,)``; each class is then held out in proportion.

    Returns:
        The rest and the held-out positions, each int64 and ascending.

    Raises:
        DataError: If there are too few examples.
    """
    if not 0 < count < n:
        raise DataError(
            f"{n} examples cannot be divided into a part of {count} and a rest: "
            "both must have at least one. Give more data."
        )
    order = torch.randperm(n, generator=generator_of(seed))
    if targets is not None and targets.ndim == 1 and not targets.is_floating_point():
        # Sort by each example's rank within its class, as a share. This spreads every class evenly
        # over the order, so a cut anywhere takes the classes in proportion.
        labels = targets[order]
        share = torch.empty(n, dtype=torch.float64)
        for label in torch.unique(labels):
            members = (labels == label).nonzero().squeeze(1)
            ranks = torch.arange(len(members), dtype=torch.float64)
            share[members] = (ranks + 0.5) / len(members)
        order = order[share.argsort(stable=True)]
    return order[count:].sort().values, order[:count].sort().values


def _pixel_statistics(
    split: Split,
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and standard deviation if inputs are pixels; otherwise their scale is unknown."""
    if getattr(split, "holds_pixels", False):
        return split.mean, split.std  # type: ignore[attr-defined]
    return None, None


def drawn_rows(total: int, n: int, seed: int) -> Tensor:
    """Return ``n`` random positions in a data set, in ascending order."""
    drawn = torch.randperm(total, generator=generator_of(seed))[:n]
    return drawn.sort().values


def rows_of_part(known: Tensor | None, chosen: Tensor) -> Tensor:
    """Return the rows of a part of a part.

    Args:
        known: Rows of the part that is divided; ``None`` for all, in order.
        chosen: Positions in it, int64 of shape ``(n,)``.

    Raises:
        DataError: If none is chosen.
    """
    if chosen.numel() == 0:
        raise DataError("A part of a data set must have at least one example, got 0 positions.")
    return chosen if known is None else known[chosen]


def on_device(tensor: Tensor, device: torch.device, *, channels_last: bool) -> Tensor:
    """Return a tensor of a batch on a device, floating-point ones as float32."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    tensor = tensor.to(device, dtype, non_blocking=True)
    if channels_last and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def plain_targets(targets: Tensor) -> Tensor:
    """Convert class numbers of any integer type to int64; return other targets unchanged."""
    integer = not targets.is_floating_point() and targets.dtype != torch.bool
    return targets.to(torch.int64) if integer and targets.ndim == 1 else targets


def normalized(
    images: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    channels_last: bool,
) -> Tensor:
    """Return a batch as float32, normalized where its statistics are given.

    Args:
        images: Shape ``(batch, channels, …)``. Not modified.
        mean: Mean of each channel, on the scale of 0…1 for uint8 images.
        std: Standard deviation of each channel, on the same scale.
        channels_last: Whether images are in channels-last layout.
    """
    shape = (1, -1, *[1] * (images.ndim - 2))
    batch = images.to(torch.float32)
    if mean is not None and std is not None:
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        means, deviations = torch.tensor(mean).view(shape), torch.tensor(std).view(shape)
        factor, offset = (
            each.to(batch.device, non_blocking=True)
            for each in (1 / (scale * deviations), means / deviations)
        )
        # Converting uint8 has made a copy; a float batch may still be the user's tensor.
        batch = batch.mul_(factor) if scale != 1 else batch * factor
        batch = batch.sub_(offset)
    elif batch is images:
        batch = batch.clone()  # an in-place network must not modify the data
    if channels_last and batch.ndim == 4:
        # After converting to float: changing the layout of bytes is 10× slower on a CPU.
        batch = batch.contiguous(memory_format=torch.channels_last)
    return batch


def as_picture(value: Tensor) -> Picture | None:
    """Return an input ``(channels, height, width)`` as a picture, or ``None`` if it is not one."""
    if value.ndim != 3 or value.shape[0] not in {1, 3}:
        return None
    if value.dtype != torch.uint8:
        value = value if value.is_floating_point() else value.float()
        low, high = value.min(), value.max()
        span = (high - low).clamp_min(torch.finfo(value.dtype).tiny)
        value = ((value - low) / span * 255).round().to(torch.uint8)
    picture: Picture = value.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return picture
