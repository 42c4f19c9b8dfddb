"""Any command line ends with 0, 1 or 2 and a line of words: never a fault of ours."""

import contextlib
import io
import os
from pathlib import Path

import pytest
from cases import some
from hypothesis import example, given
from hypothesis import strategies as st

from onebyone.cli import COMMANDS, main

NET = """
import torch
from torch import nn
def tiny():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(72, 3)).eval()
def fails(): raise AssertionError
def leaves(): raise SystemExit(3)
def no_module(): return 3
class Stops(nn.Module):
    def forward(self, x): return x / (1 // 0)
def stops(): return nn.Sequential(nn.Conv2d(1, 2, 3), Stops())
def nothing(): return nn.Sequential()
VALUE = 3
"""
DATA = """
import torch
def images(n=6):
    return torch.arange(n * 64.0).sin().reshape(n, 1, 8, 8), torch.arange(n) % 3
def good(): return images(), images(), images()
def none(): return None
def floats(): return tuple((x, y / 2) for x, y in good())
def fails(): raise KeyError("no")
def empty(): return tuple((x[:0], y[:0]) for x, y in good())
"""

SPECS = [
    "net.py:tiny", "net.py:tiny", "net.py:fails", "net.py:leaves", "net.py:no_module",
    "net.py:stops", "net.py:nothing", "net.py:VALUE", "net.py:", "net.py", "broken.py:make",
    "missing.py:make", "onebyone:classic", "onebyone:", "onebyone:clasic", "torchvision:resnet81",
    "timm:", ":", "", "folder", "n" * 300, "n" * 300 + ".py:make", "page.html", "run", "torn", "a/b",
]  # fmt: skip
DATAS = [
    "data.py:good", "data.py:good", "data.py:none", "data.py:floats", "data.py:fails",
    "data.py:empty", "data.py:", "digts", "imagefolder:", "imagefolder:folder", "imagefolder:nowhere",
    "", ":", "imagefolder:" + "n" * 300,
]  # fmt: skip
WORDS = [
    "0", "1", "-1", "1.5", "nan", "inf", "9" * 23, "9" * 5000, "99999999", "50%", "150%", "-3%", "",
    "macs=50%", "params=2%", "latency=5ms", "macs=" + "9" * 400, "macs", "gap", "auto", "1,1,8,8",
    "8x8", "1,1,8", "28x28x28x28x28", "1,7,8,8", "0x0", "cpu", "cuda", "gpu", "meta", "eager",
    "packed", "eagr", "eager:bf16", ":", "random", "pretrained", "net.py", "weights.pt", "page.html",
    "folder", "missing/below", "n" * 300, "0.5", "0.5,0.5", "conv", "0", "2", "accuracy", "acuracy",
    "net.py:tiny", "num_classes=3", "=", "a=b", "onnx", "safetensors", "tucker2", "../..", "/proc/x",
    "é", "\u202e", "--", "-h", "-", "@net.py",
]  # fmt: skip
OPTIONS = [
    "--weights", "--model-option", "--limit", "--runtime", "--threads", "--batch", "--device",
    "--metric", "--out", "--json", "--seed", "--budget", "--fastest", "--head", "--leave",
    "--calibration", "--ranks", "--form", "--input-shape", "--front", "--rounds", "--top", "--layer",
    "--mean", "--std", "--size", "--classes", "--format", "--overwrite", "--resume", "--epochs",
    "--rate", "--mix", "--max-drop", "--label-weight", "--plan", "--original-weights", "--help",
    "--reconstruct", "--only-faster", "--no-capture", "--batch-size", "--weigths",
]  # fmt: skip
# What each command needs, and what keeps it short where all is well.
NEEDS = {
    "profile": [[], ["--no-time"]],
    "plan": [["--ranks", "50%"], ["--data"]],
    "export": [["--format", "safetensors", "--out", "e"]],
    "report": [[]],
    "explain": [["page.html"]],
}


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory):
    place = tmp_path_factory.mktemp("commands")
    before = Path.cwd()
    os.chdir(place)
    Path("net.py").write_text(NET)
    Path("data.py").write_text(DATA)
    Path("broken.py").write_text("def make(:\n")
    Path("page.html").write_text("<p>")
    Path("weights.pt").write_bytes(b"\x80\x02garbage")
    Path("folder").mkdir()
    for name, text in (("run", "{}"), ("torn", "[" * 100_000)):
        Path(name).mkdir()
        Path(name, "run.json").write_text(text)
    yield
    os.chdir(before)


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from(sorted(NEEDS)))
    words = [command, draw(st.sampled_from(SPECS))]
    need = draw(st.sampled_from(NEEDS[command]))
    words += need
    if need == ["--data"]:
        words.append(draw(st.sampled_from(DATAS)))
        if draw(st.booleans()):
            # A plan that is made takes seconds: here it ends at the budget or before.
            words += ["--budget", draw(st.sampled_from(["macs=0", "mac=5%", "macs=1e", "x"]))]
        else:
            words += ["--limit", "0"]
    if command == "profile" and "--no-time" not in words:
        words += ["--no-time", "--input-shape", draw(st.sampled_from(WORDS))]
    for _ in range(draw(st.integers(0, 3))):
        words.append(draw(st.sampled_from(OPTIONS)))
        if draw(st.integers(0, 4)):
            words.append(draw(st.sampled_from(WORDS)))
    return words


def ends_in_words(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    said = err.getvalue()
    assert status in (0, 1, 2), said
    assert "Traceback" not in said
    if status:
        assert said.startswith(("Error: ", "usage: ")), said
        assert len(said) < 3000
    return status


@some(dearer=4)
@given(command_lines())
@example(["profile", "net.py:tiny", "--no-time", "--input-shape", "8x8"])
@example(["plan", "net.py:tiny", "--ranks", "50%", "--input-shape", "1,1,8,8"])
@example(["profile", "net.py:leaves"])
@example(["profile", "net.py:stops", "--no-time", "--input-shape", "8x8"])
@example(["report", "torn"])
@example(["report", "run"])
@example(["explain", "run", "page.html"])
def test_command_lines(words):
    ends_in_words(words)


@some()
@example(["9" * 5000])
@example(["profile", "9" * 5000, "9" * 5000])
@given(st.lists(st.sampled_from([*COMMANDS, *OPTIONS, *WORDS]) | st.text(max_size=6), max_size=5))
def test_words_in_any_order(words):
    if words[:1] and words[0] in COMMANDS:
        words = [words[0], "--nothing-such", *words[1:]]  # it is to be read, not to be run
    ends_in_words(words)
