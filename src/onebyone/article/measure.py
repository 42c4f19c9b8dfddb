"""Measures every claim of the article; resumes an interrupted measurement."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import onebyone
from onebyone.article.layer import BATCHES, compare_layers, thread_counts
from onebyone.article.networks import RATES, Report, Trainer, compare_networks
from onebyone.article.pictures import activation_maps, reduction, weighting
from onebyone.article.record import ArticleRecord
from onebyone.article.shelf import Shelf
from onebyone.core.errors import OptionError
from onebyone.data import Data
from onebyone.runtimes import describe_machine

Progress = Callable[[int, int, str], None]

INPUT_SHAPE = (1, 28, 28)
CLASSES = 10
SEEDS = 5
ROUNDS = 30
COLD_PROCESSES = 3

# Relative durations of the trainings, for progress.
_WEIGHTS = {"classic": 100, "convolution-only": 90, "plain": 70, "extra-nonlinearity": 75}
_LAYER_WEIGHT, _WIDE_WEIGHT = 150, 100


def measure_article(
    data: Data,
    *,
    seeds: int = SEEDS,
    epochs: int | None = None,
    rounds: int = ROUNDS,
    cold_processes: int = COLD_PROCESSES,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> ArticleRecord:
    """Measure every claim of the article on a data set and on this machine.

    Each of the four networks is trained once at each of three learning rates. The best rate on
    validation data is then used for every seed. On two cores the digits take about three minutes,
    Fashion-MNIST about twenty.

    Args:
        data: Gray pictures of 28×28 pixels in 10 classes, such as ``load_data("digits")``.
        seeds: Number of seeds that each network is trained from. A verdict needs at least 2.
        epochs: Passes over the training data. The default is from 6 to 25, by its size.
        rounds: Timed samples of each contender, interleaved.
        cold_processes: Fresh processes for each order of the two cold calls.
        folder: Folder that keeps each finished training as JSON, so that an interrupted
            measurement can be resumed. Made if missing.
        progress: Called as ``progress(done, total, message)``.

    Raises:
        OptionError: If the pictures have another form, a number is too small, or the folder has
            trainings of another measurement.
        OutputError: If the folder cannot be made or written to.
        RecordError: If a training in the folder cannot be read.
        ModelError: If a network diverges, or a fresh Python process cannot be started.
    """
    _check(data, seeds=seeds, epochs=epochs, cold_processes=cold_processes)
    # Creating layers draws weights; the caller's random state must not change.
    with torch.random.fork_rng(devices=[]):
        return _measure(
            data,
            seeds=seeds,
            epochs=epochs or default_epochs(len(data.train)),
            rounds=rounds,
            cold_processes=cold_processes,
            shelf=Shelf(folder, data=data),
            progress=progress,
        )


def _measure(
    data: Data,
    *,
    seeds: int,
    epochs: int,
    rounds: int,
    cold_processes: int,
    shelf: Shelf,
    progress: Progress | None,
) -> ArticleRecord:
    trainer = Trainer(data, epochs=epochs, shelf=shelf)
    steps = len(BATCHES) * len(thread_counts()) + 2 * cold_processes
    work = _Work(progress, trainings=seeds + len(RATES), layer_steps=steps)
    with work.stage("layers"):
        layer = compare_layers(
            rounds=rounds, cold_processes=cold_processes, step=work.step(_LAYER_WEIGHT)
        )
    with work.stage("heads"):
        heads = compare_networks(
            trainer, "classic", "convolution-only", seeds=seeds, rounds=rounds, part=work.training
        )
    with work.stage("extra non-linearity"):
        nonlinearity = compare_networks(
            trainer, "plain", "extra-nonlinearity", seeds=seeds, rounds=rounds, part=work.training
        )
    with work.stage("pictures"):
        reduced = reduction(data, shelf, work.part(_WIDE_WEIGHT))
        network = trainer.model("convolution-only")
        weighted, activations = weighting(network, data), activation_maps(network, data)
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return ArticleRecord(
        onebyone=onebyone.__version__,
        created=now,
        data=data.info(),
        machine=describe_machine(),
        layer=layer,
        heads=heads,
        nonlinearity=nonlinearity,
        weighting=weighted,
        reduction=reduced,
        activations=activations,
        seconds=work.seconds,
    )


def default_epochs(examples: int) -> int:
    """Return the default number of epochs: 25 on small data, 6 on large data."""
    return min(25, max(6, 30_000 // max(examples, 1)))


def _check(data: Data, *, seeds: int, epochs: int | None, cold_processes: int) -> None:
    if (
        data.inputs.example_text() != "×".join(map(str, INPUT_SHAPE))
        or len(data.classes) != CLASSES
    ):
        raise OptionError(
            f"The data must be gray pictures of 28×28 pixels in {CLASSES} classes, got "
            f"{data.inputs.example_text()} in {len(data.classes)}. "
            f"Give digits, mnist or fashion-mnist."
        )
    for name, value in (("seeds", seeds), ("epochs", epochs), ("cold_processes", cold_processes)):
        if value is not None and value < 1:
            raise OptionError(f"`{name}` must be at least 1, got {value}.")


class _Work:
    """Tracks the progress of the measurement, and the time of its stages."""

    def __init__(self, progress: Progress | None, *, trainings: int, layer_steps: int) -> None:
        self._progress = progress
        self._total = trainings * sum(_WEIGHTS.values()) + _LAYER_WEIGHT + _WIDE_WEIGHT
        self._layer_steps = layer_steps
        self._done = 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def part(self, weight: int) -> Report:
        """Begin a part, and return the function that reports its progress."""
        before = self._done
        self._done += weight

        def report(fraction: float, message: str) -> None:
            if self._progress is not None:
                self._progress(round(before + fraction * weight), self._total, message)

        return report

    def training(self, network: str) -> Report:
        return self.part(_WEIGHTS[network])

    def step(self, weight: int) -> Callable[[str], None]:
        report, taken = self.part(weight), 0

        def tell(message: str) -> None:
            nonlocal taken
            report(taken / self._layer_steps, message)
            taken += 1

        return tell
