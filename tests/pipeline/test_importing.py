"""Networks from ONNX files: the same function and costs as layers, rewritten, and what is refused."""

import hashlib
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.cli import main
from onebyone.core.errors import ModelError, OneByOneError, OptionError
from onebyone.core.records import InputSpec
from onebyone.networks.zoo import load
from onebyone.pipeline import importing
from onebyone.pipeline.importing import imported
from onebyone.profiling.trace import trace_layers
from onebyone.runtimes.onnx import to_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper


class Small(nn.Module):
    """Convolutions of all kinds, a residual sum, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.wide(F.relu6(self.norm(self.stem(x))))
        x = x + F.hardswish(self.depth(x))
        return self.head(x.mean((2, 3)))


class Picture(nn.Module):
    """A picture in and out, in any size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        y = F.elu(self.down(x))
        z = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
        return F.pixel_shuffle(F.pad(self.last(torch.cat([self.up(y), z], 1)), (0, 0, 0, 0)), 1)


class Sequence(nn.Module):
    """A recurrent network over the columns of a picture, as text is read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.read = getattr(nn, kind)(6 * 8, 10, bidirectional=kind != "RNN", batch_first=True)
        self.norm = nn.LayerNorm(10 if kind == "RNN" else 20)

    def forward(self, x):
        x = F.gelu(self.conv(x))
        x, _ = self.read(x.permute(0, 3, 1, 2).flatten(2))
        return torch.softmax(self.norm(x), -1)


class Two(nn.Module):
    """Two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(5, 4)

    def forward(self, image, row):
        seen = self.a(image) * self.b(row)[:, :, None, None]
        return seen, seen.amax((2, 3))


NETWORKS = {
    "small": (Small, [(3, 12, 10)]),
    "picture": (Picture, [(3, 12, 10)]),
    "lstm": (lambda: Sequence("LSTM"), [(1, 8, 9)]),
    "gru": (lambda: Sequence("GRU"), [(1, 8, 9)]),
    "rnn": (lambda: Sequence("RNN"), [(1, 8, 9)]),
    "two": (Two, [(3, 6, 5), (5,)]),
}


def made(name):
    make, samples = NETWORKS[name]
    torch.manual_seed(0)
    net = make().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net, samples


def write(net, samples, file, exporter, *, free=True, **more):
    inputs = tuple(torch.randn(2, *sample) for sample in samples)
    names = ["image", "row"][: len(samples)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "script":
            axes = {name: {0: "batch"} for name in names} if free else None
            inputs = inputs if free else tuple(each[:1] for each in inputs)
            torch.onnx.export(
                net, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes, **more
            )
        else:
            shapes = tuple({0: torch.export.Dim("batch")} for _ in samples) if free else None
            inputs = inputs if free else tuple(each[:1] for each in inputs)
            torch.onnx.export(
                net, inputs, file, dynamo=True, input_names=names, dynamic_shapes=shapes,
                verbose=False, external_data=False, **more,
            )  # fmt: skip
    return file


def tensors(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize(
    ("name", "exporter", "free"),
    [
        *((name, "script", free) for name in NETWORKS for free in (True, False)),
        # torch's newer exporter takes recurrent layers apart, for one length alone.
        *((name, "dynamo", True) for name in ("small", "two")),
    ],
)
def test_file_becomes_the_same_network(name, exporter, free, tmp_path):
    net, samples = made(name)
    file = write(net, samples, tmp_path / "net.onnx", exporter, free=free)
    before = file.read_bytes()
    found = imported(file)
    assert file.read_bytes() == before
    assert found.source.sha256 == hashlib.sha256(before).hexdigest()
    inputs = tuple(torch.randn(3, *sample) for sample in samples)
    with torch.no_grad():
        for own, wanted in zip(tensors(found.model(*inputs)), tensors(net(*inputs)), strict=True):
            assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    given = inputs[0] if len(inputs) == 1 else inputs
    assert trace_layers(found.model, given).macs == trace_layers(net, given).macs
    if len(samples) == 1:
        assert found.inputs == InputSpec.of_shape((1, *samples[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "exporter"),
    [
        ("torchvision:mobilenet_v3_small", "script"),
        ("torchvision:mobilenet_v3_small", "dynamo"),
        ("torchvision:shufflenet_v2_x0_5", "script"),
        ("timm:convnext_atto", "script"),
    ],
)
def test_network_of_a_library_keeps_outputs_and_macs(spec, exporter, tmp_path):
    torch.manual_seed(0)
    net = load(spec).model
    file = write(net, [(3, 64, 64)], tmp_path / "net.onnx", exporter)
    found = imported(file)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(found.model(x), net(x), rtol=1e-3, atol=1e-4)
    assert trace_layers(found.model, x).macs == trace_layers(net, x).macs


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    net, samples = made("small")
    return write(net, samples, tmp_path_factory.mktemp("files") / "net.onnx", "script")


def test_layers_have_the_names_and_kinds_of_the_network(file):
    layers = dict(obo.import_onnx(file).named_modules())
    kinds = {"stem": nn.Conv2d, "wide": nn.Conv2d, "depth": nn.Conv2d, "head": nn.Linear}
    assert {name: type(layers[name]) for name in kinds} == kinds
    assert layers["depth"].groups == 16


def test_rewrites_apply_and_full_rank_is_the_same(file):
    net = obo.import_onnx(file)
    x = torch.randn(4, 3, 12, 10)
    whole = obo.uniform_plan(net, (1, 3, 12, 10), ranks=1.0, form="reduce")
    with torch.no_grad():
        assert_close(obo.apply(net, whole, x)(x), net(x), rtol=1e-4, atol=1e-4)
    inputs = torch.randn(64, 3, 12, 10)
    plan = obo.plan(net, inputs, budget="macs=50%", task="classification")
    small = obo.apply(net, plan, inputs, task="classification")
    assert plan.choices
    assert trace_layers(small, x[:1]).macs <= 0.5 * trace_layers(net, x[:1]).macs


def test_copies_and_pickles_are_the_same_network(file):
    import copy
    import pickle

    net = obo.import_onnx(file)
    x = torch.randn(2, 3, 12, 10)
    with torch.no_grad():
        wanted = net(x)
        assert torch.equal(copy.deepcopy(net)(x), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), wanted)


def test_weights_beside_the_file_are_read(tmp_path):
    net, samples = made("small")
    file = write(net, samples, tmp_path / "net.onnx", "script")
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").exists()
    x = torch.randn(2, 3, 12, 10)
    with torch.no_grad():
        assert_close(obo.import_onnx(file)(x), net(x), rtol=1e-4, atol=1e-5)
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(ModelError, match="must be a valid ONNX file"):
        obo.import_onnx(file)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match="must be a valid ONNX file"):
        obo.import_onnx(file)


def model(nodes, *, inputs=("x",), outputs=("y",), shape=(1, 3, 8, 8), weights=(), opset=17):
    def value(name, sizes):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)

    graph = helper.make_graph(
        nodes, "g", [value(name, shape) for name in inputs],
        [value(name, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(each), name) for name, each in weights],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def saved(proto, tmp_path):
    onnx.save(proto, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


ones = np.ones((4, 3, 3, 3), np.float32)
CHAINS = {
    "same pads, stride 2, free size": (
        [helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])],
        ("n", 3, "h", "w"), [("w", ones)],
    ),
    "pads that differ": (
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[0, 1, 2, 0])], (1, 3, 8, 8),
        [("w", ones)],
    ),
    "bias as a sum": (
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Add", ["c", "b"], ["y"])],
        (1, 3, 8, 8), [("w", ones), ("b", np.arange(4, dtype=np.float32).reshape(4, 1, 1))],
    ),
    "one layer twice": (
        [
            helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["r"]),
            helper.make_node("Conv", ["r", "w"], ["y"]),
        ],
        (1, 4, 8, 8), [("w", np.ones((4, 4, 3, 3), np.float32) / 9)],
    ),
    "batch in a reshape": (
        [helper.make_node("Reshape", ["x", "s"], ["y"])], (1, 3, 8, 8),
        [("s", np.array([1, 3, 64]))],
    ),
    "a shape that is computed": (
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Gather", ["s", "i"], ["n"]),
            helper.make_node("Unsqueeze", ["n", "a"], ["n1"]),
            helper.make_node("Concat", ["n1", "m"], ["t"], axis=0),
            helper.make_node("Reshape", ["x", "t"], ["y"]),
        ],
        ("n", 3, 8, 8),
        [("i", np.array(0)), ("a", np.array([0])), ("m", np.array([-1]))],
    ),
    "Range, Not and ConstantOfShape": (
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("ConstantOfShape", ["s"], ["z"]),
            helper.make_node("Range", ["o", "l", "i"], ["r"]),
            helper.make_node("Greater", ["x", "z"], ["g"]),
            helper.make_node("Not", ["g"], ["k"]),
            helper.make_node("Where", ["k", "z", "r"], ["y"]),
        ],
        ("n", 3, 8, 8),
        [("o", np.float32(0)), ("l", np.float32(8)), ("i", np.float32(1))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_nodes_in_a_row_are_proven_equal(name, tmp_path):
    nodes, shape, weights = CHAINS[name]
    found = imported(saved(model(nodes, shape=shape, weights=weights), tmp_path))
    layers = [each for each in found.model.modules() if isinstance(each, nn.Conv2d)]
    assert len(layers) <= 1
    if name == "bias as a sum":
        assert layers[0].bias is not None


def test_numbers_in_front_are_exported_again(tmp_path):
    # PyTorch's exporter fails on a number as the first argument.
    nodes = [
        helper.make_node(operator, ["two", before], [after])
        for operator, before, after in (
            ("Add", "x", "a"), ("Mul", "a", "m"), ("Sub", "m", "s"), ("Div", "s", "y"),
        )
    ]  # fmt: skip
    made = saved(model(nodes, weights=[("two", np.float32(2))]), tmp_path)
    again = tmp_path / "again.onnx"
    x = torch.rand(1, 3, 8, 8)
    again.write_bytes(to_onnx(obo.import_onnx(made), x))
    assert_close(obo.load_model(again)(x), 2 / (2 - 2 * (2 + x)))


def test_older_upsampling_is_read(tmp_path):
    node = helper.make_node("Upsample", ["x", "s"], ["y"], mode="nearest")
    scales = np.array([1, 1, 2, 2], np.float32)
    imported(saved(model([node], weights=[("s", scales)], opset=9), tmp_path))


REFUSED = {
    "an operator": ([helper.make_node("Loop", ["", "", "x"], ["y"], "turns")], r"'turns' \(Loop\)"),
    "a quantized file": (
        [helper.make_node("QuantizeLinear", ["x", "s"], ["y"], "q")], "is quantized: its node 'q'",
    ),
    "another domain": (
        [helper.make_node("FusedConv", ["x", "s"], ["y"], "f", domain="com.microsoft")],
        "'com.microsoft', which is not ONNX's own",
    ),
    "a value from nowhere": ([helper.make_node("Relu", ["nothing"], ["y"])], "nothing before it"),
    "an output from nowhere": ([helper.make_node("Relu", ["x"], ["z"])], "cannot"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(what, tmp_path):
    nodes, message = REFUSED[what]
    proto = model(nodes, weights=[("s", np.float32(1))])
    if what == "another domain":
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ModelError, match=message):
        importing.read(importing.read_file(saved(proto, tmp_path)), [(1, 3, 8, 8)])


@pytest.mark.parametrize(
    "content", [b"", b"nothing", b"\x08\x07" * 50], ids=["empty", "text", "bytes"]
)
def test_malformed_file_is_refused(content, tmp_path):
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="must be a valid ONNX file"):
        obo.import_onnx(tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="must exist"):
        obo.import_onnx(tmp_path / "none.onnx")


@pytest.mark.parametrize("sizes", [[4, 3, 3, 30], [2**40, 2**40], [-1, 3]], ids=str)
def test_weight_that_lies_about_its_sizes_is_refused(sizes, tmp_path):
    proto = model([helper.make_node("Conv", ["x", "w"], ["y"])], weights=[("w", ones)])
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(sizes)
    with pytest.raises(ModelError, match="must be a valid ONNX file"):
        obo.import_onnx(saved(proto, tmp_path))


def test_edited_bytes_are_read_or_refused(tmp_path, capfd):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["a", "low", "high"], ["b"], "second"),
        helper.make_node("Reshape", ["b", "s"], ["y"], "third"),
    ]
    weights = [
        ("w", ones), ("low", np.float32(0)), ("high", np.float32(6)), ("s", np.array([1, -1])),
    ]  # fmt: skip
    good = model(nodes, weights=weights).SerializeToString()
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        content = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(content))
            if draw.random() < 0.7:
                content[place] = draw.randrange(256)
            else:
                del content[place : place + draw.randint(1, 6)]
        (tmp_path / "net.onnx").write_bytes(content)
        try:
            obo.import_onnx(tmp_path / "net.onnx")
        except OneByOneError:
            refused += 1
    assert 20 < refused < 60
    assert capfd.readouterr().out == ""


def test_huge_constants_are_not_made(tmp_path):
    proto = model(
        [
            helper.make_node("ConstantOfShape", ["s"], ["z"], "huge"),
            helper.make_node("Add", ["x", "z"], ["y"]),
        ],
        weights=[("s", np.array([2**20, 2**20]))],
    )
    with pytest.raises(ModelError, match=r"'huge' \(ConstantOfShape\).*sizes"):
        importing.read(importing.read_file(saved(proto, tmp_path)), [(1, 3, 8, 8)])


def test_names_of_the_file_are_not_code(tmp_path):
    evil = '"]; __import__("os").system("touch executed"); x["'
    nodes = [
        helper.make_node("Conv", [evil, f"forward.{evil}.weight"], ["a"], evil),
        helper.make_node("Conv", ["a", "forward.weight"], ["b"], "training"),
        helper.make_node("Mul", ["b", f"m{evil}"], ["y"], "self"),
    ]
    weights = [
        (f"forward.{evil}.weight", ones), ("forward.weight", np.ones((4, 4, 1, 1), np.float32)),
        (f"m{evil}", np.ones((4, 1, 1), np.float32)),
    ]  # fmt: skip
    net = obo.import_onnx(saved(model(nodes, inputs=(evil,), weights=weights), tmp_path))
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    assert not Path("executed").exists()
    assert all(
        name.replace(".", "").replace("_", "").isalnum() for name, _ in net.named_parameters()
    )


def test_network_that_differs_is_refused_at_its_first_node(file, monkeypatch):
    table = dict(importing.read.__globals__["OPERATORS"])
    own = table["Conv"]

    def wrong(b, node, x, w, *more):
        return own(b, node, x, w * 1.01 if "wide" in node.inputs[1] else w, *more)

    monkeypatch.setitem(importing.read.__globals__, "OPERATORS", {**table, "Conv": wrong})
    with pytest.raises(
        ModelError, match=r"first at the value .* of the node '/wide/Conv' \(Conv\)"
    ):
        obo.import_onnx(file)


def test_graph_that_is_for_one_example_alone_is_refused(tmp_path):
    node = helper.make_node("Reshape", ["x", "s"], ["y"], "fold")
    proto = model([node], weights=[("s", np.array([3, 64]))])
    with pytest.raises(ModelError, match="must compute any number of examples"):
        obo.import_onnx(saved(proto, tmp_path))


def test_free_sizes_are_tried_or_given(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    path = saved(model([node], shape=("n", 3, "h", "w")), tmp_path)
    assert imported(path).inputs is None
    found = imported(path, input_shape="1x3x20x24")
    assert found.inputs == InputSpec.of_shape((1, 3, 20, 24))
    assert dict(found.source.options) == {"input_shape": "1x3x20x24"}
    with pytest.raises(OptionError, match="must be one that"):
        obo.import_onnx(path, input_shape=(1, 4, 20, 24))
    with pytest.raises(OptionError, match="must be positive sizes"):
        imported(path, input_shape="tall")


# ---------------------------------------------------------------- commands and runs

DATA = """
import torch
def load():
    made = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, 12, 10, generator=made)
    return x[:40], x[40:50], x[50:]
"""


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    """A run of shrink from that file."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "data.py").write_text(DATA)
    command = [
        "shrink", str(file), "--data", f"{folder}/data.py:load", "--budget", "macs=60%",
        "--epochs", "1", "--out", str(folder / "run"),
    ]  # fmt: skip
    assert main(command) == 0
    return folder / "run"


def test_commands_read_the_layers(file, run, tmp_path, capsys):
    assert main(["profile", str(file), "--no-time"]) == 0
    printed = capsys.readouterr().out
    assert "stem" in printed
    assert "head" in printed
    data = f"{run.parent}/data.py:load"
    plan = ["plan", str(file), "--data", data, "--budget", "macs=60%", "--out", str(tmp_path / "p")]
    assert main(plan) == 0
    assert (tmp_path / "p" / "plan.json").exists()
    assert main(["export", str(file), "--format", "safetensors", "--out", str(tmp_path / "e")]) == 0
    assert main(["plan", str(file), "--ranks", "50%"]) == 0


def test_run_names_its_file_by_content_and_opens_no_other(file, run, tmp_path, capsys):
    record = obo.RunRecord.load(run / "run.json")
    assert record.source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(OptionError, match="--original"):
        obo.load_model(run)
    small = obo.load_model(run, original=str(file))
    x = torch.randn(2, 3, 12, 10)
    assert small(x).shape == (2, 5)
    other = write(Small().eval(), [(3, 12, 10)], tmp_path / "other.onnx", "script")
    with pytest.raises(OptionError, match="made from another ONNX file"):
        obo.load_model(run, original=str(other))
    command = ["export", str(run), "--original", str(file), "--out", str(tmp_path / "small")]
    assert main(command) == 0
    with torch.no_grad():
        assert_close(
            obo.import_onnx(tmp_path / "small" / "model.onnx")(x), small(x), rtol=1e-4, atol=1e-5
        )
    command = ["compare", str(file), str(run), "--original", str(file), "--threads", "1"]
    assert main([*command, "--data", f"{run.parent}/data.py:load"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


def test_run_from_a_run_of_a_file_knows_the_file(file, run, tmp_path):
    command = [
        "shrink", str(run), "--original", str(file), "--data", f"{run.parent}/data.py:load",
        "--budget", "macs=90%", "--epochs", "0", "--out", str(tmp_path / "again"),
    ]  # fmt: skip
    assert main(command) == 0
    origin = obo.RunRecord.load(tmp_path / "again" / "run.json").source.origin
    assert origin is not None
    assert origin.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    obo.load_model(tmp_path / "again", original=str(file))


def test_broken_off_run_is_resumed_from_the_same_file_alone(file, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.py").write_text(DATA)
    command = [
        "shrink", str(file), "--data", f"{tmp_path}/data.py:load", "--budget", "macs=60%",
        "--epochs", "1", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    with monkeypatch.context() as broken:
        broken.setattr("onebyone.pipeline.shrink.distill", lambda *_, **__: 1 / 0)
        assert main(command) != 0
    other = write(Small().eval(), [(3, 12, 10)], tmp_path / "other.onnx", "script")
    assert main([command[0], str(other), *command[2:], "--resume"]) != 0
    assert "another network or other weights" in capsys.readouterr().err.replace("\n", " ")
    assert main([*command, "--resume"]) == 0


def test_what_an_onnx_file_does_not_take_is_refused(file, tmp_path, capsys):
    assert main(["profile", str(file), "--weights", "w.safetensors"]) == 2
    assert "must be left out" in capsys.readouterr().err
    assert main(["profile", str(file), "--model-option", "num_classes=3"]) == 2
    assert "one option, input_shape" in capsys.readouterr().err
    (tmp_path / "net.xml").write_text("")
    assert main(["profile", str(tmp_path / "net.xml")]) == 1
    assert "cannot be read: it only runs in openvino" in capsys.readouterr().err.replace("\n", " ")


def test_a_file_that_runs_is_not_taken_for_layers(file):
    with pytest.raises(ModelError, match="import_onnx"):
        obo.plan(obo.load_model(file), torch.randn(8, 3, 12, 10), task="classification")


@pytest.mark.parametrize("place", ["../secret.bin", "{folder}/secret.bin"])
def test_weights_outside_of_the_folder_are_not_opened(place, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.bin").write_bytes(ones.tobytes())
    proto = model([helper.make_node("Conv", ["x", "w"], ["y"])], weights=[("w", ones)])
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", place.format(folder=tmp_path)
    path = saved(proto, inside)
    with pytest.raises(ModelError, match="must be a valid ONNX file"):
        obo.import_onnx(path)
