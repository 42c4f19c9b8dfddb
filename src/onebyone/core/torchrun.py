"""Whether torchrun started this process; apart from what imports torch, for a fast start."""

import os


def is_started() -> bool:
    """Whether torchrun started this process, alone or beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ  # torchrun sets it, and nothing else does


def process_count() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if is_started() else 1


def processes_here() -> int:
    """Return how many processes torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_started() else 1
