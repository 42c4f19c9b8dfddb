"""Exponential moving average of a network's weights (EMA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """A running average of a network's parameters and buffers, updated after each step.

    The decay starts lower, at ``(1 + n) / (10 + n)`` after ``n`` updates, so that the first weights
    are soon forgotten. Buffers of integers are not averaged: their last values count.

    Not torch's ``AveragedModel``: it copies the network, with the hooks that a distillation places.

    Args:
        network: The network. Only :meth:`in_place` changes it, for a while.
        decay: Share of the average that an update keeps.

    References:
        Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the rise of
        the decay as in TensorFlow's ``ExponentialMovingAverage``.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._count = 0
        self._current = [*network.parameters(), *network.buffers()]
        self._average = [tensor.detach().clone() for tensor in self._current]
        floats = [tensor.is_floating_point() for tensor in self._current]
        self._floats = [place for place, is_float in enumerate(floats) if is_float]
        self._others = [place for place, is_float in enumerate(floats) if not is_float]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network's weights."""
        self._count += 1
        decay = min(self.decay, (1 + self._count) / (10 + self._count))
        if self._floats:
            average = [self._average[place] for place in self._floats]
            current = [self._current[place].detach() for place in self._floats]
            torch._foreach_lerp_(average, current, 1 - decay)
        for place in self._others:
            self._average[place].copy_(self._current[place])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network have the average inside the block."""
        own = [tensor.detach().clone() for tensor in self._current]
        self._write(self._average)
        try:
            yield
        finally:
            self._write(own)

    def put_in(self) -> None:
        """Give the network the average for good."""
        self._write(self._average)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._current, values, strict=True):
            tensor.copy_(value)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs to keep."""
        return {"count": self._count, "average": self._average}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned."""
        self._count = int(state["count"])
        for mine, kept in zip(self._average, state["average"], strict=True):
            mine.copy_(kept)
