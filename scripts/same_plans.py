#!/usr/bin/env python3
"""Print hashes of what five networks are planned and rewritten to, to compare two checkouts.

The networks have random weights and are shown random images, both from a fixed seed, so that two
versions of the code that plan and fit alike print the same lines on the same machine:

    git worktree add ../before HEAD~1
    PYTHONPATH=../before/src scripts/same_plans.py > before.txt
    PYTHONPATH=src scripts/same_plans.py | diff before.txt -
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import onebyone as obo
from onebyone.networks.zoo import build

NETWORKS = {
    "classic": ("onebyone:classic", (1, 28, 28), "macs=50%"),
    "nin": ("onebyone:nin-cifar10", (3, 32, 32), "params=50%"),
    "squeezenet": ("torchvision:squeezenet1_1", (3, 64, 64), "macs=60%"),
    "resnet18": ("torchvision:resnet18", (3, 64, 64), "macs=50%,params=60%"),
    "mobilenet": ("torchvision:mobilenet_v2", (3, 64, 64), "macs=70%"),
}
EXAMPLES = 64


def main() -> int:
    """Plan and rewrite the networks asked for, and print a line of hashes for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NETWORKS)} (all)")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in NETWORKS]
    if unknown:
        parser.error(f"a network must be one of {', '.join(NETWORKS)}, got {unknown[0]!r}")
    torch.set_num_threads(1)  # sums are in another order with more
    for name in args.names or NETWORKS:
        began = time.perf_counter()
        plan, weights = _hashes(*NETWORKS[name])
        print(f"{name:10}  plan {plan}  weights {weights}", flush=True)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


def _hashes(spec: str, shape: tuple[int, ...], budget: str) -> tuple[str, str]:
    """Return the SHA-256 of what is planned for a network, and of its weights once rewritten."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's own, about its weights
        network = build(spec).eval()
    images = torch.randn(EXAMPLES, *shape)
    plan = obo.plan(network, images, budget=budget)
    small = obo.apply(network, plan, images)
    return _of_text(json.dumps(list(_choices(plan)))), _of_weights(small)


def _choices(plan: obo.Plan) -> Iterator[Any]:
    """Yield what each choice does, costs and harms, however a version of the code writes it."""
    for each in plan.choices:
        steps = getattr(each, "steps", None) or (each,)
        costs = [[cost.params, cost.macs] for cost in (each.before, each.after)]
        did = [[step.rewrite, dict(sorted(step.settings.items()))] for step in steps]
        yield [each.site, did, costs, each.harm]
    yield [[item.site, item.reason] for item in plan.left_alone]


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _of_weights(network: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
