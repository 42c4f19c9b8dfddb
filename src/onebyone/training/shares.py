"""Divides the batch of a step into parts, and each part among the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onebyone.core import processes


@dataclass(frozen=True)
class Part:
    """What this process computes at once.

    Attributes:
        start: Its first example in the batch.
        stop: The example after its last one.
        share: Its share of the step's loss.
        divided: Whether other processes compute other examples of the same part.
    """

    start: int
    stop: int
    share: float
    divided: bool

    def __len__(self) -> int:
        return self.stop - self.start


def parts_of(examples: int, accumulate: int) -> list[Part]:
    """Return the parts of a batch in order.

    Args:
        examples: Number of examples in the batch.
        accumulate: In how many parts its gradients are computed, if it has enough examples.
    """
    # Parts of one example have no variance for batch norms.
    count = max(1, min(accumulate, examples // 2))
    size, larger = divmod(examples, count)
    parts, start = [], 0
    for place in range(count):
        length = size + (place < larger)
        parts.append(_mine(start, length, examples))
        start += length
    return parts


def _mine(start: int, length: int, examples: int) -> Part:
    """Return what this process computes of a part."""
    count, share = processes.count(), length / examples
    if length < count:  # too few to divide: all processes compute all of it
        return Part(start, start + length, share / count, divided=False)
    mine = processes.share(length)
    share *= (mine.stop - mine.start) / length
    return Part(start + mine.start, start + mine.stop, share, divided=count > 1)


def mine_of(examples: int, accumulate: int) -> list[int]:
    """Return the places in a batch of all that this process computes of it."""
    parts = parts_of(examples, accumulate)
    return [place for part in parts for place in range(part.start, part.stop)]


def packed(parts: Sequence[Part]) -> list[Part]:
    """Return the parts as they lie in a batch that holds only what this process computes."""
    moved, start = [], 0
    for part in parts:
        moved.append(Part(start, start + len(part), part.share, part.divided))
        start += len(part)
    return moved
