"""Says what a machine has for onebyone: versions, instructions, runtimes, and how noisy it is."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from onebyone.core.cores import usable_cores
from onebyone.core.fields import Amount
from onebyone.core.precision import has_bf16
from onebyone.core.records import FORMAT, Machine, Ratio, Record, Timing
from onebyone.core.tables import Table
from onebyone.core.torch_state import ordinary_torch
from onebyone.core.units import format_percent
from onebyone.profiling.latency import interleave, threads
from onebyone.runtimes import describe_machine, known_runtime, runtime_names

ROUNDS = 40
SECONDS = 3.0  # of timing at most
BUSY = 0.05  # share of the time spent waiting for a processor

# What the kernels of torch and of the runtimes choose by, in the order of their age. A name that a
# system does not report is not listed.
_INSTRUCTIONS = {
    "sse4_2": "SSE4.2",
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI (int8)",
    "avx512_vnni": "AVX-512 VNNI (int8)",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "asimddp": "dot product (int8)",
    "i8mm": "I8MM (int8)",
    "bf16": "BF16",
    "sve": "SVE",
    "sve2": "SVE2",
}


@dataclass(frozen=True, kw_only=True)
class RuntimeState(Record):
    """Whether a runtime can be used here.

    Attributes:
        ready: Whether it can.
        version: Of its package; ``None`` where that is not installed.
        missing: What it needs to run, or to run fast; empty if nothing.
    """

    name: str
    ready: bool
    version: str | None
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class DoctorRecord(Record):
    """What this machine has for onebyone.

    Attributes:
        instructions: Of the processor, those that kernels choose by.
        capability: The instructions that torch's own kernels use.
        bf16: Whether the processor computes in bf16, which training then does.
        threads: The number of threads that torch uses.
        usable_cores: The cores that this process may use.
        runtimes: Each runtime, and what it needs.
        tools: Optional programs and packages by name, and whether they are here.
        timing: Of one convolution with one thread.
        same: The same convolution timed against itself. Its interval shows what difference
            cannot be told from noise here.
    """

    machine: Machine
    instructions: tuple[str, ...]
    capability: str
    bf16: bool
    threads: int
    usable_cores: int
    runtimes: tuple[RuntimeState, ...]
    tools: Mapping[str, bool]
    timing: Timing
    same: Ratio
    seconds: Amount
    format: int = FORMAT

    @property
    def noise(self) -> float:
        """The smallest difference in time that can be shown here, as a share."""
        return max(self.same.high - 1, 1 - self.same.low, 0.0)

    def tables(self) -> tuple[Table, Table, Table]:
        """Return the machine, the runtimes, and the noise."""
        return self._machine_table(), self._runtimes_table(), self._noise_table()

    def _machine_table(self) -> Table:
        versions = ", ".join(f"{name} {version}" for name, version in self.machine.versions.items())
        cores = f"{self.usable_cores} of {self.machine.cores}"
        rows = [
            ["processor", self.machine.processor],
            ["instructions", ", ".join(self.instructions) or "not reported by this system"],
            ["torch's kernels use", self.capability],
            ["bf16", "yes: training uses it" if self.bf16 else "no: training uses float32"],
            ["cores that this process may use", cores],
            ["torch's threads", str(self.threads)],
            ["device", self.machine.device],
            ["system", self.machine.system],
            ["versions", versions],
        ]
        return Table(columns=("property", "value"), rows=rows, title="This machine")

    def _runtimes_table(self) -> Table:
        families: dict[str, list[RuntimeState]] = {}
        for each in self.runtimes:
            families.setdefault(each.name.partition(":")[0], []).append(each)
        rows = [_family_row(name, states) for name, states in families.items()]
        rows += [[name, "yes" if here else "no", "", "" if here else _TOOLS[name]]
                 for name, here in self.tools.items()]  # fmt: skip
        return Table(
            columns=("runtime or tool", "ready here", "version", "needs"),
            rows=rows,
            title="Runtimes and tools",
        )

    def _noise_table(self) -> Table:
        waited = self.timing.waited
        rows = [
            ["one 3×3 convolution, 64 to 64 channels at 28×28", str(self.timing)],
            ["the same against itself", str(self.same)],
            ["waited for a processor", "unknown" if waited is None else format_percent(waited)],
        ]
        return Table(
            columns=("what", ">measured"),
            rows=rows,
            title="Noise",
            notes=[self.verdict(), self._how()],
        )

    def _how(self) -> str:
        return (
            f"Eager, 1 thread, {self.same.rounds} interleaved rounds in {self.seconds:.1f} s; "
            "quartiles of the time, block bootstrap 95 % interval of the ratio."
        )

    def verdict(self) -> str:
        """Return in a sentence how far times can be trusted now."""
        least = format_percent(self.noise)
        shown = f"Differences in time of {least} or more can be shown now."
        if self.timing.disturbed or (self.timing.waited or 0) > BUSY:
            shown += (
                " Other programs are running: stop them before you plan for a latency budget, or "
                "give --threads 1, whose times leave out the wait for a processor."
            )
        return shown

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))


def _family_row(name: str, states: list[RuntimeState]) -> list[str]:
    """Return the row of a runtime in all its precisions."""
    ready = [_precision(state) for state in states if state.ready]
    needs: dict[str, list[str]] = {}
    for state in states:
        if state.missing:
            needs.setdefault(state.missing, []).append(_precision(state))
    notes = [
        need if len(names) == len(states) else f"{', '.join(names)}: {need}"
        for need, names in needs.items()
    ]
    return [name, ", ".join(ready) or "no", states[0].version or "–", "; ".join(notes)]


def _precision(state: RuntimeState) -> str:
    return state.name.partition(":")[2] or "float32"


_TOOLS = {
    "C++ compiler": "install g++ or clang: the runtime compile needs it",
    "shell completion": "pip install 'onebyone[completion]'",
}


@ordinary_torch()
def doctor(*, rounds: int = ROUNDS) -> DoctorRecord:
    """Look at this machine, and measure its noise for at most about three seconds.

    Args:
        rounds: Interleaved rounds of timing.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.get_num_threads()
    with threads(1):
        timing, same, seconds = _noise(rounds)
    return DoctorRecord(
        machine=describe_machine(device),
        instructions=instructions(),
        capability=torch.backends.cpu.get_cpu_capability(),
        bf16=has_bf16("cpu"),
        threads=count,
        usable_cores=usable_cores(),
        runtimes=tuple(_state(name, device) for name in runtime_names()),
        tools={"C++ compiler": _compiler(), "shell completion": _completion()},
        timing=timing,
        same=same,
        seconds=seconds,
    )


def instructions(cpuinfo: str | Path = "/proc/cpuinfo") -> tuple[str, ...]:
    """Return the instruction sets of the processor; none where the system does not list them.

    Args:
        cpuinfo: The file in which Linux lists them.
    """
    try:
        text = Path(cpuinfo).read_text(encoding="utf-8")
    except OSError:
        return ()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(words for flag, words in _INSTRUCTIONS.items() if flag in value.split())
    return ()


def _state(name: str, device: str) -> RuntimeState:
    runtime = known_runtime(name)
    version = runtime.version if runtime.installed else None
    missing = ""
    if device not in runtime.devices and "cpu" not in runtime.devices:
        missing = "an NVIDIA GPU"
    elif version is None and runtime.extra:
        missing = f"pip install 'onebyone[{runtime.extra}]'"
    elif version is None:
        missing = f"pip install {runtime.package}"
    elif name.startswith("compile") and device == "cpu" and not _compiler():
        missing = "a C++ compiler"
    ready = not missing
    if ready and runtime.precision == "bf16" and device == "cpu" and not has_bf16("cpu"):
        missing = "slow here: the processor has no bf16 instructions"
    return RuntimeState(name=name, ready=ready, version=version, missing=missing)


def _compiler() -> bool:
    named = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    return any(shutil.which(name) for name in named if name)


def _completion() -> bool:
    return importlib.util.find_spec("shtab") is not None


def _noise(rounds: int) -> tuple[Timing, Ratio, float]:
    """Time one convolution against itself."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 64, 28, 28, generator=generator)
    weight = torch.randn(64, 64, 3, 3, generator=generator)
    call = functools.partial(F.conv2d, inputs, weight, padding=1)
    start = time.perf_counter()
    with torch.inference_mode():
        samples = interleave({"a": call, "b": call}, rounds=rounds, seconds=SECONDS)
    seconds = time.perf_counter() - start
    return samples.timing("a", runtime="eager", batch=1), samples.ratio("a", "b"), seconds
