"""The runtime ``torch.compile``, with the weights frozen into the compiled code."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from onebyone.core.errors import ModelError
from onebyone.core.tensor_trees import Inputs, fresh
from onebyone.networks.surgery import called, writes_into_inputs
from onebyone.runtimes.base import Prepared
from onebyone.runtimes.eager import computing, ready_copy


def prepare_compiled(model: nn.Module, example: Inputs, precision: str = "float32") -> Prepared:
    """Compile for this shape and this number of threads."""
    import torch._inductor.config as settings  # noqa: PLC0415 - takes a second

    network, example = ready_copy(model, example, precision, channels_last=True)
    network.requires_grad_(requires_grad=False)  # freezing needs weights without gradients
    forward = torch.compile(_own_code(network), dynamic=False)
    given = fresh if writes_into_inputs(network, example) else _as_it_is

    def call() -> Any:
        with torch.no_grad():
            return called(forward, given(example))

    run = computing(call, example, precision)
    # Inductor reads its settings during compilation, which happens in the first call.
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


def _as_it_is(example: Inputs) -> Inputs:
    return example


def _own_code(network: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a network, with its own code object.

    Dynamo caches compilations per code object, and after eight networks of one class it silently
    stops compiling.
    """

    def forward(*args: Any, **named: Any) -> Any:
        return network(*args, **named)

    return types.FunctionType(
        forward.__code__.replace(co_name=f"forward_{id(network)}"),
        forward.__globals__,
        forward.__name__,
        None,
        forward.__closure__,
    )
