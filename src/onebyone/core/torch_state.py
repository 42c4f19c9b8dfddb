"""Resets torch's global state to its defaults while onebyone computes.

Results must not depend on gradient mode, inference mode, autocast, the default type and device, or
anomaly detection. The caller's own code, such as a network's forward, still gets the caller's
default type and device.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from onebyone.core.errors import OptionError


@dataclass(frozen=True)
class _Defaults:
    """The caller's default type and device of new tensors."""

    dtype: torch.dtype
    device: torch.device


_CPU = torch.device("cpu")
_USUAL = _Defaults(torch.float32, _CPU)
_turn = threading.RLock()


def _new_turn() -> None:
    # After a fork, the thread that held the turn does not exist in the new process.
    global _turn  # noqa: PLW0603 - it belongs to the process
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_turn)

_CALLERS: ContextVar[_Defaults] = ContextVar("_CALLERS", default=_USUAL)


@contextmanager
def ordinary_torch() -> Iterator[None]:
    """Run the block with torch's default state, then restore the caller's state.

    Gradients are on; inference mode, autocast and anomaly detection are off; new tensors are
    float32 on the CPU. The random generators of torch, NumPy and Python are restored afterwards.
    The user's choice of kernels stays in effect: deterministic algorithms, the number of threads,
    TF32. If the user's code changes these, they are restored as well.

    This state, and what torch changes while it traces a network, belongs to the whole process. So
    only one thread at a time may be in the block; others wait.

    Raises:
        OptionError: If called in a mode in which tensors have no data.
    """
    with _turn, _ordinary():
        yield


@contextmanager
def _ordinary() -> Iterator[None]:
    _check_modes()
    callers = _Defaults(torch.get_default_dtype(), _default_device())
    # In a nested call, the outermost caller's defaults are still the user's.
    token = _CALLERS.set(callers) if callers != _USUAL else None
    try:
        with ExitStack() as stack:
            stack.enter_context(_generators_kept())
            stack.enter_context(_kernels_kept())
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.enable_grad())
            for kind in _autocasting():
                stack.enter_context(torch.autocast(kind, enabled=False))
            if torch.is_anomaly_enabled():
                stack.enter_context(torch.autograd.set_detect_anomaly(mode=False))
            stack.enter_context(_defaults(_USUAL))
            yield
    finally:
        if token is not None:
            _CALLERS.reset(token)


@contextmanager
def users_defaults(device: torch.device) -> Iterator[None]:
    """Restore the caller's default type inside, and use ``device`` if the caller had set one.

    Args:
        device: Where the user's code runs.
    """
    callers = _CALLERS.get()
    if callers == _USUAL:
        yield
        return
    elsewhere = _CPU if callers.device == _CPU else device
    with _defaults(_Defaults(callers.dtype, elsewhere)):
        yield


def _check_modes() -> None:
    for mode in _get_current_dispatch_mode_stack():
        if type(mode).__name__ == "FakeTensorMode":
            raise OptionError(
                "onebyone computes with a network's weights, but was called inside FakeTensorMode, "
                "in which tensors hold no data. Leave that mode first."
            )


def _autocasting() -> list[str]:
    """Return the types of device for which autocast is on."""
    kinds = ["cpu", "cuda"]
    return [kind for kind in kinds if torch.is_autocast_enabled(kind)]


@contextmanager
def _defaults(wanted: _Defaults) -> Iterator[None]:
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if _default_device() != wanted.device:
            stack.enter_context(wanted.device)
        if before != wanted.dtype:
            torch.set_default_dtype(wanted.dtype)
            stack.callback(torch.set_default_dtype, before)
        yield


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Restore the random generators, which the user's data and factories may draw from."""
    on_cpu, python = torch.get_rng_state(), random.getstate()
    numpys = np.random.get_state()  # noqa: NPY002 - the user's code may use it
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = torch.cuda.get_rng_state_all() if started else []
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        random.setstate(python)
        np.random.set_state(numpys)  # noqa: NPY002
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


@contextmanager
def _kernels_kept() -> Iterator[None]:
    """Restore process-wide settings that the user's code may change."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    products = torch.get_float32_matmul_precision()
    cudnn, onednn = torch.backends.cudnn, torch.backends.mkldnn
    flags = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, onednn.enabled
    try:
        yield
    finally:
        # Only if it changed: setting the number of threads makes some libraries restart.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        if torch.get_float32_matmul_precision() != products:
            torch.set_float32_matmul_precision(products)
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags[:4]
        onednn.enabled = flags[4]


def _default_device() -> torch.device:
    # `torch.get_default_device` of older versions does not see `with torch.device(...)`.
    return torch.empty(0).device
