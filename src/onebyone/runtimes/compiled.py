"""``torch.compile`` with the weights frozen into the code."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.errors import ModelError
from onebyone.runtimes.base import Prepared
from onebyone.runtimes.eager import computing, ready_copy


def prepare_compiled(model: nn.Module, example: Tensor, precision: str = "float32") -> Prepared:
    """Compile for this shape and this number of threads."""
    import torch._inductor.config as settings  # noqa: PLC0415 - takes a second

    network, example = ready_copy(model, example, precision, channels_last=True)
    network.requires_grad_(requires_grad=False)  # of the copy: frozen weights want no gradients
    forward = torch.compile(_own_code(network), dynamic=False)

    def call() -> Any:
        with torch.no_grad():
            return forward(example)

    run = computing(call, example, precision)
    # Inductor reads its settings while it compiles, which is in the first call.
    with settings.patch(freezing=True):
        try:
            run()
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"The network {type(network).__name__} could not be compiled: {first} "
                f"torch.compile needs a C++ compiler; see whether g++ is installed."
            ) from error
    return Prepared(run, {"freezing": "on", "layout": "channels last"})


def _own_code(network: nn.Module) -> Callable[[Tensor], Any]:
    """Return a function that calls a network, with a code object of its own.

    Dynamo keeps what it compiled by code object and gives up, silently, after eight networks of
    one class.
    """

    def forward(x: Tensor) -> Any:
        return network(x)

    return types.FunctionType(
        forward.__code__.replace(co_name=f"forward_{id(network)}"),
        forward.__globals__,
        forward.__name__,
        None,
        forward.__closure__,
    )
