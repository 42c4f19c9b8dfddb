"""Runs that a benchmark needs: made once, gone on with where they stopped, then kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onebyone.core.records import RunRecord
from onebyone.core.write_files import write_text
from onebyone.pipeline.run_folder import is_run


def run_once(folder: Path, go: Callable[..., Any], **asked: Any) -> RunRecord:
    """Return the record of a finished run, running or resuming it first if need be.

    Args:
        folder: Of the run.
        go: Makes the run, in the folder ``out``; goes on with it if ``resume``.
        **asked: What decides the run; kept beside the folder. A finished run is not made again, so
            one that was asked for otherwise ends the benchmark.
    """
    record = RunRecord.load(folder / "run.json") if is_run(folder) else None
    beside = folder.with_name(f"{folder.name}.asked.json")
    if record is not None and record.status.state == "finished":
        earlier = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else None
        if earlier != asked:
            raise SystemExit(
                f"{folder} holds a run with {earlier}, not with {asked}: name another folder, or "
                "remove it."
            )
        return record
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(beside, json.dumps(asked))
    go(out=folder, resume=record is not None)
    return RunRecord.load(folder / "run.json")
