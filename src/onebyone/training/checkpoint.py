"""Checkpoints: save a training after each epoch, and resume it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import msgspec
import torch

from onebyone.core.errors import OptionError, RecordError, first_line
from onebyone.core.identity import differences
from onebyone.core.processes import count, is_main, on_main
from onebyone.core.records import Epoch
from onebyone.core.write_files import write_file
from onebyone.training.job import Decision, Job

CHECKPOINT_FORMAT = 3
_CHECKPOINT_PARTS = ("settings", "decision", "model", "optimizer", "average", "best", "log")


def save(job: Job) -> None:
    """Write a checkpoint if the settings name a file for it; the main process does."""
    path = job.options.checkpoint
    if path is None or not is_main():
        return
    state = {
        "format": CHECKPOINT_FORMAT,
        "settings": job.settings,
        "decision": None if job.decision is None else tuple(job.decision),
        "model": job.student.state_dict(),
        "optimizer": job.optimizer.state_dict(),
        "average": None if job.average is None else job.average.state(),
        "best": job.best,
        "log": [epoch.to_json() for epoch in job.log],
    }

    def write(aside: Path) -> None:
        with aside.open("wb") as stream:  # given only a name, torch hides the system's error
            torch.save(state, stream)

    write_file(path, write, check=_readable)


def _readable(path: Path) -> None:
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise RecordError(f"{path} is damaged: {first_line(error)}.") from error


def decision_in(checkpoint: str | Path | None) -> Decision | None:
    """Return the decision of the trials that a checkpoint holds; ``None`` without a checkpoint."""
    if checkpoint is None:
        return None
    kept = on_main(lambda: _decision_at(Path(checkpoint)))
    return None if kept is None or not kept[2] else Decision(*kept)


def _decision_at(path: Path) -> Any:
    return _read(path, torch.device("cpu"))["decision"] if path.exists() else None


def resume(job: Job) -> bool:
    """Restore the state from a checkpoint, and return whether there is one."""
    path = job.options.checkpoint
    if path is None:
        return False
    place = job.device if count() == 1 else torch.device("cpu")  # each process has its own GPU
    state = on_main(lambda: _read(path, place) if path.exists() else None)
    if state is None:
        return False
    different = differences(state["settings"], job.settings)
    if different:
        raise OptionError(
            f"The checkpoint {path} must come from the same training, but has "
            f"{', '.join(different)}. Give the same options, or another path, or delete it."
        )
    job.student.load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    if job.average is not None:
        job.average.load_state(state["average"])
    job.best = state["best"]
    job.log.extend(state["log"])
    return True


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    advice = "Delete it to start anew, or give another path."
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if state["format"] != CHECKPOINT_FORMAT:
            raise RecordError(f"The checkpoint {path} is of another version. {advice}")
        log = [Epoch.from_json(text) for text in state["log"]]
        return {key: state[key] for key in _CHECKPOINT_PARTS} | {"log": log}
    except (
        OSError,
        EOFError,
        KeyError,
        TypeError,
        RuntimeError,
        pickle.UnpicklingError,
        msgspec.MsgspecError,
    ) as error:
        # Not torch's own text, which advises to run any code in the file.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors and numbers" if unsafe else first_line(error)
        raise RecordError(f"{path} cannot be read as a checkpoint: {reason}. {advice}") from error
