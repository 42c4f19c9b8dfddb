"""Measures a process's memory and the peak of a call, and can make malloc keep freed memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from onebyone.core.errors import OptionError

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # Linux kernel, Documentation/filesystems/proc.rst: clear_refs

# glibc's malloc.h. Values are ints; 32 MiB is the largest threshold that glibc takes.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_MIB = 2**20
_KEEP = {
    _M_MMAP_THRESHOLD: 32 * _MIB,
    _M_MMAP_MAX: 0,  # blocks above the threshold come from the heap too
    _M_TRIM_THRESHOLD: 2**31 - 1,
    _M_TOP_PAD: 64 * _MIB,
}

_kept = False


@dataclass(frozen=True)
class Held:
    """Memory of a process in bytes: resident memory, or what torch allocated on a GPU.

    Attributes:
        now: Memory in use now.
        peak: Most memory in use since the peak was reset.
    """

    now: int
    peak: int


def resident(device: str = "cpu") -> Held | None:
    """Return this process's memory, or ``None`` if the system does not report it (not Linux)."""
    if device.startswith("cuda"):
        # Only tensors count, not the CUDA context or torch's cache of freed blocks.
        torch.cuda.synchronize(device)
        return Held(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    try:
        lines = dict(
            line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines()
        )
        now, peak = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return Held(now, peak)


def settled(device: str = "cpu") -> Held | None:
    """Release unused memory, reset the peak, and return this process's memory."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return resident(device)
    libc = _glibc()
    if libc is not None and not _kept:
        libc.malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="utf-8")
    except OSError:
        return None
    return resident()


def peak_of_call(function: Callable[[], object], device: str = "cpu") -> int | None:
    """Return by how many bytes a call increases this process's memory at its peak."""
    before = settled(device)
    function()
    after = resident(device)
    return None if before is None or after is None else max(after.peak - before.now, 0)


def keep_memory() -> str:
    """Make glibc keep freed memory in this process, and return the setting in words.

    By default, glibc returns the memory of large outputs to the system after each layer and gets it
    again page by page, which can take longer than the layer itself. The setting lasts for the rest
    of the process and cannot be undone, so it is made only if the user chooses it.

    Raises:
        OptionError: If the C library is not glibc, or refuses.
    """
    global _kept  # noqa: PLW0603 - it is the process's own state
    libc = _glibc()
    if libc is None or any(libc.mallopt(name, value) != 1 for name, value in _KEEP.items()):
        raise OptionError(
            "Keeping memory needs glibc's mallopt, which this system does not have. Leave the "
            "option out, or preload another allocator."
        )
    _kept = True
    return allocator()


def allocator() -> str:
    """Return, in words, whether :func:`keep_memory` has changed this process's allocator."""
    return "freed memory is kept (mallopt)" if _kept else "default"


@cache
def _glibc() -> Any:
    # By its name: `find_library` would start a compiler to find it, at each measurement.
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") else None
