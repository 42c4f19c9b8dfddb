"""The available memory of a device."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

_MEMORY = Path("/proc/meminfo")
_USED = Path("/proc/self/statm")
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: str = "cpu") -> int | None:
    """Return the available memory of a device, or ``None`` if the system does not report it.

    On the CPU this is the least of the machine's free memory, the rest of the container's limit,
    and what ``ulimit -v`` leaves to this process.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [free for free in (_of_machine(), _of_group(), _of_process()) if free is not None]
    return max(0, min(known)) if known else None


def _of_machine() -> int | None:
    try:
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _of_group() -> int | None:
    """Return the rest of the container's memory limit, from Linux's cgroups version 2."""
    try:
        most = (_GROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (_GROUP / "memory.current").read_text(encoding="ascii").strip()
        cached = (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if not (most.isdigit() and used.isdigit()):
        return None  # "max": no bound
    # The system frees cached files as soon as memory is requested.
    files = next((int(line.split()[1]) for line in cached if line.startswith("inactive_file ")), 0)
    return int(most) - int(used) + files


def _of_process() -> int | None:
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415  # there is none on Windows

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(_USED.read_text(encoding="ascii").split()[0])
    except OSError:
        return most
    return most - pages * resource.getpagesize()
