"""Activation memory of one forward pass, from the lifetimes of its tensors."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from onebyone.sites import Inputs, copy_beside, run, tensors_in


@dataclass
class _Life:
    """A piece of memory: its size, the step that wrote it first, and the last that read it.

    Attributes:
        reference: Keeps the storage's address from being given to another one.
    """

    nbytes: int
    born: int
    last: int | None
    reference: StorageWeakRef = field(repr=False)


class _Lifetimes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and notes at which of them each storage is written and read."""

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
        """Note a tensor that was written in this step, unless its memory is known or a weight."""
        address = _address(tensor)
        if address not in self.weights and address not in self.lives:
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self.lives[address] = _Life(nbytes, self.step, None, reference)

    def peak(self) -> int:
        """Return the most bytes that are alive in one step."""
        change: dict[int, int] = defaultdict(int)
        for life in self.lives.values():
            if life.last is not None:  # what nobody reads, such as a pooling's indices, needs none
                change[life.born] += life.nbytes
                change[life.last + 1] -= life.nbytes
        alive = most = 0
        for step in sorted(change):
            alive += change[step]
            most = max(most, alive)
        return most


def peak_activation_bytes(model: nn.Module, inputs: Inputs) -> int:
    """Return the most bytes of activations that are alive at once in a forward pass.

    A tensor is alive from the operation that writes it to the last one that reads it, in the order
    in which the network runs; the input from the start, the output to the end. Views and in-place
    operations share their tensor's memory. Weights, buffers and what kernels need for themselves
    are not counted: this is what any runtime must hold that keeps the order and fuses nothing.

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
    network = copy_beside(model, inputs)
    weights = {_address(tensor) for tensor in (*network.parameters(), *network.buffers())}
    lifetimes = _Lifetimes(weights)
    for tensor in tensors_in(inputs):
        # A slice is alone in the memory of a whole batch.
        lifetimes.note(tensor, min(tensor.nbytes, tensor.untyped_storage().nbytes()))
    with lifetimes:
        output = run(network, inputs)
    for tensor in tensors_in(output):
        life = lifetimes.lives.get(_address(tensor))
        if life is not None:
            life.last = lifetimes.step
    return lifetimes.peak()


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  # its identity, which views share
