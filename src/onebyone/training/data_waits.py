"""Measures how long a training waits for its batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class DataWaits:
    """Adds up how long a training waits for each next batch.

    On a GPU this is the time in which the GPU has nothing to do between two steps: while it still
    computes, waiting costs nothing.

    Args:
        device: Where the network is trained.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waits: list[tuple[Any, Any]] = []

    def of(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and measure the waiting for each."""
        waiting = iter(batches)
        while True:
            start = self._mark()
            try:
                batch = next(waiting)
            except StopIteration:
                return
            self._waits.append((start, self._mark()))
            yield batch

    def seconds(self) -> float:
        """Return the time waited so far."""
        if self._device.type != "cuda":
            return float(sum(end - start for start, end in self._waits))
        torch.cuda.synchronize(self._device)
        return float(sum(start.elapsed_time(end) for start, end in self._waits)) / 1000

    def _mark(self) -> Any:
        """Return this moment; on a GPU an event behind all that it still has to compute."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
