"""Decodes batches of pictures by several threads, the next ones while one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from onebyone.core.cores import usable_cores
from onebyone.core.torchrun import processes_here
from onebyone.data.pictures import Pictures, Pixels, read_picture, read_pictures

# Batches that are decoded while one is used, or more if they are small.
AHEAD = 2
# Threads by default. Each holds Python's global lock for a twentieth of its time, so that more
# than this many would wait for one another.
MOST_WORKERS = 16

_Begun = tuple[Tensor, list[Future[None]]]


@dataclass(frozen=True)
class Decoder:
    """Decodes pictures, and scales and crops them to a size.

    Attributes:
        pictures: Where they are.
        size: Height and width in pixels.
        crop: Share of the scaled picture's shorter side that the crop keeps.
        workers: Number of threads.
    """

    pictures: Pictures
    size: int
    crop: float
    workers: int

    def batches(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield batches of pictures, uint8 of shape ``(n, 3, size, size)``.

        Args:
            batches: The rows of each batch, int64 of shape ``(n,)``.

        Raises:
            DataError: If a picture cannot be read; names it.
        """
        waiting: deque[_Begun] = deque()
        pool = ThreadPoolExecutor(self.workers, "onebyone-decode")
        try:
            for rows in batches:
                waiting.append(self._begin(rows.tolist(), pool))
                if len(waiting) > max(AHEAD, 2 * self.workers // max(1, len(rows))):
                    yield _finished(waiting.popleft())
            while waiting:
                yield _finished(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(self, rows: list[int], pool: ThreadPoolExecutor) -> _Begun:
        images = self._empty(len(rows))
        pixels = images.permute(0, 2, 3, 1).numpy()
        # Jobs of several pictures cost less, but the last one must not be waited for alone.
        step = max(1, len(rows) // (4 * self.workers))
        jobs = [
            pool.submit(self._read, rows[start : start + step], pixels[start : start + step])
            for start in range(0, len(rows), step)
        ]
        return images, jobs

    def _read(self, rows: list[int], into: Pixels) -> None:
        for row, place in zip(rows, into, strict=True):
            size = self.size, self.size
            read_picture(self.pictures, row, size, crop=self.crop, into=place)

    def all(self, rows: Tensor) -> Tensor:
        """Return pictures as one tensor.

        Raises:
            DataError: If pictures cannot be read; names the first few.
        """
        images, size = self._empty(len(rows)), (self.size, self.size)
        into = images.permute(0, 2, 3, 1).numpy()
        read_pictures(self.pictures, rows.tolist(), size, crop=self.crop, into=into)
        return images

    def _empty(self, n: int) -> Tensor:
        return torch.empty(n, 3, self.size, self.size, dtype=torch.uint8)


def _finished(begun: _Begun) -> Tensor:
    images, jobs = begun
    for job in jobs:
        job.result()
    return images


def default_workers() -> int:
    """Return how many threads decode by default: as many as processors, less one that trains."""
    return max(1, min(MOST_WORKERS, usable_cores() // processes_here() - 1))
