"""A script that times one call of each of the article's layers, and nothing before it.

It is run by path in a process of its own and imports nothing of onebyone: a layer that has run
once is no longer cold. Arguments: the threads, then the layers in the order of their calls.
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
        # With gradients recorded, as a plain call in a notebook does.
        start = time.perf_counter_ns()
        layers[name](maps)
        milliseconds[name] = (time.perf_counter_ns() - start) / 1e6
    sys.stdout.write(json.dumps(milliseconds))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
