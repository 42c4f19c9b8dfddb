"""Draws that repeat, and leave torch's own generators as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw with this seed inside, on the CPU and on a device, and put the generators back after."""
    where = torch.device(device)
    gpus = [where] if where.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        seed_generators(seed, where)
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and the device's, and no other."""
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed every device's
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
