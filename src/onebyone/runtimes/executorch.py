"""The runtime ExecuTorch, on the CPU, with layers delegated to XNNPACK where possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.errors import ModelError
from onebyone.core.shared_state import warnings_ignored
from onebyone.networks.surgery import evaluation_copy
from onebyone.runtimes.base import Prepared, need_device


def prepare_executorch(model: nn.Module, example: Tensor) -> Prepared:
    """Run a program in ExecuTorch."""
    need_device(example, "cpu", "executorch")
    network = evaluation_copy(model, device="cpu")
    try:
        with warnings_ignored():
            exported = torch.export.export(network, (example.clone(),))
        program = to_executorch(exported)
    except Exception as error:
        raise ModelError(
            f"The network {type(model).__name__} could not be lowered to ExecuTorch: {error}"
        ) from error
    threads = torch.get_num_threads()
    pool, run = _pool_of(threads), load_executorch(program)

    def forward() -> Any:
        nonlocal pool, run
        now = _pool_of(threads)
        if now != pool:  # a method only computes in the thread pool that it was loaded with
            pool, run = now, load_executorch(program)
        return run(example)

    return Prepared(forward, {"backend": "XNNPACK", "threads": str(threads)})


def to_executorch(exported: Any) -> bytes:
    """Return an exported program as a ``.pte`` file's content."""
    with warnings_ignored():
        # Its imports and passes cause torch's deprecation warnings.
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # noqa: PLC0415
            XnnpackPartitioner,
        )
        from executorch.exir import to_edge_transform_and_lower  # noqa: PLC0415

        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        return bytes(lowered.to_executorch().buffer)


def load_executorch(program: bytes) -> Callable[[Tensor], Any]:
    """Return a function that runs a ``.pte`` program on an input."""
    with warnings_ignored():
        from executorch.runtime import Runtime  # noqa: PLC0415 - an extra

        loaded = Runtime.get().load_program(program)
        method = loaded.load_method("forward")
    # The method points into the program, and the program into its bytes, so all are kept alive.
    held = (program, loaded, method)
    return lambda inputs: held[2].execute([inputs])


_pool = 0


def _pool_of(count: int) -> int:
    """Set ExecuTorch's number of threads, and return the number of the thread pool.

    The process has one pool. After it is replaced, methods loaded before must not run: they would
    wait for threads that no longer exist.
    """
    global _pool  # noqa: PLW0603 - the process has one
    bindings = _bindings()
    if bindings._threadpool_get_thread_count() != count:  # noqa: SLF001 - the only names
        bindings._unsafe_reset_threadpool(count)  # noqa: SLF001
        _pool += 1
    return _pool


@cache
def _bindings() -> Any:
    with warnings_ignored():
        from executorch.extension.pybindings import portable_lib  # noqa: PLC0415 - an extra
    return portable_lib
