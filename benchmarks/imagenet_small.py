"""SqueezeNet and Tiny Darknet with their trained weights: counted, and at a share of their ranks.

    python benchmarks/imagenet_small.py --ranks 0.5

ImageNet's pictures are not at hand: accuracy is not measured here, only costs and kernel errors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import onebyone as obo
from onebyone.core.tables import Table
from onebyone.core.units import format_count
from onebyone.profiling.trace import trace_layers
from onebyone.report.console import print_table

sys.path.insert(0, str(Path(__file__).parent))
from networks import imagenet_squeezenet1_0, imagenet_tiny_darknet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=float, default=0.5, help="share of the full ranks (0.5)")
    args = parser.parse_args()
    rows = []
    for make in (imagenet_squeezenet1_0, imagenet_tiny_darknet):
        network = make()
        example = torch.randn(1, *network.input_shape, generator=torch.Generator().manual_seed(0))
        plan = obo.uniform_plan(network, example, ranks=args.ranks)
        full = obo.uniform_plan(network, example, ranks=1)
        small, same = (obo.apply(network, each, None) for each in (plan, full))
        counted = trace_layers(small, example)
        assert counted.cost == plan.after
        with torch.no_grad():
            reference = network(example)
            apart = float((same(example) - reference).abs().max() / reference.abs().max())
        rows.append(
            [
                make.__name__.removeprefix("imagenet_"),
                f"{len(plan.choices)} of {len(plan.choices) + len(plan.left_alone)}",
                f"{format_count(plan.before.macs)} → {format_count(plan.after.macs)}",
                f"{100 * plan.after.macs / plan.before.macs:.1f}",
                f"{format_count(plan.before.params)} → {format_count(plan.after.params)}",
                f"{100 * plan.after.params / plan.before.params:.1f}",
                f"{apart:.0e}",
            ]
        )
    print_table(
        Table(
            columns=(
                "network", ">layers", ">MACs", ">%", ">params", ">%", ">full rank",
            ),
            rows=rows,
            title=f"{100 * args.ranks:.0f} % of the ranks, where that pays",
            notes=[
                "Costs are counted on the rewritten network and equal the plan's.",
                "Layers: rewritten of all. Full rank: the outputs' greatest difference, relative.",
            ],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
