"""What each closed form of int8 promises, on layers small enough to check by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from onebyone.core.errors import OptionError
from onebyone.quantizing import NO_CLOSED_FORMS, ClosedForms, pairs, quantize
from onebyone.quantizing.equalize import equalize
from onebyone.quantizing.graph import Captured, capture
from onebyone.quantizing.pairs import mix_pairs
from onebyone.quantizing.placement import place
from onebyone.quantizing.ranges import best_grid, grid_between, min_max_grid
from onebyone.quantizing.rounding import by_moments, nearest
from onebyone.quantizing.simulate import on_grid


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_layers(captured: Captured) -> set[str]:
    return set(captured.layers)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0)])
def test_grids_hold_zero_and_both_ends(low: float, high: float) -> None:
    grid = grid_between(low, high)
    assert float(on_grid(torch.zeros(1), grid)) == 0
    assert grid.lowest <= min(low, 0) + grid.scale / 2
    assert grid.highest >= max(high, 0) - grid.scale / 2


def test_best_range_clips_an_outlier() -> None:
    x = drawn(10_000)
    x[0] = 40

    def error(rounded: Tensor) -> float:
        return float((rounded - x).clamp(-1, 1).square().sum())

    best, widest = best_grid(x, error), min_max_grid(x)
    assert error(on_grid(x, best)) < 0.5 * error(on_grid(x, widest))
    assert best.highest < 30


@pytest.mark.parametrize("bits", [7, 8])
def test_rounding_by_moments_harms_outputs_less_than_to_the_nearest(bits: int) -> None:
    inputs = drawn(500, 6).double() @ drawn(6, 24, seed=1).double()  # far from independent
    inputs = inputs + 0.1 * drawn(500, 24, seed=2).double()
    weight = drawn(2, 8, 24, seed=3)
    moments = (inputs.T @ inputs / len(inputs)).expand(2, -1, -1)
    errors = []
    for integers, scales in (
        by_moments(weight, moments, bits=bits),
        nearest(weight, bits=bits),
    ):
        assert int(integers.abs().max()) <= {7: 63, 8: 127}[bits]
        assert_close(integers, integers.round())
        gap = integers.double() * scales.unsqueeze(-1).double() - weight.double()
        errors.append(float((gap @ inputs.T).square().sum()))
    assert errors[0] < 0.6 * errors[1]


def test_weights_on_the_grid_stay_as_they_are() -> None:
    integers = torch.randint(-126, 127, (1, 4, 10), generator=torch.Generator().manual_seed(0))
    integers[:, :, 0] = 127
    weight = integers * torch.tensor([0.5, 0.01, 2.0, 1.0]).reshape(1, 4, 1)
    inputs = drawn(100, 10)
    found, scales = by_moments(weight, (inputs.T @ inputs)[None] / 100)
    assert_close(found * scales.unsqueeze(-1), weight.double())


class Uneven(nn.Module):
    """A residual block, a concatenation and pooling, their channels of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            self.stem.weight *= torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 3, h, w)`` to ``(n, 4)``."""
        x = torch.relu(self.stem(x))
        y = torch.relu(self.inner(x) + x)
        y = torch.cat([nn.functional.max_pool2d(y, 2), self.wide(x)[:, :, ::2, ::2]], 1)
        return self.last(y).mean((2, 3))


def test_equalizing_keeps_the_function_and_lowers_the_error() -> None:
    torch.manual_seed(0)
    network, inputs = Uneven().eval(), drawn(16, 3, 8, 8)
    captured = capture(network, inputs)
    quantized = all_layers(captured)
    equalized, remarks = equalize(captured, place(captured, quantized), quantized, inputs)
    with torch.no_grad():
        assert_close(equalized.module(inputs), network(inputs), rtol=1e-4, atol=1e-5)
    assert any(remarks.values())
    assert not torch.equal(equalized.layers["conv2d"].weight, network.stem.weight)


class Pair(nn.Module):
    """Two factors, one inner channel far larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 1)
        self.last = nn.Conv2d(12, 4, 1)
        with torch.no_grad():
            mixing = drawn(8, 8) * torch.tensor([50.0] + [1.0] * 7)
            mixing = mixing + torch.eye(8)
            weight = torch.einsum("ij,jabc->iabc", mixing, self.first.weight)
            self.first.weight.copy_(weight)
            inverse = torch.linalg.inv(mixing)
            self.second.weight.copy_(torch.einsum("oiab,ij->ojab", self.second.weight, inverse))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 6, h, w)`` to ``(n, 4, h, w)``."""
        return self.last(torch.relu(self.second(self.first(x))))


def test_mixing_a_pair_keeps_the_function_and_lowers_the_error() -> None:
    torch.manual_seed(0)
    network, inputs = Pair().eval(), drawn(16, 6, 8, 8)
    captured = capture(network, inputs)
    mixed, remarks = mix_pairs(captured, all_layers(captured), inputs)
    assert list(remarks) == ["conv2d_1"]
    with torch.no_grad():
        assert_close(mixed.module(inputs), network(inputs), rtol=1e-3, atol=1e-3)
        exact = network(inputs)
        errors = []
        for mix in (True, False):
            forms = ClosedForms(pairs=mix, equalize=False)
            given = quantize(network, inputs, forms=forms).network(inputs)
            errors.append(float((given - exact).square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_mixing_the_pairs_of_a_triple_keeps_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_BETTER", 1e9)  # any mixing will do
    torch.manual_seed(0)
    pair, inputs = Pair(), drawn(16, 6, 8, 8)
    triple = nn.Sequential(pair.first, pair.second, nn.Conv2d(12, 5, 3)).eval()
    captured = capture(triple, inputs)
    mixed, remarks = mix_pairs(captured, all_layers(captured), inputs)
    assert list(remarks) == ["conv2d_1", "conv2d_2"]
    with torch.no_grad():
        exact = triple(inputs)
        gap = float((mixed.module(inputs) - exact).abs().max())
    assert gap < 1e-3 * float(exact.std())


def test_bias_correction_takes_the_mean_error_off() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    inputs = drawn(64, 3, 12, 12) + 1
    means = []
    for forms in (
        ClosedForms(ranges=False, rounding=False, equalize=False),
        NO_CLOSED_FORMS,
    ):
        with torch.no_grad():
            given = quantize(network, inputs, forms=forms).network(inputs)
            means.append(float((given - network(inputs)).mean((0, 2, 3)).abs().max()))
    assert means[0] < 0.1 * means[1]


def test_weights_of_7_bits_fit_into_sums_of_16() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    quantized = quantize(network, drawn(16, 3, 8, 8), weight_bits=7)
    assert quantized.record.weight_bits == 7
    weights = [v for name, v in quantized.integers.items() if name.endswith(".weight")]
    largest = max(int(each.abs().max()) for each in weights)
    assert 32 < largest <= 63
    assert 2 * 255 * largest < 2**15
    with pytest.raises(OptionError, match="must be 7 or 8"):
        quantize(network, drawn(16, 3, 8, 8), weight_bits=4)


def test_a_flattened_map_may_have_any_layout():
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Conv2d(1, 4, (3, 1)), nn.Conv2d(4, 8, (1, 3)))
    net = nn.Sequential(pair, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 4)).eval()
    made = quantize(net, torch.randn(16, 1, 6, 6))
    targets = {node.target for node in made.network.graph.nodes}
    assert torch.ops.aten.view.default not in targets
