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

from onebyone.calibration.moments import Moments
from onebyone.core.errors import PlanError
from onebyone.networks.conv_layers import input_rows, kernel_of, output_rows, shape_of
from onebyone.profiling.trace import trace_layers
from onebyone.rewrites.low_rank import reduced_rank as regression
from onebyone.rewrites.low_rank import separable, separable_terms
from onebyone.rewrites.low_rank.reduced_rank import problems_of

FORMS = ("depthwise-pointwise", "pointwise-depthwise")
SIZE = (9, 8)


def moments_of(layer, x, y=None):
    """Moments of each group, from all rows at once."""
    shape = shape_of(layer)
    with torch.no_grad():
        rows = input_rows(layer, x)
        outputs = output_rows(layer, layer(x) if y is None else y)
    n, mean_x, mean_y = len(rows), rows.mean(0), outputs.mean(0)
    found = []
    for group in range(shape.groups):
        own = slice(group * shape.values, (group + 1) * shape.values)
        mine = slice(group * shape.group_out, (group + 1) * shape.group_out)
        a, b = (rows - mean_x)[:, own], (outputs - mean_y)[:, mine]
        moments = Moments(
            rows=n, mean_x=mean_x[own], mean_y=mean_y[mine],
            xx=a.T @ a / n, yx=b.T @ a / n, yy=b.T @ b / n,
        )  # fmt: skip
        found.append(moments)
    return found


def separated(layer, form, terms, moments=None, metric=None):
    options = {"form": form, "terms": terms}
    chain = separable.build(layer, options)
    problems = problems_of(layer, moments, metric=metric)
    return chain, separable.fit(chain, problems, options, layer)


def correlated(n, channels, size=SIZE, *, seed=0):
    """Smooth inputs whose channels are mixtures of few sources, off center."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, channels // 2)
    sources = torch.randn(n, rank, *size, generator=generator, dtype=torch.float64)
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(size)]
    sources = pool(sources, 3, stride=1, padding=1)
    mixing = torch.randn(channels, rank, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(n, channels, *size, generator=generator, dtype=torch.float64)
    return torch.einsum("cr,nr...->nc...", mixing, sources) + noise + 0.5


@st.composite
def convolutions(draw):
    kernel = draw(st.sampled_from([(1, 3), (2, 2), (3, 1), (2, 3), (4, 2)]))
    stride = draw(st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 3)]))
    groups = draw(st.sampled_from([1, 1, 2]))
    shared = {
        "kernel_size": kernel,
        "stride": stride,
        "dilation": draw(st.sampled_from([(1, 1), (2, 1), (2, 2)])),
        "groups": groups,
        "bias": draw(st.booleans()),
        # Two channels a group at least: of one, the layer is depthwise.
        "in_channels": groups * draw(st.integers(groups, 5)),
        "out_channels": groups * draw(st.integers(1, 5)),
        "dtype": torch.float64,
    }
    if draw(st.booleans()):
        spare = [min(s, d) - 1 for s, d in zip(stride, shared["dilation"], strict=True)]
        return nn.ConvTranspose2d(
            **shared,
            padding=draw(st.tuples(st.integers(0, 1), st.integers(0, 1))),
            output_padding=draw(st.tuples(*(st.integers(0, most) for most in spare))),
        )
    numbers = st.tuples(st.integers(0, 3), st.integers(0, 3))
    names = st.sampled_from(["valid", "same"]) if stride == (1, 1) else st.just("valid")
    return nn.Conv2d(
        **shared,
        padding=draw(st.one_of(numbers, names)),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
    )


# ---------------------------------------------------------------- the same function


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@settings(max_examples=80, deadline=None)
@given(convolutions(), st.booleans(), st.sampled_from(FORMS))
def test_with_all_terms_it_is_the_same_function(layer, calibrated, form):
    x = torch.randn(2, layer.in_channels, *SIZE, dtype=torch.float64)
    moments = moments_of(layer, x) if calibrated else None
    chain, error = separated(layer, form, separable.most_terms(layer, form), moments)
    assert_close(chain(x), layer(x), rtol=1e-7, atol=1e-8)
    assert error < 1e-10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(4, 6, 5, stride=2, padding=2, dtype=torch.float64), (11,)),
        (nn.Conv3d(3, 5, (2, 1, 3), padding=(1, 0, 1), dtype=torch.float64), (4, 5, 6)),
        (nn.ConvTranspose1d(4, 3, 4, stride=2, padding=1, dtype=torch.float64), (7,)),
        (nn.ConvTranspose3d(3, 2, (2, 1, 3), stride=(1, 2, 1), dtype=torch.float64), (3, 4, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_along_one_and_three_axes_too_all_terms_are_the_same_function(layer, size, form):
    x = torch.randn(2, layer.in_channels, *size, dtype=torch.float64)
    chain, _ = separated(layer, form, separable.most_terms(layer, form))
    assert_close(chain(x), layer(x))


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_pad_or_standardize_at_each_call_are_the_same_function(form):
    padded = timm.layers.Conv2dSame(4, 6, 3, stride=2)
    scaled = timm.layers.ScaledStdConv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, *SIZE)
    for layer in (padded, scaled):
        chain, _ = separated(layer, form, separable.most_terms(layer, form))
        assert_close(chain(x), layer(x), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- kernel alone


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
def test_without_data_the_error_is_the_sum_of_the_slices_spectral_tails(form, groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, (3, 2), groups=groups)
    kernel = kernel_of(layer).numpy()
    # A slice for each input channel, or for each output channel, of each group.
    slices = kernel.swapaxes(1, 2) if form == FORMS[0] else kernel
    values = np.linalg.svd(slices, compute_uv=False) ** 2
    for terms in range(1, separable.most_terms(layer, form) + 1):
        expected = values[..., terms:].sum() / values.sum()
        chain, error = separated(layer, form, terms)
        assert error == pytest.approx(expected, abs=1e-12)
        assert kernel_error(layer, chain) == pytest.approx(expected, abs=1e-6)


def kernel_error(layer, chain):
    """Kernel of the chain, read off its answers to single pixels, against the layer's."""
    height, width = layer.kernel_size
    impulses = torch.zeros(layer.in_channels * height * width, layer.in_channels, height, width)
    impulses.flatten(1).copy_(torch.eye(len(impulses)))
    with torch.no_grad():
        zero = torch.zeros_like(impulses[:1])
        wanted, given = (m(impulses) - m(zero) for m in (layer, chain))
    return float((given - wanted).square().sum() / wanted.square().sum())


# ---------------------------------------------------------------- with data


def measured_error(layer, chain, x, root):
    """Squared error of the outputs in the metric, relative to their variance."""
    with torch.no_grad():
        wanted, given = (output_rows(layer, m(x)).T for m in (layer, chain))
    spread = wanted - wanted.mean(1, keepdim=True)
    return float((root @ (given - wanted)).square().sum() / (root @ spread).square().sum())


torch.manual_seed(0)
CASES = [
    nn.Conv2d(6, 8, 3, padding=1, dtype=torch.float64),
    nn.Conv2d(5, 3, (3, 2), stride=(2, 1), padding_mode="reflect", padding=1, dtype=torch.float64),
    nn.Conv2d(6, 8, 3, groups=2, dtype=torch.float64),
    nn.ConvTranspose2d(6, 4, 3, stride=2, dtype=torch.float64),
    nn.Conv1d(6, 7, 5, dtype=torch.float64),
]
IDS = ["plain", "strided", "grouped", "transposed", "1d"]


@pytest.mark.parametrize("layer", CASES, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighed", [False, True])
def test_the_predicted_error_is_the_error_measured_on_the_calibration_data(layer, form, weighed):
    x = correlated(8, layer.in_channels, SIZE[: len(layer.kernel_size)])
    draw = torch.randn(layer.out_channels, 20, dtype=torch.float64)
    metric = draw @ draw.T if weighed else None
    moments = moments_of(layer, x)
    problems = problems_of(layer, moments, metric=metric)
    root = torch.block_diag(*(problem.root for problem in problems))
    options = [{"form": form, "terms": t} for t in range(1, separable.most_terms(layer, form))]
    for each, quick in zip(options, separable.errors(problems, layer, options), strict=True):
        chain, error = separated(layer, form, each["terms"], moments, metric)
        assert measured_error(layer, chain, x, root) == pytest.approx(error, rel=1e-6, abs=1e-12)
        assert error == pytest.approx(quick, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("layer", CASES, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
def test_in_float32_a_wide_layers_options_are_judged_alike(monkeypatch, layer, form):
    monkeypatch.setattr(regression, "WIDE", 1)
    x = correlated(6, layer.in_channels, SIZE[: len(layer.kernel_size)])
    exact = problems_of(layer, moments_of(layer, x))
    rough = [problem.rough() for problem in exact]
    assert {problem.xx.dtype for problem in rough} == {torch.float32}
    options = [{"form": form, "terms": terms} for terms in (1, 2, 3)]
    wanted = separable.errors(exact, layer, options)
    assert separable.errors(rough, layer, options) == pytest.approx(wanted, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_in_float32_outputs_without_weights_spoil_nothing(monkeypatch, form):
    monkeypatch.setattr(regression, "WIDE", 1)
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[:, 2] = 0
    rough = [p.rough() for p in problems_of(layer, moments_of(layer, correlated(6, 5)))]
    chain = separable.build(layer, {"form": form, "terms": 2})
    error = separable.fit(chain, rough, {"form": form, "terms": 2}, layer)
    assert 0 <= error < 1
    assert all(parameter.isfinite().all() for parameter in chain.parameters())


@pytest.mark.parametrize("layer", CASES, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
def test_with_data_the_error_falls_with_terms_and_is_no_more_than_that_of_the_kernel_alone(
    layer, form
):
    x = correlated(8, layer.in_channels, SIZE[: len(layer.kernel_size)])
    moments = moments_of(layer, x)
    root = torch.eye(layer.out_channels, dtype=torch.float64)
    counts = range(1, separable.most_terms(layer, form) + 1)
    fitted, plain = [], []
    for terms in counts:
        fitted.append(separated(layer, form, terms, moments)[1])
        kernel_alone = with_best_bias(layer, separated(layer, form, terms)[0], x)
        plain.append(measured_error(layer, kernel_alone, x, root))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(fitted))
    assert all(mine <= other + 1e-12 for mine, other in zip(fitted, plain, strict=True))
    assert fitted[0] < 0.8 * plain[0]


def with_best_bias(layer, chain, x):
    """Take the mean error away, so that only the kernels are compared."""
    with torch.no_grad():
        chain[-1].bias += (output_rows(layer, layer(x)) - output_rows(layer, chain(x))).mean(0)
    return chain


@pytest.mark.parametrize("form", FORMS)
def test_more_terms_are_never_worse_however_bad_their_own_start_is(form, monkeypatch):
    layer, x = CASES[0], correlated(8, 6)
    moments, most = moments_of(layer, x), separable.most_terms(layer, form)
    true = separable_terms._truncated

    def useless(slices, weighted, terms):
        start = true(slices, weighted, terms)
        return start if terms == 1 else separable_terms.Terms(start.filters, 0 * start.mix)

    monkeypatch.setattr(separable_terms, "_truncated", useless)
    monkeypatch.setattr(separable_terms, "SWEEPS", 0)
    found = [separated(layer, form, terms, moments)[1] for terms in range(1, most + 1)]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(found))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99))
def test_no_other_pointwise_factor_does_better_on_the_data(terms, seed):
    torch.manual_seed(seed)
    layer = nn.Conv2d(5, 6, 3, dtype=torch.float64)
    x = correlated(6, 5, seed=seed)
    chain, error = separated(layer, FORMS[0], terms, moments_of(layer, x))
    chain.pointwise.weight.data += 0.01 * torch.randn_like(chain.pointwise.weight)
    root = torch.eye(6, dtype=torch.float64)
    assert measured_error(layer, with_best_bias(layer, chain, x), x, root) >= error * (1 - 1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_rounds_over_the_channels_lead_to_where_no_small_change_helps(form, monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(5, 6, 3, dtype=torch.float64), correlated(8, 5)
    draw = torch.randn(6, 20, dtype=torch.float64)
    moments, metric = moments_of(layer, x), draw @ draw.T
    root = problems_of(layer, moments, metric=metric)[0].root
    found, slopes = [], []
    for rounds in (0, 2, 100):
        monkeypatch.setattr(separable_terms, "SWEEPS", rounds)
        monkeypatch.setattr(separable_terms, "LEAST_GAIN", 0.0)
        chain, error = separated(layer, form, 2, moments, metric)
        missing = root @ output_rows(layer, chain(x) - layer(x)).T
        (missing.square().sum() / len(missing.T)).backward()
        found.append(error)
        slopes.append(float(chain.depthwise.weight.grad.norm()))
    assert found[2] <= found[1] < 0.8 * found[0]
    assert slopes[2] < 0.05 * slopes[0]


def test_the_metric_buys_accuracy_where_it_counts():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 8, 3, dtype=torch.float64), correlated(8, 6)
    moments = moments_of(layer, x)
    metric = torch.diag(torch.tensor([100.0] + 7 * [0.01], dtype=torch.float64))
    focus = separated(layer, FORMS[0], 1, moments, metric)[0]
    plain = separated(layer, FORMS[0], 1, moments)[0]

    def first_channel(chain):
        return (chain(x) - layer(x))[:, 0].square().mean().item()

    assert first_channel(focus) < 0.5 * first_channel(plain)


def test_targets_that_are_not_the_layers_own_outputs_are_fitted_to():
    torch.manual_seed(0)
    layer, other = (nn.Conv2d(6, 8, 3, dtype=torch.float64) for _ in range(2))
    x = correlated(8, 6)
    for form in FORMS:
        moments = moments_of(layer, x, other(x).detach())
        chain, error = separated(layer, form, separable.most_terms(layer, form), moments)
        own, _ = separated(layer, form, separable.most_terms(layer, form), moments_of(layer, x))
        wanted = other(x)
        assert error < 0.1
        assert (chain(x) - wanted).square().mean() < 0.1 * (own(x) - wanted).square().mean()


def test_dead_channels_do_not_spoil_the_fit():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 8, 3, dtype=torch.float64), correlated(8, 6)
    x[:, 2] = 0
    for form in FORMS:
        chain, error = separated(layer, form, 3, moments_of(layer, x))
        assert 0 < error < 0.5
        assert all(torch.isfinite(p).all() for p in chain.parameters())
        # What never spoke may speak later: its weights stay of the kernel's own size.
        assert kernel_of(chain.depthwise).abs().max() * kernel_of(chain.pointwise).abs().max() < 50


# ---------------------------------------------------------------- cost


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@settings(max_examples=40, deadline=None)
@given(convolutions(), st.sampled_from(FORMS), st.data())
def test_the_predicted_cost_is_the_cost_counted_after_building(layer, form, data):
    x = torch.zeros(1, layer.in_channels, *SIZE, dtype=torch.float64)
    output = layer(x)
    options = {"form": form, "terms": data.draw(st.integers(1, separable.most_terms(layer, form)))}
    chain = separable.build(layer, options)
    predicted = separable.cost(layer, options, input_size=SIZE, output_size=output.shape[2:])
    counted = trace_layers(chain, x)
    assert counted.cost == predicted
    with FlopCounterMode(display=False) as flops:
        chain(x)
    assert flops.get_total_flops() == 2 * predicted.macs
    assert chain(x).shape == output.shape


def test_the_grid_has_the_second_form_only_where_it_can_cost_less():
    def forms(layer):
        return {str(each["form"]) for each in separable.grid(layer)}

    assert forms(nn.Conv2d(8, 8, 3)) == {FORMS[0]}
    assert forms(nn.Conv2d(8, 4, 3)) == set(FORMS)
    assert forms(nn.Conv2d(8, 4, 3, stride=2)) == {FORMS[0]}
    assert forms(nn.ConvTranspose2d(8, 8, 4, stride=2)) == set(FORMS)


def test_the_grid_goes_up_to_half_of_the_terms_that_are_exact():
    terms = [each["terms"] for each in separable.grid(nn.Conv2d(64, 64, 7))]
    assert terms[:6] == [1, 2, 3, 4, 6, 8]
    assert terms[-1] == 25
    assert terms == sorted(set(terms))


# ---------------------------------------------------------------- what carries over


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_type_carries_over(dtype, form):
    layer = nn.Conv2d(3, 4, 3, dtype=dtype)
    chain, _ = separated(layer, form, separable.most_terms(layer, form))
    assert {p.dtype for p in chain.parameters()} == {dtype}
    x = torch.randn(1, 3, 5, 5, dtype=dtype)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert_close(chain(x), layer(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_frozen_stays_frozen_and_the_mode_stays(trained, training):
    layer = nn.Conv2d(3, 4, 3).requires_grad_(trained).train(training)
    chain = separable.build(layer, {"form": FORMS[0], "terms": 2})
    assert {p.requires_grad for p in chain.parameters()} == {trained}
    assert chain.training == training


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 6, 1), "no places to separate"),
        (nn.Linear(4, 6), "no places to separate"),
        (nn.Conv2d(4, 8, 3, groups=4), "depthwise already"),
        (nn.LazyConv2d(4, 3), "has not been run yet"),
        (nn.BatchNorm2d(4), "neither a convolution nor a linear layer"),
    ],
)
def test_what_cannot_be_separated_is_refused_by_name(layer, reason):
    assert reason in separable.why_not(layer)
    with pytest.raises(PlanError, match=reason):
        separable.build(layer, {"form": FORMS[0], "terms": 1}, site="body.conv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "depthwise", "terms": 1}, "must be one of depthwise-pointwise"),
        ({"terms": 1}, "got None"),
        ({"form": FORMS[0]}, "from 1 to 6, got None"),
        ({"form": FORMS[0], "terms": 0}, "from 1 to 6, got 0"),
        ({"form": FORMS[0], "terms": 7}, "from 1 to 6, got 7"),
        ({"form": FORMS[1], "terms": 5}, "from 1 to 4, got 5"),
        ({"form": FORMS[1], "terms": [2]}, r"got \[2\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    layer = nn.Conv2d(4, 6, 3)
    with pytest.raises(PlanError, match=message):
        separable.build(layer, options, site="body.conv")
