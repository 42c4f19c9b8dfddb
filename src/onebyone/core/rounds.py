"""The number of timing rounds, which an environment variable can limit for quick trials."""

from __future__ import annotations

import os

from onebyone.core.errors import OptionError

ENVIRONMENT = "ONEBYONE_ROUNDS"
FEWEST = 3


def limit() -> int | None:
    """Return ``ONEBYONE_ROUNDS``, the most rounds of any timing; ``None`` if it is not set.

    It is for trials and tests: few rounds show little. Records state the number of rounds. Each
    round is then a single call.

    Raises:
        OptionError: If it is not a number of at least 3.
    """
    text = os.environ.get(ENVIRONMENT)
    if not text:
        return None
    if not text.isdecimal() or len(text) > 9 or int(text) < FEWEST:
        raise OptionError(f"{ENVIRONMENT} must be a number of {FEWEST} or more, got {text!r}.")
    return int(text)


def limited(rounds: int) -> int:
    """Return a number of rounds, at most the limit."""
    most = limit()
    return rounds if most is None else min(rounds, most)
