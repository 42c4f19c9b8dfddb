"""The folder in which onebyone keeps what is costly to find again."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT = "ONEBYONE_CACHE"


def user_cache() -> Path:
    """Return the folder that ``ONEBYONE_CACHE`` names, or ``onebyone`` in the user's cache."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onebyone"
