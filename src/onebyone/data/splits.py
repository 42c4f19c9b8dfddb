"""Parts of a data set: examples that come in normalized, reproducible batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from onebyone.data.augment import Augmentation, augment, draw
from onebyone.errors import DataError, OneByOneError, OptionError
from onebyone.free_memory import free_bytes
from onebyone.records import DataInfo

Picture = NDArray[np.uint8]


@runtime_checkable
class Split(Protocol):
    """A part of a data set, such as its training examples.

    Attributes:
        input_shape: Shape of one input, without the batch.
        targets: The targets of all examples, or ``None`` where they are not known beforehand.
        augmentation: What ``augment=True`` does, in words.
    """

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch."""
        ...

    @property
    def targets(self) -> Tensor | None:
        """The targets of all examples, in order, or ``None`` where they are not known."""
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
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized float32 inputs with their targets.

        Args:
            batch_size: Examples a batch; the last batch has the rest.
            seed: Shuffles, and draws the augmentation; without it, examples come in order.
            augment: Whether to augment; needs a seed.
            device: Where the tensors are to lie.
            channels_last: Whether images lie in memory with their channels last.

        Yields:
            Inputs of shape ``(batch, *input_shape)`` and targets: int64 of shape ``(batch,)``
            for classes, any tensor for others, of shape ``(batch, 0)`` where there are none.
        """
        ...

    def take(self, n: int, seed: int = 0) -> Split:
        """Return ``n`` examples drawn at random, or all where there are fewer."""
        ...

    def image(self, index: int) -> Picture | None:
        """Return an input as a picture, uint8 of shape ``(height, width, 3)``.

        ``None`` where the input is no picture.
        """
        ...


class TensorSplit:
    """Examples that lie in memory; shuffled, augmented and normalized a batch at a time.

    Pixels stay uint8 until a batch is asked for, a quarter of the memory of float32. A part
    made by :meth:`take` or :meth:`part` shares its parent's memory.

    Args:
        inputs: Shape ``(n, *input_shape)``: uint8 images ``(n, channels, height, width)``, or
            floating point of any shape. Not modified.
        targets: One an example: integers for classes, any tensor for others, or ``None``.
        mean: A channel's mean, on the scale of 0…1 for uint8 images; nothing is subtracted
            where it is not given.
        std: A channel's standard deviation, on the same scale.
        augmentation: What ``augment=True`` does to an image.

    Raises:
        DataError: If there are no examples, targets of another number, values that are not
            finite, or images whose channels do not come first.
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
        _check_inputs(inputs, targets)
        self._inputs = inputs.detach()
        if inputs.dtype != torch.uint8:
            self._inputs = self._inputs.to(torch.float32)
        self._targets = None if targets is None else _plain_targets(targets.detach())
        self._rows: Tensor | None = None
        self._augment = augmentation or Augmentation()
        if self._augment and (inputs.ndim != 4 or (targets is not None and targets.ndim > 2)):
            raise OptionError(
                "Only images with a label each can be augmented: `inputs` must be of shape "
                f"(n, channels, height, width) and `targets` of one or two dimensions, got "
                f"{tuple(inputs.shape)} and {None if targets is None else tuple(targets.shape)}. "
                "Leave `augmentation` out."
            )
        self.mean, self.std = _statistics(mean, std, inputs)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch."""
        return tuple(self._inputs.shape[1:])

    @property
    def holds_pixels(self) -> bool:
        """Whether inputs are uint8 images, which :attr:`mean` and :attr:`std` normalize."""
        return self._inputs.dtype == torch.uint8

    @property
    def targets(self) -> Tensor | None:
        """The targets of all examples, in order; ``None`` where there are none."""
        if self._targets is None or self._rows is None:
            return self._targets
        return self._targets[self._rows]

    @property
    def augmentation(self) -> str:
        """What ``augment=True`` does, in words."""
        return str(self._augment)

    def __len__(self) -> int:
        return len(self._inputs if self._rows is None else self._rows)

    def __repr__(self) -> str:
        return f"TensorSplit({len(self)} × {'×'.join(map(str, self.input_shape))})"

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
        _check_batches(batch_size, seed, augment=augment)
        return self._batches(batch_size, seed, augment, torch.device(device), channels_last)

    def _batches(
        self,
        batch_size: int,
        seed: int | None,
        augmented: bool,  # noqa: FBT001
        device: torch.device,
        channels_last: bool,  # noqa: FBT001
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        if seed is not None:
            generator.manual_seed(seed)
        order = self._order(generator if seed is not None else None)
        draws = draw(self._augment, len(self), generator) if augmented and self._augment else None
        inputs, targets = self._resident(device)
        # Both at once: a copy of each batch's part would wait for the step before.
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
                self._normalized(images, channels_last=channels_last),
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
            # One copy an epoch instead of one a batch, where it leaves room for the network.
            return self._inputs.to(device), targets.to(device)
        return self._inputs, targets

    def _normalized(self, images: Tensor, *, channels_last: bool) -> Tensor:
        shape = (1, -1, *[1] * (images.ndim - 2))
        batch = images.to(torch.float32)
        if self.mean is not None and self.std is not None:
            scale = 255.0 if images.dtype == torch.uint8 else 1.0
            mean, std = torch.tensor(self.mean).view(shape), torch.tensor(self.std).view(shape)
            factor, offset = (
                each.to(batch.device, non_blocking=True) for each in (1 / (scale * std), mean / std)
            )
            # The conversion from uint8 has made a copy already; a float batch is still the user's.
            batch = batch.mul_(factor) if scale != 1 else batch * factor
            batch = batch.sub_(offset)
        elif batch is images:
            batch = batch.clone()  # a network that works in place must not write into the data
        if channels_last and batch.ndim == 4:
            # Converted while still NCHW: a change of layout of bytes is ten times slower on a CPU.
            batch = batch.contiguous(memory_format=torch.channels_last)
        return batch

    def part(self, rows: Tensor, *, augmentation: Augmentation | None = None) -> TensorSplit:
        """Return the examples at some positions; their inputs are shared, not copied.

        Args:
            rows: Positions in this part, int64 of shape ``(n,)``.
            augmentation: Another augmentation, or ``None`` for the same.
        """
        if rows.numel() == 0:
            raise DataError("A part of a data set must have at least one example, got 0 positions.")
        other = object.__new__(TensorSplit)
        other._inputs, other._targets = self._inputs, self._targets
        other._rows = rows if self._rows is None else self._rows[rows]
        other._augment = self._augment if augmentation is None else augmentation
        other.mean, other.std = self.mean, self.std
        return other

    def with_statistics(self, *, mean: Sequence[float], std: Sequence[float]) -> TensorSplit:
        """Return the same examples, normalized as another network wants them.

        Args:
            mean: A channel's mean, on the scale of 0…1 for uint8 images.
            std: A channel's standard deviation, on the same scale.
        """
        other = copy.copy(self)
        other.mean, other.std = _statistics(mean, std, self._inputs)
        return other

    def take(self, n: int, seed: int = 0) -> TensorSplit:
        """Return ``n`` examples drawn at random, or all where there are fewer."""
        _check_count(n)
        return self if n >= len(self) else self.part(_drawn(len(self), n, seed))

    def image(self, index: int) -> Picture | None:
        """Return an input as a picture, uint8 of shape ``(height, width, 3)``.

        Grey images are repeated three times; floating-point images are stretched from their own
        least to their greatest value. ``None`` where the input is no picture.
        """
        row = range(len(self))[index]
        return _picture(self._inputs[row if self._rows is None else int(self._rows[row])])


class DatasetSplit:
    """A map-style torch data set, behind a :class:`torch.utils.data.DataLoader`.

    The data set does its own normalization and augmentation.

    Args:
        dataset: Items are ``(input, target)`` or inputs alone; inputs are floating-point tensors.
        workers: Processes that load.
        collate: Makes a batch of items, as for a ``DataLoader``.

    Raises:
        DataError: If the data set has no length, is empty, or its items are not such.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                "A data set must be map-style, with `__len__` and `__getitem__`, got "
                f"{type(dataset).__name__}. Collect an iterable data set into tensors first."
            )
        self._dataset, self._workers, self._collate = dataset, workers, collate
        self._n = len(dataset)
        if self._n == 0:
            raise DataError(_EMPTY)
        with _said_of(dataset):
            batch = collate([dataset[0]])
        inputs, _ = _unpack(batch)
        self._input_shape = tuple(inputs.shape[1:])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch."""
        return self._input_shape

    @property
    def targets(self) -> Tensor | None:
        """The data set's ``targets`` where it has them as integers; else ``None``."""
        targets = getattr(self._dataset, "targets", None)
        # A transform of targets makes the stored ones something else than what batches hold.
        if targets is None or getattr(self._dataset, "target_transform", None) is not None:
            return None
        try:
            known = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError):
            return None
        return _plain_targets(known) if len(known) == len(self) else None

    @property
    def augmentation(self) -> str:
        """What ``augment=True`` does, in words."""
        return "the data set's own"

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return f"DatasetSplit({len(self)} × {'×'.join(map(str, self.input_shape))})"

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs with their targets; see :meth:`Split.batches`.

        The data set augments by its own transforms, or not at all, whatever ``augment`` says.
        """
        _check_batches(batch_size, seed, augment=augment)
        return self._batches(batch_size, seed, torch.device(device), channels_last)

    def _batches(
        self,
        batch_size: int,
        seed: int | None,
        device: torch.device,
        channels_last: bool,  # noqa: FBT001
    ) -> Iterator[tuple[Tensor, Tensor]]:
        # The loader draws its workers' seeds from this generator, not from the global one.
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        loader = DataLoader(
            self._dataset,
            batch_size=batch_size,
            shuffle=seed is not None,
            num_workers=self._workers,
            collate_fn=self._collate,
            generator=generator,
        )
        batches = iter(loader)
        while True:
            with _said_of(self._dataset):
                batch = next(batches, None)
            if batch is None:
                return
            inputs, targets = _unpack(batch)
            inputs = inputs.to(device, torch.float32, non_blocking=True)
            if channels_last and inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield inputs, _plain_targets(targets).to(device, non_blocking=True)

    def part(self, rows: Tensor) -> DatasetSplit:
        """Return the examples at some positions, int64 of shape ``(n,)``."""
        if rows.numel() == 0:
            raise DataError("A part of a data set must have at least one example, got 0 positions.")
        subset = Subset(self._dataset, rows.tolist())
        return DatasetSplit(subset, workers=self._workers, collate=self._collate)

    def take(self, n: int, seed: int = 0) -> DatasetSplit:
        """Return ``n`` examples drawn at random, or all where there are fewer."""
        _check_count(n)
        return self if n >= len(self) else self.part(_drawn(len(self), n, seed))

    def image(self, index: int) -> Picture | None:
        """Return an input as a picture, stretched to 0…255; ``None`` where it is none."""
        item = self._dataset[range(len(self))[index]]
        value = item[0] if isinstance(item, (tuple, list)) else item
        return _picture(value) if isinstance(value, Tensor) else None


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set: what to train on, what to choose by, and what to report on.

    Attributes:
        classes: Their names; empty where the targets are no classes.
        seed: Of the division into parts.
        crop: Share of a picture's shorter side that was kept when its center was cut out.

    Raises:
        DataError: If the parts' inputs differ in shape, or a label is no class.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...] = ()
    seed: int = 0
    crop: float = 1.0

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            split: Split = getattr(self, part)
            if split.input_shape != self.train.input_shape:
                raise DataError(
                    "The inputs of all parts must be of one shape: `train` has "
                    f"{self.train.input_shape}, `{part}` has {split.input_shape}. "
                    "Resize the one or the other."
                )
            if self.classes:
                _check_labels(part, split.targets, len(self.classes))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch."""
        return self.train.input_shape

    def info(self) -> DataInfo:
        """Return sizes, classes, shape and normalization as a record."""
        mean, std = _pixel_statistics(self.test)
        return DataInfo(
            name=self.name,
            train=len(self.train),
            validation=len(self.validation),
            test=len(self.test),
            classes=self.classes,
            input_shape=self.input_shape,
            seed=self.seed,
            mean=mean,
            std=std,
            crop=self.crop,
        )

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.train):,} to train, {len(self.validation):,} to choose, "
            f"{len(self.test):,} to test, {'×'.join(map(str, self.input_shape))}, "
            f"{len(self.classes) or 'no'} classes"
        )


def held_out(
    n: int, count: int, *, seed: int, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Divide ``n`` positions at random into the rest and ``count`` that are held out.

    Args:
        n: Positions in all.
        count: Positions to hold out, from 1 to ``n - 1``.
        seed: Of the draw.
        targets: Integer labels of shape ``(n,)``: every class is then held out in proportion.

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
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if targets is not None and targets.ndim == 1 and not targets.is_floating_point():
        # Each example's rank within its class, as a share, spreads every class evenly over the
        # order: cutting it anywhere takes the classes in proportion.
        labels = targets[order]
        share = torch.empty(n, dtype=torch.float64)
        for label in torch.unique(labels):
            members = (labels == label).nonzero().squeeze(1)
            ranks = torch.arange(len(members), dtype=torch.float64)
            share[members] = (ranks + 0.5) / len(members)
        order = order[share.argsort(stable=True)]
    return order[count:].sort().values, order[:count].sort().values


_EMPTY = "A data set must have at least one example, got 0. Check the path or the filter."


def _check_inputs(inputs: Tensor, targets: Tensor | None) -> None:
    if inputs.ndim < 2 or len(inputs) == 0:
        if inputs.ndim >= 1 and len(inputs) == 0:
            raise DataError(_EMPTY)
        raise DataError(
            "`inputs` must be of shape (n, …), an example a row, got shape "
            f"{tuple(inputs.shape)}. Add a dimension with `inputs[:, None]`."
        )
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise DataError(
            f"`inputs` must be uint8 or floating point, got {inputs.dtype}. Convert them first."
        )
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
            f"{tuple(inputs.shape)}. For grey images give `inputs[:, None]`."
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


def _statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, inputs: Tensor
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
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
    if min(std) <= 0:
        raise OptionError(f"`std` must be above 0 in every channel, got {std}.")
    return tuple(map(float, mean)), tuple(map(float, std))


def _pixel_statistics(
    split: Split,
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return mean and standard deviation where inputs are pixels; else their scale is not known."""
    if isinstance(split, TensorSplit) and split.holds_pixels:
        return split.mean, split.std
    return None, None


def _check_batches(batch_size: int, seed: int | None, *, augment: bool) -> None:
    if batch_size < 1:
        raise OptionError(f"`batch_size` must be at least 1, got {batch_size}.")
    if augment and seed is None:
        raise OptionError(
            "`augment=True` draws at random and needs a `seed`, got None. Give a seed, "
            "another one each epoch."
        )


def _check_count(n: int) -> None:
    if n < 1:
        raise OptionError(f"`n` must be at least 1 example, got {n}.")


def _drawn(total: int, n: int, seed: int) -> Tensor:
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n]
    return drawn.sort().values


def _check_labels(part: str, targets: Tensor | None, classes: int) -> None:
    if targets is None or targets.ndim != 1 or targets.is_floating_point():
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"The labels of `{part}` must lie in 0…{classes - 1}, one for each of the {classes} "
            f"classes, got {low}…{high}."
        )


def _plain_targets(targets: Tensor) -> Tensor:
    integer = not targets.is_floating_point() and targets.dtype != torch.bool
    return targets.to(torch.int64) if integer and targets.ndim == 1 else targets


@contextmanager
def _said_of(dataset: Dataset[Any]) -> Iterator[None]:
    """Say of what a data set raises that it was the data set, and what may mend it."""
    try:
        yield
    except OneByOneError:
        raise
    except Exception as error:  # a user's code may raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Of what was raised in a loading process the last line is the error itself.
        reason = lines[-1] if lines else type(error).__name__
        cure = "Mend it, or leave the example out."
        if "stack expects each tensor to be equal size" in reason:
            cure = "Resize all inputs to one shape, by torchvision's Resize and CenterCrop."
        elif "default_collate" in reason:
            cure = "Add a transform such as torchvision's ToTensor and Normalize."
        while isinstance(dataset, Subset):  # which we may have made ourselves
            dataset = dataset.dataset
        raise DataError(
            f"The data set {type(dataset).__name__} must give examples that can be put together "
            f"to a batch, and failed: {reason.rstrip('.')}. {cure}"
        ) from error


def _unpack(batch: Any) -> tuple[Tensor, Tensor]:
    pair = batch if isinstance(batch, (tuple, list)) else (batch,)
    inputs = pair[0] if pair else None
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        came = f"a tensor of {inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs)
        raise DataError(
            f"The items of a data set must be (input, target) with a floating-point input, got "
            f"{came}. Add a transform such as torchvision's ToTensor and Normalize."
        )
    if len(pair) == 1:
        return inputs, torch.empty(len(inputs), 0)
    targets = pair[1]
    if len(pair) > 2 or not isinstance(targets, Tensor):
        raise DataError(
            "The items of a data set must be (input, target), got "
            f"{len(pair)} parts of which the second is {type(targets).__name__}. "
            "Wrap the data set so that it gives a pair of tensors or numbers."
        )
    return inputs, targets


def _picture(value: Tensor) -> Picture | None:
    if value.ndim != 3 or value.shape[0] not in {1, 3}:
        return None
    if value.dtype != torch.uint8:
        low, high = value.min(), value.max()
        span = (high - low).clamp_min(torch.finfo(value.dtype).tiny)
        value = ((value - low) / span * 255).round().to(torch.uint8)
    picture: Picture = value.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return picture
