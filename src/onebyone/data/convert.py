"""Converts tensors, torch data sets and loaders to :class:`Split` and :class:`Data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from onebyone.core.errors import DataError
from onebyone.data import tables
from onebyone.data.datasets import MAP_STYLE, DatasetSplit
from onebyone.data.listed import PARTS
from onebyone.data.picture_data import all_pictures
from onebyone.data.splits import Data, Split, TensorSplit, held_out
from onebyone.data.trees import TreeSplit

MOST_CLASSES = 1_000_000  # each class gets a name

_ACCEPTED = (
    "a tensor of inputs, a pair (inputs, targets) of tensors or arrays, a map-style torch "
    "Dataset, a DataLoader, a Split or a Data"
)
_STREAM = (
    "A data set of Hugging Face must have random access, so that a seed gives the same batches, "
    "got a streamed one. Write it by `save_to_disk`, and give what `load_from_disk` returns."
)


def as_split(examples: Any) -> Split:
    """Return examples in any usual form as a split.

    Args:
        examples: A tensor or array of inputs (calibration data, no targets), or a mapping of
            keyword arguments to them; a pair ``(inputs, targets)``, whose inputs may also be a
            tuple of positional arguments; a map-style torch ``Dataset``, a ``DataLoader`` (its
            batch size is not kept), a data set of Hugging Face, a ``Split``, or a ``Data`` (of
            several parts the training part is used). Not modified; tensors are shared, not copied.

    Raises:
        DataError: If it is none of these, or its parts do not fit together.
    """
    if isinstance(examples, Data):
        return examples.train
    if isinstance(examples, Split):
        return examples
    if tables.is_stream(examples):
        raise DataError(_STREAM)
    if tables.is_table(examples):
        return _from_table(examples)
    return _in_memory(examples) or _from_torch(examples)


def _from_table(table: Any) -> Split:
    """Return a data set of Hugging Face as a split: its pictures, or what its transform makes."""
    one = tables.tables_of(table)["train"]
    if not tables.holds_pictures(one):
        return DatasetSplit(one)
    listed, labelled = tables.listed_table(one)
    return all_pictures(listed, labelled=labelled)


def _in_memory(examples: Any) -> Split | None:
    """Return tensors and arrays as a split; ``None`` for other things."""
    if isinstance(examples, (Tensor, np.ndarray)):
        return TensorSplit(_tensor(examples))
    if _is_pair(examples):
        return TensorSplit(*map(_tensor, examples))
    if isinstance(examples, Mapping):
        return TreeSplit(_arrays(examples))
    if _is_tree_and_targets(examples):
        inputs, targets = examples
        return TreeSplit(_arrays(inputs), _tensor(targets))
    return None


def _from_torch(examples: Any) -> Split:
    if isinstance(examples, TensorDataset) and len(examples.tensors) <= 2:
        return TensorSplit(*examples.tensors)
    if isinstance(examples, DataLoader):
        return _from_loader(examples)
    if isinstance(examples, Dataset) or (
        not isinstance(examples, type)
        and hasattr(examples, "__getitem__")
        and hasattr(examples, "__len__")
        and not isinstance(examples, (tuple, list, dict, str, bytes))
    ):
        return DatasetSplit(examples)
    raise DataError(f"Examples must be {_ACCEPTED}, got {_describe(examples)}.")


def as_data(
    source: Any,
    *,
    name: str = "data",
    classes: tuple[str, ...] | None = None,
    seed: int = 0,
    ignore_index: int | None = None,
) -> Data:
    """Return a data set in any usual form as :class:`Data`.

    Args:
        source: A ``Data``; a triple (train, validation, test) or a pair (train, test), each part
            in a form that :func:`as_split` accepts; or a single such part. For each missing
            part, validation or test, a tenth of the training examples is held out. A data set of
            Hugging Face may be a ``DatasetDict``.
        name: Name of the data set.
        classes: Names of the classes; default: the integer labels.
        seed: Random seed of the division.
        ignore_index: A label that every count and loss ignores.

    Raises:
        DataError: If it is none of these, is empty, or its parts do not fit together.
    """
    if isinstance(source, Data):
        return source
    if tables.is_table(source):
        of = tables.tables_of(source)
        if all(map(tables.holds_pictures, of.values())):
            made = tables.data_of_tables(of, {}, name=name, seed=seed)
            named = made.classes if classes is None else classes
            return replace(made, classes=named, ignore_index=ignore_index)
        source = tuple(of[part] for part in PARTS if part in of) if len(of) > 1 else of["train"]
    one = _is_pair(source) or _is_one_tree(source)
    if isinstance(source, (tuple, list)) and not one:
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
        if len(whole) < 3:
            raise DataError(
                "Data must have at least 3 examples to be divided, one for each part, got "
                f"{len(whole)}. Give more, or (train, validation, test)."
            )
        tenth = max(1, len(whole) // 10)
        rest, test = _held_out(whole, tenth, seed)
        train, validation = _held_out(rest, tenth, seed)
    return Data(
        name=name,
        train=train,
        validation=validation,
        test=test,
        classes=(
            _class_names(train, validation, test, ignore_index=ignore_index)
            if classes is None
            else classes
        ),
        seed=seed,
        ignore_index=ignore_index,
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


def _class_names(*splits: Split, ignore_index: int | None) -> tuple[str, ...]:
    highest = -1
    for split in splits:
        targets = split.targets
        if targets is None or targets.ndim != 1 or targets.dtype != torch.int64:
            return ()
        targets = targets if ignore_index is None else targets[targets != ignore_index]
        if not len(targets):
            continue
        highest = max(highest, int(targets.max()))
    if highest >= MOST_CLASSES:
        raise DataError(
            f"Integer labels must be classes numbered from 0, at most {MOST_CLASSES:,} of them, "
            f"got {highest}. Renumber the classes, or give targets that are not classes as "
            "floats."
        )
    return tuple(str(label) for label in range(highest + 1))


def _from_loader(loader: DataLoader[Any]) -> Split:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        raise DataError(
            "A DataLoader must draw from a map-style data set, with `__len__` and `__getitem__`, "
            f"got {type(dataset).__name__}. {MAP_STYLE}"
        )
    if loader.batch_sampler is None:
        raise DataError(
            "A DataLoader must make batches of single examples, got one with `batch_size=None`, "
            "where each item is a batch. Give a data set whose items are single examples."
        )
    # A custom batch sampler may leave examples out.
    sampler = loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
    if isinstance(sampler, SubsetRandomSampler):
        dataset = Subset(dataset, list(sampler.indices))
    elif not _draws_all(sampler, dataset):
        raise DataError(
            "A DataLoader must draw each example of a map-style data set once, in order or at "
            f"random, got the sampler {type(sampler).__name__}. Give its data set instead."
        )
    collate = loader.collate_fn
    if collate is default_collate and isinstance(dataset, TensorDataset):
        return _from_torch(dataset)
    return DatasetSplit(dataset, workers=loader.num_workers, collate=collate)


def _draws_all(sampler: Any, dataset: Any) -> bool:
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(dataset)
    return isinstance(sampler, SequentialSampler)


def _is_tree_and_targets(value: Any) -> bool:
    """Whether this is a pair of a mapping or a tuple of inputs, and their targets."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], (Mapping, tuple))
        and isinstance(value[1], (Tensor, np.ndarray))
        and bool(value[0])
    )


def _is_one_tree(value: Any) -> bool:
    """Whether this is one part of data, not ``(train, test)``."""
    if not _is_tree_and_targets(value):
        return False
    inputs, targets = value
    if not _is_pair(inputs):
        return True
    # ((a, b), c) is two parts, of which the second has no targets, if `c` is of the shape of `a`.
    return bool(targets.ndim < 2 or targets.shape[1:] != inputs[0].shape[1:])


def _arrays(inputs: Any) -> Any:
    """Return nested inputs with NumPy's arrays as tensors."""
    if isinstance(inputs, np.ndarray):
        return _tensor(inputs)
    if isinstance(inputs, Mapping):
        return {key: _arrays(value) for key, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(map(_arrays, inputs))
    return inputs


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(part, (Tensor, np.ndarray)) for part in value)
    )


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise DataError("Arrays must have all their values, got a masked array. Fill it first.")
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"Arrays must hold numbers, got an array of {array.dtype}. Give classes as numbers "
            "from 0, and inputs as one array of one shape."
        )
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise DataError(f"Arrays of {array.dtype} must fit into int64. Convert them first.")
        array = array.astype(np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)  # the widest type in torch
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch rejects negative strides and warns about read-only arrays
    return torch.from_numpy(array)


def _describe(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}: give an instance of it"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(type(part).__name__ for part in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({inner})"
    return f"a {type(value).__name__}"
