"""Reproducible random draws that restore torch's own generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from onebyone.core.errors import OptionError

LEAST_SEED, GREATEST_SEED = -(2**63), 2**64 - 1  # the range that torch accepts


def generator_of(seed: int) -> torch.Generator:
    """Return a CPU generator with this seed.

    Raises:
        OptionError: If the seed is not a whole number of 64 bits.
    """
    if not LEAST_SEED <= seed <= GREATEST_SEED:
        raise OptionError(
            f"`seed` must be a whole number from {LEAST_SEED} to {GREATEST_SEED}, got "
            f"{str(seed)[:40]}."
        )
    return torch.Generator().manual_seed(seed)


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed the generators of the CPU and a device inside the block; restore them afterwards."""
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
