"""Runs a batch that does not fit into memory in smaller parts, with a warning."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from onebyone.core.errors import ModelError
from onebyone.core.tensor_trees import Inputs, batch_size, device_of, sliced, spec_of
from onebyone.core.user_code import is_out_of_memory
from onebyone.networks.surgery import run


class Halving:
    """Runs networks on batches. When memory runs out, it halves the size, also for later batches.

    In evaluation mode examples are independent, so the outputs are the same.

    Args:
        warns: Whether to warn. Set ``False`` if the user cannot choose the batch size.
    """

    def __init__(self, *, warns: bool = True) -> None:
        self._most: int | None = None
        self._warns = warns

    def __call__(self, network: nn.Module, inputs: Inputs) -> Any:
        """Return a network's outputs in their own structure of tensors.

        Raises:
            ModelError: If the network fails, or one example alone does not fit.
        """
        while True:
            count = batch_size(inputs)
            most = self._most or count
            try:
                return _in_parts(network, inputs, most)
            except Exception as error:
                if not _ran_out(error):
                    raise
                if most == 1:
                    raise ModelError(_too_large(network, inputs)) from error
            # Outside of `except`, because the error keeps the failed tensors alive.
            self._most = max(1, min(most, count) // 2)
            if device_of(inputs).type == "cuda":
                torch.cuda.empty_cache()
            if self._warns:
                warnings.warn(
                    f"A batch of {min(most, count):,} examples does not fit into the free "
                    f"memory: {self._most:,} are run at a time. Use a smaller batch size.",
                    stacklevel=2,
                )


def _ran_out(error: BaseException | None) -> bool:
    """Whether an error or one of its causes says that memory ran out."""
    while error is not None and not is_out_of_memory(error):
        error = error.__cause__
    return error is not None


def _in_parts(network: nn.Module, inputs: Inputs, most: int) -> Any:
    count = batch_size(inputs)
    if count <= most:
        return run(network, inputs)
    starts = range(0, count, most)
    given = [run(network, sliced(inputs, start, start + most)) for start in starts]
    leaves, form = tree_flatten(given[0])
    others = [tree_flatten(each)[0] for each in given]
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[place] = torch.cat([each[place] for each in others])
    return tree_unflatten(leaves, form)


def _too_large(network: nn.Module, inputs: Inputs) -> str:
    shape = spec_of(inputs).example_text()
    return (
        f"The network {type(network).__name__} must fit into memory with one example of {shape}, "
        "but does not. Free some memory, use smaller inputs, or use a machine with more memory."
    )
