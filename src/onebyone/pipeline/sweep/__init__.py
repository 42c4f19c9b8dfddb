"""Sweeps: many runs of `shrink`, here or on a cluster, that end as one table and one page."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from onebyone.core.errors import OneByOneError, OptionError, SweepError
from onebyone.core.records import RunRecord, SweepRecord, SweepTrial
from onebyone.core.run_lines import LOGGER
from onebyone.core.settings.common import Progress
from onebyone.core.units import format_seconds
from onebyone.core.user_cache import ENVIRONMENT as CACHE
from onebyone.core.version import __version__
from onebyone.pipeline.run_folder import PLAN, RECORD
from onebyone.pipeline.sweep.folder import SweepFolder, resumed, trial_folder
from onebyone.pipeline.sweep.one_trial import Ended, Shrink, Task, is_finished
from onebyone.pipeline.sweep.ray_workers import connected
from onebyone.pipeline.sweep.schedule import Lost, carry_out

# Returns the hashes of the network and of the data of a command line of `shrink`.
Identify = Callable[[Sequence[str]], tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Where and how a sweep runs; nothing of it changes a result.

    Attributes:
        out: Folder for the runs, the record, the table and the page.
        shrink: Makes a run from a command line; a function that workers can import.
        identify: Tells whether a network and data are those of a finished run.
        address: Of a Ray cluster; ``None`` for this machine.
        nodes: Names or addresses of the nodes that trials run on; by default all.
        resume: Go on with the sweep in ``out``.
        overwrite: Replace the sweep in ``out``.
        command: The command line, for the record.
        progress: Called as ``progress(ended, trials, message)``.
    """

    out: Path
    shrink: Shrink
    identify: Identify
    address: str | None = None
    nodes: Sequence[str] = ()
    resume: bool = False
    overwrite: bool = False
    command: Sequence[str] = ()
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise OptionError(
                "Give only one of --resume, which goes on with the sweep in the folder, and "
                "--overwrite, which replaces it."
            )


def sweep(
    trials: Sequence[SweepTrial], asked: Mapping[str, str], settings: SweepSettings
) -> tuple[SweepRecord, dict[str, RunRecord]]:
    """Carry out trials, each as a run; write their table and page.

    Args:
        trials: In the order in which they start.
        asked: All that they depend on, as text: a sweep is resumed only where it is the same.
        settings: Where and how.

    Returns:
        The sweep's record, and those of the finished runs by name.

    Raises:
        OutputError: If ``out`` cannot be used.
        OptionError: If a resumed sweep was started with other settings, networks or data.
        MissingExtraError: If Ray is not installed.
        SweepError: If no node is left, or no trial could be finished.
    """
    record = SweepRecord(
        onebyone=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        settings=dict(asked),
        versions={"onebyone": __version__, "torch": str(torch.__version__)},
        trials=tuple(trials),
        command=tuple(settings.command),
    )
    folder = SweepFolder(settings.out, resume=settings.resume, overwrite=settings.overwrite)
    try:
        if folder.earlier is not None:
            record = resumed(folder.earlier, record, where=settings.out)
            record = _with_finished(record, settings)
        return _Sweep(folder, record, settings).carried_out()
    finally:
        folder.close()


class _Sweep:
    """A sweep in progress."""

    def __init__(self, folder: SweepFolder, record: SweepRecord, settings: SweepSettings) -> None:
        self._folder = folder
        self._record = record
        self._settings = settings

    def carried_out(self) -> tuple[SweepRecord, dict[str, RunRecord]]:
        """Carry out the trials that have not finished; write the table and the page."""
        waiting = [trial for trial in self._record.trials if trial.state == "waiting"]
        if waiting:
            how, address = self._settings, self._settings.address
            task = Task(how.shrink, how.out, Path.cwd(), _environment(address, how.out))
            with connected(task, address=address, hosts=how.nodes) as workers:
                self._folder.save(self._record)
                self._tell("started")
                carry_out(
                    waiting,
                    workers,
                    has_plan=lambda trial: (self._place(trial) / PLAN).exists(),
                    started=self._started,
                    ended=self._ended,
                    lost=self._lost,
                )
        runs = self._folder.publish(self._record)
        if not runs:
            first = self._record.trials[0]
            raise SweepError(
                f"At least one trial must finish, but all {len(self._record.trials)} failed, the "
                f"first with: {first.error}"
            )
        return self._record, runs

    def _place(self, trial: SweepTrial) -> Path:
        return trial_folder(self._settings.out, trial.name)

    def _started(self, trial: SweepTrial) -> None:
        self._keep(self._known(trial).with_(starts=self._known(trial).starts + 1))
        self._tell(trial.name)

    def _ended(self, trial: SweepTrial, ended: Ended) -> None:
        error, seconds = ended.error, ended.seconds
        if not error:
            try:
                run = RunRecord.load(self._place(trial) / RECORD)
                seconds = sum(run.seconds.values())
            except OneByOneError as failed:
                error = str(failed)
        state = "failed" if error else "finished"
        trial = self._known(trial).with_(
            state=state, error=error, host=ended.host, seconds=round(seconds, 3)
        )
        self._keep(trial)
        after = format_seconds(seconds)
        words = f"failed after {after}: {error}" if error else f"finished after {after}"
        done = sum(each.state != "waiting" for each in self._record.trials)
        LOGGER.info("%s (%d of %d): %s", trial.name, done, len(self._record.trials), words)
        self._tell(trial.name)

    def _lost(self, trial: SweepTrial, lost: Lost) -> None:
        LOGGER.info("%s: its process or its node ended, so it runs again", trial.name)
        self._tell(f"{trial.name}: {lost.reason}")

    def _known(self, trial: SweepTrial) -> SweepTrial:
        return next(each for each in self._record.trials if each.name == trial.name)

    def _keep(self, trial: SweepTrial) -> None:
        self._record = self._record.with_trial(trial)
        self._folder.save(self._record)

    def _tell(self, message: str) -> None:
        if self._settings.progress is not None:
            done = sum(trial.state != "waiting" for trial in self._record.trials)
            self._settings.progress(done, len(self._record.trials), message)


def _environment(address: str | None, out: Path) -> dict[str, str]:
    """Return the variables of workers: those of onebyone here; on a cluster, a shared cache."""
    own = {name: value for name, value in os.environ.items() if name.startswith("ONEBYONE_")}
    return own if address is None else {CACHE: str(out.absolute() / "cache"), **own}


def _with_finished(record: SweepRecord, settings: SweepSettings) -> SweepRecord:
    """Return a resumed sweep's record with the runs that have finished, also without its knowing.

    Raises:
        OptionError: If one of them began with another network or other data.
    """
    checked: set[str] = set()
    for trial in record.trials:
        folder = trial_folder(settings.out, trial.name)
        if not is_finished(folder):
            again = trial.with_(state="waiting", error="")
            record = record.with_trial(again)
            continue
        run = RunRecord.load(folder / RECORD)
        if trial.group not in checked:
            _check_same(run, trial, settings)
            checked.add(trial.group)
        if trial.state != "finished":
            seconds = round(sum(run.seconds.values()), 3)
            record = record.with_trial(trial.with_(state="finished", error="", seconds=seconds))
    return record


def _check_same(run: RunRecord, trial: SweepTrial, settings: SweepSettings) -> None:
    network, data = settings.identify(trial.command)
    kept = run.identity
    if kept is not None and (kept.network, kept.data) != (network, data):
        what = "network or its weights" if kept.network != network else "data"
        raise OptionError(
            f"{settings.out} can only be resumed with the same networks and data, but the {what} "
            f"of the finished trial {trial.name} was another. Give what it was started with, or "
            "replace the sweep by --overwrite."
        )
