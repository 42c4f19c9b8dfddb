"""Runs that a benchmark needs: made once, gone on with where they stopped, then kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onebyone.core.records import RunRecord
from onebyone.pipeline.run_folder import is_run


def run_once(folder: Path, go: Callable[..., Any]) -> RunRecord:
    """Return the record of a finished run, running or resuming it first if need be."""
    record = RunRecord.load(folder / "run.json") if is_run(folder) else None
    if record is None or record.status.state != "finished":
        go(out=folder, resume=record is not None)
        record = RunRecord.load(folder / "run.json")
    return record
