"""Every error that onebyone raises on purpose.

OneByOneError
├── UsageError                 what was asked cannot be meant: exit status 2
│   ├── UnknownNameError       no model, data set, rewrite or command of that name
│   ├── BudgetError            a budget that cannot be read, or cannot be met
│   └── OptionError            an argument outside what it may be
├── ModelError                 the network cannot be traced, copied or run
│   └── WeightsError           weights missing, unreadable, not finite or of another network
├── DataError                  data that is missing, empty, unreadable or of another shape
├── PlanError                  a plan that does not fit the network
├── RecordError                a file that is not the record it should be
├── ExportError                a written file that does not give the network's outputs
├── OutputError                a folder that cannot be written, or is not ours to write to
└── MissingExtraError          an optional package that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OneByOneError(Exception):
    """What must hold, what came, and what to do; the root of the tree."""

    exit_status = 1


class UsageError(OneByOneError):
    """What was asked cannot be meant."""

    exit_status = 2


class UnknownNameError(UsageError):
    """No model, data set, rewrite or command has that name."""

    def __init__(self, kind: str, name: str, available: Iterable[str], *, listed: int = 12) -> None:
        names = sorted(available)
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
        hint = f" Did you mean {_either(close)}?" if close else ""
        shown = ", ".join(names[:listed]) + (", …" if len(names) > listed else "")
        super().__init__(f"No {kind} named {name!r}.{hint} Available: {shown}.")


class BudgetError(UsageError):
    """A budget cannot be read, or cannot be met."""


class OptionError(UsageError):
    """An argument is outside what it may be."""


class ModelError(OneByOneError):
    """A network cannot be traced, copied or run."""


class WeightsError(ModelError):
    """Weights are missing, unreadable, not finite, or those of another network."""


class DataError(OneByOneError):
    """Data is missing, empty, unreadable, or of another shape."""


class PlanError(OneByOneError):
    """A plan does not fit the network."""


class RecordError(OneByOneError):
    """A file is not the record that it should be."""


class ExportError(OneByOneError):
    """A file cannot be written for another runtime, or does not give the network's outputs."""


class OutputError(OneByOneError):
    """A folder cannot be written, or is not ours to write to."""


class MissingExtraError(OneByOneError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'onebyone[{extra}]'"
        )


def _either(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)
