"""The whole line as one function: profile, calibrate, plan, apply, distil, compare, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import nn

from onebyone import __version__
from onebyone.calibration import CalibrationData
from onebyone.comparison import TRAIN_EXAMPLES, measure, side_by_side
from onebyone.data import Data, as_data, load_data
from onebyone.differences import find_disagreements
from onebyone.errors import OneByOneError, OptionError, OutputError
from onebyone.evaluation import (
    MetricFunction,
    agreement,
    evaluate,
    paired_difference,
    score,
)
from onebyone.models import load_weights
from onebyone.planning import HeadChoice
from onebyone.planning import plan as make_plan
from onebyone.profiling import profile
from onebyone.records import Disagreement, ModelSource, Plan, Profile, RunRecord, Status
from onebyone.rewrites import apply, restructure
from onebyone.runs import CHECKPOINT, ONE_SHOT, RunFolder, load_source
from onebyone.runtimes import describe_machine
from onebyone.sites import check_finite, evaluation_copy
from onebyone.training import distill, train

Progress = Callable[[int, int, str], None]

CALIBRATION_EXAMPLES = 1024
EPOCHS = 5


class Shrunk(NamedTuple):
    """A smaller network, and all that was measured of it.

    Attributes:
        model: In evaluation mode, on the CPU.
        record: What ``run.json`` keeps.
    """

    model: nn.Module
    record: RunRecord


@dataclass
class _Line:
    """A run on its way: its record grows from stage to stage and is kept in the folder."""

    record: RunRecord
    folder: RunFolder | None
    progress: Progress | None
    earlier: RunRecord | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    place: str = ""

    @property
    def checkpoint(self) -> Path | None:
        """Where training keeps its state."""
        return None if self.folder is None else self.folder.file(CHECKPOINT)

    def finish(self) -> None:
        """Write the record as finished, and remove what only an unfinished run needs."""
        self.keep(status=Status(state="finished", stage=self.record.status.stage))
        if self.folder is not None:
            for name in (CHECKPOINT, ONE_SHOT):
                self.folder.file(name).unlink(missing_ok=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run a stage: time it, and keep the record as it is when it ends or breaks off."""
        self.place = ""
        self.keep(status=Status(state="running", stage=name))
        start = time.perf_counter()
        try:
            yield
        except KeyboardInterrupt:
            self.keep(status=Status(state="interrupted", stage=name, detail=self.place))
            raise
        except OneByOneError as error:
            self.keep(status=Status(state="failed", stage=name, detail=str(error)))
            raise
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            self.keep(status=Status(state="failed", stage=name, detail=detail))
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def keep(self, **changes: Any) -> None:
        """Add to the record and write it."""
        self.record = self.record.with_(seconds=dict(self.seconds), **changes)
        if self.folder is not None:
            self.folder.save(self.record)

    def tell(self, done: int, total: int, message: str = "") -> None:
        """Pass progress on, and remember it for a run that breaks off."""
        self.place = f"{message} ({done} of {total})" if message else f"{done} of {total}"
        if self.progress is not None:
            self.progress(done, total, f"{self.record.status.stage}: {message}")


def shrink(
    model: nn.Module | str | Path,
    data: object,
    *,
    weights: str | Path | None = None,
    model_options: Mapping[str, Any] | None = None,
    **settings: Unpack[ShrinkSettings],
) -> Shrunk:
    """Make a network smaller within a budget, keep what it knows, and measure the result.

    Args:
        model: A network, not modified; or what :func:`onebyone.load_model` takes.
        data: An :class:`onebyone.data.Data`, what :func:`onebyone.data.load_data` takes, or
            ``(train, test)`` or ``(train, validation, test)``.
        weights: Where ``model`` is a name: a file, or ``"pretrained"``.
        model_options: Where ``model`` is a name: options of its factory.
        settings: See :class:`ShrinkSettings`: the budget, the folder, and how to measure.

    Returns:
        The smaller network, and the record of the run.

    Raises:
        BudgetError: If the budget cannot be read or reached; says what is reachable.
        OutputError: If ``out`` cannot be used.
        OneByOneError: As the stages do: bad data, weights, networks.

    Examples:
        >>> small, record = shrink(network, data, budget="macs=50%", out="runs/x")  # doctest: +SKIP
    """
    network, source = _network(model, weights, model_options or {})
    return shrink_loaded(network, source, data, **settings)


class ShrinkSettings(TypedDict, total=False):
    """How a network is shrunk; every setting has a default.

    Attributes:
        budget: Such as ``"macs=50%"`` (the default) or ``["macs=50%", "params=2M"]``.
        plan: A plan to carry out instead of making one; then ``budget`` is not read.
        out: Folder for the record, plan, weights and report; nothing is written without.
        head: ``auto``, ``keep``, ``exact`` or ``gap``; see :func:`onebyone.plan`.
        leave: Names of modules to leave alone.
        epochs: Of distilling from the original; 0 stops before fine-tuning.
        learning_rate: Of the distilling, if not its default.
        calibration_examples: Training inputs, without labels, that weights are fitted on.
        runtimes: In which the latency of both networks is measured, interleaved.
        metric: A built-in name, or a function ``(outputs, targets) -> scores (n,)``.
        batch: Batch size of the timed input.
        num_threads: Torch's threads while timing.
        seed: Of the calibration's examples and of the training.
        device: Where to run; CUDA where there is one, by default.
        resume: Go on with the unfinished run in ``out``.
        overwrite: Replace the run in ``out``.
        command: The command line, for the record.
        progress: Told of the steps done, in each stage.
    """

    budget: str | Iterable[str]
    plan: Plan | None
    out: str | Path | None
    head: HeadChoice
    leave: Sequence[str]
    epochs: int
    learning_rate: float | None
    calibration_examples: int
    runtimes: Sequence[str]
    metric: str | MetricFunction
    batch: int
    num_threads: int | None
    seed: int
    device: str | None
    resume: bool
    overwrite: bool
    command: Sequence[str]
    progress: Progress | None


def shrink_loaded(
    network: nn.Module,
    source: ModelSource,
    data: object,
    *,
    budget: str | Iterable[str] = "macs=50%",
    plan: Plan | None = None,
    out: str | Path | None = None,
    head: HeadChoice = "auto",
    leave: Sequence[str] = (),
    epochs: int = EPOCHS,
    learning_rate: float | None = None,
    calibration_examples: int = CALIBRATION_EXAMPLES,
    runtimes: Sequence[str] = ("eager",),
    metric: str | MetricFunction = "accuracy",
    batch: int = 1,
    num_threads: int | None = None,
    seed: int = 0,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Shrunk:
    """Do what :func:`shrink` does for a network whose source is known.

    Args:
        network: Not modified.
        source: Where it came from, for the record: what the folder's network is rebuilt from.
        data: As for :func:`shrink`. The rest as in :class:`ShrinkSettings`.
    """
    _check(epochs, calibration_examples, batch)
    check_finite(network)
    examples = _data(data, seed)
    measuring = _Measuring(
        shape=(batch, *examples.input_shape),
        runtimes=tuple(runtimes),
        num_threads=num_threads,
        device=_device(device),
        metric=metric,
    )
    device = measuring.device
    planner = _Planner(budget, plan, head, tuple(leave))
    line = _start(source, examples, out, resume, overwrite, measuring, seed, command, progress)
    original = evaluation_copy(network, device="cpu")
    with line.stage("profile"):
        line.keep(profile_before=measuring.profile(original, source.name))
    calibration = CalibrationData(
        examples.train.take(calibration_examples, seed), examples.name, seed, device=device
    )
    with line.stage("plan"):
        chosen = planner.plan(line, original, calibration)
        line.keep(plan=chosen)
    with line.stage("apply"):
        small = _applied(line, original, chosen, calibration)
    with line.stage("one-shot"):
        _measure_one_shot(line, original, small, examples, measuring)
    if epochs:
        with line.stage("distil"):
            trained = distill(
                small,
                examples,
                teacher=original,
                epochs=epochs,
                seed=seed,
                device=device,
                learning_rate=learning_rate,
                metric=metric,
                progress=line.tell,
                checkpoint=line.checkpoint,
            )
            small = trained.model
            line.keep(training=trained.log)
    with line.stage("compare"):
        _compare(line, original, small, examples, measuring)
    line.finish()
    return Shrunk(evaluation_copy(small, device="cpu"), line.record)


def train_loaded(
    network: nn.Module,
    source: ModelSource,
    data: object,
    *,
    epochs: int,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    out: str | Path | None = None,
    runtimes: Sequence[str] = ("eager",),
    metric: str | MetricFunction = "accuracy",
    batch: int = 1,
    num_threads: int | None = None,
    seed: int = 0,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Shrunk:
    """Train a network as a run: with a folder that keeps its weights, record and report.

    Args:
        network: Not modified.
        source: Where it came from, for the record.
        data: As for :func:`shrink`.
        epochs: Passes over the training data.
        batch_size: Of the training, if not its default.
        learning_rate: Of the training, if not its default. The rest as in
            :class:`ShrinkSettings`.

    Returns:
        The trained network, and the record of the run.
    """
    _check(epochs, 1, batch)
    check_finite(network)
    examples = _data(data, seed)
    measuring = _Measuring(
        shape=(batch, *examples.input_shape),
        runtimes=tuple(runtimes),
        num_threads=num_threads,
        device=_device(device),
        metric=metric,
    )
    line = _start(source, examples, out, resume, overwrite, measuring, seed, command, progress)
    with line.stage("train"):
        trained = train(
            network,
            examples,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            device=measuring.device,
            metric=metric,
            progress=line.tell,
            checkpoint=line.checkpoint,
        )
        line.keep(training=trained.log)
        if line.folder is not None:
            line.folder.save_network(trained.model)
    with line.stage("measure"):
        line.keep(**measuring.alone(trained.model, source.name, examples))
    line.finish()
    return Shrunk(evaluation_copy(trained.model, device="cpu"), line.record)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw with this seed inside, and leave torch's own generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _check(epochs: int, calibration_examples: int, batch: int) -> None:
    if epochs < 0:
        raise OptionError(f"`epochs` must be 0 or more, got {epochs}.")
    if calibration_examples < 1:
        raise OptionError(f"`calibration_examples` must be 1 or more, got {calibration_examples}.")
    if batch < 1:
        raise OptionError(f"`batch` must be 1 or more, got {batch}.")


def _network(
    model: nn.Module | str | Path, weights: str | Path | None, options: Mapping[str, Any]
) -> tuple[nn.Module, ModelSource]:
    if isinstance(model, nn.Module):
        if weights is not None or options:
            raise OptionError(
                "`weights` and `model_options` must be left out where `model` is a module: load "
                "them into it first."
            )
        return model, ModelSource(name=type(model).__name__, spec=None)
    loaded = load_source(model, weights=weights, **options)
    return loaded.model, loaded.source


def _data(data: object, seed: int) -> Data:
    if isinstance(data, str):
        return load_data(data, seed=seed)
    return data if isinstance(data, Data) else as_data(data, seed=seed)


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class _Measuring:
    """How networks are measured, all alike."""

    shape: tuple[int, ...]
    runtimes: tuple[str, ...]
    num_threads: int | None
    device: str
    metric: str | MetricFunction

    def profile(self, network: nn.Module, name: str) -> Profile:
        return profile(
            network,
            input_shape=self.shape,
            name=name,
            runtimes=self.runtimes,
            num_threads=self.num_threads,
            device=self.device,
        )

    def alone(self, network: nn.Module, name: str, data: Data) -> dict[str, Any]:
        """Return what a record keeps of one network by itself."""
        profiled = self.profile(network, name)
        test = score([network], data.test, metric=self.metric, device=self.device).each[0]
        sample = data.train.take(TRAIN_EXAMPLES, 0)
        train_metric = evaluate(network, sample, metric=self.metric, device=self.device)
        measured = measure(
            network,
            self.shape,
            timings=dict(profiled.latency),
            test=test.summary(),
            train=train_metric,
            calibration_error=test.calibration_error(),
        )
        return {"profile_after": profiled, "after": measured}


def _start(
    source: ModelSource,
    data: Data,
    out: str | Path | None,
    resume: bool,
    overwrite: bool,
    measuring: _Measuring,
    seed: int,
    command: Sequence[str],
    progress: Progress | None,
) -> _Line:
    if resume and out is None:
        raise OptionError("`resume` needs the folder of the run to go on with: give `out`.")
    folder = None if out is None else RunFolder(out, resume=resume, overwrite=overwrite)
    record = RunRecord(
        onebyone=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        status=Status(state="running", stage="start"),
        source=source,
        machine=describe_machine(measuring.device),
        data=data.info(),
        command=tuple(command),
        seed=seed,
    )
    earlier = None if folder is None else folder.earlier
    if earlier is not None:
        _check_same_run(earlier, record)
    return _Line(record, folder, progress, earlier)


def _check_same_run(earlier: RunRecord, record: RunRecord) -> None:
    """Check that an unfinished run is the one that is asked for.

    Raises:
        OutputError: If it is finished, or another one.
    """
    if earlier.status.state == "finished":
        raise OutputError("The run has finished: there is nothing to resume.")
    for what, old, new in (
        ("network", earlier.source, record.source),
        ("data", earlier.data, record.data),
        ("seed", earlier.seed, record.seed),
    ):
        if old != new:
            raise OutputError(
                f"A run can only be resumed with the same {what}: it has {old}, got {new}. "
                f"Give the same command as before, or replace the run by --overwrite."
            )


@dataclass(frozen=True)
class _Planner:
    """How a plan is come by: given, kept from before, or made."""

    budget: str | Iterable[str]
    given: Plan | None
    head: HeadChoice
    leave: tuple[str, ...]

    def plan(self, line: _Line, original: nn.Module, calibration: CalibrationData) -> Plan:
        if self.given is not None:
            return self.given
        asked = [self.budget] if isinstance(self.budget, str) else list(self.budget)
        kept = None if line.earlier is None else line.earlier.plan
        if kept is None:
            return make_plan(
                original,
                calibration,
                budget=asked,
                head=self.head,
                leave=self.leave,
                name=line.record.source.name,
                device=calibration.device,
                progress=line.tell,
            )
        words = [word.strip() for text in asked for word in text.split(",")]
        made_for = [budget.asked for budget in kept.budgets]
        if words != made_for:
            raise OutputError(
                f"A run can only be resumed with the same budget: it has {', '.join(made_for)}, "
                f"got {', '.join(words)}."
            )
        return kept


def _applied(
    line: _Line, original: nn.Module, chosen: Plan, calibration: CalibrationData
) -> nn.Module:
    kept = None if line.folder is None else line.folder.file(ONE_SHOT)
    if line.earlier is not None and kept is not None and kept.exists():
        small = restructure(original, chosen)
        load_weights(small, kept, network="the one-shot network")
        return small.eval()
    device = calibration.device
    small = apply(original, chosen, calibration, device=device, progress=line.tell).eval()
    if line.folder is not None:
        line.folder.save_network(small, ONE_SHOT)
    return small


def _measure_one_shot(
    line: _Line, original: nn.Module, small: nn.Module, data: Data, measuring: _Measuring
) -> None:
    both = score(
        [original, small],
        data.test,
        metric=measuring.metric,
        device=measuring.device,
        progress=line.tell,
    )
    line.keep(
        one_shot=measure(
            small,
            measuring.shape,
            test=both.each[1].summary(),
            calibration_error=both.each[1].calibration_error(),
        ),
        one_shot_difference=paired_difference(*both.each),
        one_shot_agreement=agreement(*both.each),
        one_shot_divergence=both.divergences[1],
    )


def _compare(
    line: _Line, original: nn.Module, small: nn.Module, data: Data, measuring: _Measuring
) -> None:
    both = side_by_side(
        original,
        small,
        data=data,
        input_shape=measuring.shape,
        runtimes=measuring.runtimes,
        metric=measuring.metric,
        num_threads=measuring.num_threads,
        device=measuring.device,
        progress=line.tell,
    )
    after = measuring.profile(small, line.record.source.name)
    if line.folder is not None:
        line.folder.save_network(small)
    differ: tuple[Disagreement, ...] = ()
    if both.test is not None:
        differ = find_disagreements(original, small, data.test, both.test, device=measuring.device)
    line.keep(
        before=both.record.before,
        after=both.record.after,
        comparison=both.record,
        profile_after=after,
        disagreements=differ,
    )
