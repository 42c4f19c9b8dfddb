"""A script that times the first call of each of the article's layers in a fresh process.

It runs by its path and does not import onebyone, so that nothing has warmed up. Its arguments are
the number of threads, then the layers in the order of their calls.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import nn


def main(threads: int, order: list[str]) -> None:
    """Print the milliseconds of each layer's first call as JSON."""
    torch.set_num_threads(threads)
    layers = {
        "pointwise": nn.Conv2d(512, 32, kernel_size=1),
        "spatial": nn.Conv2d(512, 32, kernel_size=3, padding=1),
    }
    maps = torch.rand(1, 512, 12, 12)
    milliseconds = {}
    for name in order:
        # Gradients are recorded, as in a plain call in a notebook.
        start = time.perf_counter_ns()
        layers[name](maps)
        milliseconds[name] = (time.perf_counter_ns() - start) / 1e6
    sys.stdout.write(json.dumps(milliseconds))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
