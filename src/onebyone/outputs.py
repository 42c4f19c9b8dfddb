"""What networks give, one tensor or several, and how far one's outputs are from another's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebyone.errors import ModelError
from onebyone.sites import tensors_in

Outputs = tuple[Tensor, ...]
"""All floating-point tensors that a network gives, in order, the examples along the first side."""


def comparable(given: Any, network: nn.Module, examples: int) -> Outputs:
    """Return the tensors to compare networks by; what is not floating-point is left out.

    Args:
        given: A tensor, or tensors in nested tuples, lists and mappings.
        network: That gave it, for the error.
        examples: In the batch that it was given.

    Raises:
        ModelError: If there is none, or one whose first side is not the batch.
    """
    found = _floating(given)
    if not found:
        raise ModelError(
            f"The network must give tensors of floating-point numbers in evaluation mode, but "
            f"{type(network).__name__} gave {_described(given)}. Wrap it in a module that returns "
            "what matters."
        )
    if any(not tensor.ndim or len(tensor) != examples for tensor in found):
        raise ModelError(
            f"Each tensor that the network gives must have the batch first, here {examples}, but "
            f"{type(network).__name__} gave {_described(given)}. Wrap it in a module that returns "
            "what matters, such as its backbone's features."
        )
    return found


def one_tensor(given: Any, network: nn.Module) -> Tensor:
    """Return a network's output if it is one tensor, or holds just one as :func:`the_one` says.

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
    """Return the floating-point tensor in what a network gives if it is just one, else all."""
    found = _floating(given)
    return found[0] if len(found) == 1 else given


def _floating(given: Any) -> Outputs:
    return tuple(tensor for tensor in tensors_in(given) if tensor.is_floating_point())


def in_float32(given: Any) -> Any:
    """Return what a network gives with its numbers in float32, in the same nesting."""
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
    return given


def _described(given: Any) -> str:
    shapes = [tuple(tensor.shape) for tensor in tensors_in(given)]
    kind = type(given).__name__
    if not shapes:
        return kind
    return f"{kind} of {len(shapes)} with shapes {', '.join(map(str, shapes[:4]))}" + (
        ", …" if len(shapes) > 4 else ""
    )


# ---------------------------------------------------------------- how far


def is_classifier_output(outputs: Tensor) -> bool:
    """Whether outputs are class scores, ``(batch, classes)``."""
    return outputs.ndim == 2 and outputs.shape[1] > 1


def divergence(reference: Tensor, outputs: Tensor) -> Tensor:
    """Return how far outputs are from the reference's, an example each, shape ``(batch,)``.

    For class scores the Kullback-Leibler divergence in nats, else the squared error relative to
    the mean square of the reference over the batch.

    Raises:
        ModelError: If the shapes differ: the networks do not answer the same question.
    """
    _check_shapes(reference, outputs)
    reference, outputs = reference.float(), outputs.float()
    if is_classifier_output(reference):
        log_p = reference.log_softmax(dim=1)
        return (log_p.exp() * (log_p - outputs.log_softmax(dim=1))).sum(dim=1)
    scale = reference.square().mean().clamp_min(1e-12)
    return (outputs - reference).square().reshape(len(outputs), -1).mean(dim=1) / scale


def mean_divergence(reference: Outputs, outputs: Outputs) -> Tensor:
    """Return the mean of the tensors' divergences, an example each: every tensor counts the same.

    Raises:
        ModelError: If their number or a shape differs.
    """
    return torch.stack([divergence(*pair) for pair in _paired(reference, outputs)]).mean(0)


def imitation_loss(reference: Outputs, outputs: Outputs, temperature: float) -> Tensor:
    """Return the mean divergence as a loss, a scalar, of class scores at a temperature.

    Class scores' is times the temperature squared, so that its gradients do not shrink with it
    (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2).

    Raises:
        ModelError: If their number or a shape differs.
    """
    return torch.stack([_loss(*pair, temperature) for pair in _paired(reference, outputs)]).mean()


def _loss(reference: Tensor, outputs: Tensor, temperature: float) -> Tensor:
    if not is_classifier_output(reference):
        return divergence(reference, outputs).mean()
    _check_shapes(reference, outputs)
    return temperature**2 * F.kl_div(
        (outputs / temperature).log_softmax(dim=1),
        (reference / temperature).log_softmax(dim=1),
        log_target=True,
        reduction="batchmean",
    )


def _paired(reference: Outputs, outputs: Outputs) -> list[tuple[Tensor, Tensor]]:
    if len(reference) != len(outputs):
        raise ModelError(
            f"Networks must give the same number of tensors to be compared, got {len(reference)} "
            f"and {len(outputs)}."
        )
    return list(zip(reference, outputs, strict=True))


def _check_shapes(reference: Tensor, outputs: Tensor) -> None:
    if reference.shape != outputs.shape:
        raise ModelError(
            f"Outputs must have the shape of the reference's, {tuple(reference.shape)}, got "
            f"{tuple(outputs.shape)}. Compare networks with the same classes."
        )
