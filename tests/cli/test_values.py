"""Values of arguments: what is meant is taken, and what cannot be meant is said before any work."""

import ctypes
import json
import os
from pathlib import Path

import pytest

from onebyone.cli import main

NET = """
from torch import nn
def pictures():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
def vectors():
    return nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 2))
def nested():
    return nn.Sequential(nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 3)})["conv1"])
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)


def refused(capsys, *arguments):
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return " ".join(err.split())


@pytest.mark.parametrize(
    ("net", "given", "shape"),
    [
        ("pictures", "28x20", [1, 3, 28, 20]),
        ("pictures", "2,3,28,20", [2, 3, 28, 20]),
        ("pictures", "2x3x28x20", [2, 3, 28, 20]),
        ("vectors", "5,7", [5, 7]),
    ],
)
def test_height_and_width_alone_are_taken_where_the_rest_is_known(net, given, shape, capsys):
    run = ["profile", f"net.py:{net}", "--no-time", "--json", "--input-shape", given]
    assert main(run) == 0
    assert json.loads(capsys.readouterr().out)["inputs"]["tensors"][0]["shape"] == shape


def test_a_picture_without_its_batch_is_taken_where_the_network_is_known(capsys):
    run = ["profile", "onebyone:classic", "--no-time", "--json", "--batch", "2"]
    assert main([*run, "--input-shape", "1,28,28"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"]["tensors"][0]["shape"] == [2, 1, 28, 28]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-shape", "28x28"], "28x28 is a height and a width, .* Write 1,CHANNELS,28,28."),
        (["--input-shape", "1,one"], "batch, channels, height, width, such as 1,3,224,224; got '1,one'"),
        (["--input-shape", "1," + "9" * 400], "must be sizes of at most 1,000,000"),
        (["--input-shape", "1,-3,8,8"], "batch, channels, height, width"),
        (["--batch", "99999999"], "--batch: must be at most 65,536, got 99999999."),
        (["--batch", "9" * 5000], "must be a whole number, got '999"),
        (["--batch", "0"], "--batch: must be 1 or more, got 0"),
        (["--batch", "1.5"], "--batch: must be a whole number, got '1.5'"),
        (["--threads", "1000000"], "--threads: must be at most 1,024"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said(arguments, message, capsys):
    words = refused(capsys, "profile", "net.py:vectors", "--no-time", *arguments)
    for part in message.split(" .* "):
        assert part in words
    assert len(words) < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1" * 23], "--seed: must be at most 4,294,967,295, got 11111111111111111111111"),
        (["--seed", "-1"], "--seed: must be 0 or more, got -1"),
        (["--rate", "nan"], "--rate: must be a finite number, got nan"),
        (["--rate", "0"], "--rate: must be above 0"),
        (["--label-weight", "2"], "--label-weight: must be at most 1"),
        (["--mix", "much"], "--mix: must be a number, got 'much'"),
        (["--max-drop", "-1"], "--max-drop: must be 0 or more"),
        (["--epochs", "1000000000"], "--epochs: must be at most 1,000,000"),
        (["--head", "gapp"], "invalid choice: 'gapp'"),
    ],
)  # fmt: skip
def test_settings_of_a_run_are_read_before_anything_else(arguments, message, capsys):
    words = refused(capsys, "shrink", "net.py:missing", "--data", "nowhere", *arguments)
    assert message in words


def test_a_module_with_a_slip_is_suggested(capsys):
    run = ["plan", "torchvision:squeezenet1_1", "--ranks", "50%", "--leave", "feature.0"]
    assert "no module named 'feature.0'. Did you mean 'features.0'" in refused(capsys, *run)
    run = ["plan", "net.py:pictures", "--ranks", "50%", "--input-shape", "8x8", "--leave", "body"]
    assert "no module named 'body'. Its modules are 0, 1, 2, 3, and" in refused(capsys, *run)


@pytest.mark.parametrize("command", ["profile", "bench", "plan", "explain", "export"])
def test_a_folder_that_cannot_be_made_is_said_before_any_work(command, capsys):
    Path("afile").write_text("mine")
    more = {"explain": ["cat.png"], "plan": ["--data", "nowhere"]}.get(command, [])
    for out, message in (
        ("afile", "The output must be a folder, but afile is a file"),
        ("afile/inside", "Error: Cannot"),
        ("n" * 300, "File name too long"),
    ):
        assert main([command, "net.py:missing", *more, "--out", out]) == 1
        words = " ".join(capsys.readouterr().err.split())
        assert message in words
    assert Path("afile").read_text() == "mine"


@pytest.mark.parametrize("name", ["weights", "original"])
def test_an_option_that_has_a_flag_of_its_own_is_not_mistaken_for_it(name, capsys):
    words = refused(capsys, "profile", "net.py:pictures", "--model-option", f"{name}=x")
    assert f"--model-option {name} would be taken for --{name}" in words


def test_an_option_with_two_values_is_refused(capsys):
    given = ["--model-option", "a=1", "--model-option", "a=2"]
    assert "a is given twice" in refused(capsys, "profile", "net.py:pictures", *given)


@pytest.mark.parametrize("name", ["spec", "path", "function", "raises", "name", "options"])
def test_a_factory_may_name_its_options_as_it_likes(name, capsys):
    Path("named.py").write_text(
        f"from torch import nn\ndef make({name}):\n    return nn.Linear(7, {name})\n"
    )
    run = ["profile", "named.py:make", "--no-time", "--json", "--input-shape", "1,7"]
    assert main([*run, "--model-option", f"{name}=5"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == 35


@pytest.mark.parametrize("label", ["9" * 20, "x", "1.5"])
def test_a_label_that_no_data_can_have_is_refused(label, capsys):
    given = ["--data", "digits", "--ignore-index", label]
    words = refused(capsys, "train", "net.py:pictures", *given)
    assert "--ignore-index: must be " in words


def test_a_task_with_a_slip_is_suggested(capsys):
    given = ["--data", "digits", "--task", "regresion"]
    words = refused(capsys, "train", "net.py:pictures", *given)
    assert "No task named 'regresion'. Did you mean 'regression'" in words


def test_what_the_network_prints_does_not_get_into_the_json(capsys):
    Path("prints.py").write_text(
        "print('hello')\n" + NET + "\nclass Loud(nn.Linear):\n"
        "    def forward(self, x):\n        print('loud')\n        return super().forward(x)\n"
        "def loud():\n    print('made')\n    return nn.Sequential(Loud(7, 5))\n"
    )
    run = ["profile", "prints.py:loud", "--no-time", "--json", "--input-shape", "1,7"]
    assert main(run) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["macs"] == 35
    assert {"hello", "made", "loud"} <= set(printed.err.split())


@pytest.mark.skipif(os.name != "posix", reason="C's buffer cannot be emptied from here")
def test_what_c_code_prints_does_not_get_into_the_json(capfd):
    Path("prints.py").write_text(
        "import ctypes, os\n" + NET + "\nclass Loud(nn.Linear):\n"
        "    def forward(self, x):\n        os.write(1, b'written ')\n"
        "        ctypes.CDLL(None).printf(b'buffered ')\n        return super().forward(x)\n"
        "def loud():\n    return nn.Sequential(Loud(7, 5))\n"
    )
    run = ["profile", "prints.py:loud", "--no-time", "--json", "--input-shape", "1,7"]
    assert main(run) == 0
    ctypes.CDLL(None).printf(b"after")
    ctypes.CDLL(None).fflush(None)
    printed = capfd.readouterr()
    assert json.loads(printed.out.removesuffix("after"))["macs"] == 35
    assert printed.out.endswith("after")
    assert {"written", "buffered"} <= set(printed.err.split())
