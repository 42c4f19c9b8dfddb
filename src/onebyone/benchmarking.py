"""One network in all runtimes: interleaved times, memory, and the difference of the outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from onebyone.errors import OneByOneError, OptionError
from onebyone.precision import has_bf16
from onebyone.profiling import example_input
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.profiling.resident import allocator, keep_memory, peak_of_call, resident, settled
from onebyone.records import FORMAT, Machine, Ratio, Record, Timing
from onebyone.runtimes import (
    RUNTIMES,
    Prepared,
    describe_machine,
    difference,
    find_runtime,
    outputs_of,
)
from onebyone.runtimes.outputs import SAME_OUTPUTS, OutputDifference
from onebyone.sites import as_network, evaluation_copy, run
from onebyone.tables import Table
from onebyone.units import format_bytes, format_ms, format_ratio

Progress = Callable[[int, int, str], None]

ROUNDS = 30


@dataclass(frozen=True, kw_only=True)
class BenchEntry(Record):
    """One runtime's measurements.

    Attributes:
        options: The settings that it ran with.
        ratio: Time of the first runtime / time of this one; ``None`` for the first.
        behind: Time of this one / time of the fastest; ``None`` for the fastest.
        difference: Of its outputs from those of eager float32.
        prepare_seconds: Wall time to make the network ready, such as compiling it.
        resident_bytes: By how much preparing it raised the memory held, on a GPU that of the GPU.
        call_bytes: By how much a call raises it, at its peak.
    """

    runtime: str
    version: str
    options: Mapping[str, str]
    timing: Timing
    difference: OutputDifference
    ratio: Ratio | None
    behind: Ratio | None
    prepare_seconds: float
    resident_bytes: int | None
    call_bytes: int | None

    @property
    def same(self) -> bool:
        """Whether its outputs are those of eager float32 but for rounding."""
        return self.difference.relative <= SAME_OUTPUTS


@dataclass(frozen=True, kw_only=True)
class BenchRecord(Record):
    """One network in several runtimes, timed in interleaved rounds.

    Attributes:
        left_out: Runtimes that were not timed, and why.
        allocator: How the process's allocator was set.
    """

    network: str
    input_shape: tuple[int, ...]
    entries: tuple[BenchEntry, ...]
    left_out: Mapping[str, str]
    allocator: str
    machine: Machine
    format: int = FORMAT

    @property
    def best(self) -> tuple[str, ...]:
        """The fastest runtime with the same outputs, and those not shown to be slower than it.

        Empty where the measurements were disturbed too much for a verdict.
        """
        same = [entry for entry in self.entries if entry.same]
        if not same:
            return ()
        fastest = min(same, key=lambda entry: entry.timing.median_ms)
        if fastest.timing.disturbed:
            return ()
        near = [e for e in same if e is not fastest and e.behind is not None and e.behind.low <= 1]
        return (fastest.runtime, *(entry.runtime for entry in near))

    def table(self) -> Table:
        """Return a runtime a line, in the order that they were asked for."""
        rows = [_row(entry) for entry in self.entries]
        first = self.entries[0]
        timing = first.timing
        many = "s" if timing.threads > 1 else ""
        conditions = (
            f"{timing.repeats} interleaved rounds after a warm-up, {timing.device}, "
            f"{timing.threads} thread{many}, allocator: {self.allocator}. Times: median "
            f"[quartiles]. Ratio: time of {first.runtime} / its own, [95 %]. Difference: largest, "
            f"from eager float32, as a share of the outputs' standard deviation."
        )
        notes = [conditions, _verdict(self)]
        notes += [f"Not timed: {name}: {why}" for name, why in self.left_out.items()]
        notes.append(f"{self.machine}.")
        shape = "×".join(map(str, self.input_shape))
        return Table(
            columns=("runtime", ">time", f"vs {first.runtime}", ">differs", ">call", ">ready in"),
            rows=rows,
            title=f"{self.network} on {shape}",
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
        f"{entry.difference.relative:.0e}",
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


def bench(
    model: nn.Module,
    *,
    input_shape: tuple[int, ...],
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
        input_shape: Shape of the input with the batch in front; its values are drawn.
        runtimes: Names, the first of which the others are compared with; by default all that are
            installed and run on the device, with bf16 where the processor has it.
        rounds: Interleaved rounds of timing.
        seconds: Stop timing after the first round that ends later than this.
        num_threads: Threads while timing; what torch is set to, by default. Put back afterwards.
        device: Where to run.
        keep_freed_memory: Make the C library keep freed memory, for the rest of the process; see
            :func:`onebyone.profiling.resident.keep_memory`.
        name: What to call the network; its class by default.
        progress: Told of the runtimes made ready.

    Returns:
        A record; a runtime that cannot run the network is in its ``left_out`` with the reason,
        if it was not asked for by name.

    Raises:
        UnknownNameError: If there is no runtime of a given name.
        MissingExtraError: If a runtime that was asked for is not installed.
        ModelError: If the network cannot be run.
        OptionError: If an option cannot be obeyed.
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
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    example = example_input(input_shape, device=device, dtype=dtype)
    with threads(num_threads):
        reference = outputs_of(run(evaluation_copy(model, device=device), example))
        ready: dict[str, _Ready] = {}
        for done, wanted in enumerate(names):
            if progress is not None:
                progress(done, len(names) + 1, wanted)
            try:
                ready[wanted] = _make_ready(model, example, wanted, reference)
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
        input_shape=input_shape,
        entries=_entries(ready, samples, input_shape[0]),
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
    for name, runtime in RUNTIMES.items():
        if kind not in runtime.devices:
            continue
        if not runtime.installed:
            left_out[name] = f"not installed: pip install 'onebyone[{runtime.extra}]'."
        elif runtime.precision == "bf16" and not has_bf16(device):
            left_out[name] = "the device has no bf16 instructions."
        else:
            names.append(name)
    return names


def _make_ready(model: nn.Module, example: Tensor, name: str, reference: list[Tensor]) -> _Ready:
    device = str(example.device)
    before = settled(device)
    started = time.perf_counter()
    prepared = find_runtime(name).prepare(model, example)
    seconds = time.perf_counter() - started
    gap = difference(reference, outputs_of(prepared()))
    after = settled(device) if before is not None else None
    call_bytes = peak_of_call(prepared, device) if resident(device) is not None else None
    grown = None if before is None or after is None else max(after.now - before.now, 0)
    return _Ready(prepared, gap, seconds, grown, call_bytes)


def _entries(ready: Mapping[str, _Ready], samples: Samples, batch: int) -> tuple[BenchEntry, ...]:
    timings = {name: samples.timing(name, runtime=name, batch=batch) for name in ready}
    same = [name for name in ready if ready[name].difference.relative <= SAME_OUTPUTS]
    first = next(iter(ready))
    fastest = min(same or ready, key=lambda name: timings[name].median_ms)
    return tuple(
        BenchEntry(
            runtime=name,
            version=find_runtime(name).version,
            options=item.prepared.options,
            timing=timings[name],
            difference=item.difference,
            ratio=None if name == first else samples.ratio(first, name),
            behind=None if name == fastest else samples.ratio(name, fastest),
            prepare_seconds=item.seconds,
            resident_bytes=item.resident_bytes,
            call_bytes=item.call_bytes,
        )
        for name, item in ready.items()
    )
