"""How often a network is called faster than its own twin, or different from it: by chance alone.

Run with ``python benchmarks/twins.py --pairs 200 --out twins.json``, on a machine at rest and then
with ``--busy 4``, which keeps so many other processes busy. Each pair is made anew: two copies of
one network are prepared in a runtime and timed in interleaved rounds, and judged as planning judges
a layer (several looks, further rounds where one seems to be faster) and as ``compare`` judges two
networks (one look). Nominal are 2.5 % for "faster" and 5 % for "differs".

Two copies could also really differ, by where their weights and buffers lie in memory. That part
comes back when the same pair is timed again, as noise does not: it is the square root of the
covariance of the two log ratios of a pair.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor, nn

import onebyone
from onebyone.core.randomness import seeded
from onebyone.core.records import Ratio
from onebyone.core.statistics import share_interval
from onebyone.networks.examples import example_input
from onebyone.planning.latency import layer_timer
from onebyone.profiling.latency import Samples, interleave, threads
from onebyone.runtimes import describe_machine, find_runtime

FASTER, DIFFERS = 0.025, 0.05


def small() -> nn.Module:
    """Return a network of a millisecond or so."""
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        ).eval()


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many other processes busy meanwhile."""
    command = [sys.executable, "-c", "while True: sum(range(10_000))"]
    others = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def twins(network: nn.Module, example: Tensor, runtime: str) -> dict[str, object]:
    """Return two copies of a network, ready to run."""
    prepare = find_runtime(runtime).prepare
    return {name: prepare(copy.deepcopy(network), example) for name in ("one", "other")}


def planned(ready: dict[str, object]) -> Ratio:
    """Return by how much one is called faster, decided as planning does."""
    samples: Samples | None = None
    for _ in range(layer_timer.MOST_TRIES):
        more = interleave(ready, rounds=layer_timer.ROUNDS)
        samples = more if samples is None else samples.followed_by(more)
        ratio = samples.ratio("one", "other", looks=layer_timer.MOST_TRIES)
        if ratio.verdict == "faster" or ratio.value <= 1:
            break
    return ratio


def measure(network: nn.Module, args: argparse.Namespace) -> dict[str, object]:
    """Return the counts of wrong verdicts over all pairs."""
    example = example_input(args.input_shape)
    faster = differs = disturbed = 0
    logs = []
    for done in range(args.pairs):
        ready = twins(network, example, args.runtime)
        first = planned(ready)
        faster += first.verdict == "faster"
        samples = interleave(ready, rounds=args.rounds)
        ratio = samples.ratio("one", "other")
        differs += ratio.verdict != "no difference shown"
        disturbed += samples.disturbed("one", "other")
        logs.append((np.log(first.value), np.log(ratio.value)))
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done + 1} of {args.pairs}")
    return {
        "faster": rate(faster, args.pairs, FASTER),
        "differs": rate(differs, args.pairs, DIFFERS),
        "disturbed": disturbed,
        "persistent": float(np.sqrt(max(np.cov(np.array(logs).T)[0, 1], 0.0))),
        "spread": float(np.std([second for _, second in logs], ddof=1)),
    }


def rate(count: int, pairs: int, nominal: float) -> dict[str, float]:
    """Return a share with its interval, beside what it may be."""
    low, high = share_interval(count, pairs)
    return {"count": count, "share": count / pairs, "low": low, "high": high, "nominal": nominal}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="a network's name; a small one by default")
    parser.add_argument(
        "--input-shape",
        type=lambda text: tuple(int(size) for size in text.split(",")),
        default=(1, 3, 32, 32),
    )
    parser.add_argument("--runtime", default="eager")
    parser.add_argument("--pairs", type=int, default=200, help="twins, 2 or more (200)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of the single look (30)")
    parser.add_argument("--busy", type=int, default=0, metavar="K", help="other busy processes (0)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1)")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    network = small() if args.model is None else onebyone.load_model(args.model, weights="random")
    with busy(args.busy), threads(args.threads):
        found = measure(network, args)
    found |= {
        "pairs": args.pairs,
        "runtime": args.runtime,
        "busy": args.busy,
        "threads": args.threads,
        "input_shape": list(args.input_shape),
        "machine": str(describe_machine("cpu")),
    }
    for name in ("faster", "differs"):
        each = found[name]
        print(
            f"{name}: {each['count']} of {args.pairs} twins, {100 * each['share']:.1f} % "
            f"[{100 * each['low']:.1f}–{100 * each['high']:.1f}], nominal "
            f"{100 * each['nominal']:.1f} %"
        )
    print(
        f"log ratio of a comparison: standard deviation {100 * found['spread']:.1f} %, of which "
        f"comes back when the pair is timed again {100 * found['persistent']:.1f} %"
    )
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
