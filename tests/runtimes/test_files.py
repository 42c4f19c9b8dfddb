"""Exported files as networks: what they give, what they cost, and what they refuse."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.cli import main
from onebyone.core.errors import ModelError, OptionError
from onebyone.core.records import InputSpec
from onebyone.pipeline.exporting import export
from onebyone.profiling.trace import trace_layers
from onebyone.runtimes.files import FileNetwork

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False),
        nn.Conv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    return torch.randn(9, 3, 12, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(
    network: nn.Module, inputs: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out: Path = tmp_path_factory.mktemp("exported")
    export(network, out, formats=["onnx", "openvino"], data=inputs)
    export(network, out / "int8", formats=["onnx", "openvino"], data=inputs, precision="int8")
    return out


@pytest.mark.parametrize("file", ["model.onnx", "model.xml"])
def test_file_gives_the_outputs_and_costs_of_its_network(
    network: nn.Module, inputs: torch.Tensor, folder: Path, file: str
) -> None:
    loaded = obo.load_model(folder / file)
    with torch.no_grad():
        assert_close(loaded(inputs), network(inputs), rtol=1e-4, atol=1e-5)
    assert isinstance(loaded, FileNetwork)
    assert loaded.inputs == InputSpec.of_shape((1, 3, 12, 8))
    costs, expected = loaded.costs((1, 3, 12, 8)), trace_layers(network, inputs[:1])
    assert costs.macs == expected.macs
    biases = 8 + 6 + 4
    assert costs.params == expected.params - biases
    in_int8 = FileNetwork(folder / "int8" / file)
    assert in_int8.costs((1, 3, 12, 8)) == costs


@pytest.mark.parametrize("file", ["model.onnx", "model.xml"])
def test_files_are_compared_with_their_network(
    network: nn.Module, inputs: torch.Tensor, folder: Path, file: str
) -> None:
    targets = torch.arange(len(inputs)) % 4
    small = obo.load_model(folder / "int8" / file)
    runtime = {"model.onnx": "onnxruntime", "model.xml": "openvino"}[file]
    record = obo.compare(
        network, small, data=(inputs, targets), runtimes=[runtime], rounds=3, num_threads=1
    )
    first, second = record.contenders
    assert second.measured.macs == first.measured.macs
    assert second.measured.file_bytes == small.file_bytes
    assert 0 < second.divergence < 1e-2
    assert second.measured.latency[runtime].median_ms > 0


def test_command_compares_and_times_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folder / "model.onnx"), str(folder / "int8" / "model.onnx")]
    assert main(["compare", *files, "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "onnxruntime" in printed
    bench = ["bench", files[1], "--runtime", "onnxruntime", "--runtime", "openvino"]
    assert main([*bench, "--rounds", "3", "--threads", "1"]) == 0


def test_file_with_weights_beside_it_runs(
    network: nn.Module, inputs: torch.Tensor, folder: Path, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    file = tmp_path / "net.onnx"
    whole = onnx.load(folder / "model.onnx")
    onnx.save(whole, file, save_as_external_data=True, location="w.bin", size_threshold=0)
    with torch.no_grad():
        assert_close(FileNetwork(file)(inputs), network(inputs), rtol=1e-4, atol=1e-5)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match="with its files of weights"):
        _ = FileNetwork(file).content


def test_files_that_cannot_be_run_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must exist, but"):
        obo.load_model(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot read"):
        obo.load_model(tmp_path / "broken.onnx")
    with pytest.raises(OptionError, match="`weights` must be left out"):
        obo.load_model(folder / "model.onnx", weights=tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="only runs in openvino"):
        _ = FileNetwork(folder / "model.xml").content
    with pytest.raises(ModelError, match="could not be run"):
        FileNetwork(folder / "model.onnx")(torch.zeros(1, 5, 12, 8))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_executorch_file_is_compared_with_its_network(
    network: nn.Module, inputs: torch.Tensor, tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("executorch")
    record = export(network, tmp_path, formats=["executorch"], data=inputs, precision=precision)
    small = obo.load_model(tmp_path / "model.pte")
    assert isinstance(small, FileNetwork)
    assert small.inputs == InputSpec.of_shape((1, 3, 12, 8))
    with torch.no_grad():
        assert_close(small(inputs), network(inputs), rtol=0.05, atol=0.05)
    compared = obo.compare(
        network, small, data=inputs, runtimes=["executorch"], rounds=3, num_threads=1
    )
    first, second = compared.contenders
    assert second.measured.macs == first.measured.macs == record.macs
    assert second.measured.params == record.params == 3 * 8 * 9 + 8 * 2 * 9 + 8 * 6 + 6 * 4
    (tmp_path / "export.json").unlink()
    with pytest.raises(ModelError, match=r"export\.json beside it"):
        small.costs((1, 3, 12, 8))
