"""Which forms and ranks a layer can take, and which of them are tried."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from onebyone.rewrites.low_rank import factorize
from onebyone.rewrites.low_rank.reduced_rank import problems_of

LAYERS = {
    "square": nn.Conv2d(3, 4, 3, dtype=torch.float64),
    "more out than in": nn.Conv2d(2, 20, 3, dtype=torch.float64),
    "more in than out": nn.Conv2d(20, 2, 3, dtype=torch.float64),
    "one channel in": nn.Conv2d(1, 12, (2, 3), dtype=torch.float64),
    "two channels out": nn.Conv2d(9, 2, (3, 2), dtype=torch.float64),
    "tall kernel": nn.Conv2d(3, 16, (4, 2), dtype=torch.float64),
    "grouped": nn.Conv2d(6, 20, 3, groups=2, dtype=torch.float64),
    "along one axis": nn.Conv1d(3, 12, 3, dtype=torch.float64),
    "along three axes": nn.Conv3d(2, 6, 2, dtype=torch.float64),
    "linear": nn.Linear(7, 5, dtype=torch.float64),
    "pointwise": nn.Conv2d(5, 7, 1, dtype=torch.float64),
    "transposed": nn.ConvTranspose2d(3, 16, 3, dtype=torch.float64),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    made = LAYERS[request.param]
    torch.manual_seed(0)
    made.reset_parameters()
    return made


def errors_of(layer, form, ranks):
    settings = {"form": form, "ranks": list(ranks)}
    problems = problems_of(layer)
    judged = factorize.errors(problems, layer, [settings])[0]
    return judged, factorize.fit(factorize.build(layer, settings), problems, settings, layer)


def test_full_ranks_lose_nothing_and_one_less_loses_something(layer):
    for form in factorize.forms_of(layer):
        full = factorize.full_ranks(layer, form)
        assert max(errors_of(layer, form, full)) < 1e-10
        # With all channels, which `reduce` and `tucker2` have then, one less may lose nothing.
        if form in {"expand", "spatial", "spatial-expand", "pair"}:
            for less in ((full[0] - 1, *full[1:]), (*full[:-1], full[-1] - 1)):
                assert min(less) < 1 or min(errors_of(layer, form, less)) > 1e-6


def test_a_form_has_no_factor_that_is_a_matrix_of_one_column(layer):
    """Through one channel there is nothing to reduce."""
    for form in set(factorize.forms_of(layer)) & {"reduce", "tucker2"}:
        assert factorize.full_ranks(layer, form)[0] > 1


@pytest.mark.parametrize("most", [1, 3, 14])
def test_the_grid_has_every_form_and_pair_of_ranks_along_its_axes(layer, most):
    grid = factorize.grid(layer, most=most)
    assert {each["form"] for each in grid} == set(factorize.forms_of(layer))
    for form in factorize.forms_of(layer):
        tried = [tuple(each["ranks"]) for each in grid if each["form"] == form]
        dense = 2 * most if form == "spatial" else most
        axes = [factorize._ranks_up_to(limit, dense) for limit in factorize.full_ranks(layer, form)]
        assert tried == list(itertools.product(*axes))
    for each in grid:
        factorize.check(layer, each)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 40))
def test_ranks_are_multiples_of_the_least_power_of_two_that_keeps_them_few(limit, most):
    ranks = factorize._ranks_up_to(limit, most)
    step = min(2**i for i in range(14) if limit <= most * 2**i)
    multiples = [rank for rank in range(1, limit + 1) if rank % step == 0]
    quarters = [rank for rank in range(1, step) if 4 * rank in (step, 2 * step, 3 * step)]
    assert ranks == [rank for rank in sorted(quarters + multiples) if rank <= limit]
    assert len(multiples) <= most
