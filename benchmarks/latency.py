"""What runtimes, the allocator and plans are worth on this machine: the ratios P1 to P7.

Run with ``python benchmarks/latency.py``, or name some of them: ``python benchmarks/latency.py P1
P4``. Rounds are interleaved in one process; each ratio is the median over rounds with its 95 %
interval, of times without the wait for a processor (``onebyone.profiling.latency``). Each network
of P4 has a process of its own: what was allocated before decides how memory is had. P5 compares
processes, in turns, for the allocator's setting cannot be taken back; P6 and P7 are of the plans
of ``planning.py`` for ResNet-18. Goals: P1 1.9 and no layer below 1; P2 1.35; P3 at most 1; P4 2.0,
2.0 and 1.9; P5 1.7; P6 0.95 and 0.9; P7 none. They were set on one processor; so that others can
be judged, P1, P2 and P4 also say what the ratio would be if every MAC ran at this one's peak: the
speed of a large convolution, measured first, to which the BLAS library's products need not come.
No float32 runtime that computes all MACs comes to more. Where the processor has bf16, its ratio
stands beside: another precision, not the goal's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchvision
from torch import nn

from onebyone.core.precision import has_bf16
from onebyone.core.records import Ratio
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.profiling.process_memory import keep_memory
from onebyone.profiling.trace import trace_layers
from onebyone.runtimes import Prepared, Runtime, describe_machine, find_runtime

if TYPE_CHECKING:
    import planning

# in channels, out channels, height = width: all kinds of 1×1 layers of ResNet-50, MobileNetV2,
# SqueezeNet and NiN.
LAYERS = (
    (64, 64, 56),
    (64, 256, 56),
    (256, 64, 56),
    (256, 128, 56),
    (512, 128, 28),
    (128, 512, 28),
    (1024, 256, 14),
    (256, 1024, 14),
    (2048, 512, 7),
    (512, 2048, 7),
    (32, 16, 112),
    (16, 96, 112),
    (96, 24, 56),
    (24, 144, 56),
    (960, 160, 7),
    (320, 1280, 7),
    (96, 16, 54),
    (16, 64, 54),
    (192, 160, 32),
)
NETWORKS = {"ResNet-50": "resnet50", "MobileNetV2": "mobilenet_v2", "SqueezeNet": "squeezenet1_0"}
ALLOCATED = {"SqueezeNet": "squeezenet1_0", "MobileNetV2": "mobilenet_v2"}
CHILD_ROUNDS = 3
PEAK_ROUNDS = 15
SHARES = (50, 25)  # of the latency


def packed() -> Runtime:
    return find_runtime("packed")


def channels_last() -> Runtime:
    return find_runtime("channels-last")


def shown(ratio: Ratio, samples: Samples) -> str:
    disturbed = "  disturbed" if samples.disturbed(*samples.ms) else ""
    return f"{ratio.value:5.2f} [{ratio.low:.2f}–{ratio.high:.2f}]{disturbed}"


def peak(count: int) -> float:
    """Return the GFLOP/s of a large 3×3 convolution, packed, with so many threads."""
    batch, channels, size = 8, 256, 28
    layer = nn.Conv2d(channels, channels, 3, padding=1).eval()
    with threads(count):
        ready = packed().prepare(layer, torch.randn(batch, channels, size, size))
        ms = interleave({"large": ready}, rounds=PEAK_ROUNDS).ms["large"]
    return 2e-6 * batch * 9 * channels**2 * size**2 / float(np.median(ms))


def contenders(model: nn.Module, x: torch.Tensor) -> dict[str, Prepared]:
    """Return eager, ours, and ours in bf16 where the processor has it."""
    runtimes = {"eager": channels_last(), "ours": packed()}
    if has_bf16("cpu"):
        runtimes["bf16"] = find_runtime("packed:bf16")
    return {name: runtime.prepare(model, x) for name, runtime in runtimes.items()}


def in_bf16(ratios: list[float]) -> str:
    return f", in bf16 {statistics.geometric_mean(ratios):.2f}" if ratios else ""


def layers(rounds: int, count: int, title: str) -> Iterator[str]:
    """Time each layer alone, and give the geometric mean of the ratios."""
    most = peak(count)
    yield f"{title}; peak {most:.0f} GFLOP/s"
    ratios, ceilings, reduced = [], [], []
    with threads(count):
        for inputs, outputs, size in LAYERS:
            layer, x = nn.Conv2d(inputs, outputs, 1).eval(), torch.randn(1, inputs, size, size)
            samples = interleave(contenders(layer, x), rounds=rounds)
            ratio = samples.ratio("eager", "ours")
            ratios.append(ratio.value)
            speeds = {
                name: 2e-6 * inputs * outputs * size**2 / float(np.median(ms))
                for name, ms in samples.ms.items()
            }
            ceilings.append(most / speeds["eager"])
            if "bf16" in samples.ms:
                reduced.append(samples.ratio("eager", "bf16").value)
            yield (
                f"  {inputs:4}→{outputs:<4} at {size:3}²  {shown(ratio, samples)}   "
                f"{speeds['ours']:.0f} GFLOP/s, eager {speeds['eager']:.0f}{in_bf16(reduced[-1:])}"
            )
    below = sum(value < 1 for value in ratios)
    yield (
        f"  geometric mean {statistics.geometric_mean(ratios):.2f}, {below} of 19 below 1; at the "
        f"peak {statistics.geometric_mean(ceilings):.2f}{in_bf16(reduced)}"
    )


def cliff(rounds: int) -> Iterator[str]:
    yield "P3: batch 15 ÷ batch 16, 192→160 at 32², 1 thread"
    layer = nn.Conv2d(192, 160, 1).eval()
    batches = {n: torch.randn(n, 192, 32, 32) for n in (15, 16)}
    with threads(1):
        for name, runtime in (("ours", packed()), ("eager, channels last", channels_last())):
            samples = interleave(
                {str(n): runtime.prepare(layer, x) for n, x in batches.items()}, rounds=rounds
            )
            yield f"  {name:22} {shown(samples.ratio('15', '16'), samples)}"


def whole(rounds: int) -> Iterator[str]:
    most = peak(1)
    yield f"P4: eager channels-last ÷ packed, batch 1 at 224², 1 thread; peak {most:.0f} GFLOP/s"
    for name in NETWORKS:
        yield _child("--whole", name, str(most), "--rounds", str(rounds))


def whole_network(name: str, most: float, rounds: int) -> str:
    """Return what a network takes, where nothing was run before that shaped the heap."""
    model = torchvision.models.get_model(NETWORKS[name]).eval()
    x = torch.randn(1, 3, 224, 224)
    with threads(1):
        ready = contenders(model, x)
        samples = interleave(ready, rounds=rounds)
    least_ms = 2e-6 * trace_layers(model, x).macs / most
    ceiling = np.median(samples.ms["eager"]) / least_ms
    reduced = [samples.ratio("eager", "bf16").value] if "bf16" in ready else []
    return (
        f"  {name:12} {shown(samples.ratio('eager', 'ours'), samples)}   "
        f"{np.median(samples.ms['ours']):6.1f} ms; at the peak {ceiling:.2f}"
        f"{in_bf16(reduced)}   {ready['ours'].options['packing']}"
    )


def allocation(rounds: int) -> Iterator[str]:
    yield "P5: default allocator ÷ ours, packed, batch 32 at 224², 1 thread, a process a sample"
    for name, spec in ALLOCATED.items():
        pairs = []
        for turn in range(max(3, rounds // 5)):
            order = ("default", "keep") if turn % 2 == 0 else ("keep", "default")
            pairs.append({setting: float(_child("--child", spec, setting)) for setting in order})
        ratios = [pair["default"] / pair["keep"] for pair in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rate = 32e3 / statistics.median(pair["keep"] for pair in pairs)
        yield f"  {name:12} {middle:5.2f} quartiles [{low:.2f}–{high:.2f}]   {rate:.0f} images/s"


def _child(*arguments: str) -> str:
    """Return the last line that this file prints in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def child(spec: str, setting: str) -> None:
    if setting == "keep":
        keep_memory()
    model, x = torchvision.models.get_model(spec).eval(), torch.randn(32, 3, 224, 224)
    with threads(1):
        ready = packed().prepare(model, x)
        samples = interleave({"ours": ready}, rounds=CHILD_ROUNDS, warmup=1)
    print(np.median(samples.ms["ours"]))


@cache
def planned(share: float) -> planning.Row:
    import planning  # here: the processes that P5 times plan nothing

    asked = planning.Row("resnet18", "onnxruntime", 1, 1, 224, share)
    return planning.measured(asked, None, 0)


def time_for_macs() -> Iterator[str]:
    yield "P6: time saved ÷ MACs saved, ResNet-18 in ONNX Runtime, batch 1 at 224², 1 thread"
    for row in map(planned, SHARES):
        worth = "–" if row.worth is None else f"{row.worth:.2f}"
        yield f"  {worth} at {row.asked:g} % asked, reached {row.share}"


def slower() -> Iterator[str]:
    yield "P7: rewrites that these plans took, timed again, alone"
    rows = [planned(share) for share in SHARES]
    of = sum(row.rewritten for row in rows)
    yield f"  {sum(row.slower for row in rows)} of {of} shown to be slower"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ratios", nargs="*", metavar="P1", help="some of P1 to P7; all by default")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--whole", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.child:
        child(*args.child)
        return
    n = max(3, args.rounds)
    if args.whole:
        name, most = args.whole
        print(whole_network(name, float(most), n))
        return
    line = "channels-last nn.Conv2d ÷ ours, 19 layers 1×1, batch 1"
    ratios: dict[str, Callable[[], Iterator[str]]] = {
        "P1": lambda: layers(n, 1, f"P1: {line}, 1 thread"),
        "P2": lambda: layers(n, 2, f"P2: {line}, 2 threads"),
        "P3": lambda: cliff(n),
        "P4": lambda: whole(n),
        "P5": lambda: allocation(n),
        "P6": time_for_macs,
        "P7": slower,
    }
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{describe_machine()}, {capability}, {n} rounds, median [95 %]", flush=True)
    for name in args.ratios or ratios:
        for text in ratios[name]():
            print(text, flush=True)


if __name__ == "__main__":
    main()
