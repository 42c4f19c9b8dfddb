"""ExecuTorch on the CPU, with the layers that it can delegated to XNNPACK."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.errors import ModelError
from onebyone.runtimes.base import Prepared, need_device
from onebyone.sites import evaluation_copy


def prepare_executorch(model: nn.Module, example: Tensor) -> Prepared:
    """Run a program in ExecuTorch. It sets its own threads: those that XNNPACK finds best."""
    need_device(example, "cpu", "executorch")
    network = evaluation_copy(model, device="cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(network, (example,))
        program = to_executorch(exported)
    except Exception as error:
        raise ModelError(
            f"The network {type(model).__name__} could not be lowered to ExecuTorch: {error}"
        ) from error
    run = load_executorch(program)
    return Prepared(lambda: run(example), {"backend": "XNNPACK"})


def to_executorch(exported: Any) -> bytes:
    """Return an exported program as a ``.pte`` file's content."""
    with warnings.catch_warnings():
        # Its own imports and passes warn of torch's deprecations.
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # noqa: PLC0415
            XnnpackPartitioner,
        )
        from executorch.exir import to_edge_transform_and_lower  # noqa: PLC0415

        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        return bytes(lowered.to_executorch().buffer)


def load_executorch(program: bytes) -> Callable[[Tensor], Any]:
    """Return a function that runs a ``.pte`` program on an input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.runtime import Runtime  # noqa: PLC0415 - an extra

        loaded = Runtime.get().load_program(program)
        method = loaded.load_method("forward")
    # The method points into the program, and the program into its bytes: all must live on.
    held = (program, loaded, method)
    return lambda inputs: held[2].execute([inputs])
