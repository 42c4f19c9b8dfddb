"""ViT and Swin beside plain SVD: how far the outputs move at the same time in ONNX Runtime.

    OMP_NUM_THREADS=1 python benchmarks/attention.py vit_tiny_patch16_224 --folder runs/attention
    OMP_NUM_THREADS=1 python benchmarks/attention.py swin_tiny_patch4_window7_224 --size 112

A network of timm with random weights is planned for a share of its time and fitted on pictures
without labels. Plain SVD takes the same share of the ranks of every linear layer and sees no data;
that share is searched for which the time is the plan's. A third network has these ranks too, but is
fitted on the pictures. No training follows. The divergence is the squared error of the outputs
relative to their variance, on other pictures. Random weights are the hardest case for low ranks:
their singular values hardly fall.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import onebyone as obo
from onebyone.core.compared import Compared
from onebyone.core.records import Plan
from onebyone.core.tables import Table
from onebyone.core.units import format_count
from onebyone.data import TensorSplit
from onebyone.evaluation.scores import score
from onebyone.report.console import progress

sys.path.insert(0, str(Path(__file__).parent))
from cifar10_data import enlarged
from result_cells import interval, speed

RUNTIME = "onnxruntime"
TRIES = 4  # of shares of ranks, each halving what is left
SEARCHED = (0.04, 0.5)
NAMES = ("original", "plan by time", "plain SVD of every linear layer", "the same ranks, fitted")


def network_of(name: str, size: int, seed: int) -> nn.Module:
    """Return a network of timm with random weights."""
    torch.manual_seed(seed)
    return timm.create_model(name, pretrained=False, img_size=size).eval()


def convolutions(network: nn.Module) -> list[str]:
    """Return the names of all convolutions."""
    return [n for n, module in network.named_modules() if isinstance(module, nn.Conv2d)]


def side_by_side(networks: list[nn.Module], args: argparse.Namespace, rounds: int) -> Compared:
    """Return networks timed in interleaved rounds."""
    shape = (1, 3, args.size, args.size)
    return obo.compare(
        *networks, input_shape=shape, runtimes=[RUNTIME], num_threads=args.threads, rounds=rounds
    )


def searched(network: nn.Module, ours: nn.Module, args: argparse.Namespace) -> Plan:
    """Return the plan of equal shares of the ranks that takes the time of ours."""
    low, high = SEARCHED
    for _ in range(TRIES):
        share = (low + high) / 2
        plan = uniform(network, share, args)
        timed = side_by_side([ours, obo.apply(network, plan, None)], args, 16)
        faster = timed.pair(1).latency_ratio[RUNTIME].value > 1
        low, high = (share, high) if faster else (low, share)
    return uniform(network, (low + high) / 2, args)


def uniform(network: nn.Module, share: float, args: argparse.Namespace) -> Plan:
    """Return a plan that takes the same share of the ranks of every linear layer."""
    shape = (1, 3, args.size, args.size)
    return obo.uniform_plan(network, shape, ranks=share, leave=convolutions(network))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Plan, rewrite and compare one network."""
    network = network_of(args.network, args.size, args.seed)
    shown = enlarged(args.calibration + args.test, (args.size, args.size), seed=args.seed)
    fitted, tested = map(TensorSplit, shown.split([args.calibration, args.test]))
    started = time.process_time()
    with progress("plan") as update:
        plan = obo.plan(
            network, fitted, budget=args.budget, runtime=RUNTIME, num_threads=args.threads,
            task="embedding", effort=args.effort, closest=True, progress=update,
        )  # fmt: skip
    ours = obo.apply(network, plan, fitted, task="embedding")
    seconds = time.process_time() - started
    equal = searched(network, ours, args)
    plain = obo.apply(network, equal, None)
    again = obo.apply(network, equal, fitted, task="embedding")
    networks = [network, ours, plain, again]
    timed = side_by_side(networks, args, args.rounds)
    apart = score(networks, tested, task="embedding").divergences
    rows = []
    for place, name in enumerate(NAMES):
        cost = timed.contenders[place].measured
        ratio = None if not place else timed.pair(place).latency_ratio[RUNTIME]
        rows.append({
            "name": name, "macs": cost.macs, "params": cost.params, "apart": apart[place],
            "ms": cost.latency[RUNTIME].median_ms,
            "faster": None if ratio is None else interval(ratio),
        })  # fmt: skip
    return {
        "rows": rows, "machine": str(timed.machine), "seconds": seconds,
        "rewritten": [len(plan.choices), len(equal.choices)],
        **{name: getattr(args, name) for name in (
            "network", "size", "budget", "effort", "calibration", "test", "threads", "seed",
            "rounds",
        )},
    }  # fmt: skip


def table(found: dict[str, Any]) -> Table:
    """Return a line a network."""
    lines = [
        [
            row["name"], speed(row), f"{row['apart']:.3g}" if row["faster"] else "",
            format_count(row["macs"]), format_count(row["params"]),
        ]
        for row in found["rows"]
    ]  # fmt: skip
    mine, equal = found["rewritten"]
    return Table(
        columns=(
            f"{found['network']}, {found['size']}×{found['size']}",
            f">{RUNTIME}, {found['threads']} thread(s)", ">divergence", ">MACs", ">params",
        ),
        rows=lines,
        notes=[
            (
                f"{found['budget']}; {mine} sites rewritten, {equal} by plain SVD; effort "
                f"{found['effort']}, {found['seconds']:.0f} CPU s."
            ),
            (
                f"{found['calibration']} pictures to fit on, {found['test']} others to compare "
                f"on; random weights, seed {found['seed']}; no training."
            ),
            f"Times: batch 1, {found['rounds']} interleaved rounds. {found['machine']}.",
        ],
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", help="of timm, that takes `img_size`")
    parser.add_argument("--size", type=int, default=224, help="of the pictures (224)")
    parser.add_argument("--budget", default="latency=70%")
    parser.add_argument("--effort", default="quick", help="of the plan: quick, normal, thorough")
    parser.add_argument("--calibration", type=int, default=64, help="pictures to fit on (64)")
    parser.add_argument("--test", type=int, default=64, help="pictures to compare on (64)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30, help="of timing (30)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--folder", type=Path, default=Path("runs/attention"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measured(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / f"{args.network}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found).to_markdown())


if __name__ == "__main__":
    main()
