"""The frozen records that pass between the stages: each prints, compares, saves and loads again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from onebyone.errors import OutputError, RecordError
from onebyone.tables import Table
from onebyone.units import (
    format_bytes,
    format_count,
    format_ms,
    format_percent,
    format_points,
    format_ratio,
)

Quantity = Literal["params", "macs", "latency", "memory"]

FORMAT = 1  # raised when a saved record of an older version could no longer be read


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or nothing: aside first, then renamed into place."""
    target = Path(path)
    try:
        descriptor, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror}.") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(aside).chmod(0o644)
        Path(aside).replace(target)
    except OSError as error:
        Path(aside).unlink(missing_ok=True)
        raise OutputError(f"Cannot write {target}: {error.strerror}.") from error
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def check_folder(folder: Path, record: str, owner: str) -> Path:
    """Check that a folder is new, empty, or an earlier output of the same kind, and return it.

    Args:
        folder: Where output is to go.
        record: Name of the file that such an output has.
        owner: Whose folder it is, such as ``"comparison"``.

    Raises:
        OutputError: If it is a file, or has other content.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"The output must be a folder, but {folder} is a file.")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if names and record not in names:
        raise OutputError(
            f"The output folder must be new, empty, or an earlier {owner}'s, but {folder} has "
            f"other files, such as {names[0]!r}. Choose another folder."
        )
    return folder


class Record:
    """What every record can do: become JSON, be saved, and be loaded again."""

    def to_json(self) -> str:
        """Return the record as indented JSON text."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"

    def save(self, path: str | Path) -> None:
        """Write the record to a JSON file, whole or not at all.

        Raises:
            OutputError: If the file cannot be written.
        """
        write_text(path, self.to_json())

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a record from JSON text.

        Raises:
            RecordError: If the text is not JSON, or not this record; says where.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RecordError(f"This is not a saved {cls.__name__}: {error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record from a JSON file.

        Raises:
            RecordError: If the file is missing or is not this record; says where.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise RecordError(
                f"Cannot read the {cls.__name__} at {path}: {error.strerror}."
            ) from error
        try:
            return cls.from_json(text)
        except RecordError as error:
            raise RecordError(f"{path}: {error}") from error


# ---------------------------------------------------------------- machine and time


@dataclass(frozen=True, kw_only=True)
class Machine(Record):
    """Where numbers were obtained."""

    processor: str
    cores: int
    threads: int
    device: str
    system: str
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.threads} of {self.cores} cores, {self.device}, "
            f"torch {self.versions.get('torch', '?')}"
        )


@dataclass(frozen=True, kw_only=True)
class Timing(Record):
    """Milliseconds of one call, over repeated calls after a warm-up.

    Attributes:
        repeats: Samples that the median and the quartiles are of.
        disturbed: Whether the spread, or the wait for a processor, was too large for a verdict.
        waited: Share of the time in which a thread was ready but had no processor, the median of
            all samples; ``None`` where the system does not tell. With one thread it is subtracted.
    """

    runtime: str
    device: str
    threads: int
    batch: int
    repeats: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    disturbed: bool = False
    waited: float | None = None

    def __str__(self) -> str:
        return f"{format_ms(self.median_ms)} [{format_ms(self.q1_ms)}–{format_ms(self.q3_ms)}]"

    @property
    def conditions(self) -> str:
        """How the figure was obtained, in words."""
        return (
            f"{self.runtime}, {self.device}, {_plural(self.threads, 'thread')}, "
            f"batch {self.batch}, median of {self.repeats}"
        )


@dataclass(frozen=True, kw_only=True)
class Ratio(Record):
    """How many times faster: paired, interleaved rounds, with a bootstrap interval.

    Attributes:
        value: Median over rounds of time before / time after.
        low: Lower end of the 95 % interval of that median.
        high: Upper end.
        rounds: Number of interleaved rounds.
    """

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{format_ratio(self.value)} [{self.low:.2f}–{self.high:.2f}]"

    @property
    def verdict(self) -> str:
        """``faster``, ``slower``, or ``no difference shown``."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference shown"


# ---------------------------------------------------------------- profile


@dataclass(frozen=True, kw_only=True)
class Cost(Record):
    """What a part of a network costs for one input (batch size 1).

    Attributes:
        ms: Milliseconds of a call in the runtime, on the device and with the batch and threads that
            a plan is made for; ``None`` where it is made for none. Of an option's site this is the
            time between two neighbors, so that the difference of two options alone counts.
    """

    params: int
    macs: int
    ms: float | None = None

    def __add__(self, other: Cost) -> Cost:
        ms = None if self.ms is None or other.ms is None else self.ms + other.ms
        return Cost(params=self.params + other.params, macs=self.macs + other.macs, ms=ms)

    def amount(self, quantity: Quantity) -> float:
        """Return one quantity; 0 where it is not known, as memory, which is no part's own."""
        if quantity == "latency":
            return self.ms or 0.0
        return {"params": self.params, "macs": self.macs, "memory": 0}[quantity]

    def __sub__(self, other: Cost) -> Cost:
        ms = None if self.ms is None or other.ms is None else self.ms - other.ms
        return Cost(params=self.params - other.params, macs=self.macs - other.macs, ms=ms)


@dataclass(frozen=True, kw_only=True)
class LayerCost(Record):
    """One layer: its shapes (without the batch), and what it costs for one input.

    Attributes:
        kind: What the layer is, such as ``Conv2d 3×3``.
        calls: How many times one forward pass runs it.
        macs: Multiply-accumulates of all its calls.
        timing: Time of all its calls inside the whole network, or ``None`` if not timed.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    params: int
    macs: int
    calls: int = 1
    timing: Timing | None = None


@dataclass(frozen=True, kw_only=True)
class Profile(Record):
    """A network's cost, whole and layer by layer.

    Attributes:
        input_shape: Shape of the input, with the batch.
        params: All parameters, shared ones once.
        macs: Multiply-accumulates for one input: convolutions, linear layers, matrix products.
        layers: Layers that have parameters or multiply, in the order of execution.
        uncounted: Operations that multiply but have no counting rule, with their number.
        latency: Time of the whole network by runtime.
    """

    network: str
    input_shape: tuple[int, ...]
    params: int
    macs: int
    layers: tuple[LayerCost, ...]
    latency: Mapping[str, Timing]
    uncounted: Mapping[str, int]
    machine: Machine
    format: int = FORMAT

    def table(self) -> Table:
        """Return the layers as a table, largest share visible at a glance."""
        total_ms = sum(layer.timing.median_ms for layer in self.layers if layer.timing) or None
        rows = [_layer_row(layer, self.macs, total_ms) for layer in self.layers]
        timed = total_ms is not None
        rows.append(
            ["all", "", "", format_count(self.params), format_count(self.macs), "100"]
            + ([f"{total_ms:.3f}"] if timed else [])
        )
        notes = [f"{name}: {timing} ({timing.conditions})" for name, timing in self.latency.items()]
        if timed:
            notes.append("Layer times: inside the whole network, eager, median over the passes.")
        notes += [f"Not counted: {count} × {name}." for name, count in self.uncounted.items()]
        columns = ("layer", "kind", ">output", ">params", ">MACs", ">% MACs")
        shape = "×".join(map(str, self.input_shape))
        return Table(
            columns=(*columns, ">ms") if timed else columns,
            rows=rows,
            title=f"{self.network} on {shape}",
            notes=notes,
        )

    def __str__(self) -> str:
        return str(self.table())


def _layer_row(layer: LayerCost, macs: int, total_ms: float | None) -> list[str]:
    row = [
        layer.name or "(root)",
        layer.kind + (f", {layer.calls} calls" if layer.calls > 1 else ""),
        "×".join(map(str, layer.output_shape)),
        format_count(layer.params),
        format_count(layer.macs),
        f"{100 * layer.macs / macs:.1f}" if macs else "–",
    ]
    if total_ms is not None:
        row.append(f"{layer.timing.median_ms:.3f}" if layer.timing else "–")
    return row


# ---------------------------------------------------------------- options and plan

Obtained = Literal["measured", "corrected"]
Settings = dict[str, int | str | list[int]]


@dataclass(frozen=True, kw_only=True)
class Option(Record):
    """One rewrite of one site with its settings, its cost and its predicted harm.

    Attributes:
        occupies: Names of all the modules that the rewrite replaces.
        error: Relative squared error of the site's outputs on the calibration data.
        harm: Predicted divergence of the network's outputs from the original's, in nats an
            example for a classifier (KL), else the relative squared error.
        measured: Whether ``harm`` was measured by running the option, not interpolated.
        gain: Time of the site as it is / time of the option, measured in turns between the same
            neighbors; ``None`` where it was not timed, or only predicted from others.
    """

    site: str
    rewrite: str
    settings: Settings
    before: Cost
    after: Cost
    occupies: tuple[str, ...] = ()
    error: float | None = None
    harm: float | None = None
    measured: bool = False
    gain: Ratio | None = None

    @property
    def saved(self) -> Cost:
        """What the option saves."""
        return self.before - self.after


@dataclass(frozen=True, kw_only=True)
class LeftAlone(Record):
    """A site that the plan does not change, and why, in words."""

    site: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Budget(Record):
    """An upper bound on one cost of the network.

    Attributes:
        limit: The bound in the quantity's own unit: parameters, MACs for one input, milliseconds
            of a call, or bytes of the weights and of the activations that are alive at once.
        asked: The text that it was read from, such as ``"macs=50%"``.
    """

    quantity: Quantity
    limit: int | float
    asked: str


@dataclass(frozen=True, kw_only=True)
class Deployment(Record):
    """Where a plan's network is to run: what milliseconds are measured in.

    Attributes:
        batch: Inputs of a call.
        threads: Torch's, and the runtime's own.
        version: Of the runtime's package.
    """

    runtime: str
    device: str = "cpu"
    batch: int = 1
    threads: int = 1
    version: str = ""

    def __str__(self) -> str:
        return (
            f"{self.runtime} {self.version}, {self.device}, {_plural(self.threads, 'thread')}, "
            f"batch {self.batch}"
        )


@dataclass(frozen=True, kw_only=True)
class PlannedLatency(Record):
    """What a plan's network was built and measured to take, before its weights were fitted.

    Attributes:
        deployment: Where it was measured.
        machine: On which machine.
        before: The original's time, in the same rounds.
        after: The planned network's time.
        ratio: Time before / time after.
        predicted_ms: What the plan had predicted for this network before it was measured.
        corrections: How many networks were built and measured before this one.
        share: What a millisecond that layers save by themselves is worth in the whole network.
    """

    deployment: Deployment
    machine: Machine
    before: Timing
    after: Timing
    ratio: Ratio
    predicted_ms: float
    corrections: int
    share: float

    @property
    def measured_ms(self) -> float:
        """The planned network's time by the ratio, which noise that both had does not move."""
        return self.before.median_ms / self.ratio.value

    @property
    def error(self) -> float:
        """By what share of the measured time the prediction was off."""
        return abs(self.predicted_ms - self.measured_ms) / self.measured_ms

    def __str__(self) -> str:
        words = {"faster": "", "slower": ": slower", "no difference shown": ": no difference shown"}
        disturbed = self.before.disturbed or self.after.disturbed
        return (
            f"Built and measured: {format_ms(self.before.median_ms)} → "
            f"{format_ms(self.after.median_ms)} ({self.ratio}{words[self.ratio.verdict]}) in "
            f"{self.deployment}, {self.ratio.rounds} interleaved rounds on {self.machine.processor}"
            f"{', disturbed' if disturbed else ''}; predicted {format_ms(self.predicted_ms)}, "
            f"{format_percent(self.error)} off, after {self.corrections} "
            f"correction{'s' if self.corrections != 1 else ''}."
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationInfo(Record):
    """What the harm was measured on."""

    data: str
    examples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class FrontPoint(Record):
    """What another budget would come to: the plan of least predicted harm that meets it.

    Attributes:
        after: The network's cost under that plan.
        harm: Predicted, the sum over its rewrites.
        rewritten: How many sites it rewrites.
        obtained: How its time was: ``measured`` on the network that was built, in turns with the
            original; or ``corrected``: predicted from layers' times, some of them from those of
            other options of a form, and from what such savings came to in the networks that were
            measured. ``None`` where nothing was timed, and in plans of before front points were
            measured.
        timing: The network's, where it was built and measured. ``after.ms`` is the original's time
            by ``ratio``, which noise that both had does not move.
        ratio: Time of the original / time of the network, in the same rounds.
        predicted_ms: What had been predicted for the network before it was measured.
    """

    budget: Budget
    after: Cost
    harm: float
    rewritten: int
    obtained: Obtained | None = None
    timing: Timing | None = None
    ratio: Ratio | None = None
    predicted_ms: float | None = None

    @property
    def how(self) -> str:
        """How its time was obtained, in words."""
        if self.obtained is None:
            return "predicted"
        if self.ratio is None:
            return "measured" if self.obtained == "measured" else "predicted, corrected"
        disturbed = self.timing is not None and self.timing.disturbed
        return f"measured, {self.ratio}{', disturbed' if disturbed else ''}"


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """The chosen option for each site, the budgets it meets, and why the rest was left alone.

    A small file that can be edited by hand: :func:`onebyone.apply` reads ``site``, ``rewrite``
    and ``settings`` of each choice; costs and harms are there to be read.

    Attributes:
        harm: Predicted, the sum over the choices.
        latency: Where the plan is made for a runtime.
        memory_bytes: Of the planned network's weights and peak activations, at the plan's batch;
            where a budget bounds it.
    """

    network: str
    input_shape: tuple[int, ...]
    budgets: tuple[Budget, ...]
    before: Cost
    after: Cost
    choices: tuple[Option, ...]
    left_alone: tuple[LeftAlone, ...]
    calibration: CalibrationInfo | None = None
    harm: float | None = None
    front: tuple[FrontPoint, ...] = ()
    latency: PlannedLatency | None = None
    memory_bytes: int | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format > FORMAT:
            raise ValueError(
                f"the plan's format is {self.format}; this onebyone reads up to {FORMAT}: update it"
            )

    def table(self) -> Table:
        """Return the choices, and below them what was left alone, by reason."""
        timed = self.latency is not None
        rows = [
            [
                option.site or "(root)",
                f"{option.rewrite} {format_settings(option.settings)}",
                *([_saved_time(option)] if timed else []),
                f"{format_count(option.before.macs)} → {format_count(option.after.macs)}",
                f"{format_count(option.before.params)} → {format_count(option.after.params)}",
                "–" if option.harm is None else f"{option.harm:.2g}",
            ]
            for option in self.choices
        ]
        note = (
            f"MACs {format_count(self.before.macs)} → {format_count(self.after.macs)} "
            f"({format_percent(self.after.macs / max(self.before.macs, 1))}), "
            f"params {format_count(self.before.params)} → {format_count(self.after.params)} "
            f"({format_percent(self.after.params / max(self.before.params, 1))})."
        )
        notes = [note]
        if self.latency is not None:
            notes.append(str(self.latency))
        if self.memory_bytes is not None:
            size = self.input_shape[0]
            notes.append(
                f"Weights and peak activations: {format_bytes(self.memory_bytes)} at batch {size}."
            )
        if self.calibration is not None:
            notes.append(
                f"Harm: predicted divergence from the original's outputs, on "
                f"{self.calibration.examples} calibration examples of {self.calibration.data}."
            )
        elif self.harm is not None and self.choices:
            notes.append(
                "Harm: relative squared error of the layers' kernels. It was planned without data: "
                "what the network loses is not known."
            )
        asked = ", ".join(budget.asked for budget in self.budgets)
        reasons: dict[str, list[str]] = {}
        for item in self.left_alone:
            reasons.setdefault(item.reason, []).append(item.site or "(root)")
        notes += [f"Left alone, {why}: {', '.join(sites)}." for why, sites in reasons.items()]
        return Table(
            columns=(
                "site",
                "rewrite",
                *([">saves"] if timed else []),
                ">MACs",
                ">params",
                ">harm",
            ),
            rows=rows,
            title=": ".join(filter(None, [f"Plan for {self.network}", asked])),
            notes=notes,
        )

    def front_table(self) -> Table:
        """Return what other budgets would come to, a budget a line."""
        timed = self.before.ms
        rows = [
            [
                *([] if timed is None else [format_ms(point.after.ms or 0.0), point.how]),
                *_share_cells(point.after.macs, self.before.macs),
                *_share_cells(point.after.params, self.before.params),
                str(point.rewritten),
                f"{point.harm:.2g}",
            ]
            for point in self.front
        ]
        notes = ["Each the least predicted harm under its budget, by the same options."]
        if self.latency is not None:
            notes.append(f"Times: {self.front_times()}.")
        if self.harm is not None:
            share = format_percent(self.after.macs / max(self.before.macs, 1))
            notes.append(f"The plan itself: harm {self.harm:.2g} at {share} of the MACs.")
        return Table(
            columns=(
                *([] if timed is None else [">time", "obtained"]),
                ">MACs",
                ">%",
                ">params",
                ">%",
                ">sites rewritten",
                ">harm",
            ),
            rows=rows,
            title=f"Front of {self.network}: what other budgets would come to",
            notes=notes,
        )

    def front_times(self) -> str:
        """Return in words how the times of the front were obtained."""
        if self.latency is None or self.before.ms is None:
            return "none"
        measured = sum(point.ratio is not None for point in self.front)
        others = sum(point.rewritten > 0 for point in self.front) - measured
        corrected = any(point.obtained == "corrected" for point in self.front)
        how = ", corrected by the networks that were measured" if corrected else ""
        return (
            f"{measured} measured in turns with the original in {self.latency.deployment}, "
            f"{others} predicted{how if others else ''}"
        )

    def __str__(self) -> str:
        return str(self.table())


def _saved_time(option: Option) -> str:
    """Return what an option saves in the whole network, and how many times faster it is alone."""
    if option.saved.ms is None:
        return "–"
    gain = "" if option.gain is None else f" ({format_ratio(option.gain.value)})"
    return f"{format_ms(option.saved.ms)}{gain}"


def _share_cells(part: int, whole: int) -> tuple[str, str]:
    return format_count(part), f"{100 * part / max(whole, 1):.1f}"


def format_settings(settings: Settings) -> str:
    """Return settings as short text: ``tucker2 8, 12``."""
    return " ".join(
        ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for value in settings.values()
    )


# ---------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class Epoch(Record):
    """One pass over the training data."""

    epoch: int
    loss: float
    validation: float | None
    learning_rate: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Record):
    """What a reconstruction did.

    Attributes:
        before: Divergence of the outputs from the teacher's on held-out inputs at the start: in
            nats for class scores, else the squared error relative to the outputs' mean square.
        after: The same of the weights that were kept; never more than ``before``.
        judged: ``(step, divergence)`` each time that it was measured; ``None`` where it was not
            finite.
        steps: Steps taken.
        kept_step: The step whose weights were kept; 0 for those of the start.
        stopped: What ended it.
        examples: Inputs that the weights were fitted to.
        held_out: Inputs that they were judged on.
        learning_rate: The highest one.
        features: Modules whose outputs were held near the teacher's as well.
        temperature: That class scores were divided by in the steps, not in ``judged``.
        precision: Of the steps; ``judged`` is computed in float32.
    """

    before: float
    after: float
    judged: tuple[tuple[int, float | None], ...]
    steps: int
    kept_step: int
    stopped: Literal["steps", "seconds"]
    examples: int
    held_out: int
    batch_size: int
    learning_rate: float
    features: tuple[str, ...]
    augmentation: str
    seed: int
    seconds: float
    temperature: float = 1.0
    precision: str = "float32"

    def __str__(self) -> str:
        share = self.after / self.before if self.before > 0 else 1.0
        return (
            f"Reconstructed in {self.steps} steps and {self.seconds:.0f} s: divergence on "
            f"{self.held_out} held-out inputs {self.before:.3g} → {self.after:.3g} ({share:.0%}), "
            f"weights of step {self.kept_step}."
        )


@dataclass(frozen=True, kw_only=True)
class TrainLog(Record):
    """What a training did.

    Attributes:
        objective: What was minimized, in words.
        examples: Training examples an epoch.
        chosen_epoch: The epoch whose weights were kept, counted from 1; 0 for those of the start.
        metric: Name of the metric in ``validation``.
    """

    objective: str
    metric: str
    epochs: tuple[Epoch, ...]
    examples: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    optimizer: str
    schedule: str
    precision: str
    augmentation: str
    seed: int
    seconds: float
    chosen_epoch: int
    device: str
    threads: int

    def table(self) -> Table:
        """Return an epoch a line."""
        rows = [
            [
                str(epoch.epoch),
                f"{epoch.loss:.4f}",
                "–" if epoch.validation is None else f"{epoch.validation:.4f}",
                f"{epoch.learning_rate:.2g}",
                f"{epoch.seconds:.1f}",
            ]
            for epoch in self.epochs
        ]
        note = (
            f"{self.optimizer}, {self.schedule}, batch {self.batch_size}, "
            f"{self.examples:,} examples, {self.precision}, augmentation: "
            f"{self.augmentation}, seed {self.seed}, {self.device}, "
            f"{_plural(self.threads, 'thread')}."
        )
        kept = f"{self.kept[0].upper()}{self.kept[1:]} were kept."
        return Table(
            columns=(">epoch", ">loss", f">validation {self.metric}", ">rate", ">s"),
            rows=rows,
            title=self.objective,
            notes=[note, kept],
        )

    @property
    def kept(self) -> str:
        """Which weights were kept, in words."""
        if self.chosen_epoch:
            return f"the weights of epoch {self.chosen_epoch}"
        return "the weights of the start, nearer to the original on validation data,"

    def __str__(self) -> str:
        return str(self.table())


# ---------------------------------------------------------------- evaluation


@dataclass(frozen=True, kw_only=True)
class Metric(Record):
    """A mean over examples with its 95 % interval."""

    name: str
    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        if self.is_fraction:
            return (
                f"{format_percent(self.value, 2)} "
                f"[{100 * self.low:.2f}–{100 * self.high:.2f}], n = {self.n:,}"
            )
        return f"{self.value:.4g} [{self.low:.4g}–{self.high:.4g}], n = {self.n:,}"

    @property
    def is_fraction(self) -> bool:
        """Whether the value is a share of the examples, shown as a percentage."""
        return self.name in {"accuracy", "agreement"}


@dataclass(frozen=True, kw_only=True)
class Measured(Record):
    """Everything measured of one network.

    Attributes:
        macs: For one input.
        file_bytes: Size of its weights as safetensors.
        peak_activation_bytes: Most bytes of activations alive at once in a forward pass of one
            input, each from the operation that writes it to the last that reads it.
        latency: Time of the whole network by runtime.
        metric: On test data; ``None`` where there is none.
        train_metric: On a sample of the training data.
        calibration_error: Expected calibration error of the confidence (15 equal bins), test data.
    """

    params: int
    macs: int
    file_bytes: int
    latency: Mapping[str, Timing]
    metric: Metric | None = None
    train_metric: Metric | None = None
    calibration_error: float | None = None
    peak_activation_bytes: int | None = None

    @property
    def generalization_gap(self) -> float | None:
        """Training metric less test metric."""
        if self.metric is None or self.train_metric is None:
            return None
        return self.train_metric.value - self.metric.value


@dataclass(frozen=True, kw_only=True)
class Difference(Record):
    """The metric after less the metric before, on the same examples.

    Attributes:
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
        p_value: Of no difference.
        test: Name of the paired test and of the interval.
    """

    value: float
    low: float
    high: float
    n: int
    p_value: float
    test: str


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
class Comparison(Record):
    """Two networks on the same test examples and on the same machine, interleaved.

    Attributes:
        agreement: Share of examples with the same prediction; ``None`` unless classifiers.
        divergence: Mean divergence of the outputs: KL in nats, or relative squared error.
        latency_ratio: By runtime, time before / time after: above 1 is faster.
        input_shape: Shape of the timed input, with the batch.
    """

    before: Measured
    after: Measured
    input_shape: tuple[int, ...]
    latency_ratio: Mapping[str, Ratio]
    difference: Difference | None = None
    agreement: Metric | None = None
    divergence: float | None = None
    machine: Machine | None = None
    names: tuple[str, str] = ("before", "after")
    format: int = FORMAT

    def table(self) -> Table:
        """Return before, after and how they compare, a quantity a line."""
        rows = [
            _count_row("params", self.before.params, self.after.params, format_count),
            _count_row("MACs", self.before.macs, self.after.macs, format_count),
            _count_row("weights", self.before.file_bytes, self.after.file_bytes, format_bytes),
        ]
        peaks = self.before.peak_activation_bytes, self.after.peak_activation_bytes
        if peaks[0] is not None and peaks[1] is not None:
            rows.append(_count_row("activations, peak", peaks[0], peaks[1], format_bytes))
        for runtime, ratio in self.latency_ratio.items():
            first, second = self.before.latency[runtime], self.after.latency[runtime]
            rows.append(
                [
                    f"latency, {runtime}",
                    format_ms(first.median_ms),
                    format_ms(second.median_ms),
                    f"{ratio} {'disturbed' if self.disturbed(runtime) else ratio.verdict}",
                ]
            )
        rows += self._metric_rows()
        timing = next(iter(self.before.latency.values()), None)
        notes = (
            [f"Ratios of latency: {_latency_note(timing, self.latency_ratio)}"] if timing else []
        )
        if self.difference is not None:
            notes.append(
                f"{self.difference.test}: p = {self.difference.p_value:.2g} "
                f"({self.difference.n:,} test examples)."
            )
        if self.machine is not None:
            notes.append(f"{self.machine}.")
        return Table(
            columns=("", f">{self.names[0]}", f">{self.names[1]}", "change"),
            rows=rows,
            title="Measured",
            notes=notes,
        )

    def disturbed(self, runtime: str) -> bool:
        """Whether either timing spread too widely for a verdict on speed."""
        timings = (self.before.latency.get(runtime), self.after.latency.get(runtime))
        return any(timing.disturbed for timing in timings if timing is not None)

    def _metric_rows(self) -> list[list[str]]:
        rows = []
        first, second = self.before.metric, self.after.metric
        if first is not None and second is not None:
            rows.append(
                [f"test {first.name}", _value(first), _value(second), self._difference_text(first)]
            )
        train_first, train_second = self.before.train_metric, self.after.train_metric
        if train_first is not None and train_second is not None:
            rows.append(
                [f"train {train_first.name}", _value(train_first), _value(train_second), ""]
            )
        gaps = self.before.generalization_gap, self.after.generalization_gap
        if gaps[0] is not None and gaps[1] is not None and first is not None and first.is_fraction:
            rows.append(["gap, points", format_points(gaps[0]), format_points(gaps[1]), ""])
        errors = self.before.calibration_error, self.after.calibration_error
        if errors[0] is not None and errors[1] is not None:
            rows.append(["calibration error", f"{errors[0]:.4f}", f"{errors[1]:.4f}", ""])
        if self.agreement is not None:
            rows.append(["agreement", "", _value(self.agreement), ""])
        if self.divergence is not None:
            rows.append(["divergence", "", f"{self.divergence:.4g}", ""])
        return rows

    def _difference_text(self, metric: Metric) -> str:
        if self.difference is None:
            return ""
        if metric.is_fraction:
            low, high = format_points(self.difference.low), format_points(self.difference.high)
            return f"{format_points(self.difference.value)} points [{low} … {high}]"
        difference = self.difference
        return f"{difference.value:+.4g} [{difference.low:+.4g} … {difference.high:+.4g}]"

    def __str__(self) -> str:
        return str(self.table())


def _count_row(name: str, before: int, after: int, form: Any) -> list[str]:
    change = "the same"
    if after < before and after:
        change = f"{format_ratio(before / after)} smaller"
    elif after > before and before:
        change = f"{format_ratio(after / before)} larger"
    return [name, form(before), form(after), change]


def _latency_note(timing: Timing, ratios: Mapping[str, Ratio]) -> str:
    rounds = next(iter(ratios.values())).rounds if ratios else timing.repeats
    return (
        f"{rounds} interleaved rounds after a warm-up, {timing.device}, "
        f"{_plural(timing.threads, 'thread')}, batch {timing.batch}, bootstrap 95 % interval."
    )


def _value(metric: Metric) -> str:
    return format_percent(metric.value, 2) if metric.is_fraction else f"{metric.value:.4g}"


# ---------------------------------------------------------------- a run


@dataclass(frozen=True, kw_only=True)
class ModelSource(Record):
    """Where a network came from: enough to build it again, its weights apart.

    Attributes:
        spec: What :func:`onebyone.load_model` was given; ``None`` for a module made in memory.
        options: Keyword arguments of the factory.
        weights: The weights' file name, ``pretrained``, or ``None``.
    """

    name: str
    spec: str | None
    options: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataInfo(Record):
    """What a data set is: sizes of its parts, classes, and the shape of one input.

    Attributes:
        mean: Subtracted from each channel of a picture scaled to 0…1; ``None`` where it is not
            known how pictures become inputs.
        std: What each channel is then divided by.
        crop: Share of a picture's shorter side that is kept when its center is cut out.
    """

    name: str
    train: int
    validation: int
    test: int
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    seed: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: float = 1.0


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

    index: int
    label: int
    before: int
    after: int
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

    label: int
    n: int
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class ConfusedPair(Record):
    """How many test examples of one class each network took for another.

    Attributes:
        label: The true class's number.
        predicted: The other's.
    """

    label: int
    predicted: int
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Confusion(Record):
    """Which classes two networks take for which, on the same test examples.

    Attributes:
        classes: Number of classes.
        counts: By class, in their order; of many classes, those that changed most.
        pairs: The most confused first; of many, those alone.
        pairs_left_out: Confused pairs that are not listed.
    """

    classes: int
    counts: tuple[ClassCount, ...]
    pairs: tuple[ConfusedPair, ...]
    pairs_left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """All that a run measured: what its report is made from.

    Attributes:
        folder: Where the run was kept, as it was asked for.
        max_drop: The loss of the metric that was tolerated, in points for accuracy.
        trials: Networks tried on the validation data, where the fastest within a loss was asked.
        reconstruction: The steps between the closed forms and fine-tuning, where some were asked.
        one_shot: The rewritten network before any fine-tuning.
        seconds: Wall time by stage.
    """

    onebyone: str
    created: str
    status: Status
    source: ModelSource
    machine: Machine
    data: DataInfo | None = None
    command: tuple[str, ...] = ()
    folder: str | None = None
    seed: int = 0
    plan: Plan | None = None
    max_drop: float | None = None
    trials: tuple[Trial, ...] = ()
    before: Measured | None = None
    reconstruction: Reconstruction | None = None
    one_shot: Measured | None = None
    one_shot_difference: Difference | None = None
    one_shot_agreement: Metric | None = None
    one_shot_divergence: float | None = None
    after: Measured | None = None
    comparison: Comparison | None = None
    training: TrainLog | None = None
    profile_before: Profile | None = None
    profile_after: Profile | None = None
    disagreements: tuple[Disagreement, ...] = ()
    confusion: Confusion | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    format: int = FORMAT

    def with_(self, **changes: Any) -> RunRecord:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def __str__(self) -> str:
        if self.comparison is None:
            return f"{self.status.state} at {self.status.stage}: {self.status.detail}"
        return str(self.comparison)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
