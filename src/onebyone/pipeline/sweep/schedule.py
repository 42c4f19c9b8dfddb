"""Which trial runs next, and what happens to one whose process or node has ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from onebyone.core.errors import SweepError
from onebyone.core.records import SweepTrial
from onebyone.core.units import plural
from onebyone.pipeline.sweep.one_trial import Ended

# A trial that takes its process down each time, such as by using up the memory, is given up.
MOST_STARTS = 4
# Seconds without any node, in which a cluster may get a new one.
NODE_SECONDS = 300.0
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Lost:
    """The process or the node of a trial ended before the trial did.

    Attributes:
        reason: What is known of it.
    """

    reason: str


class Workers(Protocol):
    """Where trials run: at each node one at a time."""

    def free(self) -> Sequence[str]:
        """Return the nodes that are there and have nothing to do."""

    def start(self, trial: SweepTrial, node: str) -> None:
        """Start a trial on a node."""

    def running(self) -> Sequence[SweepTrial]:
        """Return the trials that were started and have not been returned by :meth:`ended`."""

    def ended(self, seconds: float) -> Sequence[tuple[SweepTrial, Ended | Lost]]:
        """Wait for trials to end, some seconds at most; return those that did."""


def carry_out(
    trials: Sequence[SweepTrial],
    workers: Workers,
    *,
    has_plan: Callable[[SweepTrial], bool],
    started: Callable[[SweepTrial], object],
    ended: Callable[[SweepTrial, Ended], object],
    lost: Callable[[SweepTrial, Lost], object],
    node_seconds: float = NODE_SECONDS,
) -> None:
    """Carry out trials; each ends once, whatever happens to processes and nodes.

    A trial waits while another one of its group runs that has no plan yet: it finds the survey
    of that one in the cache then.

    Args:
        trials: In the order in which they start.
        workers: Where they run.
        has_plan: Whether a trial that runs has its plan.
        started: Called when a trial is started.
        ended: Called when a trial has finished or failed.
        lost: Called when a trial is to run again.
        node_seconds: How long to wait for a node while there is none.

    Raises:
        SweepError: If there is no node any more.
    """
    waiting, starts = list(trials), Counter[str]()
    seen = time.monotonic()
    while waiting or workers.running():
        for node in workers.free():
            trial = next_trial(waiting, workers.running(), has_plan)
            if trial is None:
                break
            waiting.remove(trial)
            starts[trial.name] += 1
            started(trial)
            workers.start(trial, node)
        if workers.running() or workers.free():
            seen = time.monotonic()
        elif time.monotonic() - seen > node_seconds:
            raise SweepError(
                f"The sweep needs a node, but has had none for {node_seconds:.0f} seconds, with "
                f"{plural(len(waiting), 'trial')} to go. Resume it by --resume."
            )
        for trial, outcome in workers.ended(_POLL_SECONDS):
            if isinstance(outcome, Ended):
                ended(trial, outcome)
            elif starts[trial.name] < MOST_STARTS:
                waiting.insert(0, trial)
                lost(trial, outcome)
            else:
                words = f"Its process or its node ended {MOST_STARTS} times: {outcome.reason}."
                ended(trial, Ended(words, "", 0.0))


def next_trial(
    waiting: Sequence[SweepTrial],
    running: Sequence[SweepTrial],
    has_plan: Callable[[SweepTrial], bool],
) -> SweepTrial | None:
    """Return the first trial whose survey nobody is making, or ``None``."""
    surveyed = {trial.group for trial in running if not has_plan(trial)}
    return next((trial for trial in waiting if trial.group not in surveyed), None)
