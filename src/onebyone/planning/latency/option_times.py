"""The milliseconds of options, and what part of them the whole network saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onebyone.core.records import Budget, Option


def latency_limit(budgets: Sequence[Budget]) -> float | None:
    """Return the milliseconds that budgets allow; ``None`` where none bounds them."""
    return next((budget.limit for budget in budgets if budget.quantity == "latency"), None)


def is_faster(option: Option) -> bool:
    """Whether an option is shown to be faster, or predicted to be where it was not timed yet."""
    return saved_ms(option) > 0 if option.gain is None else option.gain.verdict == "faster"


def saved_ms(option: Option) -> float:
    """Return the milliseconds that an option saves; 0 where they are not known."""
    return option.saved.ms or 0.0


def shared(option: Option, share: float) -> Option:
    """Return an option whose saving is that of the whole network."""
    before = option.before.ms or 0.0
    return replace(option, after=replace(option.after, ms=before - share * saved_ms(option)))


def scaled(option: Option, share: float) -> Option:
    """Return an option whose site takes that share of its time, as it is and rewritten."""
    before, after = option.before, option.after
    return replace(
        option,
        before=replace(before, ms=share * (before.ms or 0.0)),
        after=replace(after, ms=share * (after.ms or 0.0)),
    )


def untimed(option: Option) -> Option:
    """Return an option that is taken to save no time; the whole network's time includes it."""
    return replace(
        option, before=replace(option.before, ms=0.0), after=replace(option.after, ms=0.0)
    )


def identity(option: Option) -> tuple[str, ...]:
    """Return what tells an option from all others: its site, rewrites and settings."""
    steps = ((step.rewrite, str(sorted(step.settings.items()))) for step in option.steps)
    return option.site, *(text for step in steps for text in step)
