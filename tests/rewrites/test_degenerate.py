"""Data and weights of which statistics say little: named errors or finite networks, never others."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.calibration.collect import collect
from onebyone.calibration.curvature import output_curvature
from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.moments import MomentSum
from onebyone.core.errors import ModelError, OneByOneError, WeightsError
from onebyone.core.records import Cost, InputSpec, Option, Plan
from onebyone.data import TensorSplit
from onebyone.rewrites.low_rank import reduced_rank
from onebyone.rewrites.low_rank.eigen import eigen, eigenvalues

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net(channels=8, classes=4, *, flat=False):
    torch.manual_seed(0)
    pool = nn.MaxPool2d(4) if flat else nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        pool, nn.Flatten(), nn.Linear(channels * (4 if flat else 1), classes),
    ).eval()  # fmt: skip


def scaled(factor, layer="", *, flat=False):
    network = net(flat=flat)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(layer):
                parameter.mul_(factor)
    return network


def dead():
    network = net()
    nn.init.constant_(network[0].bias, -1e4)
    return network


def with_outlier(value):
    inputs = X.clone()
    inputs[3] *= value
    return inputs


def spoiled(value):
    inputs = X.clone()
    inputs[3, 0, 1, 2] = value
    return inputs


CASES = {
    "plain": (net, X),
    "one image": (net, X[:1]),
    "two images": (net, X[:2]),
    "identical images": (net, X[:1].expand(16, -1, -1, -1).clone()),
    "constant images": (net, torch.full_like(X, 0.5)),
    "blank images": (net, torch.zeros_like(X)),
    "one layer zero": (lambda: scaled(0, "2."), X),
    "first layer zero": (lambda: scaled(0, "0."), X),
    "last layer zero": (lambda: scaled(0, "6."), X),
    "all layers zero": (lambda: scaled(0), X),
    "dead units": (dead, X),
    "weights 1e-42": (lambda: scaled(1e-42), X),
    "weights 1e-30": (lambda: scaled(1e-30), X),
    "weights 1e-20": (lambda: scaled(1e-20), X),
    "one layer 1e-20": (lambda: scaled(1e-20, "2."), X),
    "one layer subnormal": (lambda: scaled(1e-39, "2."), X),
    "weights 1e10": (lambda: scaled(1e10), X),
    "weights 1e15": (lambda: scaled(1e15), X),
    "weights 1e30": (lambda: scaled(1e30), X),
    "first layer 1e30": (lambda: scaled(1e30, "0."), X),
    "last layer 1e30": (lambda: scaled(1e30, "6."), X),
    "outlier 1e25": (net, with_outlier(1e25)),
    "outlier 1e37": (net, with_outlier(1e37)),
    "one pixel 3e38": (net, spoiled(3e38)),
    "inputs 1e30": (net, X * 1e30),
    "inputs 1e-30": (net, X * 1e-30),
    "inputs subnormal": (net, X * 1e-42),
    "nan in an image": (net, spoiled(float("nan"))),
    "infinity in an image": (net, spoiled(float("inf"))),
    "one channel": (lambda: net(1), X),
    "one class": (lambda: net(8, 1), X),
    "fewer samples than channels": (lambda: net(32), X[:1, :, :4, :4]),
    "bytes": (net, (X.clamp(0, 1) * 255).to(torch.uint8)),
    "float64": (lambda: net().double(), X.double()),
    "bf16": (lambda: net().bfloat16(), X.bfloat16()),
    "nan in a weight": (lambda: scaled(float("nan"), "2.bias"), X),
    "flat": (lambda: net(flat=True), X),
    "flat, blank images": (lambda: net(flat=True), torch.zeros_like(X)),
    "flat, weights 1e-20": (lambda: scaled(1e-20, flat=True), X),
    "flat, weights 1e30": (lambda: scaled(1e30, flat=True), X),
    "flat, outlier": (lambda: net(flat=True), with_outlier(1e25)),
}  # fmt: skip
NOTHING = Cost(params=0, macs=0, bytes=0)


def option(site, rewrite="factorize", **settings):
    return Option.of(rewrite, settings, site=site, before=NOTHING, after=NOTHING)


def planned(inputs, *choices):
    return Plan(
        network="net", inputs=InputSpec.of_shape((1, *inputs.shape[1:])), budgets=(), before=NOTHING,
        after=NOTHING, choices=choices, left_alone=(),
    )  # fmt: skip


def changed(network):
    """Return a network that is near another."""
    near = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1.01)
    return near


def spatial(network, inputs):
    channels = network[0].out_channels
    form = {"form": "spatial-expand", "ranks": [2, 2]} if channels > 1 else {"form": "tucker2"}
    plan = planned(inputs, option("0", **form), option("2", form="tucker2", ranks=[2, 3]))
    return obo.apply(network, plan, inputs)


def separable(network, inputs):
    first = option("0", "separable", form="depthwise-pointwise", terms=2)
    second = option("2", "separable", form="pointwise-depthwise", terms=1)
    return obo.apply(network, planned(inputs, first, second), inputs)


def kernels(network, inputs):
    made = obo.uniform_plan(network, (1, *inputs.shape[1:]), ranks=0.4)
    return obo.apply(network, made, None)


WAYS = {
    "plan": lambda network, x: obo.apply(
        network, obo.plan(network, x, budget="macs=70%", head="keep"), x
    ),
    "kernels": kernels,
    "spatial": spatial,
    "separable": separable,
    "reconstruct": lambda network, x: (
        obo.reconstruct(changed(network), teacher=network, calibration=x, steps=2).model
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_poor_data_gives_a_finite_network_or_an_error_of_ours(case, way):
    make, inputs = CASES[case]
    try:
        made = WAYS[way](make(), inputs.clone())
    except OneByOneError:
        if case == "plain":
            raise
        return
    assert all(bool(p.isfinite().all()) for p in made.state_dict().values())


@pytest.mark.parametrize(
    "case", ["flat", "flat, blank images", "flat, outlier", "flat, weights 1e30"]
)
def test_an_averaging_head_is_finite_or_an_error_of_ours(case, monkeypatch):
    monkeypatch.setattr("onebyone.rewrites.head.fit.FIT_STEPS", 20)
    make, inputs = CASES[case]
    try:
        made = obo.apply(
            make(), planned(inputs, option("6", "head", form="gap", hidden=[])), inputs
        )
    except OneByOneError:
        if case != "flat, weights 1e30":
            raise
        return
    assert all(bool(p.isfinite().all()) for p in made.parameters())


@pytest.mark.parametrize("call", [
    lambda network: obo.apply(network, planned(X), X),
    lambda network: obo.uniform_plan(network, (1, 3, 8, 8)),
    lambda network: obo.plan(network, X, budget="macs=70%"),
    lambda network: obo.fold(network, (1, 3, 8, 8)),
    lambda network: obo.deepen(network, (1, 3, 8, 8)),
    lambda network: obo.reconstruct(network, teacher=net(), calibration=X, steps=1),
    lambda network: obo.reconstruct(net(), teacher=network, calibration=X, steps=1),
])  # fmt: skip
def test_weights_that_are_not_finite_are_refused_by_name(call):
    with pytest.raises(WeightsError, match=r"8 of 8 values of '2\.bias' are NaN"):
        call(scaled(float("nan"), "2.bias"))


@pytest.mark.parametrize(("layer", "named"), [("2.", "2"), ("6.", "6")])
def test_activations_that_overflow_name_the_layer(layer, named):
    network = scaled(3e38, layer)
    told = f"the first layer that gives such values is '{named}'"
    with pytest.raises(ModelError, match=told):
        obo.plan(network, X * 1e3, budget="macs=70%")
    with pytest.raises(ModelError, match=told):
        obo.apply(network, planned(X, option("0", form="expand", ranks=[2])), X * 1e3)


def moved_scale(factor):
    """Return the same function with the scale of the first layer's output moved to the second."""
    network = net()
    with torch.no_grad():
        network[0].weight.mul_(factor)
        network[0].bias.mul_(factor)
        network[2].weight.div_(factor)
    return network


@pytest.mark.parametrize("exponent", [-90, -60, 60, 90])
def test_plan_and_weights_follow_the_scale_of_activations(exponent):
    factor = 2.0**exponent
    plans = [obo.plan(n, X, budget="macs=60%", head="keep") for n in (net(), moved_scale(factor))]
    chosen = [[(o.site, o.first.rewrite, o.first.settings) for o in each.choices] for each in plans]
    assert chosen[0] == chosen[1]
    with torch.no_grad():
        wanted = obo.apply(net(), plans[0], X)(X)
        assert_close(obo.apply(moved_scale(factor), plans[0], X)(X), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("ranks", [[3, 4], [40, 40]], ids=["few", "many channels"])
def test_factors_of_a_kernel_alone_follow_its_scale(factor, ranks):
    torch.manual_seed(0)
    wide = max(ranks) > 8
    layer = nn.Conv2d(80 if wide else 6, 80 if wide else 8, 3, bias=False)
    for form, own in (("tucker2", ranks), ("expand", ranks[:1])):
        chains = []
        for size in (1.0, factor):
            other = copy.deepcopy(layer)
            with torch.no_grad():
                other.weight.mul_(size)
            plan = planned(X, option("", form=form, ranks=own))
            x = torch.ones(1, layer.in_channels, 4, 4)
            plan = Plan(**{**vars(plan), "inputs": InputSpec.of_shape(tuple(x.shape))})
            with torch.no_grad():
                chains.append(obo.apply(other, plan, None)(x).double() / size)
        assert_close(chains[1], chains[0], rtol=1e-3, atol=1e-4)


def test_moments_of_large_and_of_small_values_are_exact():
    for size in (1e-30, 1e30, 3e37):
        rows = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        layer = nn.Linear(5, 5, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(5))
        (found,) = collect(layer, [""], lambda rows=rows, size=size: [rows * size])[""]
        wide = (rows * size).double()
        assert_close(found.xx / size**2, wide.T.cov(correction=0) / size**2, rtol=1e-5, atol=1e-6)


def test_a_block_of_large_values_after_others_is_exact_too():
    small = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    total = MomentSum()
    total.add(small, small)
    total.add((small * 1e25).double(), (small * 1e25).double())
    both = torch.cat([small.double(), small.double() * float(torch.tensor(1e25))])
    wanted = both.T.cov(correction=0)
    assert_close(total.moments().xx / 1e50, wanted / 1e50, rtol=1e-6, atol=1e-9)


def test_a_variance_that_is_rounding_is_none():
    rows = torch.full((1000, 3), 1000.1)
    rows[:, 1] = torch.linspace(-1, 1, 1000)
    rows[::2, 2] = torch.nextafter(rows[0, 2], torch.tensor(2000.0))
    total = MomentSum()
    total.add(rows, rows)
    found = total.moments()
    assert (found.xx.diagonal() > 0).tolist() == [False, True, False]
    for square in (found.xx, found.yx, found.yy):
        assert square[0].count_nonzero() == square[:, 2].count_nonzero() == 0


def test_a_curvature_of_large_gradients_is_finite():
    network = scaled(1e18, "6.")
    meaning = meaning_of(network, TensorSplit(X), "classification")
    found = output_curvature(network, ["2"], lambda: [X], meaning=meaning)
    assert bool(found["2"].isfinite().all())


# ---------------------------------------------------------------- eigenvectors


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_eigenvectors_are_found_at_every_scale(size):
    square = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = (square @ square.T) * size
    values, vectors = eigen(square)
    assert_close(vectors @ torch.diag(values / size) @ vectors.T, square / size)
    assert_close(eigenvalues(square) / size, values / size)


def test_where_one_algorithm_fails_another_finds_the_same(monkeypatch):
    square = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = square + square.T
    wanted = torch.linalg.eigvalsh(square)

    def fails(_):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    values, vectors = eigen(square)
    assert_close(values, wanted)
    assert_close(vectors @ torch.diag(values) @ vectors.T, square)
    assert_close(vectors.T @ vectors, torch.eye(6, dtype=torch.float64))
    assert_close(eigenvalues(square), wanted)


def test_a_matrix_that_is_not_finite_has_none():
    with pytest.raises(torch.linalg.LinAlgError, match="must be finite"):
        eigen(torch.full((2, 2), float("nan")))
    with pytest.raises(torch.linalg.LinAlgError, match="must be finite"):
        eigenvalues(torch.full((2, 2), float("inf")))


def test_equations_without_a_solution_name_the_layer(monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("no solution")

    monkeypatch.setattr(reduced_rank, "damped", fails)
    with pytest.raises(ModelError, match=r"The layer '0' must have the weights .*no solution"):
        obo.apply(net(), planned(X, option("0", form="tucker2", ranks=[2, 2])), X)
    plan = obo.plan(net(), X, budget="macs=100%", head="keep")
    assert "cannot be solved: no solution" in {i.site: i.reason for i in plan.left_alone}["2"]
