"""The algebra of the regression, each part against its definition on explicit data."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from explicit_data import (
    CHANNELS,
    METRIC,
    OUT,
    TAPS,
    WIDTH,
    data,
    kernel_alone,
    normal,
    problem_of,
    semidefinite,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from onebyone.rewrites.low_rank import reduced_rank as rr
from onebyone.rewrites.low_rank.factors import inward
from onebyone.rewrites.low_rank.reduced_rank import Problem


@pytest.fixture(params=[0.0, 0.7], ids=["no ridge", "ridge"])
def problem(request):
    return problem_of(*data(), ridge=request.param, metric=METRIC)


# ---------------------------------------------------------------- metrics and roots


@settings(deadline=None)
@given(
    st.integers(1, 6), st.integers(0, 99), st.sampled_from([1e-200, 1.0, 1e200]), st.floats(0, 2)
)
def test_the_root_of_a_metric_squares_to_it_with_its_floor(size, seed, unit, floor):
    metric = semidefinite(size, seed=seed)
    root = rr.metric_root(unit * metric, floor=floor)
    wanted = metric / metric.diagonal().mean() + floor * torch.eye(size, dtype=torch.float64)
    assert_close(root @ root, wanted, rtol=1e-6, atol=1e-6)
    assert_close(root, root.T)


def test_the_floor_of_a_metric_is_a_hundredth():
    root = rr.metric_root(torch.diag(torch.tensor([3.0, 0.0, 0.0])))
    assert_close((root @ root).diagonal(), torch.tensor([3.01, 0.01, 0.01]).double())


def test_rounding_below_zero_in_a_metric_counts_as_nothing():
    root = rr.metric_root(torch.diag(torch.tensor([2.0, -0.5])))
    assert_close((root @ root).diagonal(), torch.tensor([2 / 0.75 + 0.01, 0.01]).double())


@pytest.mark.parametrize(
    ("diagonal", "mean"),
    [([1.0, 2.0], 1.5), ([0.0, 0.0], 0.0), ([-3.0, 1.0], 0.0), ([math.nan, 1.0], 0.0), ([math.inf, 1.0], 0.0)],
)  # fmt: skip
def test_a_metric_that_says_nothing_has_mean_zero_and_counts_all_alike(diagonal, mean):
    metric = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    assert rr.mean_diagonal(metric) == mean
    if not mean:
        assert_close(rr.metric_root(metric), torch.eye(2, dtype=torch.float64))
    spoiled = torch.eye(2)
    spoiled[0, 1] = math.nan
    assert rr.mean_diagonal(spoiled) == 0


# ---------------------------------------------------------------- the regression


def test_a_regression_solves_the_normal_equations_with_its_ridge(problem):
    found = rr.regress(problem)
    prior = problem.weight.flatten(1)
    left = found @ (problem.xx + problem.ridge * torch.eye(WIDTH, dtype=torch.float64))
    assert_close(left, problem.yx + problem.ridge * prior)


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_where_the_data_is_the_kernels_own_the_kernel_is_the_answer(problem, unit):
    problem = replace(problem, xx=unit * problem.xx, ridge=unit * problem.ridge)
    own = problem.weight.flatten(1) @ problem.xx
    for noise in (0.0, 1e-14):
        same = replace(problem, yx=own * (1 + noise * normal(OUT, WIDTH)))
        assert torch.equal(rr.regress(same), problem.weight.flatten(1))
    other = replace(problem, yx=own * (1 + 1e-9 * normal(OUT, WIDTH)))
    assert not torch.equal(rr.regress(other), problem.weight.flatten(1))
    rough = replace(problem, weight=problem.weight.float(), xx=problem.xx.float(), yx=own.float())
    assert torch.equal(rr.regress(rough), rough.weight.flatten(1))


def test_a_fit_loses_the_mean_square_of_what_it_misses():
    x, y = data()
    found = rr.regression(problem_of(x, y, ridge=0.3, metric=METRIC))
    missed = (y - y.mean(0)) - (x - x.mean(0)) @ found.weight.T
    weighed = missed @ rr.metric_root(METRIC)
    assert found.lost == pytest.approx(float(weighed.square().sum(1).mean()))
    given_ = (x - x.mean(0)) @ found.weight.T
    assert_close(found.given, given_.T @ given_ / len(x))


@pytest.mark.parametrize("vectors_first", [False, True])
def test_the_tail_of_a_fit_is_what_lesser_ranks_lose_besides(problem, vectors_first):
    found = rr._regression(problem)
    if vectors_first:
        assert found.vectors.shape == (OUT, OUT)
    in_metric = problem.root @ found.given @ problem.root
    spectrum = torch.linalg.eigvalsh(in_metric).flip(0)
    for rank in range(OUT + 1):
        assert found.tail(rank) == pytest.approx(found.lost + float(spectrum[rank:].sum()))
    along = found.vectors.T @ in_metric @ found.vectors
    assert_close(along, torch.diag(spectrum), rtol=1e-6, atol=1e-6)


def test_nothing_is_lost_or_given_that_is_below_zero():
    """But for rounding: where outputs are given exactly, and along directions without any."""
    lost = []
    for seed in range(40):
        x, _ = data(seed)
        weight = normal(OUT, WIDTH, seed=seed)
        made = problem_of(x, x @ weight.T, metric=METRIC)
        lost.append(rr._regression(made).lost)
        one = normal(OUT, 1, seed=seed)
        values = rr._fit(made, weight, one @ one.T, one @ one.T).values
        assert (values >= 0).all()
        assert float(values[0]) > 0.01 > float(values[1])
    assert min(lost) >= 0
    assert max(lost) < 1e-6


def test_a_fit_through_channels_does_not_depend_on_those_asked_for_before(problem):
    for before in ([1], [CHANNELS]):
        for rank in (1, 3):
            fresh, used = replace(problem), replace(problem)
            rr.through_channels(used, before)
            assert inward(used, rank).lost == pytest.approx(inward(fresh, rank).lost)
            assert_close(inward(used, rank).spatial, inward(fresh, rank).spatial)


@pytest.mark.parametrize("rank", range(1, CHANNELS + 1))
def test_nested_regressions_are_those_through_the_first_channels(problem, rank):
    basis = rr.channel_basis(problem)[:, :rank]
    small = rr.projected(problem, basis)
    alone, nested = rr._regression(small), rr.Nested(problem, CHANNELS)
    found = nested.fit(rank)
    assert_close(found.weight, alone.weight)
    assert_close(found.given, alone.given)
    assert found.lost == pytest.approx(alone.lost)
    first = nested.first(rank)
    for name in ("weight", "mean_x", "xx", "yx"):
        assert_close(getattr(first, name), getattr(small, name))
    assert rr.through_channels(problem, [rank, 1])[rank].lost == pytest.approx(alone.lost)


@pytest.mark.parametrize("metric", [None, METRIC], ids=["plain", "weighed"])
@pytest.mark.parametrize("rank", range(1, CHANNELS + 1))
def test_of_a_kernel_alone_too_the_first_channels_nest(metric, rank):
    problem = kernel_alone(metric=metric)
    small = rr.projected(problem, rr.channel_basis(problem)[:, :rank])
    found = rr.Nested(problem, CHANNELS).fit(rank)
    alone = rr._regression(small)
    assert_close(found.weight, alone.weight)
    assert found.lost == pytest.approx(alone.lost, abs=1e-9)
    missed = problem.root @ (problem.weight.flatten(1) - _whole(small, problem, rank).flatten(1))
    assert found.lost == pytest.approx(float(missed.square().sum()), abs=1e-9)


def _whole(small, problem, rank):
    basis = rr.channel_basis(problem)[:, :rank]
    return torch.einsum("orp,cr->ocp", small.weight, basis)


def test_a_problem_through_a_summary_is_that_of_the_summed_up_data():
    x, y = data()
    problem = problem_of(x, y, ridge=0.2, metric=METRIC)
    basis = normal(CHANNELS, 2, seed=5)
    through = torch.einsum("ncp,cr->nrp", x.reshape(-1, CHANNELS, TAPS), basis).flatten(1)
    apart_x, apart_y = through - through.mean(0), y - y.mean(0)
    found = rr.projected(problem, basis)
    assert_close(found.mean_x, through.mean(0))
    assert_close(found.xx, apart_x.T @ apart_x / len(x))
    assert_close(found.yx, apart_y.T @ apart_x / len(x))
    assert_close(found.weight, torch.einsum("ocp,cr->orp", problem.weight, basis))
    assert (found.whole, found.scale) == (False, problem.scale)


def test_the_best_channels_for_all_outputs_are_those_for_every_direction(problem):
    basis = rr.channel_basis(problem)
    assert_close(basis.T @ basis, torch.eye(CHANNELS, dtype=torch.float64))
    again = rr.channel_basis(problem, directions=torch.eye(OUT, dtype=torch.float64))
    assert_close(again.abs(), basis.abs())


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(1, CHANNELS - 1))
def test_where_channels_and_places_vary_apart_no_other_channels_do_better(seed, rank):
    """Then the basis is the best: the covariance is the Kronecker product that it takes it for."""
    channels, places = semidefinite(CHANNELS, seed=seed), semidefinite(TAPS, seed=seed + 1)
    weight = normal(OUT, CHANNELS, TAPS, seed=seed + 2)
    xx = torch.kron(channels, places)
    yx = weight.flatten(1) @ xx
    zeros = torch.zeros(WIDTH, dtype=torch.float64), torch.zeros(OUT, dtype=torch.float64)
    root = rr.metric_root(METRIC)
    problem = Problem(weight, *zeros, xx, yx, yx @ weight.flatten(1).T, root)
    best = rr._regression(rr.projected(problem, rr.channel_basis(problem)[:, :rank])).lost
    for other in range(20):
        basis = torch.linalg.qr(
            rr.channel_basis(problem) + 0.1 * normal(CHANNELS, CHANNELS, seed=other)
        )[0]
        assert (
            rr._regression(rr.projected(problem, basis[:, :rank])).lost >= best * (1 - 1e-9) - 1e-9
        )


def test_a_problem_by_columns_has_rows_for_channels(problem):
    found = rr.by_columns(problem, 3)
    assert found.weight.shape == (OUT, CHANNELS, 3)
    narrow = rr.by_columns(problem, 1)
    assert narrow.weight.shape == (OUT, WIDTH, 1)
    assert torch.equal(narrow.weight.flatten(1), problem.weight.flatten(1))
    assert rr.by_columns(problem, 1) is narrow


# ---------------------------------------------------------------- damping


def test_what_is_positive_definite_is_damped_by_the_ridge_alone():
    square = semidefinite(6)
    for ridge in (0.0, 0.3):
        lower, taken = rr.damped(square, ridge)
        assert taken == ridge
        assert_close(lower @ lower.T, square + ridge * torch.eye(6, dtype=torch.float64))
        assert_close(lower, lower.tril())


def test_what_is_not_quite_definite_is_damped_by_the_first_power_of_ten_that_helps():
    square = torch.diag(torch.tensor([1.0, 1.0, -1e-3]).double())
    assert rr.damped(square, 2e-6)[1] == pytest.approx(2e-3)
    untouched = square.clone()
    assert torch.equal(square, untouched)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_no_more_than_a_tenth_of_the_mean_is_added(unit):
    with pytest.raises(torch.linalg.LinAlgError, match=r"shape \(3, 3\) must be positive definite"):
        rr.damped(unit * torch.diag(torch.tensor([1.0, 1.0, -0.9]).double()), unit * 1e-4)
    nearly = unit * torch.diag(torch.tensor([1.0, 1.0, -0.04]).double())
    mean = float(nearly.diagonal().mean())
    for power in range(4, 14):
        assert rr.damped(nearly, mean * 10.0**-power)[1] == pytest.approx(mean * 0.1)
    with pytest.raises(torch.linalg.LinAlgError):
        rr.damped(nearly, mean * 2e-4)
    with pytest.raises(torch.linalg.LinAlgError, match=r"not with 2e-06 on its diagonal"):
        rr.damped(torch.diag(torch.tensor([1.0, 1.0, -1e-3])), 2e-6)  # float32: is found again
    with pytest.raises(torch.linalg.LinAlgError):
        rr.damped(torch.diag(torch.tensor([-1.0, -1.0]).double()), 1e-300)


# ---------------------------------------------------------------- sizes and shares


@pytest.mark.parametrize(
    ("lost", "scale", "share"),
    [(0.0, 0.0, 0.0), (1.0, 4.0, 0.25), (1.0, 0.0, 1e300), (1e300, 0.0, sys.float_info.max), (3.0, -1.0, 3e300)],
)  # fmt: skip
def test_an_error_relative_to_the_outputs_is_finite(lost, scale, share):
    assert rr.ratio(lost, scale) == pytest.approx(share)


def test_errors_of_groups_add_up():
    assert rr.relative([(1.0, 4.0), (2.0, 8.0)]) == 0.25
    assert rr.relative(iter([(1.0, 8.0)])) == 0.125


@pytest.mark.parametrize("unit", [1e-100, 1.0, 1e50])
def test_a_metrics_own_size_is_told_apart_from_its_shape(unit):
    layer = torch.nn.Conv2d(4, OUT, 1, dtype=torch.float64)
    one, other = (rr.problems_of(layer, metric=u * METRIC)[0] for u in (1.0, unit))
    assert other.scale == pytest.approx(one.scale)
    assert other.felt == pytest.approx(unit * one.felt)
    weighed = float((layer.weight.flatten(1).T @ METRIC @ layer.weight.flatten(1)).trace().detach())
    # But for the floor, which is a hundredth.
    floor = 0.01 * rr.mean_diagonal(METRIC) * float(layer.weight.detach().square().sum())
    assert one.felt == pytest.approx(weighed + floor)


def test_without_data_or_metric_all_outputs_count_as_they_are():
    layer = torch.nn.Conv2d(4, OUT, 3)
    found = rr.problems_of(layer)[0]
    assert (found.plain, found.ridge, found.unit) == (True, 0.0, 1.0)
    assert found.felt == found.scale == pytest.approx(float(layer.weight.detach().square().sum()))
    weighed = rr.problems_of(layer, metric=METRIC)[0]
    assert (weighed.plain, weighed.ridge) == (False, 0.0)
    assert (found.precision, kernel_alone().precision) == (torch.float32, torch.float64)


def test_a_layers_ridge_is_a_share_of_the_mean_variance():
    x, y = data()
    made = problem_of(x, y)

    class Given:
        xx, yx, yy, mean_x, mean_y = made.xx, made.yx, made.given_yy, made.mean_x, made.mean_y

    found = rr._problem(made.weight, made.mean_y, Given, made.root)
    assert found.ridge == pytest.approx(1e-4 * float(made.xx.diagonal().mean()))
    Given.xx = -made.xx
    assert 0 < rr._problem(made.weight, made.mean_y, Given, made.root).ridge < 1e-200
    Given.xx = None
    assert rr._problem(made.weight, made.mean_y, Given, made.root).ridge == 0


def test_only_a_wide_problem_that_float32_can_hold_is_made_rough(monkeypatch):
    wide = problem_of(*data(), ridge=1e-3)
    assert wide.rough() is wide
    monkeypatch.setattr(rr, "WIDE", WIDTH)
    assert wide.rough() is wide  # as wide as that is not wider
    monkeypatch.setattr(rr, "WIDE", WIDTH - 1)
    rough = wide.rough()
    tensors = [
        rough.weight,
        rough.mean_x,
        rough.mean_y,
        rough.xx,
        rough.yx,
        rough.given_yy,
        rough.root,
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert_close(rough.xx, wide.xx.float())
    for still in ({"ridge": 1e-21}, {"mean_x": wide.mean_x * 1e16}, {"yx": wide.yx - 1e16}):
        kept = replace(wide, **still)
        assert kept.rough() is kept
    assert replace(wide, ridge=1e-20).rough().xx.dtype == torch.float32
