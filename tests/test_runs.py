"""Runs are loaded again: from any folder, and with the original that they were made from."""

import pytest
import torch
from torch.testing import assert_close

import onebyone as obo
from onebyone.data import Data, TensorSplit
from onebyone.errors import OptionError, WeightsError
from onebyone.models import save_weights
from onebyone.pipeline import TrainSettings, train_loaded
from onebyone.records import ModelSource
from onebyone.runs import load_original

NET = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 6 * 8, 3))
"""


def data():
    images = torch.randint(0, 256, (80, 3, 6, 8), dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(80) % 3)
    return Data(name="d", train=split, validation=split, test=split, classes=("a", "b", "c"))


def shrink(spec, out, **options):
    return obo.shrink(
        spec, data(), budget="macs=70%", epochs=0, out=out, calibration_examples=32, head="keep",
        **options,
    )  # fmt: skip


@torch.no_grad()
def test_a_run_is_loaded_from_another_folder_than_it_was_started_in(tmp_path, monkeypatch):
    torch.manual_seed(0)
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (here / "net.py").write_text(NET)
    monkeypatch.chdir(here)
    small, _ = shrink("net.py:make", "runs/one")
    smaller, _ = shrink("runs/one", "runs/two")
    images = torch.randn(2, 3, 6, 8)
    monkeypatch.chdir(elsewhere)
    assert_close(obo.load_model(here / "runs" / "one")(images), small(images))
    assert_close(obo.load_model("../here/runs/two")(images), smaller(images))
    assert_close(load_original("../here/runs/two")(images), small(images))


@torch.no_grad()
def test_the_original_needs_its_weights_where_the_run_has_only_their_name(tmp_path):
    torch.manual_seed(0)
    network = obo.load_model("onebyone:convolution-only")
    save_weights(network, tmp_path / "w.safetensors")
    images = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(60) % 10)
    obo.shrink(
        "onebyone:convolution-only", Data(name="d", train=split, validation=split, test=split),
        weights=tmp_path / "w.safetensors", budget="macs=80%", epochs=0, out=tmp_path / "run",
        calibration_examples=32,
    )  # fmt: skip
    with pytest.raises(WeightsError, match=r"w\.safetensors, are not in the run"):
        load_original(tmp_path / "run")
    again = load_original(tmp_path / "run", weights=tmp_path / "w.safetensors")
    example = torch.randn(2, 1, 28, 28)
    assert_close(again(example), network(example))


def test_the_original_of_a_run_from_memory_must_be_given(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    network = obo.load_model(f"{tmp_path / 'net.py'}:make")
    shrink(network, tmp_path / "run")
    with pytest.raises(OptionError, match="made from a module in memory"):
        load_original(tmp_path / "run")
    network.train()
    again = load_original(tmp_path / "run", original=network)
    assert_close(again.state_dict(), network.state_dict())
    assert network.training
    assert not again.training


def test_the_weights_of_a_training_do_not_get_into_the_network_that_is_handed_over(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    network = obo.load_model(f"{tmp_path / 'net.py'}:make")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    source = ModelSource(name="net", spec=None)
    trained, _ = train_loaded(
        network, source, data(), TrainSettings(epochs=1, out=tmp_path / "run")
    )
    again = obo.load_model(tmp_path / "run", original=network)
    assert_close(again.state_dict(), trained.state_dict())
    assert_close(network.state_dict(), before)
