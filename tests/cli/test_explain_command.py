"""``onebyone explain`` and ``onebyone compare`` as a user meets them."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from onebyone.cli import COMMANDS, main
from onebyone.core.compared import Compared
from onebyone.explaining import Explanation
from onebyone.networks.zoo import classic, save_weights


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_weights(classic(), tmp_path / "w.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")


CLASSIC = ["onebyone:classic", "--weights", "w.safetensors"]


def test_explain_writes_a_page_and_says_where(tmp_path, capsys):
    assert main(["explain", *CLASSIC, "cat.png", "--data", "digits", "--top", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Grad-CAM" in out
    assert "Page: runs/explain-classic/explain.html" in out
    assert max(map(len, out.splitlines())) <= 80
    record = Explanation.load("runs/explain-classic/explain.json")
    assert record.command[:2] == ("onebyone", "explain")
    assert len(record.images[0].classes) == 2
    for each in record.images[0].classes:
        assert (tmp_path / "runs" / "explain-classic" / each.file).exists()


def test_explain_prints_json_and_nothing_else(capsys):
    command = ["explain", *CLASSIC, "cat.png", "--mean", "0.3", "--std", "0.3", "--json"]
    assert main([*command, "--out", "e", "--layer", "features.conv2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    record = Explanation.from_json(out)
    assert record == Explanation.load("e/explain.json")
    assert record.images[0].layer.shape == (64, 14, 14)
    assert record.preparation.mean == (0.3,)


BAD = {
    "no weights": (["onebyone:classic", "cat.png"], 1, "needs trained weights"),
    "unknown preparation": ([*CLASSIC, "cat.png"], 2, "give the data|Give the data"),
    "no such picture": ([*CLASSIC, "no.png", "--data", "digits"], 1, r"no\.png does not exist"),
    "no picture": (
        [*CLASSIC, "w.safetensors", "--data", "digits"],
        1,
        "w.safetensors is not a picture in a supported format",
    ),
    "no layer": ([*CLASSIC, "cat.png", "--data", "digits", "--layer", "x"], 2, "No layer named"),
    "top 0": ([*CLASSIC, "cat.png", "--top", "0"], 2, "--top: must be 1 or more, got 0"),
    "mean": ([*CLASSIC, "cat.png", "--mean", "a,b"], 2, "a number or one for each channel"),
    "size": ([*CLASSIC, "cat.png", "--size", "1x2x3"], 2, "such as 64 or 48x64"),
    "classes": ([*CLASSIC, "cat.png", "--data", "digits", "--classes", "no.txt"], 2, "no.txt"),
    "foreign folder": ([*CLASSIC, "cat.png", "--data", "digits", "--out", "."], 1, "other files"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(case, capsys, tmp_path):
    arguments, status, message = BAD[case]
    there = sorted(path.name for path in tmp_path.iterdir())
    assert main(["explain", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err)
    assert sorted(path.name for path in tmp_path.iterdir()) == there


METRIC = (
    "from neighbor_of_metric import SIGN\n"
    "def close(outputs, targets):\n"
    "    return SIGN * (outputs - targets).square().flatten(1).mean(1)\n"
)
DATA = (
    "import torch\n"
    "def noisy():\n"
    "    clean = torch.rand(40, 1, 8, 10, generator=torch.Generator().manual_seed(0))\n"
    "    return (clean + 0.1, clean), (clean + 0.2, clean)\n"
)
NET = (
    "import torch\nfrom torch import nn\n"
    "def make(width=2):\n"
    "    torch.manual_seed(width)\n"
    "    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 1))\n"
    "def wide(): return make(5)\n"
    "def wider(): return make(7)\n"
)


def test_networks_that_are_no_classifiers_are_compared_by_a_files_metric(tmp_path, capsys):
    files = {"m.py": METRIC, "d.py": DATA, "n.py": NET, "neighbor_of_metric.py": "SIGN = -1\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = ["compare", "n.py:make", "n.py:wide", "n.py:wider", "--data", "d.py:noisy"]
    assert main([*command, "--metric", "m.py:close", "--threads", "1", "--out", "c"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "sign-flip test" in out
    assert max(map(len, out.splitlines())) <= 80
    record = Compared.load("c/compare.json")
    assert [each.name for each in record.contenders] == ["make", "wide", "wider"]
    assert record.first.measured.metric.name == "close"
    assert (tmp_path / "c" / "report.html").read_text().startswith("<!doctype html>")


def test_networks_of_one_name_are_told_apart_by_where_they_are_from(capsys):
    other = ["onebyone:classic", "onebyone:classic", "--weights", "random", "--threads", "1"]
    assert main(["compare", *other, "--json"]) == 0
    names = [each.name for each in Compared.from_json(capsys.readouterr().out).contenders]
    assert names == ["onebyone:classic", "onebyone:classic (2)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["onebyone:classic"], "required: B"),
        (["onebyone:classic"] * 3 + ["--weights", "a", "--weights", "b"], "3 times, once for each"),
        (["onebyone:classic"] * 2 + ["--weights", "-"], "needs trained weights"),
        (["onebyone:classic"] * 2 + ["--weights", "random", "--out", "."], "other files"),
    ],
)
def test_a_comparison_that_cannot_be_meant_is_refused(arguments, message, capsys):
    assert main(["compare", *arguments]) in (1, 2)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_terminal(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*([command] if command else []), "--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= columns


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_an_example_is_broken_between_options_and_not_before_a_value(
    command, columns, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*([command] if command else []), "--help"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert not re.search(r" --\S+ \\$", line)
