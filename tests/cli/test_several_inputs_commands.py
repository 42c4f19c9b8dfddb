"""On the command line several inputs come from a function of the user's file."""

import json
from pathlib import Path

import pytest

from onebyone.cli import main
from onebyone.core.records import Profile, RunRecord
from onebyone.pipeline.exporting import ExportRecord

pytest.importorskip("onnxruntime")

BRANCHES = Path(__file__).parents[1] / "branches.py"
FILE = """
import torch
from branches import masked, positional, rgb_depth

def example():
    return torch.randn(1, 3, 8, 8), torch.randn(1, 1, 8, 8)

def by_keyword():
    return {"pixel_values": torch.randn(2, 3, 8, 8), "mask": None}

def a_list():
    return [torch.randn(1, 3, 8, 8)]

def data():
    return positional(60)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "branches.py").write_text(BRANCHES.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "two.py").write_text(FILE, encoding="utf-8")
    return folder / "two.py"


@pytest.fixture(scope="module")
def shrunk(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    command = ["shrink", f"{file}:rgb_depth", "--data", f"{file}:data", "--budget", "macs=60%"]
    assert main([*command, "--epochs", "1", "--reconstruct", "2", "--out", str(out)]) == 0
    return out


def test_a_profile_of_an_example_is_repeated_to_the_batch(file, capsys):
    command = ["profile", f"{file}:rgb_depth", "--example", f"{file}:example", "--json"]
    assert main([*command, "--no-time", "--batch", "4"]) == 0
    record = Profile.from_json(capsys.readouterr().out)
    assert str(record.inputs) == "4×3×8×8, 4×1×8×8"


def test_a_plan_without_data_takes_an_example(file, capsys):
    command = ["plan", f"{file}:masked", "--ranks", "50%", "--example", f"{file}:by_keyword"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"]["call"] == (
        "(pixel_values=pixel_values, mask=None)"
    )


def test_a_run_is_exported_and_its_file_compared(file, shrunk, tmp_path, capsys):
    assert RunRecord.load(shrunk / "run.json").data.inputs.call == "(input_0, input_1)"
    original = ["--original", f"{file}:rgb_depth"]
    out = tmp_path / "out"
    assert main(["export", str(shrunk), *original, "--out", str(out)]) == 0
    assert ExportRecord.load(out / "export.json").inputs.call == "(rgb, depth)"
    command = ["compare", str(shrunk), str(out / "model.onnx"), *original, "--batch", "2"]
    capsys.readouterr()
    assert main([*command, "--data", f"{file}:data", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["inputs"]["tensors"][0]["shape"] == [2, 3, 8, 8]
    assert found["contenders"][1]["agreement"]["value"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--example", "3"], "--example must be a function of a Python file"),
        (["--example", "FILE:nothing"], "named 'nothing'"),
        (["--example", "FILE:a_list"], "Put a list into a tuple"),
        (
            ["--example", "FILE:by_keyword", "--batch", "3"],
            "--batch must be that of the example, 2",
        ),
        (["--example", "FILE:example", "--input-shape", "1,3,8,8"], "either --input-shape or"),
        ([], "for several inputs --example"),
    ],
)
def test_what_is_no_example_is_refused(file, capsys, arguments, message):
    given = [each.replace("FILE", str(file)) for each in arguments]
    assert main(["profile", f"{file}:rgb_depth", "--no-time", *given]) in {1, 2}
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["profile", "--input-shape", "1,3,8,8"], "--input-shape is the shape of one tensor, but"),
        (["explain", "x.png"], "explain needs a network that takes one tensor"),
        (["export", "--example", "FILE:example", "--data", "FILE:data"], "--data or --example"),
        (["export", "--precision", "int8", "--data", "FILE:data"], "Int8 needs a network that"),
    ],
)
def test_what_takes_one_tensor_says_what_to_do(file, shrunk, tmp_path, capsys, command, message):
    name, *more = (each.replace("FILE", str(file)) for each in command)
    more += ["--out", str(tmp_path / "o")] if name in {"export", "explain"} else []
    assert main([name, str(shrunk), *more, "--original", f"{file}:rgb_depth"]) in {1, 2}
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()
