"""Regressions of explicit data, from their definition."""

import torch

from onebyone.rewrites.low_rank import reduced_rank as rr
from onebyone.rewrites.low_rank.reduced_rank import Problem

OUT, CHANNELS, TAPS = 5, 4, 3
WIDTH = CHANNELS * TAPS


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def semidefinite(size, *, seed=0, rank=None):
    half = normal(size, rank or size, seed=seed)
    return half @ half.T


def data(seed=0, n=200):
    """Inputs and outputs, row by row, off center and correlated."""
    x = normal(n, WIDTH, seed=seed) @ normal(WIDTH, WIDTH, seed=seed + 1) + 0.5
    y = x @ normal(WIDTH, OUT, seed=seed + 2) + normal(n, OUT, seed=seed + 3) - 1
    return x, y


def problem_of(x, y, *, ridge=0.0, metric=None, seed=0):
    """The regression of outputs on inputs, from its definition."""
    apart_x, apart_y = x - x.mean(0), y - y.mean(0)
    weight = normal(OUT, CHANNELS, TAPS, seed=seed + 9)
    root = torch.eye(OUT, dtype=torch.float64) if metric is None else rr.metric_root(metric)
    return Problem(
        weight,
        x.mean(0),
        y.mean(0),
        apart_x.T @ apart_x / len(x),
        apart_y.T @ apart_x / len(x),
        apart_y.T @ apart_y / len(x),
        root,
        ridge,
    )


METRIC = semidefinite(OUT, seed=3)


def kernel_alone(seed=0, *, metric=None):
    root = torch.eye(OUT, dtype=torch.float64) if metric is None else rr.metric_root(metric)
    zeros = torch.zeros(WIDTH, dtype=torch.float64), torch.zeros(OUT, dtype=torch.float64)
    weight = normal(OUT, CHANNELS, TAPS, seed=seed)
    return Problem(weight, *zeros, None, None, None, root, plain=metric is None)
