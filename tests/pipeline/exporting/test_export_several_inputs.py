"""A network of several inputs is exported with their names, and its file is a contestant."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import branches
import onebyone as obo
from onebyone.core.errors import ModelError, NetworkInputError
from onebyone.pipeline.exporting import FORMATS, ExportRecord, export
from onebyone.runtimes.files import FileNetwork

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ALL = ["safetensors", "pt2", "onnx", "openvino"]
FILES = pytest.mark.parametrize("file", ["model.onnx", "model.xml"])


def network(form):
    return branches.rgb_depth() if form == "positional" else branches.masked()


def examples(form, count=12):
    return branches.positional(count) if form == "positional" else branches.keywords(count)


@pytest.fixture(scope="module", params=["positional", "keywords"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    net, data = network(request.param), examples(request.param)
    return request.param, net, folder, export(net, folder, formats=ALL, data=data)


def outputs(net, inputs):
    with torch.no_grad():
        given = net(*inputs) if isinstance(inputs, tuple) else net(**inputs)
    return given["logits"] if isinstance(given, dict) else given


def test_files_keep_the_names_and_give_the_outputs(exported):
    form, net, folder, record = exported
    assert ExportRecord.load(folder / "export.json") == record
    assert all(check.dynamic == ("batch",) and not check.fixed for check in record.checks)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    assert names == (["rgb", "depth"] if form == "positional" else ["pixel_values", "mask"])
    inputs, _ = examples(form, 5)  # a batch that was not compared
    values = inputs if isinstance(inputs, tuple) else [inputs[name] for name in names]
    arrays = {name: each.numpy() for name, each in zip(names, values, strict=True)}
    (found,) = session.run(None, arrays)
    assert_close(torch.from_numpy(found), outputs(net, inputs), atol=1e-5, rtol=1e-4)
    for check in record.checks:
        loaded = FORMATS[check.format].read(folder / check.files[0], net, record.inputs)
        (own,) = obo.pipeline.exporting.outputs_of(loaded(inputs))
        assert_close(own, outputs(net, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["pt2", "onnx", "openvino"])
def test_a_loader_runs_without_this_package(exported, name):
    _, _, folder, _ = exported
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({str(folder / f'load_{name}.py')!r}, run_name='__main__')\n"
        "assert 'onebyone' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1, 4" in done.stdout or "logits" in done.stdout


@FILES
def test_a_file_is_compared_with_its_network(exported, file):
    form, net, folder, _ = exported
    loaded = obo.load_model(folder / file)
    assert isinstance(loaded, FileNetwork)
    assert loaded.inputs.same_examples(
        obo.profile(net, example=examples(form, 1)[0], timed=False).inputs
    )
    assert_close(
        outputs(loaded, examples(form, 7)[0]), outputs(net, examples(form, 7)[0]),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    runtime = "onnxruntime" if file == "model.onnx" else "openvino"
    record = obo.compare(
        net, loaded, data=examples(form), task="classification", runtimes=[runtime], rounds=3
    )
    first, second = record.contenders
    assert second.measured.macs == first.measured.macs
    assert second.agreement.value == 1


def test_keywords_may_come_in_any_order(exported):
    form, net, folder, _ = exported
    inputs, _ = examples(form, 3)
    named = inputs if form == "keywords" else dict(zip(("rgb", "depth"), inputs, strict=True))
    found = outputs(obo.load_model(folder / "model.onnx"), dict(reversed(named.items())))
    assert_close(found, outputs(net, inputs), atol=1e-5, rtol=1e-4)


def test_what_is_fixed_in_a_file_is_not_called_otherwise(tmp_path):
    net, (inputs, _) = branches.masked(), branches.keywords(2)
    export(net, tmp_path, example=inputs)
    loaded = obo.load_model(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"was written for .*scale=0\.5\), but .*scale=2\.0"):
        loaded(**{**inputs, "scale": 2.0})
    with pytest.raises(ModelError, match=r"needs a tensor for each .* none for mask"):
        loaded(pixel_values=inputs["pixel_values"], scale=0.5)


def test_one_given_example_is_enough_for_a_free_batch(tmp_path):
    net = branches.masked()
    record = export(net, tmp_path, example={"pixel_values": torch.randn(1, 3, 8, 8), "mask": None})
    (check,) = record.checks
    assert check.dynamic == ("batch",)
    assert check.shapes == ((1, 3, 8, 8), (2, 3, 8, 8))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"pixel_values": np.zeros((4, 3, 8, 8), "float32")})
    assert found.shape == (4, 4)


class Writes(nn.Module):
    """Writes into an input, reads one of two, and takes whole numbers in a list."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(6, 3)

    def forward(self, x, unused, ids):
        x.mul_(2)
        return x + self.words(ids[0]).mean(1)


def test_inputs_in_lists_and_unread_ones(tmp_path):
    net = Writes().eval()
    given = (torch.randn(3, 3), torch.randn(3, 2), [torch.tensor([[0, 5], [1, 2], [3, 3]])])
    record = export(net, tmp_path, formats=["pt2", "onnx", "openvino"], example=given)
    assert record.inputs.call == "(x, unused, [ids_0])"
    for file in ("model.onnx", "model.xml"):
        loaded = obo.load_model(tmp_path / file)
        before = given[0].clone()
        found = loaded(*given)
        assert torch.equal(before, given[0])
        with torch.no_grad():
            assert_close(found, net(before, *given[1:]))


def test_formats_of_one_tensor_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(obo.pipeline.exporting.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(NetworkInputError, match=r"The format 'executorch' needs .* one tensor"):
        export(
            branches.rgb_depth(),
            tmp_path / "o",
            formats=["executorch"],
            data=examples("positional"),
        )
    assert not (tmp_path / "o").exists()
