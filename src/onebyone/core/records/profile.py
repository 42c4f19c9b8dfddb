"""Records of what a network and its layers cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from onebyone.core.errors import RecordError
from onebyone.core.fields import Count
from onebyone.core.records.base import FORMAT, Record
from onebyone.core.records.inputs import InputSpec
from onebyone.core.records.timing import Machine, Ratio, Timing
from onebyone.core.tables import Table
from onebyone.core.units import format_bytes, format_count, format_ms

Quantity = Literal["params", "macs", "size", "latency", "memory"]
# What is counted, not measured, and adds up over layers.
COUNTED: frozenset[Quantity] = frozenset({"params", "macs", "size"})


@dataclass(frozen=True, kw_only=True)
class Cost(Record):
    """What a part of a network costs for one input (batch size 1).

    Attributes:
        bytes: Of the weights as they are deployed: 4 of a float32 value, 2 of a bfloat16 one. Of a
            whole network with the buffers that are saved, such as a batch norm's statistics.
        ms: Milliseconds of a call in the runtime, on the device and with the batch and threads that
            a plan is made for; ``None`` where it is made for none. Of an option's site this is the
            time between two neighbors, so that the difference of two options alone counts.
    """

    params: int
    macs: int
    bytes: int
    ms: float | None = None

    def __add__(self, other: Cost) -> Cost:
        ms = None if self.ms is None or other.ms is None else self.ms + other.ms
        return Cost(
            params=self.params + other.params,
            macs=self.macs + other.macs,
            bytes=self.bytes + other.bytes,
            ms=ms,
        )

    def amount(self, quantity: Quantity) -> float:
        """Return one quantity; 0 where it is not known, as memory, which is no part's own."""
        if quantity == "latency":
            return self.ms or 0.0
        counted = {"params": self.params, "macs": self.macs, "size": self.bytes, "memory": 0}
        return counted[quantity]

    def __sub__(self, other: Cost) -> Cost:
        ms = None if self.ms is None or other.ms is None else self.ms - other.ms
        return Cost(
            params=self.params - other.params,
            macs=self.macs - other.macs,
            bytes=self.bytes - other.bytes,
            ms=ms,
        )

    @property
    def counts(self) -> tuple[int, int, int]:
        """All that is counted: parameters, MACs and bytes."""
        return self.params, self.macs, self.bytes


def not_below_zero(name: str, cost: Cost) -> None:
    """Check that no amount of a cost is negative.

    Raises:
        RecordError: If parameters, MACs or bytes are below zero.
    """
    if min(cost.counts) < 0:
        raise RecordError(
            f"`{name}` must have parameters, MACs and bytes of 0 or more, got {cost.params}, "
            f"{cost.macs} and {cost.bytes}."
        )


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
    input_shape: tuple[Count, ...]
    output_shape: tuple[Count, ...]
    params: Count
    macs: Count
    calls: Count = 1
    timing: Timing | None = None


@dataclass(frozen=True, kw_only=True)
class Subnormals(Record):
    """Numbers below the smallest normal one, which many processors compute with slowly.

    What setting such weights to zero gives is no gain of a rewrite: it comes before everything
    else, on both sides of every comparison, and is told apart from it.

    Attributes:
        weights: How many of each weight and buffer, by name.
        near: How many more are so small that their products with activations are.
        values: All values of the network's weights and buffers.
        activations: How many of each module's outputs, on the inputs that it was run on, after the
            weights were set to zero.
        error: The largest difference of the outputs with these weights set to zero, in shares of
            their spread; ``None`` where there are none, or they are not finite.
        exact: Whether that is no more than rounding, so that they may be.
        before: Times of the network as it came, by runtime.
        after: Times of the same with these weights set to zero, in turns with ``before``.
        ratio: ``before`` / ``after``.
    """

    weights: Mapping[str, int]
    values: int
    near: Mapping[str, int] = field(default_factory=dict)
    activations: Mapping[str, int] = field(default_factory=dict)
    error: float | None = None
    exact: bool = True
    before: Mapping[str, Timing] = field(default_factory=dict)
    after: Mapping[str, Timing] = field(default_factory=dict)
    ratio: Mapping[str, Ratio] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many weights and buffers are subnormal."""
        return sum(self.weights.values())

    @property
    def flushed(self) -> bool:
        """Whether there are weights that may be set to zero."""
        return self.exact and bool(self.weights or self.near)

    def lines(self, *, flushed: bool = True) -> list[str]:
        """Return what was found in words.

        Args:
            flushed: Whether the weights were set to zero for what is told beside.
        """
        lines = []
        if self.weights or self.near:
            both = {
                name: self.weights.get(name, 0) + self.near.get(name, 0)
                for name in (*self.weights, *self.near)
            }
            lines.append(
                f"Subnormal weights (below the smallest normal number, slow on many processors): "
                f"{self.count:,} of {self.values:,}, and {sum(self.near.values()):,} whose "
                f"products are, in {_most(both)}. {self._what_became(flushed)}"
            )
            lines += [
                f"{name}: {format_ms(before.median_ms)} with them, "
                f"{format_ms(self.after[name].median_ms)} without, {self.ratio[name]}: no gain of "
                f"a rewrite."
                for name, before in self.before.items()
            ]
        if self.activations:
            lines.append(
                f"Subnormal activations, which cost time too: in {_most(self.activations)}. "
                "`torch.set_flush_denormal(True)` avoids them in eager, the session option "
                "`session.set_denormal_as_zero` in ONNX Runtime."
            )
        return lines

    def _what_became(self, flushed: bool) -> str:  # noqa: FBT001
        if not self.exact:
            apart = "are not finite" if self.error is None else f"differ by {self.error:.1e}"
            return f"They were left as they are: without them the outputs {apart}."
        same = f"the outputs are the same (they differ by {self.error or 0.0:.1e})"
        if flushed:
            return f"They were set to zero before all else: {same}. Times are without them."
        return f"Times are with them. `onebyone.flush_subnormals` sets them to zero: {same}."


def subnormal_notes(named: Iterable[tuple[str, Subnormals | None]]) -> list[str]:
    """Return which networks were timed without their subnormal weights, and what that gave."""
    return [f"{name}: {line}" for name, found in named if found for line in found.lines()]


def _most(counts: Mapping[str, int]) -> str:
    """Return names with their numbers, the largest first, and how many more there are."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name or '(root)'} ({count:,})" for name, count in ordered[:5])
    return named + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


@dataclass(frozen=True, kw_only=True)
class Profile(Record):
    """A network's cost, whole and layer by layer.

    Attributes:
        inputs: What the network was called with; its batch is that of the times.
        params: All parameters, shared ones once.
        macs: Multiply-accumulates for one input: convolutions, linear layers, matrix products.
        layers: Layers that have parameters or multiply, in the order of execution.
        uncounted: Operations that multiply but have no counting rule, with their number.
        latency: Time of the whole network by runtime.
        weight_bytes: Of all weights, and of the buffers that are saved.
        subnormals: Weights and activations that cost time for being tiny, if there are any.
    """

    network: str
    inputs: InputSpec
    params: Count
    macs: Count
    layers: tuple[LayerCost, ...]
    latency: Mapping[str, Timing]
    uncounted: Mapping[str, int]
    machine: Machine
    subnormals: Subnormals | None = None
    weight_bytes: Count | None = None
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
        if self.weight_bytes is not None:
            notes.append(f"Weights: {format_bytes(self.weight_bytes)}.")
        if timed:
            notes.append("Layer times: inside the whole network, eager, median over the passes.")
        notes += self._contradictions()
        if self.subnormals is not None:
            notes += self.subnormals.lines(flushed=False)
        notes += [f"Not counted: {count} × {name}." for name, count in self.uncounted.items()]
        columns = ("layer", "kind", ">output", ">params", ">MACs", ">% MACs")
        return Table(
            columns=(*columns, ">ms") if timed else columns,
            rows=rows,
            title=f"{self.network} on {self.inputs}",
            notes=notes,
        )

    def _contradictions(self) -> list[str]:
        """Return which layers took longer than the whole network did in eager."""
        whole = self.latency.get("eager")
        if whole is None:
            return []
        longer = [
            layer.name or "(root)"
            for layer in self.layers
            if layer.timing is not None and layer.timing.q1_ms > whole.q3_ms
        ]
        if not longer:
            return []
        said = (
            f"Times of {', '.join(longer)} are above the whole network's: the machine was busier "
            "when layers were timed. Measure again when it is idle."
        )
        return [said]

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
