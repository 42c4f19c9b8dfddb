"""Elimination against regressions from scratch: the error of every width, and the order."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onebyone.calibration.moments import MomentSum
from onebyone.rewrites.low_rank.reduced_rank import problems_of, regress
from onebyone.rewrites.narrow.carry_out import values_of
from onebyone.rewrites.narrow.eliminate import eliminate, lost_by, without


def problem_of(channels, taps, out, *, metric=None, seed=0, ridge=1e-12):
    """Return the problem of a convolution that gives something else than is wanted of it."""
    torch.manual_seed(seed)
    layer = nn.Conv1d(channels, out, taps, bias=False).double()
    x = torch.randn(4000, channels * taps, dtype=torch.float64)
    x = x @ torch.randn(channels * taps, channels * taps, dtype=torch.float64)
    y = x @ layer.weight.detach().flatten(1).T
    sums = MomentSum()
    sums.add(x, y + 0.1 * torch.randn_like(y) + 0.3 * x[:, :out].tanh())
    found = problems_of(layer, [sums.moments()], metric=metric)[0]
    return replace(found, ridge=ridge)


def lost_with(problem, kept, taps):
    places = values_of(kept, values=taps)
    mine = without(problem, places)
    return lost_by(mine, regress(mine))


def metric_of(size):
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return root @ root.T


@pytest.mark.parametrize("metric", [None, metric_of(3)])
def test_error_of_every_width_is_that_of_the_best_regression_on_what_is_kept(metric):
    problem = problem_of(6, 2, 3, metric=metric)
    found = eliminate([problem], 6)
    assert sorted(found.order) == list(range(6))
    for width in range(1, 7):
        expected = lost_with(problem, found.kept(width), 2) / problem.scale
        assert found.error(width) == pytest.approx(expected, rel=1e-6)
    assert found.lost[-1] == pytest.approx(found.scale, rel=1e-6)


def test_first_channel_to_go_is_the_one_whose_loss_is_least():
    problem = problem_of(6, 2, 3)
    errors = {gone: lost_with(problem, [c for c in range(6) if c != gone], 2) for gone in range(6)}
    assert eliminate([problem], 6).order[0] == min(errors, key=errors.get)


def test_channel_that_another_one_repeats_costs_nothing():
    problem = problem_of(4, 1, 3)

    def repeated(square):  # the last channel is twice the first
        mix = torch.eye(4, dtype=torch.float64)
        mix[3] = 2 * mix[0]
        return mix @ square @ mix.T

    mix = torch.eye(4, dtype=torch.float64)
    mix[3] = 2 * mix[0]
    same = replace(problem, xx=repeated(problem.xx), yx=problem.yx @ mix.T, ridge=1e-9)
    found = eliminate([same], 4)
    assert found.order[0] in (0, 3)
    assert found.error(3) == pytest.approx(found.error(4), rel=1e-5)


def test_several_readers_are_weighed_together():
    first, second = problem_of(5, 1, 3), problem_of(5, 1, 4, seed=1)
    found = eliminate([first, second], 5)
    for width in range(1, 6):
        kept = found.kept(width)
        expected = sum(lost_with(each, kept, 1) for each in (first, second))
        assert found.error(width) == pytest.approx(expected / found.scale, rel=1e-6)
    best = min(
        combinations(range(5), 4),
        key=lambda kept: sum(lost_with(each, kept, 1) for each in (first, second)),
    )
    assert found.kept(4) == list(best)


def test_many_channels_at_once_keep_the_error_exact():
    problem = problem_of(192, 1, 8)
    found = eliminate([problem], 192)
    assert sorted(found.order) == list(range(192))
    for width in (1, 50, 100, 191):
        expected = lost_with(problem, found.kept(width), 1) / problem.scale
        assert found.error(width) == pytest.approx(expected, rel=1e-5)


def test_pools_remove_what_one_by_one_would(monkeypatch):
    problem = problem_of(130, 1, 8)
    pooled = eliminate([problem], 130)
    monkeypatch.setattr("onebyone.rewrites.narrow.eliminate.AT_ONCE", 0.0)
    one_by_one = eliminate([problem], 130)
    assert_close(torch.tensor(pooled.lost), torch.tensor(one_by_one.lost), rtol=0.02, atol=1e-9)


def test_kernel_alone_loses_the_smallest_weights_first():
    layer = nn.Conv1d(4, 3, 2, bias=False).double()
    with torch.no_grad():
        layer.weight[:, 2] *= 0.01
    problem = problems_of(layer)[0]
    found = eliminate([problem], 4)
    assert found.order[0] == 2
    assert found.error(4) == 0
    weight = layer.weight.detach()
    missing = weight[:, 2].square().sum() / weight.square().sum()
    assert found.error(3) == pytest.approx(float(missing))
