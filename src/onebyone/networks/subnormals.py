"""Finds subnormal numbers in a network's tensors, and sets them to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.tensor_trees import Inputs, tensors_in
from onebyone.networks.held import to_run_beside
from onebyone.networks.surgery import hooks_removed, run

# For each type: the integer type of the same size, and the bits of exponent and fraction. The bits
# are checked because a process that flushes subnormals compares them as zero. float16 is left out:
# CPUs convert it before they compute, so its subnormals cost no time, and they may matter: its
# smallest normal number is 6e-5.
_BITS: dict[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.float32: (torch.int32, 0x7F800000, 0x007FFFFF),
    torch.float64: (torch.int64, 0x7FF0000000000000, 0x000FFFFFFFFFFFFF),
    torch.bfloat16: (torch.int16, 0x7F80, 0x007F),
}

# Weights below this many times the smallest normal number are normal themselves, but their products
# with ordinary activations are often subnormal. On processors that are slow with subnormal numbers
# these products take most of the time.
NEAR = 2.0**26


def subnormal_mask(tensor: Tensor) -> Tensor | None:
    """Return a mask of the subnormal values: not zero, but below the smallest normal number.

    Only for dense tensors of float32, float64 and bfloat16; ``None`` for others, and inside of
    ``torch.func`` transforms, where no value can be read.
    """
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 - as inside vmap
        return None
    if not plain or tensor.dtype not in _BITS or tensor.layout != torch.strided or tensor.is_meta:
        return None
    integer, exponent, fraction = _BITS[tensor.dtype]
    bits = tensor.detach().view(integer)
    return ((bits & exponent) == 0) & ((bits & fraction) != 0)


def near_mask(tensor: Tensor) -> Tensor | None:
    """Return a mask of the values that are normal, but whose products are often subnormal.

    These are below ``NEAR`` times the smallest normal number, so an activation below 1e-8 already
    makes a subnormal product. They are also too small beside the tensor's largest value to change a
    digit of any sum. ``None`` for the tensors that :func:`subnormal_mask` does not support.
    """
    below = subnormal_mask(tensor)
    if below is None or not tensor.numel():
        return below
    facts, size = torch.finfo(tensor.dtype), tensor.detach().abs()
    limit = min(NEAR * facts.tiny, float(size.max()) * facts.eps**3)
    return (size < limit) & (size > 0) & ~below


def count_subnormals(model: nn.Module) -> dict[str, int]:
    """Return the number of subnormal values by weight or buffer; names without any are left out."""
    return _counted(model, subnormal_mask)


def count_near(model: nn.Module) -> dict[str, int]:
    """Return the number of values with often subnormal products, by weight or buffer."""
    return _counted(model, near_mask)


def _counted(model: nn.Module, mask_of: Callable[[Tensor], Tensor | None]) -> dict[str, int]:
    counts = {}
    for name, tensor in _tensors(model):
        mask = mask_of(tensor)
        found = 0 if mask is None else int(mask.sum())
        if found:
            counts[name] = found
    return counts


def count_values(model: nn.Module) -> int:
    """Return the number of floating-point values in weights and buffers; shared ones count once."""
    return sum(t.numel() for _, t in _tensors(model) if t.is_floating_point())


def flush_in_place(model: nn.Module) -> None:
    """Set values of weights and buffers to zero if they, or their products, are subnormal.

    Args:
        model: Modified in place: pass a copy.
    """
    with torch.inference_mode():  # tensors made in this mode can only be changed in it
        for _, tensor in _tensors(model):
            below, near = subnormal_mask(tensor), near_mask(tensor)
            if below is not None and near is not None and bool((below | near).any()):
                tensor.data.masked_fill_(below | near, 0.0)


def subnormal_activations(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Return the number of subnormal values in each module's outputs on these inputs, by name.

    Args:
        model: Not modified; a copy in evaluation mode is run.
        inputs: A tensor ``(batch, …)``, a tuple of arguments, or keyword arguments.

    Raises:
        ModelError: If the network cannot be run on them.
    """
    network = to_run_beside(model, inputs)
    counts: dict[str, int] = {}

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            masks = (subnormal_mask(tensor) for tensor in tensors_in(output))
            found = sum(int(mask.sum()) for mask in masks if mask is not None)
            if found:
                counts[name] = counts.get(name, 0) + found

        return hook

    handles: list[Any] = []
    with hooks_removed(handles):
        for name, module in network.named_modules():
            leaf = next(module.children(), None) is None
            if leaf and not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_hook(look(name)))
        run(network, inputs)
    return counts


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
