"""Outputs of networks: finds their tensors and checks that they can be compared and are finite."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.errors import DataError, ModelError, NotComparableError
from onebyone.core.tensor_trees import Inputs, tensors_in
from onebyone.networks.surgery import first_nonfinite_layer

Outputs = tuple[Tensor, ...]
"""All floating-point tensors that a network returns, in order; the batch is the first dimension."""


def comparable(given: Any, network: nn.Module, examples: int) -> Outputs:
    """Return the floating-point tensors of an output, for comparing networks.

    Args:
        given: A network's output: a tensor, or tensors in nested tuples, lists and mappings.
        network: The network, for the error message.
        examples: Number of examples in its batch.

    Raises:
        ModelError: If there is no such tensor, or the first dimension of one is not the batch.
    """
    found = floating_tensors(given)
    if not found:
        raise NotComparableError(
            f"The network must give tensors of floating-point numbers in evaluation mode, but "
            f"{type(network).__name__} gave {_described(given)}. Wrap it in a module that returns "
            "what matters."
        )
    if any(not tensor.ndim or len(tensor) != examples for tensor in found):
        raise NotComparableError(
            f"Each tensor that the network gives must have the batch first, here {examples}, but "
            f"{type(network).__name__} gave {_described(given)}. Wrap it in a module that returns "
            "what matters, such as its backbone's features."
        )
    return found


def one_tensor(given: Any, network: nn.Module) -> Tensor:
    """Return a network's output if it is one tensor or contains only one (:func:`the_one`).

    Raises:
        ModelError: If it is anything else.
    """
    found = the_one(given)
    if isinstance(found, Tensor):
        return found
    raise ModelError(
        f"The network's output must be one tensor in evaluation mode, but {type(network).__name__} "
        f"gave {_described(given)}. Wrap it in a module that returns the tensor to compare."
    )


def the_one(given: Any) -> Any:
    """Return an output's floating-point tensor if there is exactly one, else the whole output."""
    found = floating_tensors(given)
    return found[0] if len(found) == 1 else given


def floating_tensors(given: Any) -> Outputs:
    """Return the floating-point tensors in a network's output, in order."""
    return tuple(tensor for tensor in tensors_in(given) if tensor.is_floating_point())


def in_float32(given: Any) -> Any:
    """Return a network's output in float32, in the same structure."""
    return _mapped(given, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _mapped(given: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(given, Tensor):
        return function(given)
    if isinstance(given, Mapping):
        changed = copy.copy(given) if isinstance(given, MutableMapping) else dict(given)
        for key, value in given.items():
            changed[key] = _mapped(value, function)
        return changed
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return type(given)(*(_mapped(value, function) for value in given))
    if isinstance(given, list | tuple):
        return type(given)(_mapped(value, function) for value in given)
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        duplicate: Any = copy.copy(given)
        for field in dataclasses.fields(given):
            # This also works for a frozen one.
            value = _mapped(getattr(given, field.name, None), function)
            object.__setattr__(duplicate, field.name, value)
        return duplicate
    return given


def _described(given: Any) -> str:
    shapes = [tuple(tensor.shape) for tensor in tensors_in(given)]
    kind = type(given).__name__
    if not shapes:
        return kind
    return f"{kind} of {len(shapes)} with shapes {', '.join(map(str, shapes[:4]))}" + (
        ", …" if len(shapes) > 4 else ""
    )


# ---------------------------------------------------------------- pairs, finite values


def paired(reference: Outputs, outputs: Outputs) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of two networks in pairs.

    Raises:
        ModelError: If their number differs.
    """
    if len(reference) != len(outputs):
        raise ModelError(
            f"Networks must give the same number of tensors to be compared, got {len(reference)} "
            f"and {len(outputs)}."
        )
    return list(zip(reference, outputs, strict=True))


def check_finite_outputs(outputs: Outputs, network: nn.Module, inputs: Inputs) -> None:
    """Check that a network's outputs are finite.

    Args:
        outputs: The outputs.
        network: The network. If they are not finite, it runs once more to find the layer.
        inputs: The inputs.

    Raises:
        DataError: If an input is not finite.
        ModelError: If an output is not finite; names the first layer that gives such values.
    """
    if all(bool(torch.isfinite(tensor).all()) for tensor in outputs):
        return
    for tensor in tensors_in(inputs):
        if not bool(torch.isfinite(tensor).all()):
            row = int((~torch.isfinite(tensor.reshape(len(tensor), -1)).all(dim=1)).nonzero()[0])
            raise DataError(
                f"Inputs must be finite, got NaN or infinity in example {row} of a batch. Fix the "
                "data set or drop this example."
            )
    bad = next(tensor for tensor in outputs if not bool(torch.isfinite(tensor).all()))
    bad = bad if bad.ndim else bad[None]
    rows = int((~torch.isfinite(bad.reshape(len(bad), -1)).all(dim=1)).sum())
    found = first_nonfinite_layer(network, inputs)
    where = "they come from its own forward, not from a layer"
    if found:
        kind = type(network.get_submodule(found)).__name__
        where = f"the first layer that gives such values is {found!r} ({kind})"
    raise ModelError(
        f"The outputs of {type(network).__name__} must be finite, got NaN or infinity for {rows} "
        f"of {len(bad)} examples; {where}. Check the scale of its weights and of the inputs, or "
        "leave out examples of extreme values."
    )
