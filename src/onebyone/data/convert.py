"""What users hold already, tensors, torch data sets and loaders, as splits and data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from onebyone.data.splits import Data, DatasetSplit, Split, TensorSplit, held_out
from onebyone.errors import DataError

_ACCEPTED = (
    "a tensor of inputs, a pair (inputs, targets) of tensors or arrays, a map-style torch "
    "Dataset, a DataLoader, a Split or a Data"
)


def as_split(examples: Any) -> Split:
    """Return examples of any usual kind as a split.

    Args:
        examples: A tensor or array of inputs (calibration data, no targets), a pair
            ``(inputs, targets)`` of them, a map-style torch ``Dataset``, a ``DataLoader`` (its
            batch size is not kept), a ``Split``, or a ``Data``, of which the training part is
            taken. Not modified; tensors are shared, not copied.

    Raises:
        DataError: If it is none of these, or does not fit together.
    """
    if isinstance(examples, Data):
        return examples.train
    if isinstance(examples, Split):
        return examples
    if isinstance(examples, (Tensor, np.ndarray)):
        return TensorSplit(_tensor(examples))
    if _is_pair(examples):
        return TensorSplit(*map(_tensor, examples))
    return _from_torch(examples)


def _from_torch(examples: Any) -> Split:
    if isinstance(examples, TensorDataset) and len(examples.tensors) <= 2:
        return TensorSplit(*examples.tensors)
    if isinstance(examples, DataLoader):
        return _from_loader(examples)
    if isinstance(examples, Dataset) or (
        hasattr(examples, "__getitem__")
        and hasattr(examples, "__len__")
        and not isinstance(examples, (tuple, list, dict, str, bytes))
    ):
        return DatasetSplit(examples)
    raise DataError(f"Examples must be {_ACCEPTED}, got {_describe(examples)}.")


def as_data(
    source: Any, *, name: str = "data", classes: tuple[str, ...] | None = None, seed: int = 0
) -> Data:
    """Return a data set of any usual kind as :class:`Data`.

    Args:
        source: A ``Data``; a triple (train, validation, test) or a pair (train, test) of what
            :func:`as_split` takes; or one of those alone. Where there is no validation or test
            part, a tenth of the training examples is held out for it.
        name: What to call it.
        classes: Names of the classes; taken from integer labels where not given.
        seed: Of the division.

    Raises:
        DataError: If it is none of these, is empty, or does not fit together.
    """
    if isinstance(source, Data):
        return source
    if isinstance(source, (tuple, list)) and not _is_pair(source):
        if len(source) not in {2, 3}:
            raise DataError(
                "Data must be (train, validation, test) or (train, test), got "
                f"{len(source)} parts. Each part must be {_ACCEPTED}."
            )
        parts = [as_split(part) for part in source]
        train, test = parts[0], parts[-1]
        if len(parts) == 3:
            validation = parts[1]
        else:
            train, validation = _held_out(train, max(1, len(train) // 10), seed)
    else:
        whole = as_split(source)
        tenth = max(1, len(whole) // 10)
        rest, test = _held_out(whole, tenth, seed)
        train, validation = _held_out(rest, tenth, seed)
    return Data(
        name=name,
        train=train,
        validation=validation,
        test=test,
        classes=_class_names(train, validation, test) if classes is None else classes,
        seed=seed,
    )


def _held_out(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    part = getattr(split, "part", None)
    if part is None:
        raise DataError(
            f"A {type(split).__name__} cannot be divided: it has no `part(rows)`. "
            "Give (train, validation, test)."
        )
    rest, held = held_out(len(split), count, seed=seed, targets=split.targets)
    return part(rest), part(held)


def _class_names(*splits: Split) -> tuple[str, ...]:
    highest = -1
    for split in splits:
        targets = split.targets
        if targets is None or targets.ndim != 1 or targets.is_floating_point():
            return ()
        highest = max(highest, int(targets.max()))
    return tuple(str(label) for label in range(highest + 1))


def _from_loader(loader: DataLoader[Any]) -> Split:
    dataset, sampler = loader.dataset, loader.sampler
    if isinstance(sampler, SubsetRandomSampler):
        dataset = Subset(dataset, list(sampler.indices))
    elif not isinstance(sampler, (SequentialSampler, RandomSampler)):
        raise DataError(
            "A DataLoader must draw from a map-style data set in order or at random, got the "
            f"sampler {type(sampler).__name__}. Give its data set instead."
        )
    collate = loader.collate_fn
    return DatasetSplit(dataset, workers=loader.num_workers, collate=collate)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(part, (Tensor, np.ndarray)) for part in value)
    )


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise DataError(f"Arrays must hold numbers, got an array of {array.dtype}.")
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        array = array.astype(np.int64)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch refuses the one and warns of the other
    return torch.from_numpy(array)


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        inner = ", ".join(type(part).__name__ for part in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({inner})"
    return f"a {type(value).__name__}"
