"""Factors lose what they say, keep the means, and are as large as their kernel."""

from dataclasses import replace

import pytest
import torch
from explicit_data import CHANNELS, METRIC, data, kernel_alone, normal, problem_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from onebyone.rewrites.low_rank import reduced_rank as rr
from onebyone.rewrites.low_rank.factors import between, inward, outward
from onebyone.rewrites.low_rank.reduced_rank import Problem


def chain_of(factors):
    """The kernel ``(out, in, places)`` that factors give."""
    kernel = factors.spatial
    if factors.reduce is not None:
        kernel = torch.einsum("orp,rc->ocp", kernel, factors.reduce)
    return kernel if factors.expand is None else torch.einsum("po,ocq->pcq", factors.expand, kernel)


FORMS = {
    "outward": lambda problem: outward(problem, 2),
    "inward": lambda problem: inward(problem, 2),
    "between": lambda problem: between(problem, 3, 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_factors_lose_what_they_say_and_keep_the_means(form):
    x, y = data()
    factors = FORMS[form](problem_of(x, y, ridge=1e-3, metric=METRIC))
    kernel = chain_of(factors).flatten(1)
    given_ = x @ kernel.T + factors.bias
    assert_close(given_.mean(0), y.mean(0))
    missed = (y - given_) @ rr.metric_root(METRIC)
    # The ridge makes of it a regression that is a little off the best, which the tail is of.
    assert factors.lost == pytest.approx(float(missed.square().sum(1).mean()), rel=1e-3)
    total = (y - y.mean(0)) @ rr.metric_root(METRIC)
    assert factors.scale == pytest.approx(float(total.square().sum(1).mean()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", [None, METRIC], ids=["plain", "weighed"])
def test_factors_of_a_kernel_alone_lose_what_they_say(form, metric):
    problem = kernel_alone(metric=metric)
    factors = FORMS[form](problem)
    missed = problem.root @ (problem.weight - chain_of(factors)).flatten(1)
    assert factors.lost == pytest.approx(float(missed.square().sum()), rel=1e-6)
    whole = problem.root @ problem.weight.flatten(1)
    assert factors.scale == pytest.approx(float(whole.square().sum()))
    for unfolded in (
        factors.reduce,
        None if factors.expand is None or metric is not None else factors.expand.T,
    ):
        if unfolded is not None:
            assert_close(unfolded @ unfolded.T, torch.eye(len(unfolded), dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unit", [0.0, 1e-100, 1e-30, 1e30, 1e100])
def test_factors_of_a_kernel_alone_are_as_large_as_it_is(form, unit):
    one, other = kernel_alone(), kernel_alone()
    other = replace(other, weight=unit * one.weight)
    wanted = chain_of(FORMS[form](one))
    found = FORMS[form](other)
    assert_close(chain_of(found), unit * wanted, rtol=1e-6, atol=1e-9 * unit)
    assert found.lost == pytest.approx(unit**2 * FORMS[form](one).lost, rel=1e-6)


@pytest.mark.parametrize("shape", [(70, 80), (80, 70), (66, 200)])
def test_of_many_channels_too_the_kernel_alone_loses_the_tail_of_its_spectrum(shape):
    weight = normal(shape[0], shape[1], 1)
    zeros = torch.zeros(shape[1], dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64)
    problem = Problem(weight, *zeros, None, None, None, torch.eye(shape[0]).double(), plain=True)
    spectrum = torch.linalg.svdvals(weight.flatten(1)).square()
    for rank in (1, 20, 66):
        factors = outward(problem, rank)
        assert factors.lost == pytest.approx(float(spectrum[rank:].sum()), rel=1e-5, abs=1e-8)
        missed = weight - chain_of(factors)
        assert factors.lost == pytest.approx(float(missed.square().sum()), rel=1e-6, abs=1e-8)


@settings(deadline=None)
@given(st.integers(0, 50))
def test_sweeps_never_leave_more_than_the_start(seed):
    x, y = data(seed)
    made = problem_of(x, y, ridge=1e-6, metric=METRIC, seed=seed)
    start = rr.Nested(made, CHANNELS).fit(2).tail(2)
    found = between(made, 2, 2)
    assert found.lost <= start * (1 + 1e-9)
    swept = rr.channel_basis(made, directions=rr.through_channels(made, [2])[2].vectors[:, :2])[
        :, :2
    ]
    assert found.lost <= rr._regression(rr.projected(made, swept)).tail(2) * (1 + 1e-9)
