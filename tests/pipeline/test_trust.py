"""A record from anywhere decides neither which code is run nor which file is opened."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import onebyone as obo
from onebyone.cli import main
from onebyone.core.errors import OneByOneError, OptionError, RecordError
from onebyone.core.records import ModelSource, Origin, RunRecord
from onebyone.data import Data, TensorSplit
from onebyone.networks.zoo import save_weights

EVIL = """
from pathlib import Path
Path(__file__).with_name("executed").write_text("")
from onebyone.networks.zoo import classic
def make():
    return classic()
def data():
    return None
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run of a library's network."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    images = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(40) % 10)
    data = Data(name="d", train=split, validation=split, test=split)
    torch.manual_seed(0)
    network = obo.load_model("onebyone:classic")
    save_weights(network, folder.parent / "w.safetensors")
    obo.shrink(
        "onebyone:classic", data, weights=folder.parent / "w.safetensors", budget="params=50%",
        epochs=0, out=folder, calibration_examples=32,
    )  # fmt: skip
    return folder


@pytest.fixture
def stranger(run, tmp_path):
    """Return a function that gives that run with another source in its record."""
    (tmp_path / "evil.py").write_text(EVIL)

    def made(**source):
        folder = tmp_path / "stranger"
        shutil.copytree(run, folder)
        record = RunRecord.load(folder / "run.json")
        record.with_(source=ModelSource(name="classic", **source)).save(folder / "run.json")
        shutil.copy(tmp_path / "evil.py", folder / "evil.py")
        return folder

    return made


def executed(folder):
    return [str(path) for path in folder.parent.rglob("executed")]


SPECS = {
    "beside the run": {"spec": "evil.py:make"},
    "above the run": {"spec": "../evil.py:make"},
    "in the run": {"spec": "stranger/evil.py:make"},
    "of a run": {"spec": "runs/a", "origin": Origin(spec="evil.py:make")},
    "of a library": {"spec": "timm:hf-hub:stranger/evil"},
    "of a folder": {"spec": "timm:local-dir:evil"},
    "of a path": {"spec": "timm:../evil"},
}


@pytest.mark.parametrize("source", SPECS.values(), ids=SPECS.keys())
def test_no_record_has_code_executed(stranger, monkeypatch, source):
    folder = stranger(**source)
    monkeypatch.chdir(folder.parent)
    spec = source.get("origin", Origin(spec=source["spec"])).spec
    with pytest.raises(OptionError, match=f"--original {spec.replace('.', '[.]')}"):
        obo.load_model(folder)
    assert executed(folder) == []


def test_a_run_within_a_run_is_not_opened(stranger, run, monkeypatch):
    folder = stranger(spec=str(run))
    with pytest.raises(OptionError, match="does not decide"):
        obo.load_model(folder)


def test_a_link_to_a_python_file_changes_nothing(stranger, monkeypatch):
    folder = stranger(spec="net.py:make")
    (folder.parent / "net.py").symlink_to(folder / "evil.py")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(OptionError, match=r"--original net\.py:make"):
        obo.load_model(folder)
    assert executed(folder) == []


@pytest.mark.parametrize(
    "command",
    [
        ["profile", "stranger", "--no-time"],
        ["compare", "stranger", "stranger", "--data", "digits", "--limit", "20"],
        ["explain", "stranger", "x.png"],
        ["export", "stranger", "--format", "safetensors", "--out", "out"],
        ["plan", "stranger", "--data", "digits", "--limit", "50"],
        ["shrink", "stranger", "--data", "digits", "--limit", "50", "--out", "out"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_names_the_file_and_the_flag(stranger, monkeypatch, capsys, command):
    folder = stranger(spec="evil.py:make")
    monkeypatch.chdir(folder.parent)
    assert main(command) == 2
    assert "--original evil.py:make" in capsys.readouterr().err.replace("\n", " ")
    assert executed(folder) == []
    assert not Path("out").exists()


def test_a_report_needs_no_network(stranger, monkeypatch, capsys):
    folder = stranger(spec="evil.py:make")
    monkeypatch.chdir(folder.parent)
    assert main(["report", "stranger"]) == 0
    assert executed(folder) == []


def test_what_the_caller_names_is_executed(stranger, run, monkeypatch, capsys):
    folder = stranger(spec="evil.py:make")
    monkeypatch.chdir(folder.parent)
    example = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(
            obo.load_model(folder, original="evil.py:make")(example), obo.load_model(run)(example)
        )
    assert main(["profile", "stranger", "--no-time", "--original", "evil.py:make"]) == 0
    assert executed(folder) != []


def test_original_goes_with_a_run_alone(capsys):
    command = ["profile", "onebyone:classic", "--no-time", "--original", "net.py:make"]
    assert main(command) == 2
    assert "which onebyone:classic is not" in capsys.readouterr().err.replace("\n", " ")


OPTIONS = {
    "checkpoint_path": ("timm:resnet18", "/etc/passwd"),
    "pretrained_cfg": ("timm:resnet18", "hf"),
    "cache_dir": ("timm:resnet18", "x"),
    "weights": ("torchvision:resnet18", "DEFAULT"),
    "weights_backbone": ("torchvision:resnet18", "DEFAULT"),
    "global_pool": ("timm:resnet18", "/a/path"),
    "act_layer": ("timm:resnet18", "http://address"),
    "path": ("onebyone:classic", "x"),
    "pretrained": ("timm:resnet18", True),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_record_are_sizes_shares_and_names_of_layers(stranger, name):
    spec, value = OPTIONS[name]
    folder = stranger(spec=spec, options={name: value})
    with pytest.raises(OptionError, match=f"the option {name}=.*which a record does not set"):
        obo.load_model(folder)


def test_plain_options_of_a_record_build_the_network(stranger, run):
    folder = stranger(spec="onebyone:classic", options={"in_channels": 1, "num_classes": 10})
    example = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(obo.load_model(folder)(example), obo.load_model(run)(example))


@pytest.mark.parametrize("name", ["model.safetensors", "original.safetensors"])
def test_weights_that_are_a_link_out_of_the_run_are_not_opened(stranger, name):
    folder = stranger(spec="onebyone:classic")
    shutil.move(folder / name, folder.parent / "elsewhere.safetensors")
    (folder / name).symlink_to(folder.parent / "elsewhere.safetensors")
    load = obo.load_model if name.startswith("model") else obo.pipeline.loading.load_original
    with pytest.raises(RecordError, match="must be in the run's folder"):
        load(folder)


def test_an_export_does_not_load_the_data_that_a_record_names(stranger, monkeypatch, capsys):
    folder = stranger(spec="onebyone:classic")
    content = json.loads((folder / "run.json").read_text())
    content["command"] = ["onebyone", "shrink", "x", "--data", "evil.py:data"]
    (folder / "run.json").write_text(json.dumps(content))
    monkeypatch.chdir(folder.parent)
    assert main(["export", "stranger", "--format", "safetensors", "--out", "out"]) == 0
    assert executed(folder) == []


def test_a_run_in_memory_is_built_from_what_is_given(run):
    with pytest.raises(OneByOneError, match="is a run: give `original` too"):
        obo.load_model(run, num_classes=3)
