"""The runtime ExecuTorch, on the CPU, with layers delegated to XNNPACK where possible."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from onebyone.core.errors import ModelError
from onebyone.core.shared_state import warnings_ignored
from onebyone.networks.exportable import OnCopies
from onebyone.networks.surgery import evaluation_copy, writes_into_inputs
from onebyone.runtimes.base import Prepared, need_device
from onebyone.runtimes.files import FileNetwork


def prepare_executorch(model: nn.Module, example: Tensor) -> Prepared:
    """Run a program in ExecuTorch."""
    need_device(example, "cpu", "executorch")
    if isinstance(model, FileNetwork) and model.runtime == "executorch":
        program = model.path.read_bytes()
    else:
        program = _lowered(model, example)
    threads = torch.get_num_threads()
    run = LoadedProgram(program, threads=threads)
    return Prepared(partial(run, example), {"backend": "XNNPACK", "threads": str(threads)})


def _lowered(model: nn.Module, example: Tensor) -> bytes:
    network = evaluation_copy(model, device="cpu")
    try:
        with warnings_ignored():
            if writes_into_inputs(network, example):
                network = OnCopies(network)
            exported = torch.export.export(network, (example.clone(),))
        return to_executorch(exported)
    except Exception as error:
        raise ModelError(
            f"The network {type(model).__name__} could not be lowered to ExecuTorch: {error}"
        ) from error


def to_executorch(exported: Any) -> bytes:
    """Return an exported program as a ``.pte`` file's content."""
    with warnings_ignored(), torch.random.fork_rng(devices=[]):
        # Its imports and passes cause torch's deprecation warnings, and draw random numbers.
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # noqa: PLC0415
            XnnpackPartitioner,
        )
        from executorch.exir import to_edge_transform_and_lower  # noqa: PLC0415

        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        return bytes(lowered.to_executorch().buffer)


class LoadedProgram:
    """A ``.pte`` program that is run on one input, with the outputs in a list.

    Args:
        content: Of the file.
        threads: How many to run with; by default as many as torch is set to at each run.
    """

    def __init__(self, content: bytes, *, threads: int | None = None) -> None:
        self._content = content
        self._threads = threads
        self._load()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the input, which is fixed."""
        return tuple(self._method.metadata.input_tensor_meta(0).sizes())

    def __call__(self, inputs: Tensor) -> Any:
        """Return the outputs for an input of the program's shape.

        Raises:
            RuntimeError: If it has another shape.
        """
        if _pool_of(self._count) != self._pool:
            self._load()  # a method only computes in the thread pool that it was loaded with
        return self._method.execute([inputs])

    @property
    def _count(self) -> int:
        return torch.get_num_threads() if self._threads is None else self._threads

    def _load(self) -> None:
        with warnings_ignored():
            from executorch.runtime import Runtime  # noqa: PLC0415 - an extra

            self._pool = _pool_of(self._count)
            # The method points into the program, and that into its bytes: all are kept alive.
            self._program = Runtime.get().load_program(self._content)
            self._method = self._program.load_method("forward")


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
