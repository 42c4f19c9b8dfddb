"""Every error that onebyone raises on purpose.

OneByOneError
├── UsageError                 invalid request: exit status 2
│   ├── UnknownNameError       no model, data set, rewrite or command of that name
│   ├── BudgetError            a budget that cannot be read, or cannot be met
│   └── OptionError            an argument with an invalid value
├── ModelError                 the network cannot be traced, copied or run
│   ├── NetworkInputError      inputs that a stage does not take, such as several tensors
│   ├── NotComparableError     outputs that are not tensors with the batch first
│   ├── GradientError          a forward or a loss that has no gradients
│   └── WeightsError           weights missing, unreadable, not finite or of another network
├── DataError                  data that is missing, empty, unreadable or of the wrong shape
├── PlanError                  a plan that does not fit the network
├── RecordError                a record or a file with invalid content
├── ExportError                a written file that does not give the network's outputs
├── OutputError                a folder that cannot be written, or belongs to something else
├── ProcessError               another process of the same run, under torchrun, failed or ended
├── SweepError                 a sweep without a machine to go on with, or without a finished trial
├── MissingExtraError          an optional package that is not installed
└── PluginError                a plugin of an installed package that cannot be used
    └── ContractError          a runtime or a rewrite that breaks the rules for all of them
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onebyone.core.records import Budget
    from onebyone.planning import Planner


LONGEST_NAME = 240  # characters of a name in a message


class OneByOneError(Exception):
    """The root of all errors; a message says what must hold, what came, and what to do."""

    exit_status = 1


class UsageError(OneByOneError):
    """The request is invalid."""

    exit_status = 2


class UnknownNameError(UsageError):
    """No model, data set, rewrite or command has that name."""

    def __init__(
        self, kind: str, name: str, available: Iterable[str], *, listed: int = 12, why: str = ""
    ) -> None:
        names = sorted(set(available))
        import difflib  # noqa: PLC0415 - for a fast start

        close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
        hint = f" Did you mean {_either(close)}?" if close else ""
        shown = ", ".join(names[:listed]) + (", …" if len(names) > listed else "")
        reason = f" (it {why})" if why else ""
        # Of a long path both ends tell.
        name = name if len(name) <= LONGEST_NAME else f"{name[:120]}…{name[-119:]}"
        super().__init__(f"No {kind} named {name!r}{reason}.{hint} Available: {shown}.")


class BudgetError(UsageError):
    """A budget cannot be read, or cannot be met.

    Attributes:
        nearest: The budgets, each raised to the least that can be reached; empty if not known.
        planner: A planner with the measured options. It can plan for other budgets without
            measuring again: ``error.planner.plan(["macs=60%"])``.
    """

    def __init__(self, message: str, *, nearest: Iterable[Budget] = ()) -> None:
        super().__init__(message)
        self.nearest: tuple[Budget, ...] = tuple(nearest)
        self.planner: Planner | None = None


class OptionError(UsageError):
    """An argument has an invalid value."""


class ModelError(OneByOneError):
    """A network cannot be traced, copied or run."""


class NetworkInputError(ModelError):
    """A network has inputs that a stage does not take, such as several tensors."""


class NotComparableError(ModelError):
    """Outputs are not tensors with the batch first."""


class GradientError(ModelError):
    """A forward or a loss has no gradients, so it cannot be trained."""


class WeightsError(ModelError):
    """Weights are missing, unreadable, not finite, or those of another network."""


class DataError(OneByOneError):
    """Data is missing, empty, unreadable, or of the wrong shape."""


class PlanError(OneByOneError):
    """A plan does not fit the network."""


class RecordError(OneByOneError, ValueError):
    """A record, or its file, has invalid content.

    It is also a ``ValueError``, because msgspec adds the position in the file to those only.
    """


class ExportError(OneByOneError):
    """A file cannot be written for another runtime, or does not give the network's outputs."""


class OutputError(OneByOneError):
    """A folder cannot be written, or belongs to something else."""


class ProcessError(OneByOneError):
    """Another process of the same run failed or ended.

    Attributes:
        told: Whether a process has printed the cause already.
    """

    told = False


class SweepError(OneByOneError):
    """A sweep has no machine to go on with, or none of its trials could be finished."""


class MissingExtraError(OneByOneError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'onebyone[{extra}]'"
        )


class PluginError(OneByOneError):
    """A plugin of an installed package cannot be used."""


class ContractError(PluginError):
    """A runtime or a rewrite breaks the rules that hold for all of them."""


def _either(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without a full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
