"""Benchmarks one network in several runtimes: interleaved times, memory, output differences."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta
from torch import Tensor, nn

from onebyone.core.arguments import checked
from onebyone.core.errors import OneByOneError, OptionError, PluginError
from onebyone.core.fields import Amount
from onebyone.core.precision import has_bf16
from onebyone.core.records import FORMAT, InputSpec, Machine, Ratio, Record, Timing
from onebyone.core.tables import Table
from onebyone.core.tensor_trees import Inputs, device_of
from onebyone.core.torch_state import ordinary_torch
from onebyone.core.units import format_bytes, format_ms, format_ratio
from onebyone.networks.examples import given_example
from onebyone.networks.surgery import as_network, evaluation_copy, run
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.profiling.process_memory import (
    allocator,
    keep_memory,
    peak_of_call,
    resident,
    settled,
)
from onebyone.runtimes import (
    Prepared,
    describe_machine,
    difference,
    find_runtime,
    known_runtime,
    outputs_of,
    runtime_names,
)
from onebyone.runtimes.output_check import OutputDifference

Progress = Callable[[int, int, str], None]

ROUNDS = 30


@dataclass(frozen=True, kw_only=True)
class BenchEntry(Record):
    """One runtime's measurements.

    Attributes:
        runtime: The runtime's name.
        version: The runtime's version.
        options: The settings that it ran with.
        timing: Time of a call.
        difference: Difference of its outputs from those of eager float32.
        ratio: Time of the first runtime / time of this one; ``None`` for the first.
        behind: Time of this one / time of the fastest; ``None`` for the fastest.
        prepare_seconds: Wall time to prepare the network, such as to compile it.
        resident_bytes: Memory added by preparing it; on a GPU, that of the GPU.
        call_bytes: Memory that a call adds at its peak.
    """

    runtime: str
    version: str
    options: Mapping[str, str]
    timing: Timing
    difference: OutputDifference
    ratio: Ratio | None
    behind: Ratio | None
    prepare_seconds: Amount
    resident_bytes: int | None
    call_bytes: int | None

    @property
    def same(self) -> bool:
        """Whether its outputs equal those of eager float32, except for rounding."""
        return self.difference.same


@dataclass(frozen=True, kw_only=True)
class BenchRecord(Record):
    """One network in several runtimes, timed in interleaved rounds.

    Attributes:
        left_out: Runtimes that were not timed, and why.
        allocator: Setting of the process's memory allocator.
    """

    network: str
    inputs: InputSpec
    entries: Annotated[tuple[BenchEntry, ...], Meta(min_length=1)]
    left_out: Mapping[str, str]
    allocator: str
    machine: Machine
    format: int = FORMAT

    @property
    def best(self) -> tuple[str, ...]:
        """The fastest runtime with the same outputs, and those not shown to be slower than it.

        Empty if the measurements were disturbed too much for a verdict.
        """
        same = [entry for entry in self.entries if entry.same]
        if not same:
            return ()
        fastest = min(same, key=lambda entry: entry.timing.median_ms)
        if fastest.timing.disturbed:
            return ()
        near = [
            entry for entry in same if entry.behind is not None and entry.behind.verdict != "faster"
        ]
        return (fastest.runtime, *(entry.runtime for entry in near))

    def table(self) -> Table:
        """Return a table with one runtime per line, in the order of the request."""
        rows = [_row(entry) for entry in self.entries]
        first = self.entries[0]
        timing = first.timing
        many = "s" if timing.threads > 1 else ""
        conditions = (
            f"{timing.repeats} interleaved rounds after a warm-up, {timing.device}, "
            f"{timing.threads} thread{many}, allocator: {self.allocator}. Times: median "
            f"[quartiles]. Ratio: time of {first.runtime} / its own, "
            f"[95 %, block bootstrap, for all of them together]. Difference: largest, "
            f"from eager float32, as a share of the outputs' standard deviation."
        )
        notes = [conditions, _verdict(self)]
        notes += [f"Not timed: {name}: {why}" for name, why in self.left_out.items()]
        notes.append(f"{self.machine}.")
        return Table(
            columns=("runtime", ">time", f"vs {first.runtime}", ">differs", ">call", ">ready in"),
            rows=rows,
            title=f"{self.network} on {self.inputs}",
            notes=notes,
        )

    def __str__(self) -> str:
        return str(self.table())


def _row(entry: BenchEntry) -> list[str]:
    ratio = "–"
    if entry.ratio is not None:
        ratio = f"{format_ratio(entry.ratio.value)} [{entry.ratio.low:.2f}–{entry.ratio.high:.2f}]"
    timing = entry.timing
    quartiles = f"{format_ms(timing.median_ms)} [{timing.q1_ms:.3g}–{timing.q3_ms:.3g}]"
    return [
        entry.runtime + (" (disturbed)" if timing.disturbed else ""),
        quartiles,
        ratio,
        f"{entry.difference.size:.0e}",
        "–" if entry.call_bytes is None else format_bytes(entry.call_bytes),
        f"{entry.prepare_seconds:.1f} s",
    ]


def _verdict(record: BenchRecord) -> str:
    best = record.best
    if not best:
        return "The machine was disturbed: no runtime is shown to be the fastest."
    if len(best) == 1:
        return f"Fastest with the same outputs: {best[0]}."
    return f"Fastest with the same outputs: {best[0]}; not shown to be slower: " + (
        ", ".join(best[1:]) + "."
    )


@checked
@ordinary_torch()
def bench(
    model: nn.Module,
    *,
    input_shape: tuple[int, ...] | None = None,
    example: object = None,
    runtimes: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    seconds: float | None = None,
    num_threads: int | None = None,
    device: str = "cpu",
    keep_freed_memory: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
) -> BenchRecord:
    """Time a network in several runtimes, in interleaved rounds, and compare their outputs.

    Args:
        model: Not modified: copies are run.
        input_shape: Shape of the only input with the batch in front; its values are random.
        example: In place of ``input_shape``: a tensor, a tuple of positional arguments or a mapping
            of keyword arguments.
        runtimes: Names; the others are compared with the first. The default is all that are
            installed and run on the device, with bf16 if the processor supports it.
        rounds: Interleaved rounds of timing.
        seconds: Stop timing after the first round that ends later than this.
        num_threads: Threads while timing; default: torch's present setting. Restored afterwards.
        device: Where to run.
        keep_freed_memory: Make the C library keep freed memory, for the rest of the process; see
            :func:`onebyone.profiling.process_memory.keep_memory`.
        name: Name for the network; default: its class.
        progress: Called with the number done, the total and the name before each runtime.

    Returns:
        A record. A runtime that cannot run the network is in its ``left_out`` with the reason, if
        ``runtimes`` was not given.

    Raises:
        UnknownNameError: If there is no runtime of a given name.
        MissingExtraError: If a given runtime is not installed.
        ModelError: If the network cannot be run.
        OptionError: If an option is not possible here.
    """
    left_out: dict[str, str] = {}
    names = list(dict.fromkeys(runtimes)) if runtimes else _available(device, left_out)
    for wanted in names:
        find_runtime(wanted)
    if rounds < 3:
        raise OptionError(f"`rounds` must be 3 or more, got {rounds}.")
    if keep_freed_memory:
        keep_memory()
    model = as_network(model)
    timed = given_example(model, input_shape=input_shape, example=example)
    inputs = timed.on(model, device)
    with threads(num_threads):
        reference = outputs_of(run(evaluation_copy(model, device=device), inputs))
        ready: dict[str, _Ready] = {}
        for done, wanted in enumerate(names):
            if progress is not None:
                progress(done, len(names) + 1, wanted)
            try:
                ready[wanted] = _make_ready(model, inputs, wanted, reference)
            except OneByOneError as error:
                if runtimes:
                    raise
                left_out[wanted] = str(error)
        if progress is not None:
            progress(len(names), len(names) + 1, "timing")
        samples = interleave(
            {key: item.prepared for key, item in ready.items()},
            rounds=rounds,
            device=device,
            seconds=seconds,
        )
        machine = describe_machine(device)
    return BenchRecord(
        network=name or type(model).__name__,
        inputs=timed.spec,
        entries=_entries(ready, samples, timed.spec.batch),
        left_out=left_out,
        allocator=allocator(),
        machine=machine,
    )


@dataclass(frozen=True)
class _Ready:
    prepared: Prepared
    difference: OutputDifference
    seconds: float
    resident_bytes: int | None
    call_bytes: int | None


def _available(device: str, left_out: dict[str, str]) -> list[str]:
    kind = device.partition(":")[0]
    names = []
    for name in runtime_names():
        try:
            runtime = known_runtime(name)
        except PluginError as error:
            left_out[name] = str(error)
            continue
        if kind not in runtime.devices:
            continue
        if not runtime.installed:
            left_out[name] = f"not installed: pip install 'onebyone[{runtime.extra}]'."
        elif runtime.precision == "bf16" and not has_bf16(device):
            left_out[name] = "the device has no bf16 instructions."
        else:
            names.append(name)
    return names


def _make_ready(model: nn.Module, inputs: Inputs, name: str, reference: list[Tensor]) -> _Ready:
    device = str(device_of(inputs))
    before = settled(device)
    started = time.perf_counter()
    prepared = find_runtime(name).on(model, inputs)
    seconds = time.perf_counter() - started
    gap = difference(reference, outputs_of(prepared()))
    after = settled(device) if before is not None else None
    call_bytes = peak_of_call(prepared, device) if resident(device) is not None else None
    grown = None if before is None or after is None else max(after.now - before.now, 0)
    return _Ready(prepared, gap, seconds, grown, call_bytes)


def _entries(ready: Mapping[str, _Ready], samples: Samples, batch: int) -> tuple[BenchEntry, ...]:
    timings = {name: samples.timing(name, runtime=name, batch=batch) for name in ready}
    same = [name for name in ready if ready[name].difference.same]
    first, others = next(iter(ready)), max(1, len(ready) - 1)
    fastest = min(same or ready, key=lambda name: timings[name].median_ms)
    return tuple(
        BenchEntry(
            runtime=name,
            version=find_runtime(name).version,
            options=item.prepared.options,
            timing=timings[name],
            difference=item.difference,
            ratio=None if name == first else samples.ratio(first, name, together=others),
            behind=None if name == fastest else samples.ratio(name, fastest, together=others),
            prepare_seconds=item.seconds,
            resident_bytes=item.resident_bytes,
            call_bytes=item.call_bytes,
        )
        for name, item in ready.items()
    )
