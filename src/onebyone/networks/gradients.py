"""Backward passes through the user's forward and loss, with an error if there is no gradient."""

from __future__ import annotations

from torch import Tensor, nn

from onebyone.core.errors import GradientError
from onebyone.core.user_code import users_code

_MUST = "A loss must have gradients for the network's parameters"
_CURE = (
    "Let the forward and the loss compute without `torch.no_grad()`, `torch.inference_mode()`, "
    "`detach()`, `argmax` or writes into what autograd keeps"
)


def backward(loss: Tensor, network: nn.Module) -> None:
    """Compute the gradients of a loss.

    Raises:
        GradientError: If the loss has no gradient, or the user's backward pass fails.
    """
    if not loss.requires_grad:
        raise GradientError(f"{_MUST}, but that of {type(network).__name__} has none. {_CURE}.")
    with users_code(_MUST, _CURE, raises=GradientError):
        loss.backward()  # type: ignore[no-untyped-call]
