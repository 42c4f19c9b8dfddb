"""The demo: train a plain network on embedded data, then make it faster and smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onebyone.core.randomness import seeded
from onebyone.core.settings.runs import ShrinkSettings, TrainRunSettings
from onebyone.data import load_data
from onebyone.pipeline.loading import load_source
from onebyone.pipeline.run import Shrunk
from onebyone.pipeline.shrink import shrink_loaded
from onebyone.pipeline.train import train_loaded
from onebyone.profiling.latency import threads

EPOCHS = 12
DISTIL_EPOCHS = 8
BUDGET = "latency=50%"


def run_demo(
    out: str | Path,
    *,
    command: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> Shrunk:
    """Train a plain network on the digits, then rewrite it for half its time in eager.

    Its layers are large enough for a rewrite to be faster on any processor, and small enough to be
    trained in a minute. If half the time is out of reach, the nearest plan is used.

    Args:
        out: Folder for two runs, ``plain`` and ``small``; earlier ones are replaced.
        command: The command line, for the records.
        progress: Called with the number of steps done.

    Raises:
        OutputError: If the folder cannot be used.
    """
    # For a network this small, a second thread gains little; with one, times are the steadiest.
    with threads(1):
        return _run(Path(out), command, progress)


def _run(
    folder: Path, command: Sequence[str], progress: Callable[[int, int, str], None] | None
) -> Shrunk:
    data = load_data("digits")
    with seeded(0):
        plain = load_source("onebyone:plain")
    common: dict[str, Any] = {"overwrite": True, "command": command, "progress": progress}
    training = TrainRunSettings(epochs=EPOCHS, out=folder / "plain", **common)
    train_loaded(plain.model, plain.source, data, training)
    trained = load_source(folder / "plain")
    shrinking = ShrinkSettings(
        budget=BUDGET, closest=True, epochs=DISTIL_EPOCHS, out=folder / "small", **common
    )
    return shrink_loaded(trained.model, trained.source, data, shrinking)
