"""One trial, as a worker process carries it out."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onebyone.core.errors import OneByOneError
from onebyone.core.locks import FolderLock, alone_on_machine
from onebyone.core.records import RunRecord, SweepTrial
from onebyone.pipeline.run_folder import RECORD
from onebyone.pipeline.sweep.folder import SWEEP, trial_folder

# Runs a command line of `shrink`, going on with what is in its folder; returns an error's message.
Shrink = Callable[[Sequence[str]], str]
# Seconds to wait for a process of the same trial on a node that the sweep has lost: it may still
# be running, and will then have finished the trial.
ORPHAN_SECONDS = 3600.0


@dataclass(frozen=True)
class Ended:
    """How a start of a trial ended.

    Attributes:
        error: The message; empty if the trial finished.
        host: Name of the machine.
        seconds: Wall time, without waiting for the machine.
    """

    error: str
    host: str
    seconds: float


@dataclass(frozen=True)
class Task:
    """What workers do with a trial.

    Attributes:
        shrink: Makes the run; a function that workers can import.
        out: Folder of the sweep, on a disk that all machines share.
        directory: Where the command was started: relative paths start here.
        environment: Variables that are set in the worker.
    """

    shrink: Shrink
    out: Path
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, trial: SweepTrial) -> Ended:
        """Carry out a trial while nothing else is measured on this machine."""
        host = socket.gethostname()
        try:
            os.chdir(self.directory)
            shared = (self.out / SWEEP).exists()
        except OSError:
            shared = False
        if not shared:
            return Ended(
                f"All machines of a sweep must see its folder and the folder that it was started "
                f"in, but {host} has no {self.out.absolute() / SWEEP}. Start it on a shared disk, "
                "or name the machines by --node.",
                host,
                0.0,
            )
        os.environ.update(self.environment)
        folder = trial_folder(self.out, trial.name)
        with alone_on_machine():
            start = time.perf_counter()
            try:
                FolderLock(folder, wait=ORPHAN_SECONDS).release()
                error = "" if is_finished(folder) else self.shrink(trial.command)
            except OneByOneError as failed:
                error = str(failed)
            return Ended(error, host, time.perf_counter() - start)


def is_finished(folder: Path) -> bool:
    """Whether a folder has a finished run.

    Raises:
        RecordError: If its record cannot be read.
    """
    file = folder / RECORD
    return file.exists() and RunRecord.load(file).status.state == "finished"
