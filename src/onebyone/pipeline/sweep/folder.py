"""The folder of a sweep: its record, the runs of its trials, the table and the page."""

from __future__ import annotations

import shutil
from pathlib import Path

from onebyone.core.errors import OutputError
from onebyone.core.identity import differences, refuse_different
from onebyone.core.locks import FolderLock
from onebyone.core.records import RunRecord, SweepRecord
from onebyone.core.write_files import check_folder, contents, remove_leftovers, write_text
from onebyone.pipeline.run_folder import RECORD
from onebyone.report.sweep_page import render_sweep
from onebyone.report.sweep_rows import csv_of

SWEEP = "sweep.json"
TRIALS = "trials"  # a folder: of the runs
TABLE = "trials.csv"
REPORT = "report.html"


def trial_folder(out: str | Path, name: str) -> Path:
    """Return the folder of a trial's run."""
    return Path(out) / TRIALS / name


class SweepFolder:
    """The folder of a sweep's files; it is locked against other processes.

    Args:
        path: Made if it does not exist. A folder with content other than a sweep is refused.
        resume: Go on with the sweep in it.
        overwrite: Replace the sweep in it.

    Attributes:
        earlier: The record of the sweep that is resumed.

    Raises:
        OutputError: If the folder cannot be used; says why and what to do. It is then unchanged.
    """

    def __init__(self, path: str | Path, *, resume: bool, overwrite: bool) -> None:
        self.path = check_folder(path, owner="a sweep's", marks=[SWEEP])
        self._lock = FolderLock(self.path)
        try:
            self._replaces = overwrite and SWEEP in contents(self.path)
            self.earlier = self._earlier(resume=resume, overwrite=overwrite)
            remove_leftovers(self.path)
        except BaseException:
            self.close()
            raise

    def _earlier(self, *, resume: bool, overwrite: bool) -> SweepRecord | None:
        if overwrite or SWEEP not in contents(self.path):
            return None
        if not resume:
            raise OutputError(
                f"{self.path} has a sweep already. Go on with it by --resume, replace it by "
                "--overwrite, or choose another folder."
            )
        return SweepRecord.load(self.path / SWEEP)

    def close(self) -> None:
        """Release the folder's lock; remove the folder if nothing was written."""
        self._lock.release()

    def save(self, record: SweepRecord) -> None:
        """Write the record; the first time, remove the sweep that is replaced."""
        if self._replaces:
            shutil.rmtree(self.path / TRIALS, ignore_errors=True)
            for name in (TABLE, REPORT):
                (self.path / name).unlink(missing_ok=True)
            self._replaces = False
        record.save(self.path / SWEEP)

    def runs(self, record: SweepRecord) -> dict[str, RunRecord]:
        """Return the records of the finished runs by name, in the order of the trials."""
        names = [trial.name for trial in record.trials if trial.state == "finished"]
        return {name: RunRecord.load(trial_folder(self.path, name) / RECORD) for name in names}

    def publish(self, record: SweepRecord) -> dict[str, RunRecord]:
        """Write the table and the page of all trials; return the records of the finished runs."""
        runs = self.runs(record)
        write_text(self.path / TABLE, csv_of(record, runs))
        write_text(self.path / REPORT, render_sweep(record, runs))
        return runs


def resumed(earlier: SweepRecord, asked: SweepRecord, *, where: Path) -> SweepRecord:
    """Return the record to go on with: of the finished trials the earlier one's.

    A trial that failed is tried again, since its cause may be gone.

    Raises:
        OptionError: If the sweep was started with other settings or versions.
    """
    different = differences(earlier.settings, asked.settings)
    different += differences(earlier.versions, asked.versions)
    advice = "Give the same command as before, or replace the sweep by --overwrite."
    refuse_different(different, where=where, advice=advice)
    known = {trial.name: trial for trial in earlier.trials}
    record = asked
    for trial in asked.trials:
        kept = known[trial.name]
        again = kept.state != "finished"
        changes = {"state": "waiting", "error": ""} if again else {}
        record = record.with_trial(kept.with_(command=trial.command, **changes))
    return record
