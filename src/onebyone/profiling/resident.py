"""Memory: what a process holds on a device, what a call adds to it, and whether it is kept."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onebyone.errors import OptionError

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
    """Memory of a process in bytes: resident in the machine's, or allocated on a GPU by torch.

    Attributes:
        now: Held at the moment.
        peak: The most that was held since the peak was reset.
    """

    now: int
    peak: int


def resident(device: str = "cpu") -> Held | None:
    """Return what this process holds, or ``None`` where the system does not tell (not Linux)."""
    if device.startswith("cuda"):
        # What torch allocated; the context and what it keeps for later allocations are not of a
        # network.
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
    """Return what this process holds once unused memory is given back, and restart the peak."""
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
    """Return by how many bytes a call raises the memory that this process holds, at its peak."""
    before = settled(device)
    function()
    after = resident(device)
    return None if before is None or after is None else max(after.peak - before.now, 0)


def keep_memory() -> str:
    """Make glibc keep freed memory in this process, and return the setting in words.

    Large outputs are otherwise given back to the system after each layer and fetched anew, page by
    page, which can take longer than the layer itself. It lasts as long as the process and cannot
    be taken back, so nothing here calls it without being asked.

    Raises:
        OptionError: If the C library is not glibc, or refuses.
    """
    global _kept  # noqa: PLW0603 - it is the process's own state
    libc = _glibc()
    if libc is None or any(libc.mallopt(name, value) != 1 for name, value in _KEEP.items()):
        raise OptionError(
            "Keeping memory needs glibc's mallopt, which this system has not. Leave it out, or "
            "preload another allocator."
        )
    _kept = True
    return allocator()


def allocator() -> str:
    """Return in words how this process's allocator was set by :func:`keep_memory`."""
    return "freed memory is kept (mallopt)" if _kept else "default"


def _glibc() -> Any:
    name = ctypes.util.find_library("c")
    libc = ctypes.CDLL(name) if name else None
    return libc if libc is not None and hasattr(libc, "mallopt") else None
