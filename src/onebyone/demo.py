"""The whole line on embedded data: the article's classic network, trained, then shrunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onebyone.data import load_data
from onebyone.pipeline import (
    ShrinkSettings,
    Shrunk,
    TrainSettings,
    shrink_loaded,
    train_loaded,
)
from onebyone.profiling.latency import threads
from onebyone.randomness import seeded
from onebyone.runs import load_source

EPOCHS = 30
DISTIL_EPOCHS = 60
BUDGET = "params=2%"


def run_demo(
    out: str | Path,
    *,
    command: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> Shrunk:
    """Train the classic network on the digits, then rewrite its head and convolutions.

    Args:
        out: Folder for two runs, ``classic`` and ``small``; earlier ones are replaced.
        command: The command line, for the records.
        progress: Told of the steps done.

    Raises:
        OutputError: If the folder cannot be used.
    """
    # A network this small gains nothing from a second thread, and loses by waiting for it.
    with threads(1):
        return _run(Path(out), command, progress)


def _run(
    folder: Path, command: Sequence[str], progress: Callable[[int, int, str], None] | None
) -> Shrunk:
    data = load_data("digits")
    with seeded(0):
        classic = load_source("onebyone:classic")
    common: dict[str, Any] = {"overwrite": True, "command": command, "progress": progress}
    training = TrainSettings(epochs=EPOCHS, out=folder / "classic", **common)
    train_loaded(classic.model, classic.source, data, training)
    trained = load_source(folder / "classic")
    shrinking = ShrinkSettings(budget=BUDGET, epochs=DISTIL_EPOCHS, out=folder / "small", **common)
    return shrink_loaded(trained.model, trained.source, data, shrinking)
