"""The int8 form for timing has the structure of the file that is deployed."""

from collections import Counter

import pytest
import torch
from torch import nn

from onebyone.core.errors import ModelError
from onebyone.quantizing import NO_CLOSED_FORMS, ClosedForms, quantize
from onebyone.quantizing.flow import flow_of
from onebyone.quantizing.untrained import int8_form, with_conversion
from onebyone.runtimes.onnx import layers_to_onnx, onnxruntime_session, to_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Net(nn.Module):
    """A residual sum, a depthwise layer, a concatenation, pooling and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.pair = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 8, 3, padding=1))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.pair(self.one(x).relu())).relu()
        x = nn.functional.max_pool2d(torch.cat([x, self.depthwise(x)], 1), 2)
        return self.fc(nn.functional.relu6(self.wide(x)).mean((2, 3)))


class Halves(nn.Module):
    """A unit of ShuffleNet: half of the channels pass by."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        kept, changed = self.stem(x).relu().chunk(2, 1)
        return self.last(torch.cat([kept, self.branch(changed).relu()], 1))


class Averaged(nn.Module):
    """A classifier that ends in a convolution and an average, as SqueezeNet and NiN do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return self.last(self.first(x).relu()).relu().mean((2, 3))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(4, 3, 12, 12)


def rounded(content):
    """Return the operators whose outputs are quantized, and those that read quantized tensors."""
    graph = onnx.load_from_string(content).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    makers |= {each.name: "input" for each in graph.input}
    counts = Counter(node.op_type for node in graph.node if node.op_type != "Constant")
    quantized = Counter(
        makers[node.input[0]] for node in graph.node if node.op_type == "QuantizeLinear"
    )
    return counts, quantized


def test_tensors_are_quantized_where_the_deployed_file_quantizes_them(net, inputs):
    real = to_onnx(quantize(net, inputs, forms=NO_CLOSED_FORMS).network, inputs[:1])
    assert rounded(int8_form(to_onnx(net, inputs[:1]))) == rounded(real)


@pytest.mark.parametrize("make", [Halves, Averaged])
def test_parts_and_averages_are_quantized_as_in_the_deployed_file(make, inputs):
    torch.manual_seed(0)
    net = make().eval()
    real = to_onnx(quantize(net, inputs, forms=NO_CLOSED_FORMS).network, inputs[:1])
    counts, quantized = rounded(int8_form(to_onnx(net, inputs[:1])))
    assert (counts, quantized) == rounded(real)
    assert make is Averaged or quantized["Split"] == 2
    # What an average reads is on a grid: else runtimes would compute the last layer in float32.
    assert make is Halves or quantized["Relu"] == 2


def operators_in_onnxruntime(content, tmp_path):
    """Return the operators that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node)


def test_all_layers_of_a_classifier_run_in_int8(inputs, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    real = to_onnx(quantize(net, inputs, forms=NO_CLOSED_FORMS).network, inputs[:1])
    for content in (real, int8_form(to_onnx(net, inputs[:1]))):
        found = operators_in_onnxruntime(content, tmp_path)
        assert (found["QLinearConv"], found["QGemm"], found["Gemm"]) == (1, 2, 0)


def test_each_relu6_of_a_deep_network_is_computed_within_its_layer(inputs, tmp_path):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU6()) for _ in range(24)]
    net = nn.Sequential(*blocks, nn.Conv2d(3, 3, 1)).eval()
    found = operators_in_onnxruntime(int8_form(to_onnx(net, inputs[:1])), tmp_path)
    assert (found["QLinearConv"], found["Clip"]) == (24, 0)


def test_parts_share_the_grid_of_the_whole(inputs):
    torch.manual_seed(0)
    made = quantize(Halves().eval(), inputs)
    grids = {name: grid for name, grid in made.record.grids.items() if "getitem" in name}
    assert len(grids) == 2
    assert len({(grid.scale, grid.zero_point) for grid in grids.values()}) == 1


def zero_of_the_input(content):
    """Return the level of zero on the grid of the network's input."""
    graph = onnx.load_from_string(content).graph
    constants = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    return int(constants[first.input[2]])


def test_pictures_of_bytes_are_levels_from_zero_as_in_the_deployed_file(net, inputs):
    levels = torch.randint(0, 256, (16, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    pictures = levels / 255 - 0.5
    content = to_onnx(net, inputs[:1])
    real = to_onnx(quantize(net, pictures, forms=ClosedForms(rounding=False)).network, inputs[:1])
    assert zero_of_the_input(real) == 0
    assert zero_of_the_input(int8_form(content, inputs=pictures[:1])) == 0
    for others in (None, inputs):
        assert zero_of_the_input(int8_form(content, inputs=others)) > 0


def test_runtimes_compute_every_layer_but_the_last_in_int8(net, inputs, tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    content = int8_form(layers_to_onnx(net, inputs[:1]))
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    assert kinds["QLinearConv"] == 6
    assert kinds["Conv"] == 0
    assert kinds["QLinearAdd"] == 1


def test_layers_that_are_named_stay_float32(net, inputs):
    content = to_onnx(net, inputs[:1])
    some = int8_form(content, float32=["one", "depthwise"])
    kinds = Counter(n.op_type for n in onnx.load_from_string(some).graph.node)
    whole = Counter(n.op_type for n in onnx.load_from_string(int8_form(content)).graph.node)
    assert whole["DequantizeLinear"] - kinds["DequantizeLinear"] >= 4
    session = onnxruntime_session(some)
    assert session.run(None, {"input": inputs[:1].numpy()})[0].shape == (1, 5)


def test_a_name_that_is_no_layers_is_refused(net, inputs):
    content = to_onnx(net, inputs[:1])
    with pytest.raises(ModelError, match="The layers nowhere must be in the exported graph"):
        int8_form(content, float32=["nowhere"])
    with pytest.raises(ModelError, match="none is left"):
        int8_form(layers_to_onnx(nn.Sequential(nn.ReLU()), inputs[:1]))


def test_what_flows_between_layers_is_read_from_the_graph(net, inputs):
    flow = flow_of(to_onnx(net, inputs[:1]))
    assert list(flow.gives) == ["stem.0", "one", "pair.0", "pair.1", "depthwise", "wide", "fc"]
    pairs = {(edge.first, edge.second) for edge in flow.edges}
    total, wide = flow.sums
    assert flow.sums[total] == ("stem.0", "pair.1")
    assert flow.sums[wide] == (total, "depthwise")
    assert {("stem.0", "one"), ("one", "pair.0"), ("pair.0", "pair.1"), ("wide", "fc")} <= pairs
    assert {(total, "depthwise"), (total, wide), ("depthwise", wide), (wide, "wide")} <= pairs
    assert flow.gives["one"] == 8 * 12 * 12


def test_a_conversion_is_added_after_the_first_activation(inputs):
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    content = layers_to_onnx(chain, inputs[:1])
    _, quantized = rounded(with_conversion(content))
    assert quantized == Counter({"Relu": 1})
