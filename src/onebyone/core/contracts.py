"""What the checks of rewrites and runtimes share: a rule that must hold, and who breaks it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onebyone.core.errors import ContractError


def hold(fact: bool, words: str) -> None:  # noqa: FBT001 - what must hold comes first
    """Check that a rule holds.

    Args:
        fact: Whether it does.
        words: The rule, without a full stop.

    Raises:
        ContractError: If it does not.
    """
    if not fact:
        raise ContractError(f"{words}.")


@contextmanager
def failing_as(words: str) -> Iterator[None]:
    """Convert any error in this context into one that says what must work.

    Args:
        words: What must work, as in "The rewrite 'thin' must take a linear layer".

    Raises:
        ContractError: If anything is raised.
    """
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        raise ContractError(f"{words}, but it failed: {type(error).__name__}: {error}") from error
