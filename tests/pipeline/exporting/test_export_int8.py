"""Files in int8: the simulated integers in their runtimes, and what is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from onebyone.cli import main
from onebyone.core.errors import ExportError, OptionError, UnknownNameError
from onebyone.pipeline import exporting
from onebyone.pipeline.exporting import ExportRecord, export
from onebyone.quantizing import Int8Record, load_quantized
from onebyone.runtimes.onnx import onnxruntime_session

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


def examples(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def test_int8_files_hold_the_simulated_integers(tmp_path: Path) -> None:
    network, inputs = small_network(), examples()
    record = export(network, tmp_path, formats=["onnx", "openvino"], data=inputs, precision="int8")
    assert record.precision == "int8"
    assert ExportRecord.load(tmp_path / "export.json") == record
    quantized = load_quantized(network, tmp_path, inputs[:1])
    integers = {
        tuple(each.dims): onnx.numpy_helper.to_array(each)
        for each in onnx.load(tmp_path / "model.onnx").graph.initializer
        if each.data_type == onnx.TensorProto.INT8
    }
    for name, values in quantized.integers.items():
        if name.endswith(".weight"):
            assert np.array_equal(integers[tuple(values.shape)], values.numpy())
    session = onnxruntime_session(str(tmp_path / "model.onnx"))
    given = torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])
    with torch.no_grad():
        exact = network(inputs)
    assert float((given - exact).square().mean() / exact.var()) < 1e-3
    processor = Int8Record.load(tmp_path / "int8.json")
    assert processor.saturates is False or processor.weight_bits == 7


def test_a_file_of_other_integers_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "SAME_STEPS", 1e-9)
    with pytest.raises(ExportError, match="outputs differ"):
        export(small_network(), tmp_path / "out", data=examples(), precision="int8")
    assert not (tmp_path / "out").exists()


def test_what_int8_needs_is_asked_for(tmp_path: Path) -> None:
    network = small_network()
    with pytest.raises(OptionError, match="`calibration` must be given"):
        export(network, tmp_path / "a", input_shape=(1, 3, 12, 12), precision="int8")
    with pytest.raises(OptionError, match="got 'pt2'"):
        export(network, tmp_path / "a", data=examples(), formats=["pt2"], precision="int8")
    with pytest.raises(OptionError, match="left out for float32"):
        export(network, tmp_path / "a", data=examples(), calibration=examples())
    with pytest.raises(UnknownNameError, match="Did you mean 'int8'"):
        export(network, tmp_path / "a", data=examples(), precision="int4")


def test_command_exports_int8(tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["export", "onebyone:classic", "--weights", "random", "--data", "digits"]
    if main([*given, "--precision", "int8", "--out", str(out)]) != 0:
        pytest.fail("the command failed")
    assert (out / "int8.json").exists()
    assert ExportRecord.load(out / "export.json").precision == "int8"


def test_calibration_inputs_alone_are_enough(tmp_path):
    record = export(
        small_network(), tmp_path, formats=["onnx"], calibration=examples(), precision="int8"
    )
    assert record.checks[0].inputs.endswith("real inputs")
