"""Training steps captured as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from onebyone.core.errors import ModelError, first_line
from onebyone.core.tensor_trees import Inputs, map_tensors, tensors_in

STEPS_BEFORE_CAPTURE = 3
TakeStep = Callable[[Inputs, Tensor, int], Tensor]  # (inputs, targets, examples) -> loss


class CapturedStep:
    """Takes training steps on a GPU: runs the first ones normally, then replays a CUDA graph.

    A step of a small network has about a thousand kernels of a few microseconds. Launching them one
    by one takes longer than running them; a graph is launched as one. Batches of another shape,
    and steps that wait for the GPU, run normally.
    """

    def __init__(self, take: TakeStep, device: torch.device) -> None:
        self._take, self._device = take, device
        self._ahead = STEPS_BEFORE_CAPTURE
        self._waits = False  # whether a step waits for the GPU: it cannot be captured
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Inputs = torch.empty(0)
        self._targets = self._loss = torch.empty(0)

    def __call__(self, inputs: Inputs, targets: Tensor, examples: int) -> Tensor:
        """Take a step and return its loss, which is valid until the next step."""
        with torch.cuda.device(self._device):
            if self._ahead > 0:
                self._ahead -= 1
                return self._beside(inputs, targets, examples)
            if self._graph is None and not self._waits:
                self._capture(inputs, targets, examples)
            given, kept = (
                [*tensors_in(each)] for each in ((inputs, targets), (self._inputs, self._targets))
            )
            alike = [each.shape for each in given] == [each.shape for each in kept]
            if self._graph is None or not alike:
                return self._take(inputs, targets, examples)
            for old, new in zip(kept, given, strict=True):
                old.copy_(new)
            self._graph.replay()
            return self._loss

    def _beside(self, inputs: Inputs, targets: Tensor, examples: int) -> Tensor:
        # Warm up on another stream: libraries allocate in their first calls, which a graph must
        # not contain.
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream), _waits_noted() as waits:
            loss = self._take(inputs, targets, examples)
        self._waits = self._waits or any(waits)
        current.wait_stream(stream)
        return loss

    def _capture(self, inputs: Inputs, targets: Tensor, examples: int) -> None:
        self._inputs, self._targets = map_tensors(Tensor.clone, inputs), targets.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._loss = self._take(self._inputs, self._targets, examples)
        except (
            RuntimeError,
            ModelError,
        ) as error:  # it leaves torch's generators and allocator unusable
            raise ModelError(
                f"A training step could not be captured as a CUDA graph: {first_line(error)}. "
                "Start a new process and give `capture=False`."
            ) from error
        self._graph = graph


@contextmanager
def _waits_noted() -> Iterator[list[bool]]:
    """Record whether the block waits for a GPU; pass other warnings on."""
    before = torch.cuda.get_sync_debug_mode()
    waits: list[bool] = []
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
            waits += ["synchronizing CUDA operation" in str(each.message) for each in noted]
    for each, wait in zip(noted, waits, strict=True):
        if not wait:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
