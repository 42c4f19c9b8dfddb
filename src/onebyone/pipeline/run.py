"""The state of a run: how it starts, what each stage records, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from onebyone.calibration.infer_task import Known, meaning_of
from onebyone.calibration.meaning import Meaning, TaskLike
from onebyone.core.errors import BudgetError, OneByOneError, OptionError, OutputError
from onebyone.core.identity import check_same, words_of
from onebyone.core.measures import Measure
from onebyone.core.processes import is_main, on_main
from onebyone.core.records import Identity, ModelSource, Profile, RunRecord, Status, TrainLog
from onebyone.core.run_lines import LOGGER
from onebyone.core.settings.runs import RunSettings
from onebyone.core.task import Task
from onebyone.core.tensor_trees import first_examples, repeated
from onebyone.core.units import format_seconds
from onebyone.core.version import __version__
from onebyone.data import Data, as_data, load_data
from onebyone.data.hashing import hash_data
from onebyone.networks.examples import Example, inputs_of
from onebyone.networks.hashing import hash_network, hash_weights
from onebyone.networks.surgery import as_device
from onebyone.pipeline.run_folder import (
    CHECKPOINT,
    EPOCHS,
    INT8_CHECKPOINT,
    INT8_EPOCHS,
    ONE_SHOT,
    RunFolder,
    check_apart,
)
from onebyone.pipeline.run_times import RunTimes, times_of
from onebyone.pipeline.trackers import Tracker, check_trackers, trackers_of
from onebyone.profiling import profile_on
from onebyone.runtimes import describe_machine

# A line for each finished stage; a command shows them on standard error.
T = TypeVar("T")


class Shrunk(NamedTuple):
    """A smaller network, and the record of its run.

    Attributes:
        model: The network, in evaluation mode, on the CPU.
        record: The content of ``run.json``.
    """

    model: nn.Module
    record: RunRecord

    def __str__(self) -> str:
        return str(self.record)


@dataclass
class Run:
    """A run in progress: each stage adds to its record, which is saved in the folder."""

    record: RunRecord
    folder: RunFolder | None
    settings: RunSettings
    device: str
    example: Example
    meaning: Meaning
    seconds: dict[str, float] = field(default_factory=dict)
    trackers: tuple[Tracker, ...] = ()
    place: str = ""
    remark: str = ""  # on the present stage, for the log
    stages: Sequence[str] = ()
    times: RunTimes | None = None

    @property
    def scoring(self) -> dict[str, Any]:
        """Options of scoring, the same for all networks."""
        return {"metric": self.settings.metric, "task": self.meaning, "device": self.device}

    @property
    def training(self) -> dict[str, Any]:
        """Options of training, with its checkpoint."""
        return self._training(CHECKPOINT, EPOCHS)

    @property
    def int8_training(self) -> dict[str, Any]:
        """Options of the distillation in int8, with a checkpoint of its own."""
        return self._training(INT8_CHECKPOINT, INT8_EPOCHS)

    def _training(self, checkpoint: str, epochs: str) -> dict[str, Any]:
        # All processes know the checkpoint; the main one alone has the folder, and writes it.
        out = self.settings.out
        kept = None if out is None else Path(out) / checkpoint
        seed = self.settings.seed
        how = {"capture": self.settings.capture, "seed": seed, "checkpoint": kept}
        told = partial(self.log_epoch, name=epochs)
        return {**self.scoring, **how, "on_epoch": told, "progress": self.tell}

    def on_main(self, call: Callable[[], T]) -> T:
        """Let the main process do what several cannot share; all have its result and record."""
        result, self.record = on_main(lambda: (call(), self.record))
        return result

    def log_epoch(self, log: TrainLog, name: str = EPOCHS) -> None:
        """Write the epochs of a training to the folder, and report the last one to trackers."""
        if self.folder is not None:
            self.folder.save_epochs(log, name)
        for tracker in self.trackers:
            tracker.log(self.record.status.stage, log)

    def profile(self, network: nn.Module, *, timed: bool = True) -> Profile:
        """Profile a network: its costs and, if asked, its times, in total and for each layer."""
        return on_main(
            lambda: profile_on(
                network,
                self.example,
                name=self.record.source.name,
                runtimes=tuple(self.settings.runtimes),
                num_threads=self.settings.num_threads,
                device=self.device,
                timed=timed,
            )
        )

    def finish(self) -> None:
        """Write the record as finished, and remove files that only a resumed run needs."""
        self.keep(status=Status(state="finished", stage=self.record.status.stage))
        if self.folder is not None:
            self.folder.remove(CHECKPOINT, INT8_CHECKPOINT, ONE_SHOT)
            if self.times is not None:
                self.times.keep(self.seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run a stage: time it, and save the record when it ends or fails."""
        self.place = self.remark = ""
        before = self.seconds.get(name, 0.0)  # from before the run was resumed
        start = time.perf_counter()
        try:
            self.keep(status=Status(state="running", stage=name))
            yield
        except BaseException as error:
            self.seconds[name] = before + time.perf_counter() - start
            self.break_off(name, error)
            raise
        self.seconds[name] = before + time.perf_counter() - start
        took = format_seconds(self.seconds[name])
        said = self.remark and f"; {self.remark}"
        self.log(f"{self._numbered(name)}: finished after {took}{said}{self._left(name)}")

    def _numbered(self, stage: str) -> str:
        """Return a stage with its number: ``plan (2 of 6)``."""
        if stage not in self.stages:
            return stage
        return f"{stage} ({self.stages.index(stage) + 1} of {len(self.stages)})"

    def _left(self, finished: str) -> str:
        """Return how long the rest of the run will take, in words; empty where that is unknown."""
        left = None if self.times is None else self.times.left(self.stages, finished)
        if left is None:
            return ""
        return f"; about {format_seconds(left)} left, by the last run like it"

    def log(self, line: str) -> None:
        """Add a line to the folder's log, and show it where a command listens."""
        if is_main():
            LOGGER.info(line)
        if self.folder is not None:
            self.folder.log(line)

    def break_off(self, stage: str, error: BaseException) -> None:
        """Write the record as interrupted or failed; never raises an error of its own."""
        if isinstance(error, KeyboardInterrupt):
            status = Status(state="interrupted", stage=stage, detail=self.place)
        else:
            own = isinstance(error, OneByOneError)
            told = str(error) if own else f"{type(error).__name__}: {error}"
            status = Status(state="failed", stage=stage, detail=told)
        # On a full disk the earlier record remains; the run can still be resumed from it.
        with suppress(OutputError):
            self.keep(status=status)
        if self.folder is not None:  # a command shows the error itself
            self.folder.log(f"{self._numbered(stage)}: {status.state}: {status.detail}")

    def keep(self, **changes: Any) -> None:
        """Add to the record and write it."""
        record = self.record.with_(seconds=dict(self.seconds), **changes)
        if self.folder is not None:
            self.folder.save(record)
        self.record = record  # not before: a run whose end is not on the disk has not finished

    def tell(self, done: int, total: int, message: str = "") -> None:
        """Report progress, and keep it for the record of an interrupted run."""
        self.place = f"{message} ({done} of {total})" if message else f"{done} of {total}"
        if self.settings.progress is not None and is_main():
            self.settings.progress(
                done, total, f"{self._numbered(self.record.status.stage)}: {message}"
            )


def read_data(data: object, settings: RunSettings) -> Data:
    """Return the data of a run; load it if it is given by name."""
    seed, ignored = settings.seed, settings.ignore_index
    if isinstance(data, str):
        return load_data(data, seed=seed, ignore_index=ignored)
    return data if isinstance(data, Data) else as_data(data, seed=seed, ignore_index=ignored)


def meaning_of_run(
    network: nn.Module,
    source: ModelSource,
    data: Data,
    settings: RunSettings,
    task: TaskLike | Meaning | None,
    *,
    learns: bool = False,
) -> Meaning:
    """Return what the network's outputs mean, for all stages."""
    asks = settings.metric == "accuracy"
    return meaning_of(
        network,
        data,
        task,
        known=Known.of(source, learns=learns, asks_accuracy=asks),
        ignore_index=settings.ignore_index,
    )


@contextmanager
def started(
    network: nn.Module, source: ModelSource, data: Data, settings: RunSettings, meaning: Meaning
) -> Iterator[Run]:
    """Check all that can be checked early, then start a run, or resume one that is the same."""
    check_trackers(settings.log)
    device = str(as_device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    example = _example(network, data, settings.batch)
    meaning = meaning.to(device)
    record = on_main(
        lambda: RunRecord(
            onebyone=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            status=Status(state="running", stage="start"),
            source=source,
            machine=describe_machine(device),
            data=data.info(),
            command=tuple(settings.command),
            folder=None if settings.out is None else str(settings.out),
            seed=settings.seed,
            task=meaning.info(),
        )
    )
    if settings.out is None:
        run = Run(record, None, settings, device, example, meaning)
        with _reported(run, settings):
            yield run
        return
    uses = (*settings.uses, *([source.spec] if source.spec is not None else []))
    on_main(lambda: check_apart(settings.out or "", uses, replaces=settings.overwrite))
    deciding = {**settings.deciding, "device": device, "task": _words_of_task(meaning.task)}
    identity = Identity(
        network=hash_network(network),
        data=hash_data(data),
        settings={name: words_of(value) for name, value in deciding.items()},
        versions={"onebyone": __version__, "torch": str(torch.__version__)},
    )
    record = record.with_(identity=identity, weights=hash_weights(network))
    with _folder_of(record, settings) as (record, folder):
        run = Run(record, folder, settings, device, example, meaning, dict(record.seconds))
        run.times = times_of(record)
        try:
            with _reported(run, settings):
                yield run
        except BaseException as error:
            if run.record.status.state == "running" and run.record.status.stage != "start":
                run.break_off(run.record.status.stage, error)  # between two stages
            if isinstance(error, BudgetError) and run.record.plan is None and folder is not None:
                folder.discard()  # there is nothing to resume: what was asked cannot be done
            raise


@contextmanager
def _folder_of(
    asked: RunRecord, settings: RunSettings
) -> Iterator[tuple[RunRecord, RunFolder | None]]:
    """Yield the record to go on with, and the folder that it is in: the main process has it."""
    opened: list[RunFolder] = []

    def opening() -> RunRecord:
        assert settings.out is not None
        folder = RunFolder(settings.out, resume=settings.resume, overwrite=settings.overwrite)
        opened.append(folder)
        earlier = folder.earlier
        return asked if earlier is None else _resumed(earlier, asked, settings.out)

    try:
        yield on_main(opening), next(iter(opened), None)
    finally:
        for folder in opened:
            folder.close()


def _example(network: nn.Module, data: Data, batch: int) -> Example:
    """Return what networks are timed on: of several inputs real ones, which fit one another."""
    if data.inputs.is_single:
        return Example(data.inputs.with_batch(batch))
    inputs, targets = next(iter(data.test.batches(batch)))
    if len(targets) < batch:
        inputs = repeated(first_examples(inputs, 1), batch)
    return Example(inputs_of(network, inputs), inputs)


@contextmanager
def _reported(run: Run, settings: RunSettings) -> Iterator[None]:
    """Report a run to the services that the settings name, and end it there."""
    config = {name: words_of(value) for name, value in settings.deciding.items()}
    folder = None if run.folder is None else run.folder.path
    if is_main():
        run.trackers = trackers_of(settings.log, run.record.source.name, config, folder)
    try:
        yield
    finally:
        failed = run.record.status.state != "finished"
        for tracker in run.trackers:
            tracker.close(run.record, failed=failed)


def _words_of_task(task: Task) -> str:
    """Return a task's name; for a user's task also the identity of its functions."""
    if isinstance(task.divergence, Measure):
        return task.name
    return f"{task.name}: {words_of([task.divergence, task.metric, task.loss])}"


def _resumed(earlier: RunRecord, asked: RunRecord, out: str | Path) -> RunRecord:
    """Return the record of an unfinished run, to resume it.

    Raises:
        OptionError: If it was started with another network, other data or other settings.
    """
    advice = "Give the same command as before, or replace the run by --overwrite."
    if earlier.identity is None or asked.identity is None:
        raise OptionError(f"The run in {out} does not say what it was started with. {advice}")
    check_same(earlier.identity, asked.identity, where=out, advice=advice)
    same_machine = earlier.machine == asked.machine
    return earlier.with_(
        status=asked.status,
        machine=asked.machine,
        command=asked.command,
        folder=asked.folder,
        source=asked.source,
        # Times of another machine must not be compared with those of this one.
        profile_before=earlier.profile_before if same_machine else None,
    )
