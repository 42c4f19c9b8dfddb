"""The bytes of a module's weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def weight_bytes(module: nn.Module, *, float_bytes: int | None = None) -> int:
    """Return the bytes of all parameters and of the buffers that are saved, shared ones once.

    Args:
        module: Not modified.
        float_bytes: Of a floating-point value as it is deployed; by default as it is here.
    """
    tensors = {id(tensor): tensor for tensor in saved_tensors(module)}
    return sum(
        tensor.numel() * float_bytes
        if float_bytes is not None and tensor.is_floating_point()
        else tensor.nbytes
        for tensor in tensors.values()
    )


def saved_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield all parameters, and the buffers that are saved."""
    yield from module.parameters()
    for each in module.modules():
        for name, buffer in each.named_buffers(recurse=False):
            if name not in each._non_persistent_buffers_set:  # noqa: SLF001 - no public name
                yield buffer
