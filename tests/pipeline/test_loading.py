"""Runs are loaded again: from any folder, and with the original that they were made from."""

import shutil

import pytest
import torch
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.errors import OptionError, RecordError, UnknownNameError, WeightsError
from onebyone.core.records import ModelSource, Status
from onebyone.core.settings.runs import TrainRunSettings
from onebyone.data import Data, TensorSplit
from onebyone.networks.zoo import save_weights
from onebyone.pipeline.loading import load_original
from onebyone.pipeline.train import train_loaded

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
def test_a_run_needs_no_other_folder_than_its_own(tmp_path, monkeypatch):
    torch.manual_seed(0)
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    small, _ = shrink("net.py:make", "runs/one")
    smaller, _ = shrink("runs/one", "runs/two", original="net.py:make")
    images = torch.randn(2, 3, 6, 8)
    shutil.copytree("runs/two", "elsewhere")
    shutil.rmtree("runs")
    named = {"original": "net.py:make"}
    assert_close(obo.load_model("elsewhere", **named)(images), smaller(images))
    assert_close(load_original("elsewhere", **named)(images), small(images))


@torch.no_grad()
def test_a_run_of_a_run_of_a_library_network_needs_nothing_named(tmp_path):
    images = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(60) % 10)
    d = Data(name="d", train=split, validation=split, test=split)
    common = {"epochs": 0, "calibration_examples": 32}
    network = obo.load_model("onebyone:classic", in_channels=1)
    save_weights(network, tmp_path / "w.safetensors")
    obo.shrink(
        "onebyone:classic", d, weights=tmp_path / "w.safetensors", budget="params=50%",
        out=tmp_path / "one", **common,
    )  # fmt: skip
    (tmp_path / "w.safetensors").unlink()
    small, _ = obo.shrink(tmp_path / "one", d, budget="params=90%", out=tmp_path / "two", **common)
    example = torch.randn(2, 1, 28, 28)
    assert_close(load_original(tmp_path / "one")(example), network(example))
    (tmp_path / "one").rename(tmp_path / "moved")
    assert_close(obo.load_model(tmp_path / "two")(example), small(example))


def test_other_weights_than_the_originals_are_refused(tmp_path):
    network = obo.load_model("onebyone:convolution-only")
    save_weights(network, tmp_path / "w.safetensors")
    torch.manual_seed(1)
    save_weights(obo.load_model("onebyone:convolution-only"), tmp_path / "other.safetensors")
    images = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(60) % 10)
    obo.shrink(
        "onebyone:convolution-only", Data(name="d", train=split, validation=split, test=split),
        weights=tmp_path / "w.safetensors", budget="macs=80%", epochs=0, out=tmp_path / "run",
        calibration_examples=32,
    )  # fmt: skip
    again = load_original(tmp_path / "run", weights=tmp_path / "w.safetensors")
    assert_close(again.state_dict(), network.state_dict())
    with pytest.raises(WeightsError, match=r"made from other weights than those in .*other"):
        load_original(tmp_path / "run", weights=tmp_path / "other.safetensors")
    (tmp_path / "run" / "original.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"w\.safetensors, are not in the run"):
        load_original(tmp_path / "run")


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
        network, source, data(), TrainRunSettings(epochs=1, out=tmp_path / "run")
    )
    again = obo.load_model(tmp_path / "run", original=network)
    assert_close(again.state_dict(), trained.state_dict())
    assert_close(network.state_dict(), before)


def test_a_run_is_named_by_its_folder(tmp_path):
    with pytest.raises(RecordError, match=r"named by its folder: give .*a in place of"):
        obo.load_model(tmp_path / "a" / "run.json")


def test_a_name_too_long_for_a_path_is_no_network():
    with pytest.raises(UnknownNameError, match="No library of models named"):
        obo.load_model("x" * 5000 + ":y")


@pytest.mark.parametrize(
    ("state", "message"),
    [("interrupted", "did not finish .interrupted at 'plan'.*--resume"), ("finished", "copy all")],
)
def test_a_run_without_weights_says_why(tmp_path, state, message):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 28, 28), dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(60) % 10)
    d = Data(name="d", train=split, validation=split, test=split)
    out = tmp_path / "run"
    _, record = obo.shrink("onebyone:classic", d, budget="macs=70%", epochs=0, out=out,
                           calibration_examples=32)  # fmt: skip
    record.with_(status=Status(state=state, stage="plan")).save(out / "run.json")
    (out / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=message):
        obo.load_model(out)
