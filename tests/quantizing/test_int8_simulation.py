"""Laws of the int8 simulation: it gives what ONNX Runtime gives for the exported file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from onebyone.core.errors import OptionError, UnknownNameError
from onebyone.quantizing import NO_CLOSED_FORMS, ClosedForms, load_quantized, quantize
from onebyone.quantizing.signed import signed_form
from onebyone.runtimes.executorch import LoadedProgram, to_executorch
from onebyone.runtimes.onnx import onnxruntime_session, to_onnx

pytest.importorskip("onnxruntime")


class Behind(nn.Module):
    """A part between two 1×1 convolutions, so that its input and its output are quantized."""

    def __init__(self, part: nn.Module, channels: int, given: int) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, channels, 1)
        self.part = part
        self.after = nn.Conv2d(given, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 3, h, w)`` to ``(n, 4, h', w')``."""
        return self.after(self.part(self.before(x)))


class Residual(nn.Module):
    """An addition, and a ReLU behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return torch.relu(self.conv(x) + x)


class Concatenated(nn.Module):
    """Two branches of different ranges, concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.small = nn.Conv2d(channels, 5, 1)
        self.large = nn.Conv2d(channels, 3, 3, padding=1)
        with torch.no_grad():
            self.large.weight *= 7

    def forward(self, x: Tensor) -> Tensor:
        """Map to 8 channels."""
        return torch.cat([torch.relu(self.small(x)), self.large(x)], 1)


class Flattened(nn.Module):
    """Linear layers behind global average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(channels, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Map to ``(n, 8, 1, 1)``."""
        x = torch.relu(self.first(x.mean((2, 3))))
        return self.second(x)[:, :, None, None]


PARTS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "without padding": lambda: nn.Conv2d(8, 8, 3),
    "stride": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "oblong": lambda: nn.Conv2d(8, 8, (3, 1), padding=(1, 0)),
    "1x1": lambda: nn.Conv2d(8, 8, 1),
    "no bias": lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "depthwise, stride": lambda: nn.Conv2d(8, 16, 5, 2, padding=2, groups=8),
    "batch norm, relu": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
    ),
    "relu6": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6()),
    "padded relu": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
    "leaky relu": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.LeakyReLU(0.1)),
    "max pooling": lambda: nn.MaxPool2d(3, 2, 1),
    "average pooling": lambda: nn.AvgPool2d(2),
    "global pooling": lambda: nn.AdaptiveAvgPool2d(1),
    "residual": lambda: Residual(8),
    "concatenation": lambda: Concatenated(8),
    "linear": lambda: Flattened(8),
}


def pictures(count: int = 24, *, channels: int = 3, size: int = 9) -> Tensor:
    """Return inputs that are not symmetric around zero."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=generator) + 0.7


FRESH = pictures(40)[24:]
MANY = pictures(1624)[24:]  # for networks that give few values for each input


def lively(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a network around a part, with batch norms that do something."""
    torch.manual_seed(3)  # before the part is made, so that its weights do not hang on other tests
    part = make()
    given = 16 if isinstance(part, nn.Conv2d) and part.out_channels == 16 else 8
    network = Behind(part, 8, given)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def last_grid(network: fx.GraphModule) -> tuple[fx.Node, float]:
    """Return the tensor on the last grid of a simulation, and that grid's step."""
    rounded = [n for n in network.graph.nodes if "dequantize_per_tensor" in str(n.target)]
    return rounded[-1], rounded[-1].args[1]


def with_last_grid(network: fx.GraphModule) -> fx.GraphModule:
    """Return a simulation that gives its last quantized tensor too."""
    network = copy.deepcopy(network)
    node, _ = last_grid(network)
    output = next(n for n in network.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], node),)
    network.graph.set_codegen(fx.graph.CodeGen())
    network.recompile()
    return network


def in_onnxruntime(network: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Return what ONNX Runtime gives for the exported network."""
    session = onnxruntime_session(to_onnx(network, inputs))
    return [torch.from_numpy(each) for each in session.run(None, {"input": inputs.numpy()})]


def check_within_a_step(network: nn.Module, forms: ClosedForms) -> nn.Module:
    """Check the law for one network; return its simulation."""
    quantized = quantize(network, pictures(), forms=forms)
    assert all(layer.precision == "int8" for layer in quantized.record.layers)
    both = with_last_grid(quantized.network)
    with torch.no_grad():
        simulated = both(FRESH)[-1]
        inputs = FRESH if simulated.numel() > 1000 else MANY
        simulated = both(inputs)[-1]
    gaps = (in_onnxruntime(both, inputs)[-1] - simulated).abs() / last_grid(both)[1]
    assert gaps.max() < 1.01
    # Nearly all sums are far from the middle between two steps. One that is not moves all that is
    # computed from it, so a few in a thousand may differ; of few values that cannot be told.
    assert (gaps > 0.5).float().mean() < 4e-3
    return quantized.network


@pytest.mark.parametrize("name", PARTS)
def test_simulation_equals_onnxruntime_within_a_step(name: str) -> None:
    network = lively(PARTS[name])
    simulation = check_within_a_step(network, ClosedForms())
    with torch.no_grad():
        exact, simulated = network(FRESH), simulation(FRESH)
    error = float((simulated - exact).square().mean() / exact.var())
    assert 0 < error < 1e-3


@pytest.mark.parametrize("name", ["depthwise", "concatenation"])
def test_simulation_equals_onnxruntime_without_closed_forms(name: str) -> None:
    check_within_a_step(lively(PARTS[name]), NO_CLOSED_FORMS)


@pytest.mark.parametrize("name", PARTS)
def test_signed_levels_give_the_same_outputs_bit_for_bit(name: str) -> None:
    network = quantize(lively(PARTS[name]), pictures(), forms=NO_CLOSED_FORMS).network
    before = copy.deepcopy(network)
    signed = signed_form(network)
    with torch.no_grad():
        assert torch.equal(signed(FRESH), network(FRESH))
        assert torch.equal(before(FRESH), network(FRESH))
    assert str(before.graph) == str(network.graph), "its input is not modified"
    tensors = [n for n in signed.graph.nodes if "quantize_per_tensor" in str(n.target)]
    assert {(*n.args[3:],) for n in tensors} == {(-128, 127, torch.int8)}
    values = [n for n in tensors if "dequantize" in str(n.target)]
    assert all(len(n.users) == 1 for n in values), "each reader has values of its own"


def test_signed_concatenation_reads_the_grid_that_it_writes() -> None:
    network = quantize(lively(PARTS["concatenation"]), pictures(), forms=NO_CLOSED_FORMS).network
    (joined,) = (n for n in signed_form(network).graph.nodes if "cat" in str(n.target))
    (after,) = joined.users
    assert {source.args[1:3] for source in joined.all_input_nodes} == {after.args[1:3]}


def test_signed_form_leaves_other_networks_alone() -> None:
    network = lively(PARTS["1x1"])
    assert signed_form(network) is network


@pytest.mark.parametrize("name", PARTS)
def test_executorch_gives_the_simulation_within_a_step(name: str) -> None:
    pytest.importorskip("executorch")
    quantized = quantize(lively(PARTS[name]), pictures(), forms=NO_CLOSED_FORMS)
    both = with_last_grid(quantized.network)
    program = torch.export.export(signed_form(both), (FRESH,))
    with torch.no_grad():
        simulated = both(FRESH)[-1]
    gaps = (LoadedProgram(to_executorch(program))(FRESH)[-1] - simulated).abs()
    assert (gaps / last_grid(both)[1]).max() < 1.01


def test_saved_network_is_loaded_again(tmp_path: Path) -> None:
    network = lively(PARTS["residual"])
    inputs = pictures()
    quantized = quantize(network, inputs)
    quantized.save(tmp_path)
    loaded = load_quantized(network, tmp_path, inputs[:1])
    assert loaded.record == quantized.record
    with torch.no_grad():
        assert torch.equal(loaded.network(inputs), quantized.network(inputs))


def test_layers_stay_float32_where_asked() -> None:
    network = lively(PARTS["3x3"])
    quantized = quantize(network, pictures(), keep_float32={"part": "it is slower in int8"})
    layers = {layer.name: layer for layer in quantized.record.layers}
    assert layers["part"].why == "it is slower in int8"
    assert layers["after"].precision == "int8"
    float_weights = [name for name, _ in quantized.network.named_buffers() if "_weight" in name]
    assert sum(name.endswith("_weight") for name in float_weights) == 1
    with pytest.raises(UnknownNameError, match="part"):
        quantize(network, pictures(), keep_float32=["parts"])
    with pytest.raises(OptionError, match="none is left"):
        quantize(network, pictures(), keep_float32=["before", "part", "after"])


def test_model_is_not_modified() -> None:
    network = lively(PARTS["batch norm, relu"])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    quantize(network, pictures())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_pictures_of_bytes_round_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (24, 3, 9, 9), generator=generator)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
    inputs = (levels / 255 - mean) / std
    network = lively(PARTS["3x3"]).requires_grad_(requires_grad=False)
    quantized = quantize(network, inputs)
    assert quantized.record.pixels is not None
    assert quantized.record.pixels.steps == pytest.approx((1 / 51, 1 / 76.5, 1 / 63.75), rel=1e-4)
    assert (
        quantized.record.layers[0].error
        < 0.5 * quantize(network, inputs, forms=ClosedForms(pixels=False)).record.layers[0].error
    )
    with torch.no_grad():
        error = (quantized.network(inputs) - network(inputs)).square().mean()
    assert float(error) < 1e-3 * float(network(inputs).var())
    assert quantize(network, pictures()).record.pixels is None
