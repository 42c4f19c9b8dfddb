"""The record of a sweep: its trials, each a run in a folder of its own, and how they ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from onebyone.core.errors import RecordError
from onebyone.core.fields import Amount, Count
from onebyone.core.records.base import FORMAT, Record

TrialState = Literal["waiting", "finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class SweepTrial(Record):
    """A trial of a sweep: one run of ``shrink``.

    Attributes:
        name: Of its folder.
        network: Name of the network.
        group: Trials of one group share the survey: they have the network, the data, the seed and
            the effort in common.
        budget: The budgets that are met together, separated by commas.
        command: The command line that makes this run.
        error: Why it failed.
        starts: How often it was started; more than once where its process or node ended, or the
            sweep was resumed.
        host: The machine that it ran on.
        seconds: Wall time of the last start.
    """

    name: str
    network: str
    data: str
    group: str
    budget: str
    runtime: str
    seed: int
    precision: str
    effort: str
    command: tuple[str, ...]
    state: TrialState = "waiting"
    error: str = ""
    starts: Count = 0
    host: str = ""
    seconds: Amount | None = None

    def with_(self, **changes: Any) -> SweepTrial:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class SweepRecord(Record):
    """A sweep: its trials in their order, and how far it came.

    Attributes:
        settings: Everything that the trials depend on, as text: a sweep is resumed only where it
            is the same.
        versions: Of the packages that compute.
    """

    onebyone: str
    created: str
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    trials: tuple[SweepTrial, ...]
    command: tuple[str, ...] = field(default=())
    format: int = FORMAT

    def check(self) -> None:
        """Check that there are trials, and that no two have the same folder."""
        names = [trial.name for trial in self.trials]
        if not names or len(set(names)) < len(names):
            raise RecordError(f"`trials` must be trials of different names, got {names}.")

    def with_trial(self, trial: SweepTrial) -> SweepRecord:
        """Return a copy with a trial in place of the one of its name."""
        trials = tuple(trial if each.name == trial.name else each for each in self.trials)
        return replace(self, trials=trials)

    def counted(self, state: TrialState) -> int:
        """Return how many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)
