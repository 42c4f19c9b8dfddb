"""Hashes of the content of data sets."""

from __future__ import annotations

import torch

from onebyone.core.identity import Digest
from onebyone.core.tensor_trees import tensors_in
from onebyone.data.splits import Data, Split, TensorSplit
from onebyone.data.streams import PictureSplit
from onebyone.data.trees import TreeSplit

# Inputs in memory up to this many bytes are hashed in full, in a second or two. Of larger ones, and
# of inputs that must be loaded, only this many examples of each part are hashed, always the same
# ones.
WHOLE_BYTES = 2_000_000_000
SAMPLED = 128


def hash_data(data: Data) -> str:
    """Return the SHA-256 of a data set: classes, all labels known in advance, and inputs.

    Tensors in memory are hashed in full up to 2 GB. Otherwise 128 examples of each part are read
    twice; values that differ between the two readings, due to random transforms, are left out.
    """
    digest = Digest()
    digest.text(repr((data.classes, data.seed, data.crop)))
    seen: set[int] = set()
    for part in (data.train, data.validation, data.test):
        _add_split(digest, part, seen)
    return digest.hexadecimal()


def hash_split(split: Split) -> str:
    """Return the SHA-256 of one part of a data set; see :func:`hash_data`."""
    digest = Digest()
    _add_split(digest, split, set())
    return digest.hexadecimal()


def _add_split(digest: Digest, split: Split, seen: set[int]) -> None:
    digest.text(f"{len(split)} {split.inputs} {split.augmentation}")
    targets = split.targets
    if targets is not None:
        digest.tensor("targets", targets)
    if isinstance(split, PictureSplit):
        _add_pictures(digest, split, seen)
        return
    if not isinstance(split, TensorSplit | TreeSplit):
        _add_sample(digest, split)
        return
    if isinstance(split, TensorSplit):
        digest.text(f"{split.mean} {split.std}")
    inputs, rows = split.stored()
    if rows is not None:
        digest.tensor("rows", rows)
    for tensor in tensors_in(inputs):
        if tensor.data_ptr() in seen:  # parts of one data set share their memory
            continue
        seen.add(tensor.data_ptr())
        whole = tensor.nbytes <= WHOLE_BYTES or not tensor.ndim
        digest.tensor("inputs", tensor if whole else tensor[:: max(1, len(tensor) // SAMPLED)])


def _add_pictures(digest: Digest, split: PictureSplit, seen: set[int]) -> None:
    """Add pictures as :func:`_add_split` does the same ones in memory."""
    digest.text(f"{split.mean} {split.std}")
    listed, rows = split.stored()
    if rows is not None:
        digest.tensor("rows", rows)
    if id(listed) in seen:
        return
    seen.add(id(listed))
    whole = len(listed) * split.inputs.values <= WHOLE_BYTES
    read = torch.arange(len(listed))[:: 1 if whole else max(1, len(listed) // SAMPLED)]
    shape = (len(read), *split.inputs.tensors[0].sample)
    digest.blocks("inputs", torch.uint8, shape, split.decoded(read))


def _add_sample(digest: Digest, split: Split) -> None:
    drawn = split.take(SAMPLED, 0)
    readings = [list(drawn.batches(SAMPLED)) for _ in range(2)]
    for first, second in zip(*readings, strict=True):
        pairs = zip(tensors_in(first), tensors_in(second), strict=True)
        for place, (one, other) in enumerate(pairs):
            if torch.equal(one, other):
                digest.tensor(f"tensor {place}", one)
