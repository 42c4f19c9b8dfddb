"""The whole line as one function: profile, calibrate, plan, apply, distil, compare, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from onebyone import __version__
from onebyone.calibration import CalibrationData, drawn_for
from onebyone.comparison import TRAIN_EXAMPLES, measure, side_by_side
from onebyone.data import Data, as_data, load_data
from onebyone.differences import count_confusions, find_disagreements
from onebyone.errors import OneByOneError, OptionError, OutputError, UnknownNameError
from onebyone.evaluation import (
    MetricFunction,
    agreement,
    check_scorable,
    evaluate,
    paired_difference,
    score,
)
from onebyone.models import load_weights
from onebyone.planning import HeadChoice, Planner
from onebyone.planning.budget import check_budgets
from onebyone.profiling import profile
from onebyone.reconstruction import inputs_for, reconstruct
from onebyone.records import Disagreement, ModelSource, Plan, Profile, RunRecord, Status
from onebyone.rewrites import apply, restructure
from onebyone.runs import CHECKPOINT, ONE_SHOT, RunFolder, load_source
from onebyone.runtimes import describe_machine
from onebyone.sites import as_device, as_network, check_finite, evaluation_copy
from onebyone.tolerance import plan_within
from onebyone.training import check_distillation, distill, train

Progress = Callable[[int, int, str], None]

EPOCHS = 5
DEFAULT_BUDGET = "macs=50%"


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
    settings: RunSettings
    device: str
    shape: tuple[int, ...]
    earlier: RunRecord | None
    seconds: dict[str, float] = field(default_factory=dict)
    place: str = ""

    @property
    def scoring(self) -> dict[str, Any]:
        """How networks are scored, all alike."""
        return {"metric": self.settings.metric, "device": self.device}

    @property
    def training(self) -> dict[str, Any]:
        """How networks are trained, and where training keeps its state."""
        kept = None if self.folder is None else self.folder.file(CHECKPOINT)
        seed = self.settings.seed
        how = {"capture": self.settings.capture, "seed": seed, "checkpoint": kept}
        return {**self.scoring, **how, "progress": self.tell}

    def profile(self, network: nn.Module) -> Profile:
        """Count and time a network, whole and layer by layer."""
        return profile(
            network,
            input_shape=self.shape,
            name=self.record.source.name,
            runtimes=tuple(self.settings.runtimes),
            num_threads=self.settings.num_threads,
            device=self.device,
        )

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
        if self.settings.progress is not None:
            self.settings.progress(done, total, f"{self.record.status.stage}: {message}")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every run takes.

    Attributes:
        out: Folder for the record, weights and report; nothing is written without.
        runtimes: In which latency is measured, interleaved.
        metric: A built-in name, or a function ``(outputs, targets) -> scores (n,)``.
        batch: Batch size of the timed input.
        num_threads: Torch's threads while timing.
        seed: Of all that is drawn.
        device: Where to run; CUDA where there is one, by default.
        capture: Of training steps as a CUDA graph; see :func:`onebyone.train`.
        resume: Go on with the unfinished run in ``out``.
        overwrite: Replace the run in ``out``.
        command: The command line, for the record.
        progress: Told of the steps done, in each stage.
    """

    out: str | Path | None = None
    runtimes: Sequence[str] = ("eager",)
    metric: str | MetricFunction = "accuracy"
    batch: int = 1
    num_threads: int | None = None
    seed: int = 0
    device: str | None = None
    capture: bool = True
    resume: bool = False
    overwrite: bool = False
    command: Sequence[str] = ()
    progress: Progress | None = None

    def __post_init__(self) -> None:
        _at_least(1, batch=self.batch)
        if self.resume and self.out is None:
            raise OptionError("`resume` needs the folder of the run to go on with: give `out`.")


@dataclass(frozen=True, kw_only=True)
class ShrinkSettings(RunSettings):
    """How a network is shrunk.

    Attributes:
        budget: Such as ``"latency=50%"`` or ``["macs=50%", "params=2M"]``; by default
            ``"macs=50%"``. Latency is measured in the first of ``runtimes``.
        fastest: The fastest network whose harm is hardly above the least within the budgets.
        max_drop: Instead of a budget: the fastest network that loses no more than this on the
            validation data before fine-tuning, in points for accuracy (without labels of the
            agreement with the original), in the metric's unit else.
        only_faster: Take no rewrite that is not shown to be faster in the first of ``runtimes``,
            where budgets do not bound latency too.
        measure_front: Where times are planned for, build and measure the networks of other budgets
            as well, as many as a minute allows; see :func:`onebyone.plan`.
        plan: A plan to carry out instead of making one; then ``budget`` is not read.
        head: ``auto``, ``keep``, ``exact`` or ``gap``; see :func:`onebyone.plan`.
        leave: Names of modules to leave alone.
        reconstruct: Steps that bring all weights nearer to the original's outputs on training
            inputs, without labels, before any fine-tuning; see :func:`onebyone.reconstruct`.
        epochs: Of distilling from the original; 0 stops before fine-tuning.
        learning_rate: Of the distilling, if not its default.
        label_weight: Share of the distilling's loss that the labels get, from 0 to 1.
        mix: Share of the distilling's images in which a rectangle is another one's; see
            :func:`onebyone.distill`.
        calibration_examples: Training inputs, without labels, that weights are fitted on; where
            not given 1,024, or more for a cheap network with a wide linear layer.
    """

    budget: str | Iterable[str] | None = None
    fastest: bool = False
    max_drop: float | None = None
    only_faster: bool = False
    measure_front: bool = False
    plan: Plan | None = None
    head: HeadChoice = "auto"
    leave: Sequence[str] = ()
    reconstruct: int = 0
    epochs: int = EPOCHS
    learning_rate: float | None = None
    label_weight: float = 0.0
    mix: float | None = None
    calibration_examples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(0, epochs=self.epochs, reconstruct=self.reconstruct)
        given = [self.budget is not None, self.max_drop is not None, self.plan is not None]
        if sum(given) > 1:
            raise OptionError("Give one of `budget`, `max_drop` and `plan`.")
        if self.fastest and self.budget is None:
            raise OptionError("`fastest` needs a `budget`, such as `params=50%`.")
        check_distillation(label_weight=self.label_weight, mix=self.mix)
        if self.max_drop is not None and self.max_drop < 0:
            raise OptionError(f"`max_drop` must be 0 or more, got {self.max_drop}.")
        if self.calibration_examples is not None:
            _at_least(1, calibration_examples=self.calibration_examples)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings):
    """How a network is trained.

    Attributes:
        epochs: Passes over the training data.
        batch_size: Of the training, if not its default.
        learning_rate: Of the training, if not its default.
    """

    epochs: int
    batch_size: int | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, epochs=self.epochs)


def _at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise OptionError(f"`{name}` must be {least} or more, got {number}.")


def shrink(
    model: nn.Module | str | Path,
    data: object,
    *,
    weights: str | Path | None = None,
    model_options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Shrunk:
    """Make a network smaller within a budget, keep what it knows, and measure the result.

    Args:
        model: A network, not modified; or what :func:`onebyone.load_model` takes.
        data: An :class:`onebyone.data.Data`, what :func:`onebyone.data.load_data` takes, or
            ``(train, test)`` or ``(train, validation, test)``. Classifiers need no labels: without
            them there is no accuracy in the record, but the agreement with the original.
        weights: Where ``model`` is a name: a file, or ``"pretrained"``.
        model_options: Where ``model`` is a name: options of its factory.
        settings: The fields of :class:`ShrinkSettings`: the budget, the folder, how to measure.

    Returns:
        The smaller network, and the record of the run.

    Raises:
        BudgetError: If the budget cannot be read or reached; says what is reachable.
        OutputError: If ``out`` cannot be used.
        UnknownNameError: If there is no such setting.
        OneByOneError: As the stages do: bad data, weights, networks.

    Examples:
        >>> small, record = shrink(network, data, budget="macs=50%", out="runs/x")  # doctest: +SKIP
    """
    known = [each.name for each in fields(ShrinkSettings)]
    for name in settings:
        if name not in known:
            raise UnknownNameError("setting", name, known, listed=len(known))
    chosen = ShrinkSettings(**settings)
    network, source = _network(model, weights, model_options or {})
    return shrink_loaded(network, source, data, chosen)


def shrink_loaded(
    network: nn.Module, source: ModelSource, data: object, settings: ShrinkSettings
) -> Shrunk:
    """Do what :func:`shrink` does for a network whose source is known.

    Args:
        network: Not modified.
        source: Where it came from: what the folder's network is rebuilt from.
        data: As for :func:`shrink`.
        settings: How.
    """
    check_finite(network)
    if settings.plan is None and isinstance(settings.budget, str | list | tuple):
        # A typing error should not leave a folder behind; an iterator can be read only once.
        check_budgets(settings.budget)
    examples = _data(data, settings.seed)
    original = evaluation_copy(network, device="cpu")
    check_scorable(original, examples.test, metric=settings.metric)
    line = _start(source, examples, settings)
    with line.stage("profile"):
        line.keep(profile_before=line.profile(original))
    calibration = drawn_for(
        original,
        examples.train,
        examples=settings.calibration_examples,
        name=examples.name,
        seed=settings.seed,
        device=line.device,
    )
    with line.stage("plan"):
        chosen = _planned(line, original, calibration, settings, examples)
        line.keep(plan=chosen)
    with line.stage("apply"):
        small = _applied(line, original, chosen, calibration, examples)
    with line.stage("one-shot"):
        _measure_one_shot(line, original, small, examples)
    if settings.epochs:
        with line.stage("distil"):
            trained = distill(
                small,
                examples,
                teacher=original,
                epochs=settings.epochs,
                learning_rate=settings.learning_rate,
                label_weight=settings.label_weight,
                mix=settings.mix,
                **line.training,
            )
            small = trained.model
            line.keep(training=trained.log)
    with line.stage("compare"):
        _compare(line, original, small, examples)
    line.finish()
    return Shrunk(evaluation_copy(small, device="cpu"), line.record)


def train_loaded(
    network: nn.Module, source: ModelSource, data: object, settings: TrainSettings
) -> Shrunk:
    """Train a network as a run: with a folder that keeps its weights, record and report.

    Args:
        network: Not modified.
        source: Where it came from: what the folder's network is rebuilt from.
        data: As for :func:`shrink`.
        settings: How.

    Returns:
        The trained network, and the record of the run.
    """
    check_finite(network)
    examples = _data(data, settings.seed)
    line = _start(source, examples, settings)
    with line.stage("train"):
        trained = train(
            network,
            examples,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            **line.training,
        )
        line.keep(training=trained.log)
        if line.folder is not None:
            line.folder.save_network(trained.model)
    with line.stage("measure"):
        _measure_alone(line, trained.model, examples)
    line.finish()
    return Shrunk(evaluation_copy(trained.model, device="cpu"), line.record)


def _network(
    model: nn.Module | str | Path, weights: str | Path | None, options: Mapping[str, Any]
) -> tuple[nn.Module, ModelSource]:
    if not isinstance(model, str | Path):
        network = as_network(model)
        if weights is not None or options:
            raise OptionError(
                "`weights` and `model_options` must be left out where `model` is a module: load "
                "them into it first."
            )
        return network, ModelSource(name=type(network).__name__, spec=None)
    loaded = load_source(model, weights=weights, **options)
    return loaded.model, loaded.source


def _data(data: object, seed: int) -> Data:
    if isinstance(data, str):
        return load_data(data, seed=seed)
    return data if isinstance(data, Data) else as_data(data, seed=seed)


def _start(source: ModelSource, data: Data, settings: RunSettings) -> _Line:
    out = settings.out
    device = str(as_device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    folder = None
    if out is not None:
        folder = RunFolder(out, resume=settings.resume, overwrite=settings.overwrite)
    record = RunRecord(
        onebyone=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        status=Status(state="running", stage="start"),
        source=source,
        machine=describe_machine(device),
        data=data.info(),
        command=tuple(settings.command),
        folder=None if out is None else str(out),
        seed=settings.seed,
    )
    earlier = None if folder is None else folder.earlier
    if earlier is not None:
        _check_same_run(earlier, record)
    shape = (settings.batch, *data.input_shape)
    return _Line(record, folder, settings, device, shape, earlier)


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


def _planned(
    line: _Line,
    original: nn.Module,
    calibration: CalibrationData,
    settings: ShrinkSettings,
    data: Data,
) -> Plan:
    """Return the plan: given, kept from before, or made."""
    if settings.plan is not None:
        return settings.plan
    budget = DEFAULT_BUDGET if settings.budget is None else settings.budget
    asked = [budget] if isinstance(budget, str) else list(budget)
    kept = None if line.earlier is None else line.earlier.plan
    if kept is None:
        return _fresh_plan(line, original, calibration, asked, data=data)
    if line.earlier is not None and line.earlier.max_drop != settings.max_drop:
        raise OutputError(
            f"A run can only be resumed with the same tolerance: it has "
            f"{line.earlier.max_drop}, got {settings.max_drop}."
        )
    if settings.max_drop is not None and line.earlier is not None:
        line.keep(max_drop=settings.max_drop, trials=line.earlier.trials)
        return kept
    words = [word.strip() for text in asked for word in text.split(",")]
    made_for = [each.asked for each in kept.budgets]
    if words != made_for:
        raise OutputError(
            f"A run can only be resumed with the same budget: it has {', '.join(made_for)}, "
            f"got {', '.join(words)}."
        )
    return kept


def _fresh_plan(
    line: _Line,
    original: nn.Module,
    calibration: CalibrationData,
    asked: list[str],
    *,
    data: Data,
) -> Plan:
    """Plan for the budgets, or for the fastest network within a loss."""
    settings = line.settings
    assert isinstance(settings, ShrinkSettings)
    wants_time = settings.fastest or settings.only_faster or settings.max_drop is not None
    wants_time = wants_time or "latency" in check_budgets(asked)
    planner = Planner(
        original,
        calibration,
        asked=asked,
        head=settings.head,
        leave=settings.leave,
        runtime=settings.runtimes[0] if wants_time else None,
        batch=settings.batch,
        num_threads=settings.num_threads,
        name=line.record.source.name,
        device=line.device,
        progress=line.tell,
    )
    if settings.max_drop is None:
        made = planner.plan(asked, fastest=settings.fastest)
        front = planner.front(made.budgets[0].quantity, measured=settings.measure_front)
        return replace(made, front=front)
    made, trials = plan_within(
        original,
        planner,
        calibration,
        data.validation,
        max_drop=settings.max_drop,
        metric=settings.metric,
        device=line.device,
        progress=line.tell,
    )
    line.keep(max_drop=settings.max_drop, trials=trials)
    return replace(made, front=planner.front("latency", measured=settings.measure_front))


def _applied(
    line: _Line, original: nn.Module, chosen: Plan, calibration: CalibrationData, data: Data
) -> nn.Module:
    kept = None if line.folder is None else line.folder.file(ONE_SHOT)
    if line.earlier is not None and kept is not None and kept.exists():
        small = restructure(original, chosen)
        load_weights(small, kept, network="the one-shot network")
        line.keep(reconstruction=line.earlier.reconstruction)
        return small.eval()
    small = apply(original, chosen, calibration, device=line.device, progress=line.tell).eval()
    steps = line.settings.reconstruct if isinstance(line.settings, ShrinkSettings) else 0
    if steps and chosen.choices:
        nearer = reconstruct(
            small,
            teacher=original,
            calibration=inputs_for(data.train, steps, line.settings.seed),
            steps=steps,
            seed=line.settings.seed,
            device=line.device,
            progress=line.tell,
        )
        small = nearer.model.eval()
        line.keep(reconstruction=nearer.log)
    if line.folder is not None:
        line.folder.save_network(small, ONE_SHOT)
    return small


def _measure_one_shot(line: _Line, original: nn.Module, small: nn.Module, data: Data) -> None:
    both = score([original, small], data.test, progress=line.tell, **line.scoring)
    line.keep(
        one_shot=measure(
            small,
            line.shape,
            test=both.each[1].summary() if both.labelled else None,
            calibration_error=both.each[1].calibration_error(),
        ),
        one_shot_difference=paired_difference(*both.each) if both.labelled else None,
        one_shot_agreement=agreement(*both.each),
        one_shot_divergence=both.divergences[1],
    )


def _compare(line: _Line, original: nn.Module, small: nn.Module, data: Data) -> None:
    both = side_by_side(
        original,
        small,
        data=data,
        input_shape=line.shape,
        runtimes=line.settings.runtimes,
        num_threads=line.settings.num_threads,
        progress=line.tell,
        **line.scoring,
    )
    after = line.profile(small)
    if line.folder is not None:
        line.folder.save_network(small)
    differ: tuple[Disagreement, ...] = ()
    confusion = None
    if both.test is not None:
        confusion = count_confusions(data.test, both.test)
        differ = find_disagreements(original, small, data.test, both.test, device=line.device)
    line.keep(
        before=both.record.before,
        after=both.record.after,
        comparison=both.record,
        profile_after=after,
        disagreements=differ,
        confusion=confusion,
    )


def _measure_alone(line: _Line, network: nn.Module, data: Data) -> None:
    """Keep what a record has of one network by itself."""
    profiled = line.profile(network)
    test = score([network], data.test, progress=line.tell, **line.scoring).each[0]
    measured = measure(
        network,
        line.shape,
        timings=dict(profiled.latency),
        test=test.summary(),
        train=evaluate(network, data.train.take(TRAIN_EXAMPLES, 0), **line.scoring),
        calibration_error=test.calibration_error(),
    )
    line.keep(profile_after=profiled, after=measured)
