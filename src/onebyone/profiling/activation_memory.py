"""Activation memory of one forward pass, from the lifetimes of its tensors."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from onebyone.core.tensor_trees import Inputs, fresh, tensors_in
from onebyone.networks.held import to_run_beside
from onebyone.networks.surgery import run


@dataclass
class _Life:
    """A storage: its size, the step that first wrote it, and the step that last read it.

    Attributes:
        reference: Keeps the storage's address from being reused.
    """

    nbytes: int
    born: int
    last: int | None
    reference: StorageWeakRef = field(repr=False)


class _Lifetimes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and records when each storage is written and read."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.lives: dict[int, _Life] = {}
        self.step = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        output = func(*args, **(kwargs or {}))
        self.step += 1
        for tensor in tensors_in((args, kwargs or {})):
            life = self.lives.get(_address(tensor))
            if life is not None:
                life.last = self.step
        for tensor in tensors_in(output):
            self.note(tensor, tensor.untyped_storage().nbytes())
        return output

    def note(self, tensor: Tensor, nbytes: int) -> None:
        """Record a tensor written in this step, unless its storage is known or a weight's."""
        address = _address(tensor)
        if address not in self.weights and address not in self.lives:
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self.lives[address] = _Life(nbytes, self.step, None, reference)

    def peak(self) -> int:
        """Return the largest number of bytes alive in one step."""
        change: dict[int, int] = defaultdict(int)
        for life in self.lives.values():
            if life.last is not None:  # unread tensors, such as pooling indices, do not count
                change[life.born] += life.nbytes
                change[life.last + 1] -= life.nbytes
        alive = most = 0
        for step in sorted(change):
            alive += change[step]
            most = max(most, alive)
        return most


def peak_activation_bytes(model: nn.Module, inputs: Inputs) -> int:
    """Return the peak number of activation bytes alive at once in a forward pass.

    A tensor is alive from the operation that writes it to the last one that reads it, in the order
    in which the network runs. The input is alive from the start, the output until the end. Views
    and in-place operations share their tensor's memory. Weights, buffers and workspace of kernels
    do not count: every runtime that keeps this order and fuses nothing needs this much.

    Args:
        model: Not modified; a copy in evaluation mode is run.
        inputs: A tensor ``(batch, …)``, a tuple of arguments, or keyword arguments.

    Raises:
        ModelError: If the network cannot be copied or run on these inputs.

    Examples:
        >>> import torch
        >>> chain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> peak_activation_bytes(chain, torch.zeros(1, 3, 5, 7))  # 4 bytes × (8 + 8) × 5 × 7
        2240
    """
    network = to_run_beside(model, inputs)
    weights = {_address(tensor) for tensor in (*network.parameters(), *network.buffers())}
    lifetimes = _Lifetimes(weights)
    inputs = fresh(inputs)
    for tensor in tensors_in(inputs):
        # A slice counts with its own bytes, not with those of the whole batch it is cut from.
        lifetimes.note(tensor, min(tensor.nbytes, tensor.untyped_storage().nbytes()))
    with lifetimes:
        output = run(network, inputs, given_away=True)
    for tensor in tensors_in(output):
        life = lifetimes.lives.get(_address(tensor))
        if life is not None:
            life.last = lifetimes.step
    return lifetimes.peak()


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  # its identity, which views share
