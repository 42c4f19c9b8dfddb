"""Every command and code block of the tutorials and of the README is executed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from onebyone.cli import main, make_parser

# Whole tutorials: minutes each on a busy machine.
pytestmark = pytest.mark.timeout(2400)

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r'^```(\w+)?(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture
def _home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ONEBYONE_CACHE", str(tmp_path / "cache"))
    for name in ("net", "data"):
        sys.modules.pop(name, None)
    yield
    for name in ("net", "data"):
        sys.modules.pop(name, None)


def smaller(words):
    """Return a command with less to compute: few pictures, narrow networks, two runtimes."""
    changed = [{"200": "40", "300": "60", "400": "120"}.get(word, word) for word in words]
    if "onebyone:plain" in words:
        changed += ["--model-option", "width=4"]
    if "bench" in words and "--runtime" not in words:
        changed += ["--runtime", "eager", "--runtime", "onnxruntime"]
    return changed


def command(line):
    """Run a line of a block as a shell does."""
    words = smaller(shlex.split(line, comments=True))
    if words[:1] == ["onebyone"]:
        status = main(words[1:])
        assert status == 0, line
    elif words[:1] == ["python"]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        subprocess.run([sys.executable, *words[1:]], check=True, env=environment)
    else:
        assert words[:2] == ["pip", "install"], f"a test does not know how to run {line!r}"
        assert re.fullmatch(r"onebyone(\[\w+\])?", words[2]), line


@pytest.mark.usefixtures("_home")
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_block_of_a_tutorial_runs(path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if "openvino" in path.read_text(encoding="utf-8"):
        pytest.importorskip("openvino", reason="openvino is not installed")
    names = {}
    text = path.read_text(encoding="utf-8")
    for number, fewer in ((200, 40), (300, 60)):
        text = text.replace(f"limit={number}", f"limit={fewer}")
    text = text.replace("range(400)", "range(120)")
    for kind, title, body in BLOCK.findall(text):
        if title:
            Path(title).write_text(body, encoding="utf-8")
        elif kind == "python":
            exec(compile(body, path.name, "exec"), names)
        else:
            assert kind == "bash", body
            for line in body.splitlines():
                command(line)


def test_no_tutorial_is_left_out_of_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in TUTORIALS:
        assert f"tutorials/{path.name}" in text


# ---------------------------------------------------------------- the README

NETWORK = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(432, 4),
    )
"""
PICTURES = """
import torch

def load():
    images = torch.randn(60, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(60) % 4
"""
# What takes minutes, or is another test's: the demo, the article, a sweep, a larger network.
PARSED_ONLY = ("demo", "article", "train", "doctor", "sweep")


@pytest.fixture
def _small_world(_home):
    """Make a network, weights, data and a picture as small as can be."""
    import torch
    from PIL import Image

    from onebyone.networks.zoo import build, save_weights

    Path("net.py").write_text(NETWORK)
    Path("data.py").write_text(PICTURES)
    Image.new("RGB", (12, 12), (90, 20, 200)).save("photo.png")
    torch.manual_seed(0)
    save_weights(build("net.py:make"), "net.safetensors")


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def readme_commands():
    """Return the commands of the README's table, in its order."""
    return re.findall(r"`(onebyone [^`]+)`", readme())


def small(line, number):
    """Return a README's command for the small world; each run has a folder of its own."""
    words = shlex.split(line.replace("DATA", "data.py:load").replace("NET", "net.py:make"))
    if "net.py:make" in words:
        words += ["--weights", "net.safetensors"]
        words += ["--weights", "-"] if words[1] == "compare" else []
    if words[1] in ("profile", "bench"):
        words += ["--input-shape", "1,3,12,12"]
    if "runs/x" in words and "--out" not in words[:-1]:
        words += ["--original", "net.py:make"] if words[1] != "report" else []
    elif words[1] == "shrink":
        words[words.index("--out") + 1] += "" if number == 0 else f"-{number}"
        words += ["--epochs", "1"] + (["--closest"] if "--max-drop" not in words else [])
    if words[1] == "export" and "runs/x" in words:
        words += ["--original", "net.py:make", "--data", "data.py:load"]
    if words[1] == "explain":
        words += ["--out", "why", "--mean", "0,0,0", "--std", "1,1,1"]
    return shlex.join(words)


@pytest.mark.usefixtures("_small_world")
def test_every_command_of_the_readme_runs():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    parser = make_parser()
    for number, line in enumerate(readme_commands()):
        words = shlex.split(line)[1:]
        if words[0] in PARSED_ONLY or words[0].startswith("--"):
            if not words[0].startswith("--"):
                parser.parse_args(words)
            continue
        command(small(line, number))


@pytest.mark.usefixtures("_small_world")
def test_the_python_of_the_readme_runs():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    import onebyone as obo

    (body,) = [body for kind, _, body in BLOCK.findall(readme()) if kind == "python"]
    body = body.replace("timm:resnet18", "net.py:make").replace("resnet18.safe", "net.safe")
    body = body.replace("224, 224", "12, 12").replace("budget=", "closest=True, budget=")
    body = body.replace('closest=True, budget="macs', 'budget="macs')
    data = obo.load_data("data.py:load")
    exec(compile(body, "README.md", "exec"), {"data": data, "calibration": data.train})


def test_other_blocks_of_the_readme_are_known():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for kind, _, body in BLOCK.findall(readme()):
        lines = [line for line in body.splitlines() if line]
        if kind == "python" or "─" in body:
            continue
        for line in lines:
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
            elif words[0] == "onebyone":
                make_parser().parse_args(words[1:])
            else:
                assert words[:2] == ["pip", "install"], line
