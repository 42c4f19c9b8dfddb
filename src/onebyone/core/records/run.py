"""The record of a run, from the network that it began with to what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from onebyone.core.errors import RecordError
from onebyone.core.fields import Amount, Count, Share
from onebyone.core.records.base import FORMAT, Record
from onebyone.core.records.comparison import Comparison
from onebyone.core.records.deployed import Deployed
from onebyone.core.records.inputs import InputSpec
from onebyone.core.records.measured import Difference, Measured, Metric, TaskInfo
from onebyone.core.records.pictures import OutputPictures
from onebyone.core.records.plan import Budget, Plan
from onebyone.core.records.profile import Cost, Profile, Subnormals
from onebyone.core.records.timing import Machine
from onebyone.core.records.training import Reconstruction, TrainLog
from onebyone.core.tables import Table


@dataclass(frozen=True, kw_only=True)
class Origin(Record):
    """How a run's network is built again without the runs that it was made from.

    Attributes:
        spec: Of the network that the first of these runs began with; ``None`` for a module made in
            memory.
        options: Keyword arguments of its factory.
        plans: What these runs carried out, one after the other.
        sha256: Of the content of an ONNX file; ``None`` for all else.
    """

    spec: str | None
    options: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    plans: tuple[Plan, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSource(Record):
    """Where a network came from: enough to build it again, its weights apart.

    Attributes:
        spec: What :func:`onebyone.load_model` was given; ``None`` for a module made in memory.
        options: Keyword arguments of the factory.
        weights: The weights' file name, ``pretrained``, ``random``, or ``None`` where the factory
            gave them.
        origin: Where ``spec`` is a run's folder: how the run's network is built.
        task: Where ``spec`` is a run's folder: the task that the run knew.
        sha256: Where ``spec`` is an ONNX file that was read as layers: of its content.
    """

    name: str
    spec: str | None
    options: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    weights: str | None = None
    origin: Origin | None = None
    task: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataInfo(Record):
    """What a data set is: sizes of its parts, classes, and what one example is.

    Attributes:
        inputs: What a batch of one example gives a network.
        mean: Subtracted from each channel of a picture scaled to 0…1; ``None`` where it is not
            known how pictures become inputs.
        std: What each channel is then divided by.
        crop: Share of a picture's shorter side that is kept when its center is cut out.
    """

    name: str
    train: Count
    validation: Count
    test: Count
    classes: tuple[str, ...]
    inputs: InputSpec
    seed: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: Share = 1.0

    def check(self) -> None:
        """Check that there is a mean for each deviation, and that none of these is 0."""
        if self.crop == 0:
            raise RecordError("`crop` must be above 0, got 0.")
        if (self.mean is None) != (self.std is None):
            raise RecordError("`mean` and `std` must be given together, or neither.")
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std):
                raise RecordError(
                    f"`mean` and `std` must have a value for each channel, got {len(self.mean)} "
                    f"and {len(self.std)}."
                )
            if min(self.std, default=1) <= 0:
                raise RecordError(f"`std` must be above 0 in each channel, got {self.std}.")


State = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Status(Record):
    """How far a run came.

    Attributes:
        stage: The stage that it is in, or where it stopped.
        detail: Where in that stage, or the error.
    """

    state: State
    stage: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Disagreement(Record):
    """A test example that the two networks see differently.

    Attributes:
        index: Position in the test data.
        image: A PNG as a ``data:`` address, or empty where the input is no picture.
        maps: Class activation maps of the two predictions, as ``data:`` addresses, of the original
            first; an empty one, or none at all, where a network has no exact maps.
    """

    index: Count
    label: Count
    before: Count
    after: Count
    image: str = ""
    maps: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClassCount(Record):
    """How many test examples of a class there are, and how many each network classified rightly.

    Attributes:
        label: The class's number.
        before: Right predictions of the original.
        after: Right predictions of the rewritten network.
    """

    label: Count
    n: Count
    before: Count
    after: Count


@dataclass(frozen=True, kw_only=True)
class ConfusedPair(Record):
    """How many test examples of one class each network took for another.

    Attributes:
        label: The true class's number.
        predicted: The other's.
    """

    label: Count
    predicted: Count
    before: Count
    after: Count


@dataclass(frozen=True, kw_only=True)
class Confusion(Record):
    """Which classes two networks take for which, on the same test examples.

    Attributes:
        classes: Number of classes.
        counts: By class, in their order; of many classes, those that changed most.
        pairs: The most confused first; of many, those alone.
        pairs_left_out: Confused pairs that are not listed.
    """

    classes: Count
    counts: tuple[ClassCount, ...]
    pairs: tuple[ConfusedPair, ...]
    pairs_left_out: Count = 0


@dataclass(frozen=True, kw_only=True)
class Identity(Record):
    """What decides a run's result, by content: a run is resumed only where all of it is the same.

    Attributes:
        network: SHA-256 of the original: its modules, their code, its weights.
        data: SHA-256 of the data: see :func:`onebyone.data.hashing.hash_data`.
        settings: Every setting that the result depends on, as text.
        versions: Of the packages that computed.
    """

    network: str
    data: str
    settings: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Trial(Record):
    """A network that was tried on validation data in the search for the fastest within a loss.

    Attributes:
        after: What it costs, as predicted.
        difference: Of the metric on the validation data, before fine-tuning.
        plan_harm: The harm that its plan predicted.
        built: Whether it was also built and measured in the runtime.
    """

    budget: Budget
    after: Cost
    difference: Difference
    plan_harm: float | None = None
    built: bool = False


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """All that a run measured: what its report is made from.

    Attributes:
        identity: By which a run that is resumed is known.
        weights: SHA-256 of the original's weights.
        folder: Where the run was kept, as it was asked for.
        subnormals: The original's weights that were set to zero before all else, with what that
            gave alone; everything else was measured without them.
        task: What the outputs were taken to mean.
        max_drop: The loss of the metric that was tolerated, in points for accuracy.
        trials: Networks tried on the validation data, where the fastest within a loss was asked.
        reconstruction: The steps between the closed forms and fine-tuning, where some were asked.
        one_shot: The rewritten network before any fine-tuning, in float32.
        deployed: The network in int8, where the plan says so: ``after`` and ``comparison`` are of
            its file then.
        pictures: Test examples with the outputs of both networks, where these are masks, boxes or
            images.
        seconds: Wall time by stage.
    """

    onebyone: str
    created: str
    status: Status
    source: ModelSource
    machine: Machine
    identity: Identity | None = None
    weights: str | None = None
    data: DataInfo | None = None
    command: tuple[str, ...] = ()
    folder: str | None = None
    seed: int = 0
    subnormals: Subnormals | None = None
    task: TaskInfo | None = None
    plan: Plan | None = None
    max_drop: float | None = None
    trials: tuple[Trial, ...] = ()
    before: Measured | None = None
    reconstruction: Reconstruction | None = None
    one_shot: Measured | None = None
    one_shot_difference: Difference | None = None
    one_shot_agreement: Metric | None = None
    one_shot_divergence: float | None = None
    deployed: Deployed | None = None
    after: Measured | None = None
    comparison: Comparison | None = None
    training: TrainLog | None = None
    profile_before: Profile | None = None
    profile_after: Profile | None = None
    disagreements: tuple[Disagreement, ...] = ()
    confusion: Confusion | None = None
    pictures: OutputPictures | None = None
    seconds: Mapping[str, Amount] = field(default_factory=dict)
    format: int = FORMAT

    def with_(self, **changes: Any) -> RunRecord:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def tables(self) -> tuple[Table, ...]:
        """Return the plan and the comparison, as far as the run came."""
        made = (self.plan, self.comparison)
        return tuple(each.table() for each in made if each is not None)

    def __str__(self) -> str:
        if self.comparison is None:
            return f"{self.status.state} at {self.status.stage}: {self.status.detail}"
        notes = [] if self.subnormals is None else self.subnormals.lines()
        return "\n".join([str(self.comparison), *notes])
