import json

import pytest

from onebyone.cli import main
from onebyone.pipeline.exporting import ExportRecord
from onebyone.profiling.bench import BenchRecord

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:make"


def test_bench_prints_json_alone_and_writes_its_record(net, tmp_path, capsys):
    command = ["bench", net, "--input-shape", "2,3,16,12", "--threads", "1", "--rounds", "3"]
    command += ["--runtime", "eager", "--runtime", "packed"]
    assert main([*command, "--json", "--out", str(tmp_path / "out")]) == 0
    record = BenchRecord.from_json(capsys.readouterr().out)
    assert [entry.runtime for entry in record.entries] == ["eager", "packed"]
    assert BenchRecord.load(tmp_path / "out" / "bench.json") == record
    assert main(command) == 0
    assert "packed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--input-shape", "1,3,9,9", "--runtime", "onnxrt"], 2, "No runtime named 'onnxrt'"),
        ([], 2, "Give --input-shape"),
        (["--input-shape", "1,5,9,9", "--runtime", "eager"], 1, "must run on an input of shape"),
        (["--input-shape", "1,3,9,9", "--rounds", "2"], 2, "`rounds` must be 3 or more"),
        (
            ["--input-shape", "1,3,9,9", "--runtime", "cuda-graph"],
            2,
            "needs an input on a cuda device",
        ),
    ],
)
def test_bench_says_what_is_wrong_in_a_line(net, capsys, arguments, status, message):
    assert main(["bench", net, "--threads", "1", *arguments]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_export_writes_files_and_says_how_they_were_checked(net, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", net, "--input-shape", "1,3,16,12", "--out", str(out)]
    assert main([*command, "--format", "pt2", "--format", "safetensors", "--json"]) == 0
    record = ExportRecord.from_json(capsys.readouterr().out)
    assert [check.format for check in record.checks] == ["pt2", "safetensors"]
    expected = {"model.pt2", "model.safetensors", "load_pt2.py", "load_safetensors.py"}
    assert {p.name for p in out.iterdir()} == expected | {"export.json", "preprocessing.json"}


def test_a_run_is_exported_with_its_own_data_plan_and_classes(tmp_path, capsys):
    run = tmp_path / "run"
    trained = ["train", "onebyone:classic", "--data", "digits", "--epochs", "1", "--limit", "64"]
    assert main([*trained, "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["export", str(run), "--format", "safetensors", "--out", str(tmp_path / "e")]) == 0
    record = ExportRecord.load(tmp_path / "e" / "export.json")
    assert record.checks[0].inputs == "8 real inputs of digits"
    assert len(record.preprocessing.classes) == 10
    known = json.loads((tmp_path / "e" / "preprocessing.json").read_text())
    assert known["mean"] is not None


def test_export_says_what_is_wrong_in_a_line(net, tmp_path, capsys):
    out = str(tmp_path / "out")
    wrong = ["export", net, "--input-shape", "1,3,9,9", "--out", out, "--format"]
    assert main([*wrong, "onx"]) == 2
    assert "Did you mean 'onnx'" in capsys.readouterr().err
    assert main(["export", net, "--out", out]) == 2
    assert "Give --input-shape" in capsys.readouterr().err
    assert main(["export", "torchvision:resnet18", "--out", out]) == 1
    assert "needs trained weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
