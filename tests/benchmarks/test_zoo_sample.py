"""The zoo's benchmark on a dozen small networks, and what it says of networks that are wrong."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def zoo():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import zoo
    finally:
        sys.path.remove(str(BENCHMARKS))
    return zoo


@pytest.fixture
def checks(zoo):
    return sys.modules["zoo_checks"]


def made_by(checks, monkeypatch, make):
    monkeypatch.setattr(checks, "build", lambda spec, **_: make())
    return checks.check_model("torchvision:made-up")


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1)
    )


@pytest.mark.slow
def test_every_rewrite_is_right_on_the_sample(zoo, tmp_path):
    results = tmp_path / "zoo.jsonl"
    status = zoo.main(["--sample", "--results", str(results), "--table", str(tmp_path / "t.md")])
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["model"] for row in rows] == list(zoo.SAMPLE)
    for row in rows:
        assert row["status"] == "ok", (row["model"], row["detail"], row["checks"])
        assert row["rewritten"] > 0
        assert 0 < row["half_macs"] < row["macs"]
    assert status == 0
    page = (tmp_path / "t.md").read_text()
    assert all(name in page for name in zoo.SAMPLE)


def test_a_right_network_passes_every_check(checks, monkeypatch):
    row = made_by(checks, monkeypatch, plain)
    assert row.status == "ok", (row.detail, row.checks)
    assert row.rewritten == row.sites == 2
    assert row.folded == 1
    assert {"profile", "full rank", "half rank", "fold", "untouched"} <= set(row.checks)


def test_a_wrong_output_a_wrong_count_and_a_changed_original_are_found(checks, monkeypatch):
    import onebyone as obo

    right = obo.apply

    def wrong_output(model, plan, calibration):
        network = right(model, plan, calibration)
        with torch.no_grad():
            next(iter(network.parameters())).mul_(1 + 1e-4)
        return network

    monkeypatch.setattr(obo, "apply", wrong_output)
    assert "outputs differ by" in made_by(checks, monkeypatch, plain).checks["full rank"]

    def wrong_size(model, plan, calibration):
        return nn.Sequential(right(model, plan, calibration), nn.Conv2d(6, 6, 1).double())

    monkeypatch.setattr(obo, "apply", wrong_size)
    assert "but predicted" in made_by(checks, monkeypatch, plain).checks["half rank"]

    def changes_mode(model, plan, calibration):
        model.eval()
        return right(model, plan, calibration)

    monkeypatch.setattr(obo, "apply", changes_mode)
    row = made_by(checks, monkeypatch, plain)
    assert row.checks["untouched"] == "failed: the original was changed"
    assert row.status == "failed"


@pytest.mark.parametrize(
    ("rewritten", "original", "result"),
    [
        (5e-4, None, "ok 5e-04"),
        (5e-3, 1e-2, "ok 5e-03, the original's by 1e-02"),
        (5e-3, 1e-4, "failed: outputs differ by 5e-03, the original's by 1e-04"),
        (ValueError("no rule"), 1e-4, "failed: ValueError: no rule"),
        (ValueError("no rule"), KeyError("op"), "none: the original cannot be exported: KeyError:"),
    ],
)
def test_onnx_is_held_to_what_it_makes_of_the_original(
    checks, monkeypatch, rewritten, original, result
):
    networks = []

    def apart(network, example):
        networks.append(network)
        found = rewritten if network is networks[0] else original
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(checks, "_onnx_apart", apart)
    monkeypatch.setattr(checks, "build", lambda spec, **_: plain())
    row = checks.check_model("torchvision:made-up", onnx=True)
    assert row.checks["onnx"].startswith(result)
    assert len(networks) == (1 if original is None else 2)


def test_a_crash_is_a_failure_with_its_cause(checks, monkeypatch):
    import onebyone as obo

    def crash(model, plan, calibration):
        raise KeyError("weight")

    monkeypatch.setattr(obo, "apply", crash)
    row = made_by(checks, monkeypatch, plain)
    assert row.checks["full rank"].startswith("failed: KeyError: 'weight'")
    assert row.checks["fold"].startswith("ok")


def test_a_transformer_is_skipped_and_says_so(checks):
    row = checks.check_model("timm:test_vit")
    assert row.status == "skipped"
    assert row.detail == "not a convolutional network: one convolution, the patch embedding"


def test_a_dead_network_is_no_proof(checks, monkeypatch):
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))

        def forward(self, x):
            return self.layers(x) * 0 + 1

    row = made_by(checks, monkeypatch, Dead)
    assert row.status == "failed"
    assert "dead" in row.detail


def test_a_network_that_takes_too_long_is_stopped_and_the_next_one_runs(zoo, tmp_path, monkeypatch):
    results = tmp_path / "zoo.jsonl"

    def endless(spec, **_):
        while True:
            pass

    monkeypatch.setattr(zoo, "check_model", endless)
    arguments = ["timm:test_vit", "--seconds", "1", "--results", str(results)]
    assert zoo.main(arguments) == 1
    monkeypatch.undo()
    row = json.loads(results.read_text())
    assert row["status"] == "failed"
    assert row["detail"] == "stopped after 1.0 s"
    assert zoo.main(["timm:test_vit", "timm:test_vit2", "--results", str(results)]) == 1
    assert len(results.read_text().splitlines()) == 2  # what was run is not run again


def test_the_smallest_of_each_family_comes_first(zoo):
    families = zoo.timm_families()
    assert families["convnext", "convnext"][0].startswith("convnext_zepto")
    assert families["resnet", "resnet"][:2] == ["resnet10t", "resnet14t"]
    assert families["vgg", "vgg"][0] == "vgg11"
    assert sum(map(len, families.values())) > 1000
