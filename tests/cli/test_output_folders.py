"""Outputs are checked before the work, and requests to end are heeded."""

import json
import os
import signal
from pathlib import Path

import pytest

from onebyone.cli import main
from onebyone.core.records import RunRecord

COMMANDS = {
    "profile": ["profile", "net.py:fails"],
    "plan": ["plan", "net.py:fails", "--data", "digits"],
    "bench": ["bench", "net.py:fails"],
    "compare": ["compare", "net.py:fails", "net.py:fails", "--weights", "random"],
    "explain": ["explain", "net.py:fails", "x.png", "--weights", "random"],
    "export": ["export", "net.py:fails", "--weights", "random"],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a file in the way, and a network that is not to be made."""
    monkeypatch.chdir(tmp_path)
    Path("afile").write_text("mine")
    Path("net.py").write_text("def fails(): raise AssertionError('the work has begun')\n")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["afile", "afile/below", "n" * 300])
def test_an_output_that_cannot_be_written_is_said_before_the_work(command, place, capsys):
    assert main([*COMMANDS[command], "--out", place]) == 1
    err = capsys.readouterr().err
    assert "the work has begun" not in err
    assert "folder" in err
    assert Path("afile").read_text() == "mine"
    assert sorted(path.name for path in Path().iterdir()) == ["afile", "net.py"]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_other_output_goes_into_the_folder_of_a_run(command, capsys):
    Path("run").mkdir()
    for name in ("run.json", "plan.json", "model.safetensors"):
        Path("run", name).write_text("the run's")
    assert main([*COMMANDS[command], "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert "the work has begun" not in err
    assert "The output folder must " in err
    assert {path.read_text() for path in Path("run").iterdir()} == {"the run's"}


def test_a_report_that_cannot_be_written_is_said(capsys):
    Path("run.json").write_text("{}")
    assert main(["report", "run.json", "--out", "afile/page.html"]) == 1
    assert "Cannot make the folder" in capsys.readouterr().err


def test_a_request_to_end_is_an_interruption(capsys, monkeypatch):
    def ends(self, done, total, message=""):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("onebyone.pipeline.run.Run.tell", ends)
    before = signal.getsignal(signal.SIGTERM)
    command = ["train", "onebyone:classic", "--data", "digits", "--limit", "40", "--out", "run"]
    assert main([*command, "--epochs", "1", "--threads", "1"]) == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert "Resume the run with --out run --resume" in capsys.readouterr().err
    assert RunRecord.load("run/run.json").status.state == "interrupted"


def test_weights_that_were_drawn_are_said_to_be_random():
    command = ["train", "onebyone:classic", "--weights", "random", "--data", "digits", "--limit"]
    assert main([*command, "40", "--epochs", "1", "--threads", "1", "--out", "run"]) == 0
    assert json.loads(Path("run/run.json").read_text())["source"]["weights"] == "random"
    page = Path("run/report.html").read_text()
    assert "Weights of the original" in page
    assert "random" in page
