"""A run's folder: its record, plan, weights and report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from torch import nn

from onebyone.core.errors import OutputError
from onebyone.core.locks import FolderLock
from onebyone.core.records import RunRecord, TrainLog
from onebyone.core.write_files import (
    RUN_RECORD,
    check_folder,
    contents,
    remove_leftovers,
    write_text,
)
from onebyone.networks.zoo import save_weights
from onebyone.report.html import write_report

RECORD = RUN_RECORD
PLAN = "plan.json"
WEIGHTS = "model.safetensors"
ORIGINAL = "original.safetensors"
ONE_SHOT = "one-shot.safetensors"
REPORT = "report.html"
CHECKPOINT = "checkpoint.pt"
DEPLOYED = "deployed"  # a folder: the int8 files, and what they were made from
EPOCHS = "log.csv"
# Of the distillation in int8.
INT8_CHECKPOINT, INT8_EPOCHS = "checkpoint-int8.pt", "log-int8.csv"
LOG = "run.log"
# Stages that make no file but the record.
_PREPARING = frozenset({"start", "profile", "plan"})
# The original's weights are kept in the run only up to this size.
KEPT_BYTES = 2_000_000_000


class RunFolder:
    """The folder of a run's files; it is locked against other processes.

    Each file is written whole or not at all. An earlier run is replaced only when the new run
    trains or has a plan: until then, all that it was asked may prove impossible.

    Args:
        path: Made if it does not exist. A folder with content other than a run is refused.
        resume: Resume the unfinished run in it.
        overwrite: Replace the run in it.

    Attributes:
        earlier: The record of the unfinished run that is resumed.

    Raises:
        OutputError: If the folder cannot be used; says why and what to do. It is then unchanged.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = check_folder(path, owner="a run's", marks=[RECORD])
        self._lock = FolderLock(self.path)
        self._replaces = self._keeps_earlier = False
        self._unwritten: list[str] = []
        try:
            self.earlier = self._earlier(resume=resume, overwrite=overwrite)
            remove_leftovers(self.path)
        except BaseException:
            self.close()
            raise

    def _earlier(self, *, resume: bool, overwrite: bool) -> RunRecord | None:
        names = contents(self.path)
        if RECORD not in names:
            return None
        self._replaces = True
        self._keeps_earlier = bool({*names} - {RECORD, REPORT, LOG})
        if overwrite:
            return None
        record = RunRecord.load(self.path / RECORD)
        finished = record.status.state == "finished"
        if resume and finished:
            raise OutputError("The run has finished: there is nothing to resume.")
        if not resume and not finished and record.plan is None and not self._keeps_earlier:
            return None  # it stopped before it made anything
        if not resume:
            how = "has finished" if finished else "did not finish"
            more = "" if finished else "Resume it by --resume, "
            raise OutputError(
                f"{self.path} has a run already, which {how}. {more}"
                f"{'or r' if more else 'R'}eplace it by --overwrite, or choose another folder."
            )
        self._replaces = False
        return record

    def close(self) -> None:
        """Release the folder's lock; remove the folder if nothing was written."""
        self._lock.release()

    def file(self, name: str) -> Path:
        """Return the path of one of the run's files."""
        return self.path / name

    def save(self, record: RunRecord) -> None:
        """Write the record, its plan, and the report made from it."""
        if self._replaces:
            if self._keeps_earlier and record.plan is None and record.status.stage in _PREPARING:
                return
            self.remove(CHECKPOINT, INT8_CHECKPOINT, ONE_SHOT, ORIGINAL, PLAN, WEIGHTS, REPORT)
            self.remove(EPOCHS, INT8_EPOCHS, LOG)
            shutil.rmtree(self.file(DEPLOYED), ignore_errors=True)
            self._replaces = False
        if record.plan is not None:
            record.plan.save(self.file(PLAN))
        record.save(self.file(RECORD))
        self._write_log()
        write_report(record, self.file(REPORT))

    def log(self, line: str) -> None:
        """Add a line with the time to the run's log; a full disk does not end the run for that."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self._unwritten.append(f"{now}  {' '.join(line.split())}\n")
        self._write_log()

    def _write_log(self) -> None:
        # Not beside the record of an earlier run, and not without a record: the folder would
        # be taken for somebody else's.
        if self._replaces or not self.file(RECORD).exists():
            return
        with suppress(OSError), self.file(LOG).open("a", encoding="utf-8") as file:
            file.writelines(self._unwritten)
            self._unwritten.clear()

    def save_network(self, network: nn.Module, name: str = WEIGHTS) -> None:
        """Write a network's weights."""
        save_weights(network, self.file(name))

    def save_epochs(self, log: TrainLog, name: str = EPOCHS) -> None:
        """Write the epochs of a training as comma-separated values."""
        write_text(self.file(name), log.csv())

    def keep_original(self, network: nn.Module) -> None:
        """Write the original's weights once, unless they are too large."""
        if not self.file(ORIGINAL).exists() and _bytes_of(network) <= KEPT_BYTES:
            self.save_network(network, ORIGINAL)

    def discard(self) -> None:
        """Remove the record of a new run that has made nothing; an earlier run stays."""
        if self.earlier is None and not self._replaces:
            self.remove(LOG, REPORT, RECORD)  # the record last: it makes the folder a run's

    def remove(self, *names: str) -> None:
        """Remove files of the run if they exist."""
        for name in names:
            self.file(name).unlink(missing_ok=True)


def _bytes_of(network: nn.Module) -> int:
    tensors = (*network.parameters(), *network.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_apart(out: str | Path, uses: Iterable[str | Path], *, replaces: bool) -> None:
    """Check that the output folder is apart from the inputs, so that none is destroyed.

    Args:
        out: The folder for the output.
        uses: Files and folders that the output is made from; missing ones are skipped.
        replaces: Whether the files in the folder are replaced.

    Raises:
        OutputError: If the folder is one of these, is inside one, or contains one.
    """
    # Not `Path.resolve`, which raises a RuntimeError for a link to itself.
    target = Path(os.path.realpath(out))
    for used in uses:
        source = Path(used)
        if not source.exists():
            continue
        inside = _lies_in(source.resolve(), target) and (replaces or source.is_dir())
        if inside or (source.is_dir() and _lies_in(target, source.resolve())):
            raise OutputError(
                f"The output folder must be apart from the run's inputs, but {out} is {used}, is "
                f"inside it, or contains it. Choose another folder."
            )


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is the folder or inside it, after links are resolved."""
    if not folder.exists():
        return False
    return any(each.exists() and each.samefile(folder) for each in (path, *path.parents))


def is_run(path: str | Path) -> bool:
    """Whether a path is a run's folder."""
    try:
        return (Path(path) / RECORD).is_file()
    except OSError:  # not a valid path, such as a text that is too long
        return False
