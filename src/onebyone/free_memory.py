"""How much memory a device has left."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_MEMORY = Path("/proc/meminfo")


def free_bytes(device: str = "cpu") -> int | None:
    """Return the memory that can be had on a device, or ``None`` where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
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
