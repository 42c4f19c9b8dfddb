"""The record of a plan: the choices, the budgets, and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onebyone.core.errors import RecordError
from onebyone.core.fields import Count, Whole
from onebyone.core.records.base import FORMAT, Record
from onebyone.core.records.inputs import InputSpec
from onebyone.core.records.measured import TaskInfo
from onebyone.core.records.option import Option
from onebyone.core.records.profile import Cost, Quantity, Subnormals, not_below_zero
from onebyone.core.records.timing import Machine, Ratio, Timing
from onebyone.core.tables import Table
from onebyone.core.units import (
    format_bytes,
    format_count,
    format_ms,
    format_percent,
    format_ratio,
    plural,
)

PlanPrecision = Literal["float32", "int8", "auto"]
Obtained = Literal["measured", "corrected"]


@dataclass(frozen=True, kw_only=True)
class LeftAlone(Record):
    """A site that the plan does not change, and why, in words."""

    site: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Budget(Record):
    """An upper bound on one cost of the network.

    Attributes:
        limit: The bound in the quantity's own unit: parameters, MACs for one input, bytes of the
            weights (``size``), milliseconds of a call, or bytes of the weights and of the
            activations that are alive at once (``memory``).
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
        precision: What the planned network computes in.
    """

    runtime: str
    device: str = "cpu"
    batch: Whole = 1
    threads: Whole = 1
    version: str = ""
    precision: PlanPrecision = "float32"

    def __str__(self) -> str:
        how = {"float32": "", "int8": " in int8", "auto": " in float32 and int8"}[self.precision]
        return (
            f"{self.runtime} {self.version}{how}, {self.device}, {plural(self.threads, 'thread')}, "
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
        alone: The time of the original in int8, without any rewrite, in the same rounds; where the
            planned network is in int8.
        alone_ratio: That time / the planned network's.
    """

    deployment: Deployment
    machine: Machine
    before: Timing
    after: Timing
    ratio: Ratio
    predicted_ms: float
    corrections: Count
    share: float
    alone: Timing | None = None
    alone_ratio: Ratio | None = None

    def check(self) -> None:
        """Check that the original took some time."""
        if self.before.median_ms == 0:
            raise RecordError("`before.median_ms` must be above 0, got 0.")

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
        alone = ""
        if self.alone is not None and self.alone_ratio is not None:
            alone = (
                f" The original in int8: {format_ms(self.alone.median_ms)}; the planned network is "
                f"{self.alone_ratio} as fast{words[self.alone_ratio.verdict]}."
            )
        return (
            f"Built and measured: {format_ms(self.before.median_ms)} → "
            f"{format_ms(self.after.median_ms)} ({self.ratio}{words[self.ratio.verdict]}) in "
            f"{self.deployment}, {self.ratio.rounds} interleaved rounds on {self.machine.processor}"
            f"{', disturbed' if disturbed else ''}; predicted {format_ms(self.predicted_ms)}, "
            f"{format_percent(self.error)} off, after {self.corrections} "
            f"correction{'s' if self.corrections != 1 else ''}.{alone}"
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationInfo(Record):
    """What the harm was measured on."""

    data: str
    examples: Count
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
    rewritten: Count
    obtained: Obtained | None = None
    timing: Timing | None = None
    ratio: Ratio | None = None
    predicted_ms: float | None = None

    def check(self) -> None:
        """Check that the cost is not below zero."""
        not_below_zero("after", self.after)

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

    A small file that can be edited by hand: :func:`onebyone.apply` reads ``site`` and ``steps``
    of each choice; costs and harms are there to be read.

    Attributes:
        inputs: What the network takes, with the batch that the plan is for.
        harm: Predicted, the sum over the choices.
        gap: By which share less harm another choice might do, where time ended the search; 0 where
            no other choice does less.
        latency: Where the plan is made for a runtime.
        notes: What came out otherwise than expected while it was made, in words.
        subnormals: Weights of the original that were set to zero first; no rewrite's gain.
        memory_bytes: Of the planned network's weights and peak activations, at the plan's batch;
            where a budget bounds it.
        task: What the outputs were taken to mean, which harm follows; ``None`` without data.
        precision: What the network is deployed in. In int8, its weights are quantized after all
            rewrites and training.
        float32_layers: Layers of the rewritten network that stay float32 in int8, and why.
    """

    network: str
    inputs: InputSpec
    budgets: tuple[Budget, ...]
    before: Cost
    after: Cost
    choices: tuple[Option, ...]
    left_alone: tuple[LeftAlone, ...]
    calibration: CalibrationInfo | None = None
    harm: float | None = None
    gap: float = 0.0
    front: tuple[FrontPoint, ...] = ()
    latency: PlannedLatency | None = None
    memory_bytes: Count | None = None
    notes: tuple[str, ...] = ()
    subnormals: Subnormals | None = None
    task: TaskInfo | None = None
    precision: PlanPrecision = "float32"
    float32_layers: tuple[LeftAlone, ...] = ()
    format: int = FORMAT

    def check(self) -> None:
        """Check that costs are not below zero."""
        not_below_zero("before", self.before)
        not_below_zero("after", self.after)

    def missed(self) -> tuple[tuple[Budget, float], ...]:
        """Return the budgets that the plan does not meet, and what share of the original is left.

        A measured time counts as within a budget up to a hundredth above it: that is noise.
        """
        missed = []
        for budget in self.budgets:
            total, amount = self.before.amount(budget.quantity), self.after.amount(budget.quantity)
            limit: float = budget.limit
            if budget.quantity == "memory":
                amount = self.memory_bytes or 0
            elif budget.quantity == "latency":
                limit *= 1.01
                amount = total if self.latency is None else total / self.latency.ratio.value
                unchanged = not self.choices and self.precision == "float32"
                amount = total if unchanged else amount
            if amount > limit:
                missed.append((budget, amount / (total or amount)))
        return tuple(missed)

    def table(self) -> Table:
        """Return the choices, and below them what was left alone, by reason."""
        timed = self.latency is not None
        rows = [
            [
                option.site or "(root)",
                option.label,
                *([_saved_time(option)] if timed else []),
                f"{format_count(option.before.macs)} → {format_count(option.after.macs)}",
                f"{format_count(option.before.params)} → {format_count(option.after.params)}",
                f"{format_bytes(option.before.bytes)} → {format_bytes(option.after.bytes)}",
                "–" if option.harm is None else f"{option.harm:.2g}",
            ]
            for option in self.choices
        ]
        note = (
            f"MACs {format_count(self.before.macs)} → {format_count(self.after.macs)} "
            f"({format_percent(self.after.macs / max(self.before.macs, 1))}), "
            f"params {format_count(self.before.params)} → {format_count(self.after.params)} "
            f"({format_percent(self.after.params / max(self.before.params, 1))}), "
            f"weights {format_bytes(self.before.bytes)} → {format_bytes(self.after.bytes)} "
            f"({format_percent(self.after.bytes / max(self.before.bytes, 1))})."
        )
        notes = [note]
        if self.latency is not None:
            notes.append(str(self.latency))
        if self.memory_bytes is not None:
            size = self.inputs.batch
            notes.append(
                f"Weights and peak activations: {format_bytes(self.memory_bytes)} at batch {size}."
            )
        if self.calibration is not None:
            measured_in = "" if self.task is None else f" ({self.task.divergence})"
            notes.append(
                f"Harm: predicted divergence from the original's outputs{measured_in}, on "
                f"{self.calibration.examples} calibration examples of {self.calibration.data}."
            )
        elif self.harm is not None and self.choices:
            notes.append(
                "Harm: relative squared error of the layers' kernels. It was planned without data: "
                "what the network loses is not known."
            )
        notes += [
            f"The budget {budget.asked} is not met: this is the nearest that was reached "
            f"({format_percent(reached)} of the original)."
            for budget, reached in self.missed()
        ]
        notes += self.notes
        if self.subnormals is not None:
            notes += self.subnormals.lines()
        if self.gap:
            notes.append(
                f"The search for the least harm ended at its time limit: another choice may do up "
                f"to {format_percent(self.gap)} less."
            )
        if self.task is not None:
            notes.append(str(self.task))
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
                ">weights",
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
                format_bytes(point.after.bytes),
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
                ">weights",
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
