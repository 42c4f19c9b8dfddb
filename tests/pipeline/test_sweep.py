"""A sweep on an embedded Ray: failed trials are rows, and what has finished is not made again."""

import csv
import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from onebyone.cli import main
from onebyone.core.records import RunRecord, SweepRecord

NET = """
import torch
from torch import nn

def good():
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        ).eval()
"""
HOW = ["--data", "digits", "--limit", "32", "--calibration", "16", "--epochs", "0"]
COMMAND = ["sweep", "net.py:good", *HOW, "--budget", "macs=80%", "--budget", "macs=0.1%",
           "--threads", "1", "--out", "out"]  # fmt: skip


def write_net(seed=0, more=""):
    Path("net.py").write_text(NET.replace("SEED", str(seed)) + more)


def table():
    with Path("out/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Return the folder of a sweep of two trials, one of which asks for too much."""
    pytest.importorskip("ray", reason="Ray is not installed")
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ONEBYONE_CACHE", str(folder / "cache"))
        write_net()
        assert main(COMMAND) == 0
    return folder


@pytest.fixture
def here(swept, tmp_path, monkeypatch):
    """A copy of it, to go on with."""
    shutil.copytree(swept, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


@pytest.mark.usefixtures("here")
def test_a_trial_that_fails_is_a_row_with_its_error_and_the_others_go_on():
    first, second = table()
    assert (first["status"], second["status"]) == ("finished", "failed")
    assert "the least that these rewrites reach" in second["error"]
    record = RunRecord.load(f"out/trials/{first['trial']}/run.json")
    assert float(first["latency_after_ms"]) == record.after.latency["eager"].median_ms
    assert first["processor"] == record.machine.processor
    assert "1 of 2 trials finished" in Path("out/report.html").read_text()
    kept = SweepRecord.load("out/sweep.json")
    assert [trial.starts for trial in kept.trials] == [1, 1]


@pytest.mark.usefixtures("here")
def test_a_resumed_sweep_keeps_what_finished_and_tries_the_others(capsys):
    first = Path("out/trials", table()[0]["trial"], "run.json")
    before = first.read_bytes()
    sweep = json.loads(Path("out/sweep.json").read_text())
    # As if the command had been killed once the first run was there, before it was noted.
    sweep["trials"][0] |= {"state": "waiting", "seconds": None}
    Path("out/sweep.json").write_text(json.dumps(sweep))
    assert main([*COMMAND, "--resume", "--json"]) == 0
    kept = SweepRecord.from_json(capsys.readouterr().out)
    assert [trial.state for trial in kept.trials] == ["finished", "failed"]
    assert [trial.starts for trial in kept.trials] == [1, 2]
    assert first.read_bytes() == before


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "--seed", "1"], "was started with seed 0 instead of 1"),
        (["--resume", "--head", "keep"], "was started with head not given instead of keep"),
        ([], "has a sweep already. Go on with it by --resume"),
    ],
)
def test_another_sweep_is_not_gone_on_with(more, message, capsys):
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert main([*COMMAND, *more]) in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())
    after = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.usefixtures("here")
def test_a_sweep_with_another_network_is_not_gone_on_with(capsys):
    write_net(seed=1)
    assert main([*COMMAND, "--resume"]) == 2
    words = " ".join(capsys.readouterr().err.split())
    assert re.search("network or its weights of the finished trial 1-good-.* was another", words)


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(COMMAND) == 1
    assert "pip install 'onebyone[ray]'" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_address_without_a_cluster_is_told_at_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nothing listens there
        port = free.getsockname()[1]
        assert main([*COMMAND, "--address", f"127.0.0.1:{port}"]) == 2
    assert f"nothing answers at 127.0.0.1:{port}" in " ".join(capsys.readouterr().err.split())
    assert not Path("out").exists()
