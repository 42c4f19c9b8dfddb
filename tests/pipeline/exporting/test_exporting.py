"""Exported files are the network in their runtimes, and a file that is not is never left."""

import dataclasses
import json
import subprocess
import sys
import zipfile

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from onebyone.core.errors import (
    ExportError,
    MissingExtraError,
    OptionError,
    OutputError,
    UnknownNameError,
)
from onebyone.core.records import InputSpec
from onebyone.core.tensor_trees import spec_of
from onebyone.data import Data, TensorSplit
from onebyone.networks.zoo.article import classic
from onebyone.pipeline import exporting
from onebyone.pipeline.exporting import FORMATS, ExportRecord, Preprocessing, export
from onebyone.pipeline.exporting import formats as formats_module
from onebyone.pipeline.exporting.loaders import loader_of

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

CHECKED_HERE = ["safetensors", "pt2", "onnx", "openvino"]


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def with_fixed_head():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 10 * 6, 5))


def digits(n=12, shape=(3, 12, 8)):
    generator = torch.Generator().manual_seed(0)
    split = TensorSplit(
        torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator),
        torch.arange(n) % 5,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )
    return Data(
        name="drawn", train=split, validation=split, test=split, classes=tuple("abcde"), seed=0
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    net = convolutional()
    return net, folder, export(net, folder, formats=CHECKED_HERE, data=digits())


def test_all_formats_give_the_networks_outputs_with_free_sizes(exported):
    net, folder, record = exported
    assert [check.format for check in record.checks] == CHECKED_HERE
    for check in record.checks:
        assert check.dynamic == ("batch", "height", "width")
        assert check.inputs == "8 real inputs of drawn"
        assert check.difference.relative <= check.tolerance
        assert check.shapes == ((1, 3, 12, 8), (8, 3, 12, 8), (2, 3, 44, 72))
        assert check.file_bytes == sum((folder / file).stat().st_size for file in check.files)
        # Sizes that were not checked work too.
        x = torch.randn(5, 3, 23, 17)
        loaded = FORMATS[check.format].read(folder / check.files[0], net)
        (outputs,) = exporting.outputs_of(loaded(x))
        assert_close(outputs, net.eval()(x).detach(), rtol=1e-4, atol=1e-5)
        net.train()
    assert ExportRecord.load(folder / "export.json") == record
    assert "batch, height" in str(record)


def test_the_network_is_left_as_it_was(tmp_path):
    net = convolutional().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    export(net, tmp_path / "out", formats=["safetensors", "pt2"], input_shape=(1, 3, 12, 8))
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", CHECKED_HERE)
def test_no_input_is_written_into_a_file(name, tmp_path):
    # Pixels that no weight is likely to hold, in the order in which they lie in memory.
    inputs = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(7))
    export(convolutional(), tmp_path / "out", formats=[name], data=inputs)
    row = inputs[0, 0, 0].numpy().tobytes()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert files
    for file in files:
        parts = [file.read_bytes()]
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                parts = [archive.read(part) for part in archive.namelist()]
        assert not any(row in part for part in parts), file.name


def test_executorch_gives_the_networks_outputs_at_one_size(tmp_path):
    pytest.importorskip("executorch")
    net, folder = convolutional(), tmp_path / "out"
    record = export(net, folder, formats=["executorch"], data=digits())
    (check,) = record.checks
    assert (check.dynamic, check.shapes) == ((), ((1, 3, 12, 8),))
    assert check.difference.relative <= check.tolerance
    done = subprocess.run(
        [sys.executable, str(folder / "load_executorch.py")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[1, 5]" in done.stdout


@pytest.mark.parametrize("name", ["pt2", "onnx", "openvino"])
def test_a_loader_needs_its_runtime_alone(exported, name):
    _, folder, _ = exported
    code = (
        "import runpy, sys\n"
        f"outputs = runpy.run_path({str(folder / f'load_{name}.py')!r}, run_name='__main__')\n"
        "heavy = {'onebyone', 'timm'} | ({'torch'} if 'pt2' not in sys.argv[1] else set())\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "(1, 5)" in done.stdout or "[1, 5]" in done.stdout


def test_the_weights_loader_fills_a_network(exported):
    import runpy

    net, folder, _ = exported
    load = runpy.run_path(str(folder / "load_safetensors.py"))["load"]
    again = load(
        convolutional().apply(
            lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None
        )
    )
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_preprocessing_is_written_beside(exported):
    _, folder, record = exported
    written = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
    assert written["mean"] == [0.5, 0.4, 0.3]
    assert written["std"] == [0.2, 0.3, 0.4]
    assert written["classes"] == list("abcde")
    assert written["inputs"]["tensors"][0]["shape"] == [1, 3, 12, 8]
    assert Preprocessing.load(folder / "preprocessing.json") == record.preprocessing


def test_a_network_with_a_fixed_head_keeps_its_size_and_frees_the_batch(tmp_path):
    record = export(
        with_fixed_head(), tmp_path / "out", formats=["onnx"], input_shape=(1, 3, 12, 8)
    )
    (check,) = record.checks
    assert check.dynamic == ("batch",)
    assert check.shapes == ((1, 3, 12, 8), (8, 3, 12, 8))
    assert "height, width fixed: the network accepts no other sizes." in str(check.fixed)


class OneAtATime(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x.reshape(1, 6))


def test_a_network_of_one_batch_is_exported_for_it(tmp_path):
    record = export(OneAtATime(), tmp_path / "out", formats=["pt2"], input_shape=(1, 6))
    assert record.checks[0].dynamic == ()
    assert record.checks[0].shapes == ((1, 6),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape", "dynamic"),
    [
        (lambda: torchvision.models.resnet18(num_classes=7), (1, 3, 64, 96), 3),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=7), (1, 3, 64, 96), 3),
        (lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None), (1, 3, 64, 96), 3),
        (classic, (1, 1, 28, 28), 1),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_real_networks_are_exported(tmp_path, make, shape, dynamic):
    torch.manual_seed(0)
    record = export(
        make(), tmp_path / "out", formats=["pt2", "onnx", "openvino"], input_shape=shape
    )
    for check in record.checks:
        assert len(check.dynamic) == dynamic, (check.format, check.fixed)


# ---------------------------------------------------------------- faults


def spoiled(name, how):
    original = FORMATS[name]

    def write(source, dynamic, path):
        original.write(source, dynamic, path)
        how(path)

    return dataclasses.replace(original, write=write)


def one_weight(path):
    """Change one weight of an ONNX file by a little."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda item: len(item.raw_data))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[3] += 0.1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("fault", [one_weight, cut])
@pytest.mark.parametrize("there", [False, True])
def test_a_wrong_file_is_refused_and_not_left(tmp_path, monkeypatch, fault, there):
    folder = tmp_path / "out"
    if there:
        folder.mkdir()
        (folder / "model.onnx").write_text("an older file")
    monkeypatch.setitem(exporting.FORMATS, "onnx", spoiled("onnx", fault))
    with pytest.raises(ExportError, match=r"The onnx file must give the network's outputs"):
        export(convolutional(), folder, formats=["safetensors", "onnx"], input_shape=(1, 3, 12, 8))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["model.onnx"] * there
    if there:
        assert (folder / "model.onnx").read_text() == "an older file"


def test_swapped_weights_of_a_safetensors_file_are_noticed(tmp_path, monkeypatch):
    def other(path):
        from onebyone.networks.zoo import save_weights

        torch.manual_seed(1)
        save_weights(nn.Sequential(*convolutional()), path)
        from safetensors.torch import load_file, save_file

        state = load_file(path)
        state["3.bias"] = state["3.bias"] + 0.05
        save_file(state, path)

    monkeypatch.setitem(exporting.FORMATS, "safetensors", spoiled("safetensors", other))
    with pytest.raises(ExportError, match="its outputs differ by"):
        export(
            convolutional(), tmp_path / "out", formats=["safetensors"], input_shape=(1, 3, 12, 8)
        )
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setitem(exporting.FORMATS, "pt2", spoiled("pt2", stop))
    with pytest.raises(KeyboardInterrupt):
        export(convolutional(), tmp_path / "out", formats=["pt2"], input_shape=(1, 3, 12, 8))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_asked_is_refused(tmp_path, monkeypatch):
    net = convolutional()
    with pytest.raises(UnknownNameError, match=r"No format named 'onx'. Did you mean 'onnx'"):
        export(net, tmp_path / "out", formats=["onx"], input_shape=(1, 3, 12, 8))
    with pytest.raises(OptionError, match="`formats` must name at least one"):
        export(net, tmp_path / "out", formats=[], input_shape=(1, 3, 12, 8))
    with pytest.raises(OptionError, match="`input_shape` must be given"):
        export(net, tmp_path / "out")
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"onebyone\[openvino\]"):
        export(net, tmp_path / "out", formats=["openvino"], input_shape=(1, 3, 12, 8))
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(OutputError, match="must be a folder"):
        export(net, tmp_path / "file", formats=["safetensors"], input_shape=(1, 3, 12, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_every_format_has_a_loader_that_is_python():
    one = InputSpec.of_shape((1, 3, 4, 4))
    several = spec_of({"rgb": torch.rand(2, 3), "prior": [torch.rand(2, 1)], "scale": -0.5})
    for name, form in formats_module.FORMATS.items():
        compile(loader_of(name, one), form.file, "exec")
        if form.takes_trees:
            compile(loader_of(name, several), form.file, "exec")
