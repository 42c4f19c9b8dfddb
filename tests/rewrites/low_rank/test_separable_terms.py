"""The parts of the fit of depthwise and pointwise terms, each against its definition."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onebyone.rewrites.low_rank import reduced_rank, separable, separable_terms
from onebyone.rewrites.low_rank.reduced_rank import Problem, metric_root, problems_of

OUT, CHANNELS, PLACES = 5, 4, 6
WIDTH = CHANNELS * PLACES


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def semidefinite(size, *, seed=0):
    half = normal(size, size, seed=seed)
    return half @ half.T / size


def problem_of(xx, yx, yy, *, ridge=0.0, weight=None):
    weight = normal(OUT, CHANNELS, PLACES, seed=1) if weight is None else weight
    zeros = torch.zeros(WIDTH, dtype=torch.float64), torch.zeros(OUT, dtype=torch.float64)
    return Problem(weight, *zeros, xx, yx, yy, metric_root(semidefinite(OUT, seed=2)), ridge)


def data_of(problem):
    return separable_terms._Data(problem.xx, problem.yx, problem.metric, problem)


def own_outputs(weight=None, *, ridge=0.0):
    """A layer's own outputs on correlated inputs."""
    weight = normal(OUT, CHANNELS, PLACES, seed=1) if weight is None else weight
    flat, xx = weight.flatten(1), semidefinite(WIDTH, seed=3)
    return problem_of(xx, flat @ xx, flat @ xx @ flat.T, ridge=ridge, weight=weight)


def other_outputs(ridge=1e-6):
    """Outputs that no layer gives exactly."""
    rows = normal(300, WIDTH + OUT, seed=4) @ normal(WIDTH + OUT, WIDTH + OUT, seed=5)
    square = rows.T @ rows / len(rows)
    return problem_of(
        square[:WIDTH, :WIDTH], square[WIDTH:, :WIDTH], square[WIDTH:, WIDTH:], ridge=ridge
    )


def lost_of(problem, kernel):
    """The squared error of a kernel in the metric, from its definition."""
    flat = kernel.flatten(1)
    missed = problem.yy - flat @ problem.yx.T - problem.yx @ flat.T + flat @ problem.xx @ flat.T
    return float((problem.metric * missed).sum())


FORMS = {
    "depthwise-pointwise": separable_terms._refine_depthwise,
    "pointwise-depthwise": separable_terms._refine_pointwise,
}


def start_of(problem, form, terms):
    first = form == "depthwise-pointwise"
    slices = problem.weight.transpose(0, 1) if first else problem.weight
    return separable_terms._truncated(slices, slices, terms)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_terms_lose_what_they_say_and_less_than_their_start(form, terms):
    problem = other_outputs()
    start = start_of(problem, form, terms)
    found = FORMS[form](data_of(problem), [start])
    lost = lost_of(problem, separable_terms.kernel_of_terms(form, found.filters, found.mix))
    assert found.lost == pytest.approx(lost)
    assert found.scale == problem.scale
    assert lost < lost_of(problem, separable_terms.kernel_of_terms(form, start.filters, start.mix))


@pytest.mark.parametrize("form", FORMS)
def test_of_several_starts_the_best_is_refined(form):
    problem = other_outputs()
    good = FORMS[form](data_of(problem), [start_of(problem, form, 2)])
    bad = replace(good, filters=normal(*good.filters.shape, seed=8))
    for starts in ([bad, good], [good, bad]):
        assert FORMS[form](data_of(problem), starts).lost <= good.lost * (1 + 1e-9)


def test_what_is_lost_is_never_below_zero():
    data = data_of(own_outputs())
    assert data.lost(data.problem.yy * (1 + 1e-9), data.problem.yy) == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_wide_layer_is_refined_by_one_round(monkeypatch, form):
    problem = other_outputs()

    def refined(sweeps):
        monkeypatch.setattr(separable_terms, "SWEEPS", sweeps)
        return FORMS[form](data_of(problem), [start_of(problem, form, 2)]).lost

    unrefined, once, twice = map(refined, (0, 1, 2))
    assert unrefined > once >= twice
    monkeypatch.setattr(reduced_rank, "WIDE", WIDTH - 1)
    assert refined(2) == once
    assert refined(0) == unrefined


def test_a_sweep_changes_nothing_where_nothing_is_missing():
    problem = own_outputs(ridge=0.5)
    slices = problem.weight.transpose(0, 1)
    found = separable_terms._swept(
        data_of(problem), separable_terms._truncated(slices, slices, OUT)
    )
    assert_close(
        separable_terms.kernel_of_terms("depthwise-pointwise", found.filters, found.mix),
        problem.weight,
    )


def test_a_sweep_is_the_same_in_blocks_of_any_size(monkeypatch):
    problem = other_outputs()
    start = start_of(problem, "depthwise-pointwise", 2)
    kernels = []
    for block in (1, 2, 3, 32):
        monkeypatch.setattr(separable_terms, "BLOCK", block)
        swept = separable_terms._swept(data_of(problem), start)
        kernels.append(
            separable_terms.kernel_of_terms("depthwise-pointwise", swept.filters, swept.mix)
        )
    for kernel in kernels[1:]:
        assert_close(kernel, kernels[0])


def test_a_sweep_leaves_no_better_terms_to_its_last_channel():
    problem = other_outputs(ridge=0.0)
    swept = separable_terms._swept(data_of(problem), start_of(problem, "depthwise-pointwise", 2))
    least = lost_of(
        problem, separable_terms.kernel_of_terms("depthwise-pointwise", swept.filters, swept.mix)
    )
    for seed in range(40):
        filters, mix = swept.filters.clone(), swept.mix.clone()
        filters[-1] += 0.02 * normal(*filters[-1].shape, seed=seed)
        mix[-1] += 0.02 * normal(*mix[-1].shape, seed=seed + 100)
        kernel = separable_terms.kernel_of_terms("depthwise-pointwise", filters, mix)
        assert lost_of(problem, kernel) >= least * (1 - 1e-9)


def test_the_filters_of_a_reduced_rank_are_of_length_one():
    problem = other_outputs()
    lower = torch.linalg.cholesky(problem.xx[:PLACES, :PLACES])
    root = torch.linalg.inv(lower)
    filters, mix = separable_terms._reduced_rank(problem.yx[:, :PLACES], root, problem.metric, 3)
    assert_close(filters.norm(dim=1), torch.ones(3, dtype=torch.float64))
    full, whole = separable_terms._reduced_rank(problem.yx[:, :PLACES], root, problem.metric, OUT)
    wanted = torch.linalg.solve(problem.xx[:PLACES, :PLACES], problem.yx[:, :PLACES].T).T
    assert_close(whole @ full, wanted)
    # Of each lesser rank it is the best in the metric: the tail of the spectrum is lost.
    missed = metric_root(semidefinite(OUT, seed=2)) @ (wanted - mix @ filters) @ lower
    white = metric_root(semidefinite(OUT, seed=2)) @ wanted @ lower
    tail = torch.linalg.svdvals(white)[3:].square().sum()
    assert_close(missed.square().sum(), tail)


def test_wider_terms_are_the_same_kernel_with_filters_apart_from_the_old_ones():
    slices = normal(CHANNELS, OUT, PLACES)
    terms = separable_terms._truncated(slices, slices, 2)
    terms = replace(terms, filters=terms.filters + 0.3 * normal(*terms.filters.shape, seed=6))
    wide = separable_terms._widened(terms, slices, 4)
    assert wide.filters.shape == (CHANNELS, 4, PLACES)
    assert_close(wide.mix @ wide.filters, terms.mix @ terms.filters)
    old, new = wide.filters[:, :2], wide.filters[:, 2:]
    assert_close(new @ old.mT, torch.zeros(CHANNELS, 2, 2, dtype=torch.float64))
    # They are the leading ones of what the old ones cannot give.
    basis = torch.linalg.qr(old.mT).Q
    rest = slices - slices @ basis @ basis.mT
    assert_close(rest - rest @ new.mT @ new, rest - _leading(rest, 2))


def _leading(slices, rank):
    left, values, right = torch.linalg.svd(slices, full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


def test_covariances_between_channels_and_places_make_up_that_of_both():
    channels, places = semidefinite(CHANNELS, seed=7), semidefinite(PLACES, seed=8)
    problem = problem_of(torch.kron(channels, places), normal(OUT, WIDTH), semidefinite(OUT))
    start = start_of(problem, "pointwise-depthwise", 2)
    between, window = separable_terms._separate_covariances(data_of(problem), start)
    damping = reduced_rank.DAMPING
    whole = channels * places.trace() / PLACES
    assert_close(between, whole + damping * whole.diagonal().mean() * torch.eye(CHANNELS).double())
    share = torch.kron(between, window)
    assert_close(share, problem.xx, rtol=1e-2, atol=3 * damping * float(problem.xx.abs().max()))
    plain = places * PLACES / places.trace()
    assert_close(window, plain + damping * plain.diagonal().mean() * torch.eye(PLACES).double())


def test_covariances_of_inputs_that_are_all_zero_are_finite():
    zero = torch.zeros(WIDTH, WIDTH).double()
    data = data_of(problem_of(zero, torch.zeros(OUT, WIDTH).double(), semidefinite(OUT)))
    start = start_of(data.problem, "pointwise-depthwise", 2)
    for matrix in separable_terms._separate_covariances(data, start):
        assert matrix.isfinite().all()


def test_whitened_inputs_are_white_also_where_places_are_the_same():
    half = normal(WIDTH, WIDTH // 2, seed=6)
    xx = half @ half.T  # of half the rank
    xx[1], xx[:, 1] = xx[0], xx[:, 0]  # the first two places of the first channel
    xx[1, 1] = xx[0, 0]
    ridge = 1e-3 * float(xx.diagonal().mean())
    whitening, ridges = data_of(
        problem_of(xx, normal(OUT, WIDTH), normal(OUT, OUT), ridge=ridge)
    ).whitening
    assert ridges == [ridge] * CHANNELS
    for channel, white in enumerate(whitening):
        own = slice(channel * PLACES, (channel + 1) * PLACES)
        lifted = xx[own, own] + ridge * torch.eye(PLACES).double()
        assert_close(white @ lifted @ white.T, torch.eye(PLACES).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_an_inverse_of_what_has_one_is_it_and_of_what_has_none_goes_as_far_as_it_can(unit):
    full = unit * torch.stack([semidefinite(4, seed=seed) for seed in range(3)])
    wanted = torch.eye(4).double().expand(3, 4, 4)
    assert_close(separable_terms._inverse(full) @ full, wanted, rtol=0, atol=1e-5)
    half = normal(4, 2)
    low = unit * half @ half.T
    assert_close(low @ separable_terms._inverse(low) @ low, low, rtol=1e-5, atol=1e-5 * unit)
    assert separable_terms._inverse(torch.zeros(2, 3, 3).double()).isfinite().all()
    assert separable_terms._inverse(full.float()).dtype == torch.float32


@pytest.mark.parametrize("better", [separable_terms._better_mix, separable_terms._better_filters])
def test_steps_of_conjugate_gradients_lead_to_the_least_squares(monkeypatch, better):
    monkeypatch.setattr(separable_terms, "STEPS", 300)
    problem = other_outputs()
    data, start = data_of(problem), start_of(problem, "pointwise-depthwise", 2)
    found = better(data, start)
    kernel = separable_terms.kernel_of_terms("pointwise-depthwise", found.filters, found.mix)
    least = lost_of(problem, kernel)
    assert least < lost_of(
        problem, separable_terms.kernel_of_terms("pointwise-depthwise", start.filters, start.mix)
    )
    missing = problem.metric @ (problem.yx - kernel.flatten(1) @ problem.xx)
    missing = missing.reshape(OUT, CHANNELS, PLACES)
    # The gradient in what was free to change is none.
    if better is separable_terms._better_mix:
        assert_close(missing @ found.filters.mT, torch.zeros_like(found.mix), rtol=0, atol=1e-4)
        assert_close(found.filters, start.filters)
    else:
        assert_close(found.mix.mT @ missing, torch.zeros_like(found.filters), rtol=0, atol=1e-4)
        assert_close(found.filters.norm(dim=2), torch.ones(OUT, 2).double())


def test_the_scale_given_to_conjugate_gradients_is_about_the_inverse_curvature(monkeypatch):
    """Where channels and places vary apart and outputs count apart, one step is enough."""
    monkeypatch.setattr(separable_terms, "STEPS", 1)
    xx = torch.kron(semidefinite(CHANNELS, seed=7), semidefinite(PLACES, seed=8))
    weight = normal(OUT, CHANNELS, PLACES, seed=1)
    made = problem_of(xx, weight.flatten(1) @ xx, torch.eye(OUT).double(), weight=weight)
    problem = replace(made, root=torch.diag(torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]).double()))
    data, start = data_of(problem), start_of(problem, "pointwise-depthwise", 2)
    for better in (separable_terms._better_mix, separable_terms._better_filters):
        found = better(data, start)
        kernel = separable_terms.kernel_of_terms("pointwise-depthwise", found.filters, found.mix)
        missing = problem.metric @ (problem.yx - kernel.flatten(1) @ problem.xx)
        missing = missing.reshape(OUT, CHANNELS, PLACES)
        gradient = (
            missing @ start.filters.mT
            if better is separable_terms._better_mix
            else start.mix.mT @ missing
        )
        assert float(gradient.abs().max()) < 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_only_with_all_terms_settings_are_exact(form):
    for layer in (nn.Conv2d(4, 3, 3), nn.Conv2d(12, 20, (2, 3)), nn.Conv2d(4, 6, 3, groups=2)):
        most = separable.most_terms(layer, form)
        found = [
            terms
            for terms in range(1, most + 1)
            if separable.is_exact(layer, {"form": form, "terms": terms})
        ]
        assert found == [most]
        if most > 1:
            fewer = {"form": form, "terms": most - 1}
            chain = separable.build(layer, fewer)
            assert separable.fit(chain, problems_of(layer), fewer, layer) > 1e-6
