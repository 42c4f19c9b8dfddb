"""The code that a report gives is run as it stands."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import torch
from parsed_page import Page
from run_records import run_record
from torch import nn

import onebyone as obo
from onebyone.cli import main
from onebyone.networks.zoo import classic, save_weights
from onebyone.report.html import render_run


def codes(record):
    return [code.text for code in Page(render_run(record)).find("code") if "<pre" not in code.text]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small run as the command line makes it, and the folder that it was made in."""
    folder = tmp_path_factory.mktemp("used")
    torch.manual_seed(0)
    save_weights(classic(), folder / "w.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = "shrink onebyone:classic --weights w.safetensors --data digits --limit 60 --budget params=30% --epochs 0 --calibration 48 --out runs/a"
        assert main([*words.split(), "--threads", "1", "--json"]) == 0
    return folder


def test_the_code_of_a_report_loads_the_network_and_applies_the_plan(made, monkeypatch):
    monkeypatch.chdir(made)
    load, deploy, apply, _, again = codes(obo.RunRecord.load("runs/a/run.json"))
    names: dict = {}
    exec(load, names)
    loaded = names["net"]
    exec(apply, names)
    assert isinstance(names["small"], nn.Module)
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(names["small"].eval()(x), loaded(x))
    assert main(shlex.split(deploy)[1:]) == 0
    assert Path("exports/a/model.onnx").exists()
    install, command = again.splitlines()
    assert install.startswith(f"pip install onebyone=={obo.__version__} torch==")
    assert command.startswith("onebyone shrink onebyone:classic --weights w.safetensors")


def test_a_network_of_a_run_is_loaded_with_the_weights_of_its_folder():
    record = run_record()
    source = dataclasses.replace(record.source, spec="runs/classic", weights="model.safetensors")
    assert 'obo.load_model("runs/classic")' in codes(record.with_(source=source))[2]


def test_a_network_made_in_memory_is_asked_for():
    record = run_record()
    source = dataclasses.replace(record.source, spec=None)
    load, apply, *_ = codes(record.with_(source=source, command=(), folder="runs/x"))
    assert 'obo.load_model("runs/x", original=original)' in load
    assert "net = ...  # the original resnet20-cifar10" in apply
