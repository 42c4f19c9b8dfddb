import copy
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from onebyone.calibration import moments as moment_sums
from onebyone.calibration.collect import Across, collect
from onebyone.core.errors import PlanError
from onebyone.networks.conv_layers import output_rows
from onebyone.networks.layers import Pointwise
from onebyone.networks.surgery import replace_module
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites.low_rank import factorize
from onebyone.rewrites.low_rank import reduced_rank as regression
from onebyone.rewrites.low_rank.reduced_rank import problems_of

SIZE = (9, 8)
# Of a layer with a k×k kernel.
KXK = ["reduce", "expand", "tucker2", "spatial", "spatial-expand"]


def factored(layer, form, ranks, moments=None, metric=None):
    """Return the chain and its error as fitted."""
    options = {"form": form, "ranks": ranks}
    chain = factorize.build(layer, options)
    problems = problems_of(layer, moments, metric=metric)
    return chain, factorize.fit(chain, problems, options, layer)


def seen_by(layer, *batches):
    return collect(nn.Sequential(layer), ["0"], lambda: batches)["0"]


def full(layer, form):
    return list(factorize.full_ranks(layer, form))


def correlated(n, channels, size=SIZE, *, seed=0, rank=None, dtype=torch.float64):
    """Smooth inputs whose channels are mixtures of few sources, off center."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or max(1, channels // 2)
    sources = torch.randn(n, rank, *size, generator=generator, dtype=torch.float64)
    sources = F.avg_pool2d(sources, 3, stride=1, padding=1)
    mixing = torch.randn(channels, rank, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(n, channels, *size, generator=generator, dtype=torch.float64)
    return (torch.einsum("cr,nrhw->nchw", mixing, sources) + noise + 0.5).to(dtype)


@st.composite
def convolutions(draw):
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    stride = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 3)]))
    numbers = st.tuples(st.integers(0, 3), st.integers(0, 3))
    padding = draw(
        st.one_of(numbers, st.just("valid"), st.just("same") if stride == (1, 1) else numbers)
    )
    if padding != "same" and padding != "valid":
        # Something must be left to convolve.
        assert all(size + 2 * p > r for size, p, r in zip(SIZE, padding, reach, strict=True))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return {
        "in_channels": groups * draw(st.integers(1, 6 // groups)),
        "out_channels": groups * draw(st.integers(1, 6 // groups)),
        "groups": groups,
        "kernel_size": kernel,
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
        "bias": draw(st.booleans()),
    }


# ---------------------------------------------------------------- the same function


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@settings(max_examples=60, deadline=None)
@given(convolutions(), st.booleans(), st.integers(0, 99))
def test_every_form_of_full_rank_is_the_same_function(arguments, calibrated, seed):
    torch.manual_seed(seed)
    layer = nn.Conv2d(**arguments, dtype=torch.float64)
    x = torch.randn(2, layer.in_channels, *SIZE, dtype=torch.float64)
    moments = seen_by(layer, x) if calibrated else None
    for form in factorize.forms_of(layer):
        chain, error = factored(layer, form, full(layer, form), moments)
        assert_close(chain(x), layer(x), rtol=1e-7, atol=1e-8)
        assert error < 1e-10


@pytest.mark.parametrize("bias", [True, False])
def test_a_full_rank_pair_of_linear_layers_is_the_same_function(bias):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5, bias=bias, dtype=torch.float64)
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    chain, _ = factored(layer, "pair", [5])
    assert_close(chain(x), layer(x))
    assert [type(part) for part in chain] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize(
    "lost",
    [{"stride": (1, 1)}, {"dilation": (1, 1)}, {"padding_mode": "zeros"}, {"padding": (0, 0)}],
)
def test_the_law_of_full_rank_notices_a_setting_that_is_lost(lost, monkeypatch):
    torch.manual_seed(0)
    layer = nn.Conv2d(
        4, 5, 3, stride=2, dilation=2, padding=2, padding_mode="reflect", dtype=torch.float64
    )
    x = torch.randn(2, 4, *SIZE, dtype=torch.float64)
    true = nn.Conv2d.__init__

    def forgetful(self, *sizes, **options):
        true(self, *sizes, **({**options, **lost} if "stride" in options else options))

    monkeypatch.setattr(nn.Conv2d, "__init__", forgetful)
    chain, _ = factored(layer, "reduce", [4])
    with pytest.raises(AssertionError):
        assert_close(chain(x), layer(x))


# ---------------------------------------------------------------- kernel alone


def spectrum(matrix):
    return np.linalg.svd(matrix, compute_uv=False) ** 2


@pytest.mark.parametrize("form", ["expand", "reduce", "spatial", "pair"])
def test_without_data_the_error_is_the_tail_of_the_kernels_spectrum(form):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 1 if form == "pair" else (3, 2))
    weight = layer.weight.detach().double().numpy()
    unfolded = weight.transpose(1, 0, 2, 3) if form == "reduce" else weight
    if form == "spatial":  # input channels and rows against output channels and columns
        unfolded = weight.transpose(1, 2, 0, 3).reshape(18, 16)
    values = spectrum(unfolded.reshape(len(unfolded), -1))
    for rank in range(1, 7):
        chain, error = factored(layer, form, [rank])
        expected = values[rank:].sum() / values.sum()
        assert error == pytest.approx(expected, abs=1e-12)
        assert relative_kernel_error(layer, chain) == pytest.approx(expected, abs=1e-6)


def relative_kernel_error(layer, chain):
    """Kernel of the chain, read off its answers to single pixels, against the layer's."""
    parts = [part.weight.detach().double() for part in chain]
    if next(name for name, _ in chain.named_children()) == "vertical":
        merged = torch.einsum("ory,rcx->ocxy", parts[1][:, :, 0], parts[0][..., 0])
        if len(parts) == 3:
            merged = torch.einsum("ps,scxy->pcxy", parts[2].flatten(1), merged)
    elif len(parts) == 3:
        merged = torch.einsum(
            "os,srxy,rc->ocxy", parts[2].flatten(1), parts[1], parts[0].flatten(1)
        )
    elif parts[1].shape[2:] == (1, 1):
        merged = torch.einsum("or,rcxy->ocxy", parts[1].flatten(1), parts[0])
    else:
        merged = torch.einsum("orxy,rc->ocxy", parts[1], parts[0].flatten(1))
    weight = layer.weight.detach().double()
    return float((merged - weight).square().sum() / weight.square().sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_without_data_tucker2_is_within_the_bounds_of_the_higher_order_svd(inner, outer, seed):
    torch.manual_seed(seed)
    layer = nn.Conv2d(6, 6, 3)
    weight = layer.weight.detach().double().numpy()
    by_input = spectrum(weight.transpose(1, 0, 2, 3).reshape(6, -1))
    by_output = spectrum(weight.reshape(6, -1))
    tails = by_input[inner:].sum() / by_input.sum(), by_output[outer:].sum() / by_output.sum()
    chain, error = factored(layer, "tucker2", [inner, outer])
    assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9
    assert relative_kernel_error(layer, chain) == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [(20, 50), (66, 30), (66, 70)])
def test_of_many_channels_too_tucker2_is_exact_to_the_weights_own_type(dtype, ranks):
    torch.manual_seed(0)
    layer = nn.Conv2d(66, 70, (3, 2), dtype=dtype)
    weight = layer.weight.detach().double().numpy()
    by_input = spectrum(weight.transpose(1, 0, 2, 3).reshape(66, -1))
    by_output = spectrum(weight.reshape(70, -1))
    tails = [v[r:].sum() / v.sum() for v, r in zip((by_input, by_output), ranks, strict=True)]
    chain, error = factored(layer, "tucker2", list(ranks))
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    assert max(tails) - rounding <= error <= sum(tails) + rounding
    assert relative_kernel_error(layer, chain) == pytest.approx(error, abs=rounding)
    if ranks == (66, 70):
        # Errors are squared: of the outputs they are roots.
        assert relative_kernel_error(layer, chain) <= rounding**2


@pytest.mark.parametrize("channels", [12, 80])
def test_without_data_tucker2_is_near_what_sweeping_to_the_end_finds(channels):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, channels, 3, dtype=torch.float64)
    inner = outer = channels // 2
    weight = layer.weight.detach().flatten(2)
    expand = torch.linalg.svd(weight.flatten(1), full_matrices=False)[0][:, :outer]
    for _ in range(200):  # HOOI (De Lathauwer et al. 2000), one axis after the other
        kept = torch.einsum("or,ocp->crp", expand, weight)
        basis = torch.linalg.svd(kept.flatten(1), full_matrices=False)[0][:, :inner]
        seen = torch.einsum("ocp,cr->orp", weight, basis)
        expand = torch.linalg.svd(seen.flatten(1), full_matrices=False)[0][:, :outer]
    best = 1 - float(torch.einsum("or,osp->rsp", expand, seen).square().sum()) / float(
        weight.square().sum()
    )
    _, error = factored(layer, "tucker2", [inner, outer])
    # Of weights with no structure at all, the hardest.
    assert best <= error + 1e-12
    assert error <= 1.07 * best


# ---------------------------------------------------------------- with data


def measured_error(layer, chain, x, root=None):
    """Squared error of the outputs in the metric, relative to their variance."""
    with torch.no_grad():
        wanted, given = (m(x).transpose(0, 1).flatten(1) for m in (layer, chain))
    root = torch.eye(len(wanted), dtype=wanted.dtype) if root is None else root
    spread = wanted - wanted.mean(1, keepdim=True)
    return float((root @ (given - wanted)).square().sum() / (root @ spread).square().sum())


def some_ranks(form):
    two = [[1, 2], [3, 4], [5, 3], [2, 8]]
    return {"tucker2": two, "spatial-expand": two}.get(form, [[1], [2], [4], [5]])


torch.manual_seed(0)  # what follows is the same whatever was imported before
CASES = [
    (nn.Conv2d(6, 8, 3, padding=1, dtype=torch.float64), "expand"),
    (nn.Conv2d(6, 8, 3, padding=1, dtype=torch.float64), "reduce"),
    (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), dtype=torch.float64), "tucker2"),
    (nn.Conv2d(6, 8, 1, stride=2, dtype=torch.float64), "pair"),
    (nn.Conv2d(6, 8, (2, 3), stride=(2, 1), padding=1, dtype=torch.float64), "spatial"),
    (nn.Conv2d(6, 8, 3, padding=1, dtype=torch.float64), "spatial-expand"),
]


@pytest.mark.parametrize(("layer", "form"), CASES, ids=[form for _, form in CASES])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_predicted_error_is_the_error_measured_on_the_calibration_data(layer, form, weighed):
    x = correlated(8, 6)
    draw = torch.randn(8, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    metric = draw @ draw.T if weighed else None
    moments = seen_by(layer, x[:5], x[5:])
    problems = problems_of(layer, moments, metric=metric)
    grid = some_ranks(form)
    options = [{"form": form, "ranks": ranks} for ranks in grid]
    quickly = factorize.errors(problems, layer, options)
    for ranks, quick in zip(grid, quickly, strict=True):
        chain, error = factored(layer, form, ranks, moments, metric)
        measured = measured_error(layer, chain, x, problems[0].root)
        # Exact where the regression gives the kernel itself back; damped where it must be solved.
        exact = form in {"expand", "pair"}
        assert measured == pytest.approx(error, rel=1e-9 if exact else 1e-3)
        # HOOI's sweeps come after the quick value, and only better it.
        assert error <= quick * (1 + 1e-6)
        if len(ranks) == 1:
            assert error == pytest.approx(quick, rel=1e-9)


@pytest.mark.parametrize(("layer", "form"), CASES, ids=[form for _, form in CASES])
def test_a_wide_layer_roughly_fitted_has_the_error_that_was_predicted(monkeypatch, layer, form):
    monkeypatch.setattr(regression, "WIDE", 1)
    moments = seen_by(layer, correlated(8, 6))
    problems = problems_of(layer, moments)
    options = [{"form": form, "ranks": ranks} for ranks in some_ranks(form)]
    for settings_, quick in zip(options, factorize.errors(problems, layer, options), strict=True):
        chain = factorize.build(layer, settings_)
        error = factorize.fit(chain, problems, settings_, layer, rough=True)
        assert error == pytest.approx(quick, rel=1e-6)


@pytest.mark.parametrize("metric", [None, torch.diag(torch.tensor([9.0, 1, 4, 0.1, 2, 3, 1, 5]))])
@pytest.mark.parametrize(("layer", "form"), CASES, ids=[form for _, form in CASES])
def test_in_float32_a_wide_layers_options_are_judged_alike(monkeypatch, layer, form, metric):
    monkeypatch.setattr(regression, "WIDE", 1)
    out = layer.weight.shape[0]
    moments = seen_by(layer, correlated(8, 6))
    metric = None if metric is None else metric[:out, :out]
    exact = problems_of(layer, moments, metric=metric)
    rough = [problem.rough() for problem in exact]
    assert {problem.xx.dtype for problem in rough} == {torch.float32}
    options = [{"form": form, "ranks": ranks} for ranks in some_ranks(form)]
    wanted = factorize.errors(exact, layer, options)
    assert factorize.errors(rough, layer, options) == pytest.approx(wanted, rel=2e-3, abs=1e-5)
    for settings_, error in zip(options, wanted, strict=True):
        chain = factorize.build(layer, settings_)
        factorize.fit(chain, rough, settings_, layer, rough=True)
        measured = measured_error(layer, chain, correlated(8, 6), exact[0].root)
        assert measured == pytest.approx(error, rel=1e-2, abs=1e-5)


def test_a_narrow_layer_and_one_that_sees_nothing_stay_in_float64(monkeypatch):
    layer = nn.Conv2d(6, 5, 3, dtype=torch.float64)
    (narrow,) = problems_of(layer, seen_by(layer, correlated(2, 6)))
    assert narrow.rough() is narrow
    monkeypatch.setattr(regression, "WIDE", 1)
    (dead,) = problems_of(layer, seen_by(layer, torch.zeros(2, 6, *SIZE, dtype=torch.float64)))
    assert dead.rough() is dead


@pytest.mark.parametrize(("layer", "form"), CASES, ids=[form for _, form in CASES])
def test_a_fit_does_not_depend_on_what_was_asked_for_before(layer, form):
    moments = seen_by(layer, correlated(8, 6))
    problems = problems_of(layer, moments)
    options = [{"form": form, "ranks": ranks} for ranks in some_ranks(form)]
    factorize.errors(problems, layer, options)
    for settings_ in options:
        later, fresh = (factorize.build(layer, settings_) for _ in range(2))
        factorize.fit(later, problems, settings_, layer)
        factorize.fit(fresh, problems_of(layer, moments), settings_, layer)
        x = correlated(2, 6, seed=1)
        assert_close(later(x), fresh(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("layer", "form"), CASES, ids=[form for _, form in CASES])
def test_with_data_the_error_falls_with_rank_and_is_no_more_than_that_of_the_kernel_alone(
    layer, form
):
    x = correlated(8, 6)
    moments = seen_by(layer, x)
    # Of expand and pair this is the theorem of Eckart and Young in the metric of the data; reduce
    # and tucker2 take a basis that is best only for separable statistics, so theirs is a finding.
    two = len(full(layer, form)) == 2
    grid = [[r, r] for r in range(1, 7)] if two else [[r] for r in range(1, 7)]
    fitted = [measured_error(layer, factored(layer, form, r, moments)[0], x) for r in grid]
    plain = [measured_error(layer, factored(layer, form, r)[0], x) for r in grid]
    assert all(later <= earlier * (1 + 1e-6) + 1e-12 for earlier, later in pairwise(fitted))
    assert all(
        mine <= other * (1 + 1e-6) + 1e-12 for mine, other in zip(fitted, plain, strict=True)
    )
    assert fitted[2] < 0.5 * plain[2]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 99), st.sampled_from(["expand", "pair"]))
def test_no_other_factors_of_that_rank_do_better_on_the_data(rank, seed, form):
    torch.manual_seed(seed)
    layer = nn.Conv2d(5, 6, 3 if form == "expand" else 1, dtype=torch.float64)
    x = correlated(6, 5, seed=seed)
    chain, error = factored(layer, form, [rank], seen_by(layer, x))
    for part in chain:
        part.weight.data += 0.01 * torch.randn_like(part.weight)
    assert measured_error(layer, chain, x) >= error * (1 - 1e-9) - 1e-12


def test_the_metric_buys_accuracy_where_it_counts():
    layer, x = nn.Conv2d(6, 8, 3, dtype=torch.float64), correlated(8, 6)
    moments = seen_by(layer, x)
    metric = torch.diag(torch.tensor([100.0] + 7 * [0.01], dtype=torch.float64))
    focus = factored(layer, "expand", [1], moments, metric)[0]
    plain = factored(layer, "expand", [1], moments)[0]

    def first_channel(chain):
        return (chain(x) - layer(x))[:, 0].square().mean().item()

    assert first_channel(focus) < 0.1 * first_channel(plain)


def test_the_mean_shift_goes_into_the_bias():
    layer, x = nn.Conv2d(6, 8, 3, dtype=torch.float64), correlated(8, 6) + 5
    for form in factorize.forms_of(layer):
        ranks = [1] * len(full(layer, form))
        chain, _ = factored(layer, form, ranks, seen_by(layer, x))
        assert_close(chain(x).mean((0, 2, 3)), layer(x).mean((0, 2, 3)))


def test_the_asymmetric_fit_mends_what_came_before_it():
    torch.manual_seed(0)
    first, second = nn.Conv2d(4, 6, 3, dtype=torch.float64), nn.Conv2d(6, 8, 3, dtype=torch.float64)
    original = nn.Sequential(first, second).eval()
    x = correlated(16, 4, size=(10, 10))
    # What comes before loses half of one channel and mixes another in: an error that is linear.
    damage = torch.eye(6, dtype=torch.float64)
    damage[1, 1], damage[2, 3] = 0.5, 0.8
    broken = nn.Conv2d(4, 6, 3, dtype=torch.float64)
    with torch.no_grad():
        broken.weight.copy_(torch.einsum("pc,cixy->pixy", damage, first.weight))
        broken.bias.copy_(damage @ first.bias + 1)
    damaged = nn.Sequential(broken, copy.deepcopy(second)).eval()
    symmetric = collect(original, ["1"], lambda: [x])["1"]
    asymmetric = Across(original, lambda: [x]).moments(damaged, ["1"])["1"]
    wanted = original(x)

    def left(moments):
        chain, _ = factored(second, "expand", [7], moments)
        return ((chain(broken(x)) - wanted).square().mean() / wanted.var()).item()

    assert left(asymmetric) < 0.05 * left(symmetric)


# ---------------------------------------------------------------- cost


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@settings(max_examples=25, deadline=None)
@given(convolutions(), st.data())
def test_the_predicted_cost_is_the_cost_counted_after_building(arguments, data):
    layer = nn.Conv2d(**arguments)
    x = torch.zeros(1, layer.in_channels, *SIZE)
    output = layer(x)
    for form in factorize.forms_of(layer):
        ranks = [data.draw(st.integers(1, limit)) for limit in full(layer, form)]
        options = {"form": form, "ranks": ranks}
        chain = factorize.build(layer, options)
        predicted = factorize.cost(layer, options, input_size=SIZE, output_size=output.shape[2:])
        counted = trace_layers(chain, x)
        assert counted.cost == predicted
        with FlopCounterMode(display=False) as flops:
            chain(x)
        assert flops.get_total_flops() == 2 * predicted.macs
        assert chain(x).shape == output.shape


# ---------------------------------------------------------------- what carries over


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", KXK)
def test_the_type_carries_over(dtype, form):
    layer = nn.Conv2d(3, 4, 3, dtype=dtype)
    chain, _ = factored(layer, form, full(layer, form))
    assert {p.dtype for p in chain.parameters()} == {dtype}
    x = torch.randn(1, 3, 5, 5, dtype=dtype)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert_close(chain(x), layer(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_frozen_stays_frozen_and_the_mode_stays(trained, training):
    layer = nn.Conv2d(3, 4, 3).requires_grad_(trained).train(training)
    chain = factorize.build(layer, {"form": "tucker2", "ranks": [2, 2]})
    assert {p.requires_grad for p in chain.parameters()} == {trained}
    assert {m.training for m in chain.modules()} == {training}


def test_a_new_layer_shares_no_memory_with_the_old_one():
    layer = nn.Conv2d(3, 4, 1)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    chain, _ = factored(layer, "pair", [3])
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.fill_(7)
    assert_close(dict(layer.state_dict()), before)


# ---------------------------------------------------------------- poor data


@pytest.mark.parametrize("form", KXK)
@pytest.mark.parametrize("case", ["dead channels", "constant channels", "few rows", "all zero"])
@pytest.mark.parametrize("across", [False, True])
def test_poor_data_gives_finite_factors_and_the_full_rank_still_fits(form, case, across):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, 3)
    x = correlated(1 if case == "few rows" else 6, 6, size=(4, 4), dtype=torch.float32)
    if case == "dead channels":
        x[:, 2:4] = 0
    elif case == "constant channels":
        x[:, 1], x[:, 4] = 1000.0, -3.0
    elif case == "all zero":
        x = torch.zeros_like(x)
    network = nn.Sequential(layer).eval()
    moments = (
        Across(network, lambda: [x]).moments(copy.deepcopy(network), ["0"])["0"]
        if across
        else seen_by(layer, x)
    )
    for ranks in (full(layer, form), [1] * len(full(layer, form))):
        chain, error = factored(layer, form, ranks, moments)
        assert all(bool(torch.isfinite(p).all()) for p in chain.parameters())
        assert math.isfinite(error)
        if ranks != [1] and ranks != [1, 1]:
            assert_close(chain(x), layer(x), rtol=2e-3, atol=2e-3)


def test_weights_that_the_data_says_nothing_of_stay_the_kernels():
    # Reduced to every channel, with a channel that the calibration data never lit.
    layer = nn.Conv2d(6, 5, 3, dtype=torch.float64)
    x = correlated(6, 6)
    x[:, 2] = 0
    chain, _ = factored(layer, "expand", [5], seen_by(layer, x))
    other = torch.randn(2, 6, *SIZE, dtype=torch.float64)
    assert_close(chain(other), layer(other))


def rounded(moments):
    """Return moments whose covariance is, as float32 sums are, less than semi-definite."""
    side = len(moments.xx)
    generator = torch.Generator().manual_seed(1)
    values, vectors = torch.linalg.eigh(moments.xx)
    noise = 3e-4 * values.mean()
    spread = torch.rand(side, generator=generator, dtype=torch.float64)
    values = torch.where(values < 1e-9 * values[-1], -noise * spread, values)
    return replace(moments, xx=vectors @ torch.diag(values) @ vectors.T)


@pytest.mark.parametrize("form", KXK)
@pytest.mark.parametrize("wide", [False, True])
def test_inputs_along_few_directions_are_fitted_though_their_sums_are_rounded(
    monkeypatch, form, wide
):
    """The last layers of a trained classifier: nothing but the class is left to vary."""
    monkeypatch.setattr(regression, "WIDE", 1 if wide else 10_000)
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 10, 3, padding=1)
    images = torch.randn(3, 24, 4, 5, dtype=torch.float64)
    shares = torch.randn(40, 3, dtype=torch.float64)
    x = torch.einsum("ns,schw->nchw", shares, images)
    (exact,) = seen_by(copy.deepcopy(layer).double(), x)
    moments = [rounded(exact)]
    problems = problems_of(layer, moments)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(problems[0].xx + problems[0].ridge * torch.eye(24 * 9))
    settings_ = {"form": form, "ranks": [rank // 2 for rank in full(layer, form)]}
    chain = factorize.build(layer, settings_)
    (predicted,) = factorize.errors(problems, layer, [settings_])
    fitted = factorize.fit(chain, problems, settings_, layer)
    assert measured_error(layer, chain, x.float()) == pytest.approx(fitted, abs=5e-3)
    assert predicted == pytest.approx(fitted, abs=2e-2)
    _, unrounded = factored(layer, form, settings_["ranks"], [exact])
    assert fitted == pytest.approx(unrounded, abs=5e-3)


def test_a_covariance_that_no_damping_mends_is_refused():
    square = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    with pytest.raises(torch.linalg.LinAlgError, match="positive definite"):
        regression.damped(square, 1e-4)
    lower, ridge = regression.damped(square + 1.01 * torch.eye(3), 0.0)
    assert ridge == 0
    assert_close(lower @ lower.T, square + 1.01 * torch.eye(3))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "depthwise: no channels to mix"),
        (nn.Conv2d(4, 8, 3, groups=4), "depthwise: no channels to mix"),
        (nn.Conv2d(1, 4, 1), "no rank to lower"),
        (nn.Linear(4, 1), "no rank to lower"),
        (nn.Bilinear(4, 4, 3), "Bilinear is neither a convolution nor a linear layer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_cannot_be_factorized_is_refused_with_the_reason(layer, reason):
    assert reason in factorize.why_not(layer)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.Linear(4, 4), Pointwise(4, 4)])
def test_plain_layers_can_be_factorized(layer):
    assert factorize.why_not(layer) is None


def test_a_convolution_with_its_own_way_to_convolve_is_refused():
    class Odd(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight / weight.norm(), bias)

    assert factorize.why_not(Odd(4, 4, 3)) == "Odd computes its convolution in its own way"


@pytest.mark.parametrize(
    ("form", "ranks", "message"),
    [
        (
            "pair",
            [2],
            r"form of 'a\.b' must be one of reduce, expand, tucker2, spatial, spatial-expand, got 'pair'",
        ),
        ("reduce", [0], "ranks of 'a.b' as 'reduce' must be 1 from 1 up to 3, got"),
        ("reduce", [4], "must be 1 from 1 up to 3, got"),
        ("expand", [6], "must be 1 from 1 up to 5, got"),
        ("expand", [1, 1], "must be 1 from 1 up to 5, got"),
        ("tucker2", [3], "must be 2 from 1 up to 3, 5, got"),
        ("tucker2", [3, 6], "must be 2 from 1 up to 3, 5, got"),
    ],
)
def test_impossible_forms_and_ranks_are_refused(form, ranks, message):
    with pytest.raises(PlanError, match=message):
        factorize.build(nn.Conv2d(3, 5, 2), {"form": form, "ranks": ranks}, site="a.b")


def test_moments_give_the_same_problem_however_they_are_batched():
    layer, x = nn.Conv2d(3, 5, 3, padding=1), correlated(12, 3, dtype=torch.float32)
    one, many = seen_by(layer, x), seen_by(layer, *x.split(5))
    assert one[0].rows == many[0].rows
    assert_close(one[0].xx, many[0].xx, rtol=1e-5, atol=1e-6)


def test_a_layer_of_a_network_is_replaced_where_it_is():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    replace_module(network, "0", factorize.build(network[0], {"form": "reduce", "ranks": [2]}))
    assert list(network[0]._modules) == ["reduce", "spatial"]


# ---------------------------------------------------------------- other layers

OTHERS = {
    "linear": (nn.Linear(7, 6), (3, 5, 7)),
    "conv1d": (nn.Conv1d(6, 8, 3, stride=2, padding=1, padding_mode="circular"), (3, 6, 9)),
    "conv3d": (nn.Conv3d(4, 6, (3, 2, 1), stride=(1, 2, 1), padding=1), (2, 4, 5, 6, 7)),
    "transposed": (nn.ConvTranspose2d(6, 8, (3, 2), stride=(2, 1), output_padding=(1, 0)), (2, 6, 7, 5)),
    "transposed, grouped": (nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, groups=2), (2, 6, 7, 5)),
    "transposed 1×1": (nn.ConvTranspose2d(6, 8, 1, stride=2), (2, 6, 7, 5)),
    "transposed 3-d": (nn.ConvTranspose3d(4, 6, 2, stride=2), (2, 4, 3, 5, 4)),
    "grouped": (nn.Conv2d(6, 9, (3, 2), groups=3, padding=1), (2, 6, 7, 5)),
    "grouped 1×1": (nn.Conv2d(6, 9, 1, groups=3, stride=2), (2, 6, 7, 5)),
    "1×1 with padding": (nn.Conv2d(6, 9, 1, padding=1), (2, 6, 7, 5)),
    "standardized": (timm.layers.StdConv2d(6, 8, 3, stride=2), (2, 6, 9, 7)),
    "standardized, scaled, same": (timm.layers.ScaledStdConv2dSame(6, 8, 3, stride=2), (2, 6, 9, 8)),
    "same": (timm.layers.Conv2dSame(6, 8, (3, 5), stride=2), (2, 6, 9, 8)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), (2, 6, 9, 8)),
    "spectral norm": (nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 8, 3)).eval(), (2, 6, 9, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_full_rank_is_the_same_function_for_every_kind_of_layer(name, calibrated):
    layer, size = OTHERS[name]
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    x = torch.randn(size, dtype=torch.float64)
    moments = seen_by(layer, x) if calibrated else None
    assert factorize.why_not(layer) is None
    for form in factorize.forms_of(layer):
        chain, error = factored(layer, form, full(layer, form), moments)
        assert_close(chain(x), layer(x), rtol=1e-7, atol=1e-8)
        assert error < 1e-9


@pytest.mark.parametrize("name", OTHERS)
def test_the_predicted_cost_and_error_hold_for_every_kind_of_layer(name):
    layer, size = OTHERS[name]
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    x = torch.randn(size, dtype=torch.float64)
    y = layer(x)
    moments = seen_by(layer, x)
    axes = slice(1, -1) if isinstance(layer, nn.Linear) else slice(2, None)
    for form in factorize.forms_of(layer):
        ranks = [max(1, rank // 2) for rank in full(layer, form)]
        options = {"form": form, "ranks": ranks}
        chain, error = factored(layer, form, ranks, moments)
        predicted = factorize.cost(
            layer, options, input_size=x.shape[axes], output_size=y.shape[axes]
        )
        counted = trace_layers(chain, x)
        assert counted.cost == predicted
        with torch.no_grad():
            wanted, given = (output_rows(layer, out) for out in (layer(x), chain(x)))
        measured = (given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
        assert float(measured) == pytest.approx(error, rel=0.05 if min(size) < 3 else 1e-2)


def test_a_layer_too_wide_for_second_moments_is_fitted_to_its_outputs(monkeypatch):
    monkeypatch.setattr(moment_sums, "MOST_VALUES", 8)
    torch.manual_seed(0)
    x = correlated(20, 9, size=(1, 1)).flatten(1)
    layer = nn.Linear(9, 6).double()
    moments = seen_by(layer, x)
    assert moments[0].xx is None
    errors = []
    for rank in (1, 3, 6):
        chain, error = factored(layer, "pair", [rank], moments)
        with torch.no_grad():
            wanted = layer(x) - layer(x).mean(0)
            measured = (chain(x) - layer(x)).square().sum() / wanted.square().sum()
        assert float(measured) == pytest.approx(error, rel=1e-6, abs=1e-12)
        errors.append(error)
    assert errors[0] > errors[1] > errors[2]
    # Eckart and Young: of all outputs of that rank, the nearest.
    values = spectrum((layer(x) - layer(x).mean(0)).detach().numpy())
    assert errors[1] == pytest.approx(values[3:].sum() / values.sum(), rel=1e-6)


# ---------------------------------------------------------------- many more outputs than inputs


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("weighed", [False, True])
def test_a_layer_of_many_outputs_is_fitted_as_well_in_the_space_of_its_outputs(
    monkeypatch, kind, weighed
):
    torch.manual_seed(0)
    layer = nn.Linear(6, 40) if kind == "linear" else nn.Conv2d(6, 40, 1)
    layer.double()
    x = correlated(300, 6)
    (data,) = seen_by(layer, x.movedim(1, -1) if kind == "linear" else x)
    turned = torch.eye(6) + 0.3 * torch.randn(6, 6)  # what it sees in a rewritten network
    turned = turned.double()
    data = replace(
        data, mean_x=turned @ data.mean_x, xx=turned @ data.xx @ turned.T, yx=data.yx @ turned.T
    )
    metric = None
    if weighed:
        root = torch.randn(40, 40, dtype=torch.float64)
        metric = root @ root.T
    whole, lost = factored(layer, "pair", [3], [data], metric)
    monkeypatch.setattr(regression, "MANY_OUTPUTS", 12)
    (problem,) = problems_of(layer, [data], metric=metric)
    assert problem.span.shape == (40, 6)
    assert problem.root.shape == (6, 6)
    spanned, again = factored(layer, "pair", [3], [data], metric)
    # The floor of the metric is a share of another mean.
    tolerance = 0.05 if weighed else 1e-6
    assert_close(again, lost, rtol=tolerance, atol=0)
    example = x[:4].movedim(1, -1) if kind == "linear" else x[:4]
    assert_close(spanned(example), whole(example), rtol=tolerance, atol=tolerance)
    _, nothing = factored(layer, "pair", full(layer, "pair"), [data], metric)
    assert nothing < lost


def test_a_layer_of_few_or_many_outputs_and_a_kernel_alone_are_taken_as_they_are(monkeypatch):
    monkeypatch.setattr(regression, "MANY_OUTPUTS", 12)
    x = correlated(20, 6).movedim(1, -1)
    for outputs, spanned in ((12, False), (13, True)):
        layer = nn.Linear(6, outputs).double()
        (problem,) = problems_of(layer, seen_by(layer, x))
        assert (problem.span is not None) == spanned
        assert problems_of(layer)[0].span is None
    wide = nn.Conv2d(6, 40, 3).double()
    assert problems_of(wide, seen_by(wide, correlated(20, 6)))[0].span is None
