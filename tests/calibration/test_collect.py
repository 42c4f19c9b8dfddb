import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.calibration import inputs as calibration_inputs
from onebyone.calibration import moments as moment_sums
from onebyone.calibration.collect import Across, collect
from onebyone.calibration.curvature import curvature_of, output_curvature
from onebyone.calibration.inputs import as_calibration, drawn_for
from onebyone.calibration.meaning import Meaning
from onebyone.calibration.moments import Enough, MomentSum
from onebyone.core.errors import DataError, ModelError
from onebyone.data import TensorSplit, as_split
from onebyone.networks.conv_layers import input_rows, output_rows

# ---------------------------------------------------------------- sampling


def moments_of(layer, x, **options):
    return collect(nn.Sequential(layer), ["0"], lambda: [x], **options)["0"]


def test_rows_come_in_parts_where_patches_are_many(monkeypatch):
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(5, 3, 7, 6)
    whole = moments_of(layer, x)[0]
    monkeypatch.setattr(moment_sums, "PATCH_VALUES", 1)
    parts = moments_of(layer, x)[0]
    assert parts.rows == whole.rows
    assert_close(parts.xx, whole.xx, rtol=1e-5, atol=1e-6)


def test_of_large_maps_so_many_places_are_drawn_as_the_values_need(monkeypatch):
    monkeypatch.setattr(moment_sums, "ROWS_A_VALUE", 30)
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 4, 3).double(), torch.randn(20, 2, 24, 25, dtype=torch.float64)
    every, some = moments_of(layer, x)[0], moments_of(layer, x, examples=20)[0]
    # 30 times 18 values, spread over 20 examples.
    assert (every.rows, some.rows) == (20 * 22 * 23, 20 * 27)
    assert_close(some.yy, every.yy, rtol=0.3, atol=0.05)
    # What it gives still follows from what it sees.
    weight = layer.weight.detach().flatten(1)
    assert_close(some.yx, weight @ some.xx)


def test_where_products_are_dear_fewer_places_are_drawn():
    layer, x = nn.Conv2d(2, 4, 3), torch.randn(20, 2, 24, 25)
    found = moments_of(layer, x, examples=20, enough=Enough(macs=0, fewest=8))
    assert found[0].rows == 20 * 8  # 8 times 18 values, rounded up
    few = moments_of(layer, x, examples=20, enough=Enough(macs=18**2 * 60, fewest=1))
    assert few[0].rows == 60


def test_the_groups_of_a_layer_have_moments_of_their_own():
    layer, x = nn.Conv2d(6, 4, 3, groups=2).double(), torch.randn(5, 6, 7, 6, dtype=torch.float64)
    halves = []
    for part in range(2):
        half = nn.Conv2d(3, 2, 3).double()
        half.weight.data = layer.weight.data[2 * part : 2 * part + 2]
        half.bias.data = layer.bias.data[2 * part : 2 * part + 2]
        halves.append(moments_of(half, x[:, 3 * part : 3 * part + 3])[0])
    for mine, expected in zip(moments_of(layer, x), halves, strict=True):
        for name in ("mean_x", "mean_y", "xx", "yx", "yy"):
            assert_close(getattr(mine, name), getattr(expected, name))


# ---------------------------------------------------------------- moments


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([1, 4, 1000]))
def test_streamed_moments_are_the_moments_of_all_rows_together(sizes, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moment_sums, "ROWS_A_BLOCK", block)
        x = torch.randn(sum(sizes), 3, dtype=torch.float64) + 10
        y = torch.randn(sum(sizes), 2, dtype=torch.float64)
        total = MomentSum()
        for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
            total.add(part_x, part_y)
    moments = total.moments()
    both = torch.cat([x, y], 1)
    centered = both - both.mean(0)
    expected = centered.T @ centered / len(x)
    assert moments.rows == len(x)
    assert_close(moments.mean_x, x.mean(0))
    assert_close(moments.mean_y, y.mean(0))
    assert_close(moments.xx, expected[:3, :3])
    assert_close(moments.yx, expected[3:, :3])
    assert_close(moments.yy, expected[3:, 3:])


def test_a_large_mean_does_not_swallow_a_small_variance():
    generator = torch.Generator().manual_seed(0)
    x = 1000 + 0.1 * torch.randn(5000, 2, generator=generator)
    total = MomentSum()
    for part in x.split(500):
        total.add(part)
    moments = total.moments(weight=torch.eye(2, dtype=torch.float64))
    assert_close(moments.xx, torch.cov(x.double().T, correction=0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 3, 4, 100])
def test_a_square_by_halves_is_the_whole_square(monkeypatch, columns):
    monkeypatch.setattr(moment_sums, "COLUMNS", columns)
    x, y = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    total = MomentSum()
    for part in range(0, 20, 6):
        total.add(x[part : part + 6], y[part : part + 6])
    found = total.moments()
    assert_close(found.xx, torch.cov(x.T, correction=0))
    assert_close(found.yy, torch.cov(y.T, correction=0))
    assert_close(found.yx, torch.cov(torch.cat([y, x], 1).T, correction=0)[:5, 5:])


def test_few_float32_rows_at_a_time_are_as_exact_as_many():
    torch.manual_seed(0)
    x = torch.randn(3000, 4) * torch.tensor([1e-3, 1.0, 10.0, 1e3])
    total = MomentSum()
    for rows in x.split(3):
        total.add(rows, rows)
    assert_close(total.moments().xx, torch.cov(x.double().T, correction=0), rtol=1e-4, atol=0.05)


def test_no_rows_have_no_moments():
    with pytest.raises(DataError, match="at least one row, got none: the layer never ran"):
        MomentSum().moments()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 3)
    )  # fmt: skip


X = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def batches():
    return X.split(4)


def test_collected_moments_are_those_of_the_layers_own_inputs_and_outputs():
    net = network()
    moments = {name: m[0] for name, m in collect(net, ["0", "2", "4"], batches).items()}
    hidden = net[:2](X)
    rows, outputs = (
        input_rows(net[2], hidden).double(),
        output_rows(net[2], net[2](hidden)).double(),
    )
    assert_close(moments["2"].mean_x, rows.mean(0).detach(), rtol=1e-4, atol=1e-5)
    assert_close(moments["2"].mean_y, outputs.mean(0).detach(), rtol=1e-4, atol=1e-5)
    assert_close(moments["2"].yy, torch.cov(outputs.T, correction=0).detach(), rtol=1e-4, atol=1e-5)
    assert {name: m.rows for name, m in moments.items()} == {"0": 160, "2": 40, "4": 10}


def test_a_layer_that_does_not_run_has_no_moments():
    net = network()
    net.add_module("unused", nn.Linear(2, 2))
    net.forward = nn.Sequential(*list(net)[:5]).forward
    assert set(collect(net, ["0", "unused"], batches)) == {"0"}


def test_across_equal_networks_the_moments_are_the_layers_own():
    net = network().eval()
    names = ["0", "2", "4"]
    own, across = (
        collect(net, names, batches),
        Across(net, batches).moments(copy.deepcopy(net), names),
    )
    for name in names:
        assert_close(across[name][0].xx, own[name][0].xx, rtol=1e-4, atol=1e-5)
        assert_close(across[name][0].yx, own[name][0].yx, rtol=1e-4, atol=1e-5)
        assert_close(across[name][0].mean_y, own[name][0].mean_y, rtol=1e-4, atol=1e-5)


class WritesIntoItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = x * 1
        y = self.first(x)
        x += 100
        return self.second(F.relu_(y) + x)


def test_inputs_are_those_that_the_layer_saw_though_written_into_later():
    torch.manual_seed(0)
    net = WritesIntoItsInput().eval()
    across = Across(net, batches).moments(copy.deepcopy(net), ["first", "second"])
    assert_close(across["first"][0].mean_x, X.double().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    wanted = net.first(X).detach().double().mean((0, 2, 3))
    assert_close(across["first"][0].mean_y, wanted, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- curvature


def classes(net, inputs):
    with torch.no_grad():
        return Meaning.measured("classification", (net(inputs),))


def test_the_curvature_predicts_the_divergence_of_a_small_error():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    many = torch.randn(4000, 3, 6, 6)
    fisher = output_curvature(net, ["1"], lambda: [many], meaning=classes(net, many))["1"]
    # Of a softmax the Fisher information is known: diag(p) - p pᵀ.
    p = net(many).softmax(1).detach().double()
    known = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    assert_close(fisher, known, rtol=0.1, atol=0.01)


def test_the_curvature_is_symmetric_positive_and_the_same_each_time():
    net = network()
    how = {"meaning": classes(net, X), "seed": 3}
    first, second = (output_curvature(net, ["0", "2", "4"], batches, **how) for _ in range(2))
    for name, matrix in first.items():
        assert_close(matrix, second[name], rtol=0, atol=0)
        assert_close(matrix, matrix.T)
        least, *_, most = torch.linalg.eigvalsh(matrix)
        assert least > -1e-6 * most


def test_an_activation_that_writes_in_place_does_not_change_the_curvature():
    net = network()
    plain = copy.deepcopy(net)
    plain[1].inplace = False
    one, other = (
        output_curvature(n, ["0", "2"], batches, meaning=classes(n, X)) for n in (net, plain)
    )
    assert_close(one, other)


def test_the_curvature_of_outputs_that_are_no_class_scores():
    net = network()[:3]
    meaning = Meaning.measured("restoration", (net(X),))
    matrix = output_curvature(net, ["0", "2"], batches, meaning=meaning)["2"]
    assert matrix.shape == (5, 5)
    assert float(matrix.trace()) > 0


def test_of_outputs_that_are_maps_few_examples_tell_enough():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    data = as_calibration(torch.randn(90, 3, 34, 35))
    seen = []
    net[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    meaning = Meaning.measured("restoration", (net(data.split.take(90).batches(90).__next__()[0]),))
    seen.clear()
    few = curvature_of(net, ["0"], data, 1, meaning)["0"]
    assert sum(seen) == 1 + 65_536 // (32 * 33)
    every = output_curvature(net, ["0"], data.batches, meaning=meaning)["0"]
    assert_close(few, every, rtol=0.1, atol=0.02 * float(every.abs().max()))


def test_a_network_without_outputs_is_refused():
    class Classes(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    with pytest.raises(ModelError, match="must give tensors of floating-point numbers"):
        output_curvature(Classes(), [], batches, meaning=Meaning.measured("embedding", (X,)))


# ---------------------------------------------------------------- data


def test_calibration_data_comes_from_any_usual_form_and_is_always_the_same():
    for source in (X, TensorSplit(X), (X, torch.zeros(10)), torch.utils.data.TensorDataset(X)):
        data = as_calibration(source)
        assert len(data) == 10
        assert_close(torch.cat(list(data.batches())), X)
        assert_close(data.example(), X[:1])
    assert as_calibration(data).split is data.split


def test_large_inputs_come_in_small_batches(monkeypatch):
    monkeypatch.setattr(calibration_inputs, "BATCH_VALUES", 4 * X[0].numel() + 5)
    assert [len(batch) for batch in as_calibration(X).batches()] == [4, 4, 2]
    monkeypatch.setattr(calibration_inputs, "BATCH_VALUES", 1)
    assert [len(batch) for batch in as_calibration(X).batches()] == 10 * [1]


def test_a_smaller_set_is_drawn_from_it_always_alike():
    data = as_calibration(X)
    assert data.first(20) is data
    one, two = (torch.cat(list(data.first(4).batches())) for _ in range(2))
    assert one.shape == (4, 3, 6, 6)
    assert_close(one, two)
    assert (data.info().examples, data.first(4).info().examples) == (10, 4)


def test_what_is_no_data_is_refused():
    with pytest.raises(DataError):
        as_calibration("photos")
    with pytest.raises(DataError):
        as_calibration(torch.empty(0, 3, 6, 6))


class Wide(nn.Module):
    """A linear layer on a flattened map, and convolutions with many places."""

    def __init__(self, width=8, out=5):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Linear(width * 7 * 9, out)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))


def inputs_split(n):
    return as_split(torch.randn(n, 3, 7, 9))


def test_a_linear_layer_gets_three_times_as_many_examples_as_it_has_inputs():
    assert len(drawn_for(Wide(8), inputs_split(3000))) == 3 * 8 * 7 * 9
    # Its rows are enough at fewer, and of a convolution an example has many.
    assert len(drawn_for(Wide(2), inputs_split(3000))) == 1024
    assert len(drawn_for(Wide(8).conv, inputs_split(3000))) == 1024


def test_no_more_examples_are_drawn_than_there_are_or_are_cheap(monkeypatch):
    assert len(drawn_for(Wide(), inputs_split(700))) == 700
    assert len(drawn_for(Wide(), inputs_split(1100))) == 1100
    macs = 8 * 3 * 9 * 63 + 8 * 63 * 5
    monkeypatch.setattr(calibration_inputs, "CALIBRATION_MACS", 1200 * macs)
    assert len(drawn_for(Wide(), inputs_split(3000))) == 1200
    monkeypatch.setattr(calibration_inputs, "CALIBRATION_MACS", 10 * macs)
    assert len(drawn_for(Wide(), inputs_split(3000))) == 1024


def test_a_number_that_is_given_is_drawn_as_it_is():
    split = inputs_split(3000)
    drawn = drawn_for(Wide(), split, examples=40, name="own", seed=3)
    assert (len(drawn), drawn.name, drawn.seed) == (40, "own", 3)
    expected = next(split.take(40, 3).batches(40))[0]
    assert_close(torch.cat(list(drawn.batches())), expected)


def test_with_too_few_examples_a_wide_layer_is_fitted_worse():
    """What the number is for: as many rows as inputs, against three times so many."""
    torch.manual_seed(0)
    network = Wide(out=40).eval()
    fresh = torch.randn(2000, 3, 7, 9)
    plan = obo.plan(network, fresh[:64], budget="params=30%", head="exact")
    split = inputs_split(3000)

    def error(examples):
        small = obo.apply(network, plan, drawn_for(network, split, examples=examples))
        with torch.no_grad():
            return float((small(fresh) - network(fresh)).square().mean())

    assert error(None) < 0.9 * error(8 * 7 * 9)
