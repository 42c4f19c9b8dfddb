"""Laws of trainable int8 networks: they start as the simulation, and gradients pass rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_int8_simulation as simulation
import torch
from torch import Tensor, nn

from onebyone.core.errors import ModelError
from onebyone.quantizing import Quantized, load_quantized, quantize
from onebyone.quantizing.trainable import LayerIntegers, rounded, trainable, with_trained

FRESH, PARTS, lively, pictures = (
    simulation.FRESH,
    simulation.PARTS,
    simulation.lively,
    simulation.pictures,
)
STEP, ZERO, LOW, HIGH = 0.25, 3, 0, 15


def moved(quantized: Quantized, seed: int = 0) -> nn.Module:
    """Return a trainable network whose parameters are not those of the start."""
    network = trainable(quantized)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            size = 0.05 if name.endswith(".change") else 0.02
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("name", ["padded relu", "max pooling", "residual", "linear"])
def test_it_starts_as_the_simulation_bit_for_bit(name: str) -> None:
    quantized = quantize(lively(PARTS[name]), pictures())
    network = trainable(quantized)
    with torch.no_grad():
        assert torch.equal(network(FRESH), quantized.network(FRESH))
    again = with_trained(quantized, network, epochs=0)
    assert again.record == quantized.record
    assert {*again.integers} == {*quantized.integers}
    for key, value in quantized.integers.items():
        assert again.integers[key].dtype == value.dtype
        assert torch.equal(again.integers[key], value)


@pytest.mark.parametrize("name", ["max pooling", "residual", "concatenation", "linear"])
def test_trained_integers_give_what_was_trained_and_are_loaded_again(
    name: str, tmp_path: Path
) -> None:
    network = lively(PARTS[name])
    quantized = quantize(network, pictures())
    changed = moved(quantized)
    made = with_trained(quantized, changed, epochs=2)
    with torch.no_grad():
        given = made.network(FRESH)
        assert torch.equal(changed(FRESH), given)
        assert not torch.equal(quantized.network(FRESH), given)
    assert made.record.distilled == 2
    assert "distilled in int8 for 2 epochs" in str(made.record).replace("\n", " ")
    made.save(tmp_path)
    loaded = load_quantized(network, tmp_path, FRESH[:1])
    assert loaded.record == made.record
    with torch.no_grad():
        assert torch.equal(loaded.network(FRESH), given)


@pytest.mark.parametrize("name", ["3x3", "max pooling", "residual", "grouped"])
def test_the_file_of_trained_integers_is_within_a_step_in_onnxruntime(name: str) -> None:
    quantized = quantize(lively(PARTS[name]), pictures())
    made = with_trained(quantized, moved(quantized), epochs=1)
    both = simulation.with_last_grid(made.network)
    with torch.no_grad():
        simulated = both(FRESH)[-1]
    file = simulation.in_onnxruntime(both, FRESH)[-1]
    gaps = (file - simulated).abs() / simulation.last_grid(both)[1]
    assert gaps.max() < 1.01
    assert (gaps > 0.5).float().mean() < 1e-3


def values() -> Tensor:
    """Return values inside the grid, none near the middle between two levels, and beyond it."""
    places = torch.tensor([-9.0, -3.4, -2.7, -0.2, 0.0, 0.3, 4.4, 11.2, 12.4, 30.0])
    return places.double() * STEP


def test_gradients_pass_rounding_and_stop_beyond_the_ends() -> None:
    x = values().requires_grad_()
    step = torch.tensor(STEP, dtype=torch.float64)
    weights = torch.arange(1.0, 11.0, dtype=torch.float64)
    (rounded(x, step, ZERO, LOW, HIGH) * weights).sum().backward()
    inside = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.float64)
    assert torch.equal(x.grad, weights * inside)


def test_the_gradient_of_a_step_is_the_slope_of_the_values_that_it_makes() -> None:
    # With each value kept at its place between two levels, a step's slope is defined: what the
    # levels' values change by, less what the values in the grid would change by themselves.
    x, step = values(), torch.tensor(STEP, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    (rounded(x, step, ZERO, LOW, HIGH) * weights).sum().backward()

    def straight(size: float) -> Tensor:
        levels = (x / STEP).round().clamp(LOW - ZERO, HIGH - ZERO)
        beyond = levels != (x / STEP).round()
        # Rounding is the place plus a constant: straight-through, as the gradient takes it.
        kept = (x / size + (levels - x / STEP)) * size
        return (torch.where(beyond, levels * size, kept) * weights).sum()

    change = 1e-6
    slope = (straight(STEP + change) - straight(STEP - change)) / (2 * change)
    torch.testing.assert_close(step.grad, slope, rtol=1e-7, atol=1e-7)


def test_where_nothing_is_rounded_gradients_are_those_of_finite_differences() -> None:
    # On values that lie on a fine grid, the network is linear in each weight: a whole level more
    # changes the outputs by just what the gradient says.
    torch.manual_seed(0)
    weight = torch.randint(-5, 6, (3, 2, 1, 1)).to(torch.int8)
    scales = torch.tensor([0.5, 0.25, 1.0])
    step = torch.tensor(0.125)
    layer = LayerIntegers(weight, scales, torch.tensor([7, -3, 0]), step, 8)
    x = torch.randint(0, 8, (4, 2, 3, 3)).float()
    pattern = torch.randint(-3, 4, (4, 3, 3, 3)).float()

    def loss() -> Tensor:
        kernel, bias = layer(step)
        return (nn.functional.conv2d(x, kernel, bias) * pattern).sum()

    start = loss()
    start.backward()
    for parameter, size in ((layer.weight, scales), (layer.bias_change, step * scales)):
        for place in range(parameter.numel()):
            each = size[place * len(size) // parameter.numel()]
            with torch.no_grad():
                parameter.view(-1)[place] += each
                slope = (loss() - start) / each
                parameter.view(-1)[place] -= each
            torch.testing.assert_close(parameter.grad.view(-1)[place], slope)


def test_known_levels_of_pictures_and_float32_layers_are_not_trained() -> None:
    generator = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, (24, 3, 9, 9), generator=generator) / 255
    network = lively(PARTS["3x3"])
    quantized = quantize(network, bytes_, keep_float32={"after": "asked for"})
    assert quantized.record.pixels is not None
    student = trainable(quantized)
    trained = {name for name, each in student.named_parameters() if each.requires_grad}
    assert sum("step_of" in name for name in trained) == len(quantized.record.grids) - 1
    assert sum("integers_of" in name for name in trained) == 2 * 2
    made = with_trained(quantized, moved(quantized), epochs=1)
    fixed = [
        name
        for name, grid in made.record.grids.items()
        if grid.scale == quantized.record.grids[name].scale
    ]
    assert len(fixed) == 1


def test_tensors_that_pass_values_on_share_their_trained_step() -> None:
    quantized = quantize(lively(PARTS["max pooling"]), pictures())
    made = with_trained(quantized, moved(quantized), epochs=1)
    before, after = (set(each.record.grids.values()) for each in (quantized, made))
    assert len(before) == len(after) < len(made.record.grids)


def test_what_was_not_made_by_quantize_is_refused() -> None:
    quantized = quantize(lively(PARTS["1x1"]), pictures())
    other = Quantized(nn.Identity(), quantized.record, quantized.integers)
    with pytest.raises(ModelError, match="as `quantize` made it"):
        trainable(other)
    with pytest.raises(ModelError, match="has no 'step_of"):
        with_trained(quantized, nn.Identity(), epochs=1)
