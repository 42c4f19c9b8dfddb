"""The pretrained NiN for CIFAR-10 without fine-tuning: its 5×5 layers alone, then all of it.

python benchmarks/nin.py --calibration 512 --seed 0
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from onebyone.core.tables import Table
from onebyone.profiling.trace import trace_layers
from onebyone.report.console import print_table

sys.path.insert(0, str(Path(__file__).parent))
from cifar10_data import cifar10_nin_statistics
from networks import cifar10_nin
from one_shot import OneShot, one_shot


def row(name: str, result: OneShot) -> list[str]:
    """Return a line of the table."""
    plan, change, same = result.plan, result.difference, result.agreement
    assert same is not None
    return [
        name,
        f"{100 * plan.after.macs / plan.before.macs:.1f}",
        f"{100 * plan.after.params / plan.before.params:.1f}",
        f"{100 * result.before.scores.mean():.1f}",
        f"{100 * result.after.scores.mean():.1f}",
        f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
        f"{100 * same.value:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", action="append", metavar="SHARE", help="of all MACs (50%%)")
    parser.add_argument("--calibration", type=int, default=512, metavar="N", help="images (512)")
    parser.add_argument("--seed", type=int, default=0, help="of the images that are drawn (0)")
    args = parser.parse_args()
    network, data = cifar10_nin(), cifar10_nin_statistics()
    layers = trace_layers(network, torch.zeros(1, *data.inputs.tensors[0].sample)).layers
    total = sum(layer.macs for layer in layers)
    wide = [
        layer
        for layer in layers
        if isinstance(module := network.get_submodule(layer.name), nn.Conv2d)
        and module.kernel_size == (5, 5)
    ]
    held = sum(layer.macs for layer in wide)
    # Half of what the 5×5 layers cost is to go, the rest stays.
    narrow = f"macs={total - held // 2}"
    budgets = args.budget or ["50%"]
    only, *whole = one_shot(
        network,
        data,
        [narrow, *(f"macs={budget}" for budget in budgets)],
        examples=args.calibration,
        seed=args.seed,
        sites={narrow: [layer.name for layer in wide]},
    )
    left = 100 * (held - (total - only.plan.after.macs)) / held
    rows = [row(f"5×5 layers, {left:.0f} %", only)]
    rows += [row(f"all, {budget}", r) for r, budget in zip(whole, budgets, strict=True)]
    print_table(
        Table(
            columns=(
                "layers", ">% MACs", ">% params", ">before", ">after", ">points", ">same, %",
            ),
            rows=rows,
            title="The pretrained NiN on CIFAR-10, one-shot",
            notes=[
                f"{len(only.before.scores):,} test images; differences paired, 95 % interval.",
                (f"Fitted on {args.calibration} unlabelled training images (seed {args.seed}), "
                "no fine-tuning."),
            ],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
