"""Wraps a user's torch data set: reproducible batches, and errors that name the bad item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from onebyone.core.errors import DataError, OneByOneError
from onebyone.core.memory import free_bytes
from onebyone.core.randomness import generator_of
from onebyone.core.read_files import printable, reason_of
from onebyone.core.records import InputSpec
from onebyone.core.tensor_trees import (
    Inputs,
    batch_size,
    concatenated,
    has_batch,
    map_tensors,
    spec_of,
    tensors_in,
)
from onebyone.core.units import format_bytes, plural
from onebyone.core.user_code import place_of
from onebyone.data.dataset_items import (
    FIX,
    RESIZE,
    TRANSFORM,
    Collated,
    Failed,
    Items,
    form_of,
    root_of,
)
from onebyone.data.split_checks import EMPTY, check_batches, check_count
from onebyone.data.splits import (
    Mine,
    Picture,
    Split,
    TensorSplit,
    as_picture,
    drawn_rows,
    on_device,
    plain_targets,
    rows_of_part,
)
from onebyone.data.streams import PictureSplit
from onebyone.data.tables import is_table, known_labels
from onebyone.data.trees import TreeSplit

# Number of items to read twice, to see whether they are the same. An item that changes with
# probability 1/2 is missed in one of 256 data sets.
PROBED = 8
# Share of the free memory for keeping items that change when read again.
MEMORY_SHARE = 0.5
_EXPECTED = "The items of a data set must be (input, target) with a floating-point input"
MAP_STYLE = (
    "Collect an iterable data set into tensors first, or give WebDataset's shards as "
    "`onebyone.Shards`."
)
_LABELS = ("labels", "label", "targets", "target")


class DatasetSplit:
    """A map-style torch data set, read through a :class:`torch.utils.data.DataLoader`.

    The data set does its own normalization and augmentation. Before each item, the global
    generators of torch, numpy and Python are seeded by the item's index, and restored afterwards.
    So an item is the same example each time, in any order and process, unless ``augment`` is set.

    Args:
        dataset: Items are ``(inputs, target)`` or only inputs; inputs are a floating-point tensor,
            a tuple of positional arguments, or a mapping of keyword arguments. An item may also be
            one mapping: then ``labels``, ``label``, ``targets`` or ``target`` is its target.
        workers: Number of loading processes.
        collate: Makes a batch of items, as for a ``DataLoader``.

    Raises:
        DataError: If the data set has no length, is empty, or has items of another form.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self._dataset, self._workers, self._collate = dataset, workers, collate
        self._rows: Tensor | None = None
        self._spec: InputSpec | None = None
        self._repeats: list[bool] = []  # shared with the parts; empty until known
        self._n = _length(dataset)
        self._form = form_of(self._items(None).__getitems__([0]).items[0])
        inputs, targets = self._read([0], seed=None)
        self._spec = spec_of(inputs)
        self._targets = _known_targets(dataset, self._n)
        if self._targets is not None and not _same_target(self._targets[0], targets):
            self._targets = None  # the items have other targets

    @property
    def inputs(self) -> InputSpec:
        """What a batch of one example gives a network."""
        assert self._spec is not None
        return self._spec

    @property
    def targets(self) -> Tensor | None:
        """The data set's ``targets`` if it has them as numbers; else ``None``."""
        if self._targets is None or self._rows is None:
            return self._targets
        return self._targets[self._rows]

    @property
    def augmentation(self) -> str:
        """What ``augment=True`` does, in words."""
        return "the data set's own"

    @property
    def shares(self) -> bool:
        """Whether a process can load its share of a batch alone: a collate may mix examples."""
        return self._collate is default_collate

    @property
    def loading(self) -> str:
        """How examples are loaded, in words."""
        workers = plural(self._workers, "worker") if self._workers else "no worker (`num_workers`)"
        return f"loaded as they are used, by {workers}"

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        return f"DatasetSplit({len(self)} × {self.inputs.example_text()})"

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        mine: Mine | None = None,
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield inputs with their targets; see :meth:`Split.batches`.

        The data set's own transforms do the augmentation, if any. With ``augment`` their draws
        depend on the seed; otherwise they are always the same. With ``mine``, only these examples
        of each batch are loaded and given.
        """
        check_batches(batch_size, seed, augment=augment)
        # Without this generator the loader would draw its workers' seeds from the global one.
        generator = generator_of(0 if seed is None else seed)
        order = list(range(self._n))
        if seed is not None:
            order = torch.randperm(self._n, generator=generator).tolist()
        groups = [order[start : start + batch_size] for start in range(0, self._n, batch_size)]
        if mine is not None:
            groups = [[group[place] for place in mine(len(group))] for group in groups]
        where = torch.device(device)
        loaded = self._loaded(groups, seed if augment else None, generator)
        return (
            (
                map_tensors(partial(on_device, device=where, channels_last=channels_last), inputs),
                plain_targets(targets).to(where, non_blocking=True),
            )
            for inputs, targets in loaded
        )

    def _loaded(
        self, groups: list[list[int]], drawn: int | None, generator: torch.Generator
    ) -> Iterator[tuple[Inputs, Tensor]]:
        loader = DataLoader(
            self._items(drawn),
            batch_sampler=groups,
            num_workers=self._workers,
            collate_fn=Collated(self._collate, self._form),  # type: ignore[arg-type]
            generator=generator,
        )
        batches = iter(loader)
        for positions in groups:
            with self._loading():
                batch = next(batches)
            yield self._checked(batch, positions)

    def _items(self, seed: int | None) -> Items:
        rows = None if self._rows is None else self._rows.tolist()
        return Items(self._dataset, rows, 0 if seed is None else seed)

    def _read(self, positions: list[int], *, seed: int | None) -> tuple[Inputs, Tensor]:
        """Read some examples in this process."""
        items = self._items(seed).__getitems__(positions)
        return self._checked(Collated(self._collate, self._form)(items), positions)

    def _checked(self, batch: Any, positions: list[int]) -> tuple[Inputs, Tensor]:
        """Return a batch's inputs and targets, or raise an error that names the bad example."""
        name = self.name
        if isinstance(batch, Failed):
            at = self._at(self._row(positions[batch.place])) if batch.place is not None else ""
            raise DataError(
                f"The data set {name} must give examples that can be collated into a batch, but "
                f"failed{at}: {batch.reason}. {batch.cure}"
            ) from batch.error
        inputs, targets = _unpack(batch)
        count = batch_size(inputs)
        if count != len(positions) or targets.ndim == 0 or len(targets) != count:
            raise DataError(
                f"The data set {name} must give an input and a target for each of "
                f"{len(positions)} items, got {count} inputs and "
                f"{len(targets) if targets.ndim else 1} targets. Give each item one target, and "
                "a `collate_fn` that leaves none out."
            )
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors_in(inputs)]
        if any(0 in shape for shape in shapes):
            raise DataError(f"{_EXPECTED} of at least one value, got inputs of shape {shapes[0]}.")
        found = spec_of(inputs)
        if self._spec is not None and not found.same_examples(self._spec):
            raise DataError(
                f"All inputs of the data set {name} must be of one shape, got "
                f"{_shape_of(found)}{self._at(self._row(positions[0]))} and "
                f"{_shape_of(self._spec)} before. {RESIZE}"
            )
        for tensor in tensors_in(inputs):
            # A sum is fast, and not finite if a value is not; it may also overflow.
            if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                finite = torch.isfinite(tensor).reshape(len(tensor), -1).all(1)
                bad = int((~finite).nonzero()[0]) if has_batch(tensor, count) else 0
                raise DataError(
                    f"The inputs of the data set {name} must be finite, got NaN or infinity"
                    f"{self._at(self._row(positions[bad]))}. {FIX}"
                )
        return inputs, targets

    @property
    def name(self) -> str:
        """The name of the data set's class."""
        return type(root_of(self._dataset, 0)[0]).__name__

    def _row(self, position: int) -> int:
        """Return the index of an example in the user's original data set."""
        row = position if self._rows is None else int(self._rows[position])
        return root_of(self._dataset, row)[1]

    @staticmethod
    def _at(row: int) -> str:
        return f" at index {row}"

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Convert errors of the loader's processes into one that says what to do."""
        try:
            yield
        except OneByOneError:
            raise
        except Exception as error:
            raise DataError(
                f"The {self._workers} processes that load the data set {self.name} must give its "
                f"examples, and failed: {_last_line(error)}. Give a loader with `num_workers=0`, "
                "or fewer; its processes may have run out of memory, and all that the data set "
                "holds must be picklable."
            ) from error

    def part(self, rows: Tensor) -> DatasetSplit:
        """Return the examples at some positions, int64 of shape ``(n,)``."""
        other = object.__new__(DatasetSplit)
        other.__dict__.update(self.__dict__)
        other._rows = rows_of_part(self._rows, rows)
        other._n = len(rows)
        return other

    def take(self, n: int, seed: int = 0) -> DatasetSplit:
        """Return ``n`` examples drawn at random, or all if there are fewer."""
        check_count(n)
        return self if n >= len(self) else self.part(drawn_rows(len(self), n, seed))

    def image(self, index: int) -> Picture | None:
        """Return an input as a picture, scaled to 0…255; ``None`` if it is not a picture."""
        inputs, _ = self._read([range(len(self))[index]], seed=None)
        pictures = (as_picture(tensor[0]) for tensor in tensors_in(inputs) if tensor.ndim)
        return next((picture for picture in pictures if picture is not None), None)

    def repeats(self) -> bool:
        """Whether items are the same when read again; tries :data:`PROBED` of them."""
        if not self._repeats:
            count = min(PROBED, self._n)
            places = np.linspace(0, self._n - 1, count).astype(int).tolist()
            first = [self._read([place], seed=None)[0] for place in places]
            again = [self._read([place], seed=None)[0] for place in places]
            both = zip(tensors_in(first), tensors_in(again), strict=True)
            self._repeats.append(all(torch.equal(*pair) for pair in both))
        return self._repeats[0]


def repeatable(split: Split) -> Split:
    """Return a split whose examples are the same each time they are read.

    Streamed pictures are decoded into memory if they fit, since they will be read again and again.
    A data set may use its own random generator, which cannot be seeded from outside. Its items
    are then read once and kept in memory.

    Args:
        split: Returned unchanged if its items are the same each time.

    Raises:
        DataError: If they are not, and do not fit into memory.
    """
    if isinstance(split, PictureSplit) and split.fits_memory():
        return split.in_memory()
    if not isinstance(split, DatasetSplit) or split.repeats():
        return split
    needed, free = len(split) * split.inputs.values * 4, free_bytes()
    if free is not None and needed > MEMORY_SHARE * free:
        raise DataError(
            "The items of calibration data must be the same each time they are read, but those of "
            f"{split.name} are not. To keep them all takes {format_bytes(needed)}, more than "
            f"{MEMORY_SHARE:.0%} of the {format_bytes(free)} that are free. Leave random "
            "transforms out, draw them from torch's, numpy's or Python's global generators, or "
            "give fewer."
        )
    batches = list(split.batches(64))
    inputs = concatenated([each for each, _ in batches])
    targets: Tensor | None = torch.cat([each for _, each in batches])
    if targets is not None and targets.ndim == 2 and not targets.shape[1]:
        targets = None
    return (
        TensorSplit(inputs, targets) if isinstance(inputs, Tensor) else TreeSplit(inputs, targets)
    )


def _last_line(error: Exception) -> str:
    # In an error from a loading process, the last line is the original error.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[-1].rstrip(".")) if lines else type(error).__name__


def _length(dataset: Any) -> int:
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not sized:
        raise DataError(
            "A data set must be map-style, with `__len__` and `__getitem__`, got "
            f"{type(dataset).__name__}. {MAP_STYLE}"
        )
    try:
        n = len(dataset)
    except Exception as error:  # a user's code may raise anything
        told = ", ".join(filter(None, [type(error).__name__, place_of(error)]))
        raise DataError(
            f"The data set {type(dataset).__name__} must have a length, but its `__len__` failed: "
            f"{reason_of(error)} ({told}). Fix the data set."
        ) from error
    if n == 0:
        raise DataError(EMPTY)
    return n


def _known_targets(dataset: Any, n: int) -> Tensor | None:
    """Return the targets that a data set stores, if it stores one for each item."""
    if type(dataset) is Subset:
        known = _known_targets(dataset.dataset, _length(dataset.dataset))
        return None if known is None else known[torch.as_tensor(dataset.indices)]
    targets = getattr(dataset, "targets", None)
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        targets = dataset.tensors[1]
    if is_table(dataset):
        targets = known_labels(dataset)
    # With a target transform, the stored targets differ from those in batches.
    transformed = any(
        getattr(dataset, name, None) is not None for name in ("target_transform", "transforms")
    )
    if targets is None or (transformed and not _standard(dataset)):
        return None
    try:
        known = torch.as_tensor(targets)
    except Exception:  # noqa: BLE001  # not convertible to a tensor
        return None
    return plain_targets(known) if known.ndim and len(known) == n else None


def _standard(dataset: Any) -> bool:
    """Whether ``transforms`` is torchvision's wrapper of a transform of inputs only."""
    return (
        getattr(dataset, "target_transform", None) is None
        and type(getattr(dataset, "transforms", None)).__name__ == "StandardTransform"
    )


def _same_target(known: Tensor, found: Tensor) -> bool:
    target = plain_targets(found)[0] if found.ndim and len(found) else found
    if target.shape != known.shape:
        return False
    return bool((target.double() - known.double()).abs().max() < 1e-6) if known.numel() else True


def _unpack(batch: Any) -> tuple[Inputs, Tensor]:
    pair: Sequence[Any] = batch if isinstance(batch, (tuple, list)) else (batch,)
    if isinstance(batch, Mapping):
        named = dict(batch)
        labels = [named.pop(key) for key in _LABELS if key in named]
        pair = (named, *labels[:1])
    inputs = _plain_inputs(pair[0] if pair else None)
    if len(pair) == 1:
        return inputs, torch.empty(batch_size(inputs), 0)
    targets = pair[1]
    if len(pair) > 2 or not isinstance(targets, Tensor):
        raise DataError(
            "The items of a data set must be (input, target), got "
            f"{len(pair)} parts of which the second is {type(targets).__name__}. "
            f"{_target_advice(targets)}"
        )
    return inputs, targets


def _plain_inputs(value: Any) -> Inputs:
    """Return the inputs of a batch: a tensor, positional arguments, or keyword arguments.

    Raises:
        DataError: If they are none of these, or have no tensor.
    """
    if isinstance(value, (Mapping, tuple, list)) and any(True for _ in tensors_in(value)):
        # Torch's collate makes lists of tuples.
        inputs: Any = dict(value) if isinstance(value, Mapping) else tuple(value)
        if isinstance(inputs, tuple) and len(inputs) == 1 and isinstance(inputs[0], Tensor):
            return inputs[0]
        return inputs  # type: ignore[no-any-return]
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        raise DataError(f"{_EXPECTED}, got {_described(value)}. {_advice(value)}")
    return value


def _shape_of(spec: InputSpec) -> str:
    return str(spec.tensors[0].sample) if spec.is_single else spec.example_text()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}" if value.ndim > 1 else "numbers"
    if isinstance(value, dict):
        return f"a dictionary with {', '.join(map(repr, list(value)[:6]))}"
    return str(type(value))


def _advice(value: Any) -> str:
    if isinstance(value, dict):
        return "Wrap the data set so that it gives a pair of tensors."
    return TRANSFORM


def _target_advice(targets: Any) -> str:
    if isinstance(targets, (tuple, list)) and targets and isinstance(targets[0], str):
        return "Number the classes from 0, and give the numbers in place of their names."
    return "Wrap the data set so that it gives a pair of tensors or numbers."
