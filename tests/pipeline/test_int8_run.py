"""A run in int8: what is compared, kept and loaded again is the deployed file."""

import json
from dataclasses import replace

import pytest
import tiny
import torch

import onebyone as obo
from onebyone.core.errors import OptionError
from onebyone.core.records import Deployed, DeployedLayer, LeftAlone, Plan, RunRecord
from onebyone.report.html import render_run
from onebyone.runtimes.files import FileNetwork

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SOURCE = replace(tiny.SOURCE, spec=None)


@pytest.fixture(scope="module")
def plan():
    made = obo.plan(tiny.network(), tiny.data().train, budget="macs=60%")
    small = obo.restructure(tiny.network(), made)
    names = [name for name, module in small.named_modules() if isinstance(module, torch.nn.Conv2d)]
    kept = LeftAlone(site=names[-1], reason="slower in int8")
    return replace(made, precision="int8", float32_layers=(kept,))


@pytest.fixture(scope="module")
def finished(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "int8"
    small, record = tiny.shrink(
        out, plan=plan, budget=None, epochs=0, reconstruct=0, runtimes=["onnxruntime"]
    )
    return out, small, record


def inputs():
    return torch.cat([x for x, _ in tiny.data().test.batches(64)])


def test_the_figures_of_the_run_are_those_of_the_deployed_file(finished):
    out, _, record = finished
    file = FileNetwork(out / record.deployed.file)
    assert record.after.file_bytes == file.file_bytes == record.deployed.file_bytes
    targets = torch.cat([y for _, y in tiny.data().test.batches(64)])
    accuracy = (file(inputs()).argmax(1) == targets).double().mean()
    assert record.after.metric.value == pytest.approx(float(accuracy))
    assert record.comparison.agreement is not None
    assert list(record.comparison.latency_ratio) == ["onnxruntime"]


def test_the_record_says_what_each_layer_computes_in_and_on_what_processor(finished):
    _, _, record = finished
    names = [layer.name for layer in record.deployed.layers]
    assert len(names) == record.deployed.int8_layers + 1 == 4
    int8 = [layer for layer in record.deployed.layers if layer.precision == "int8"]
    assert all(layer.largest_scale > 0 for layer in int8)
    made = json.loads((finished[0] / "deployed" / "int8.json").read_text())
    assert list(record.deployed.instructions) == made["instructions"]
    assert "3 of 4 layers in int8" in str(record.deployed)
    assert RunRecord.from_json(record.to_json()).deployed == record.deployed
    page = render_run(record)
    assert "Deployed in int8" in page
    assert "The file in int8" in page


def test_a_run_is_loaded_as_the_network_that_simulates_its_file(finished):
    out, small, record = finished
    loaded = obo.load_model(out, original=tiny.network())
    file = FileNetwork(out / record.deployed.file)
    assert torch.equal(loaded(inputs()), small(inputs()))
    assert (loaded(inputs()) - file(inputs())).abs().max() <= 0.25 * file(inputs()).std()
    floating = obo.load_model(out, weights=out / "model.safetensors", original=tiny.network())
    assert not torch.equal(floating(inputs()), small(inputs()))


def test_the_file_of_a_run_is_exported_as_it_is(finished, tmp_path):
    from onebyone.pipeline.loading import load_deployed, load_source

    out, _, record = finished
    weights = out / "model.safetensors"
    floating = load_source(out, weights=weights, original=tiny.network()).model
    made = obo.export(load_deployed(out, floating), tmp_path / "file", data=tiny.data())
    assert made.precision == "int8"
    again, first = (
        FileNetwork(path)(inputs())
        for path in (tmp_path / "file" / "model.onnx", out / record.deployed.file)
    )
    torch.testing.assert_close(again, first)


def test_layers_that_a_plan_leaves_in_float32_stay_so(finished, plan):
    (kept,) = plan.float32_layers
    layers = {layer.name: layer for layer in finished[2].deployed.layers}
    assert layers[kept.site].precision == "float32"
    assert layers[kept.site].remark == "slower in int8"


def test_runtimes_that_do_not_run_int8_are_refused_before_anything_is_done(tmp_path):
    for runtimes in (["eager"], ["onnxruntime", "eager"]):
        with pytest.raises(OptionError, match="must be 'float32' in the runtime 'eager'"):
            tiny.shrink(tmp_path / "run", precision="int8", runtimes=runtimes)
    pytest.importorskip("openvino")
    with pytest.raises(OptionError, match="`openvino` must be the only runtime if it is the first"):
        tiny.shrink(tmp_path / "run", precision="int8", runtimes=["openvino", "onnxruntime"])
    assert not (tmp_path / "run").exists()


def test_a_file_that_was_made_on_another_kind_of_processor_says_so(finished, tmp_path, monkeypatch):
    from onebyone.evaluation import compare as module

    out, _, record = finished
    file = FileNetwork(out / record.deployed.file)
    how = {"data": tiny.data(), "runtimes": ["onnxruntime"], "rounds": 3, "num_threads": 1}
    same = obo.compare(tiny.network(), file, **how)
    assert same.contenders[1].made_elsewhere == ""
    monkeypatch.setattr(module, "eight_bit_instructions", lambda: ("another",))
    other = obo.compare(tiny.network(), file, **how)
    assert "another" in other.contenders[1].made_elsewhere
    assert "made on a processor with other instructions" in str(other).replace("\n", " ")


def test_a_deployed_network_prints_a_layer_a_line():
    layer = DeployedLayer(name="a", precision="float32", remark="slower in int8")
    made = Deployed(
        files=("deployed/model.onnx",),
        file="deployed/model.onnx",
        runtime="onnxruntime",
        layers=(layer,),
        file_bytes=10,
        examples=3,
        difference=0.1,
    )
    assert "slower in int8" in str(made)
    assert made.int8_layers == 0
    assert "none known" in " ".join(made.notes())


def test_a_plan_in_int8_is_saved_with_its_precision(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").precision == "int8"


@pytest.fixture(scope="module")
def trained(plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "trained"
    small, record = tiny.shrink(out, **distilling(plan))
    return out, small, record


def distilling(plan):
    how = {"plan": plan, "budget": None, "epochs": 1, "reconstruct": 0, "int8_epochs": 2}
    return how | {"runtimes": ["onnxruntime"]}


def test_a_run_distilled_in_int8_deploys_the_trained_integers(trained):
    out, small, record = trained
    did = record.deployed.distilled
    assert len(did.log.epochs) == 2
    assert did.after <= did.before
    made = json.loads((out / "deployed" / "int8.json").read_text())
    assert made["distilled"] == did.log.chosen_epoch
    file = FileNetwork(out / record.deployed.file)
    loaded = obo.load_model(out, original=tiny.network())
    assert torch.equal(loaded(inputs()), small(inputs()))
    assert (loaded(inputs()) - file(inputs())).abs().max() <= 0.25 * file(inputs()).std()
    assert len((out / "log-int8.csv").read_text().splitlines()) == 3
    assert len(record.training.epochs) == 1
    assert not list(out.glob("checkpoint*"))


def test_the_report_and_the_table_say_what_the_distillation_in_int8_did(trained):
    _, _, record = trained
    said = "Distilled in int8 for 2 epochs: divergence on 64 validation inputs"
    assert said in " ".join(str(record.deployed).split())
    page = render_run(record)
    assert said in page
    assert "Each epoch of the distillation in int8" in page
    assert record.deployed.distilled.log.csv().splitlines()[0].endswith(",divergence")
    assert "divergence" not in record.training.csv()
    assert RunRecord.from_json(record.to_json()) == record


def test_a_run_that_was_interrupted_in_int8_is_resumed_to_the_same_file(plan, trained, tmp_path):
    out, how = tmp_path / "run", distilling(plan)
    with pytest.raises(KeyboardInterrupt):
        tiny.shrink(out, **how, progress=tiny.stop_in("distil int8", after=5))
    assert (out / "checkpoint-int8.pt").exists()
    assert RunRecord.load(out / "run.json").status.stage == "distil int8"
    tiny.shrink(out, **how, resume=True)
    for name in ("int8.json", "int8.safetensors"):
        assert (out / "deployed" / name).read_bytes() == (
            trained[0] / "deployed" / name
        ).read_bytes()


def test_a_distillation_in_int8_is_refused_in_float32(tmp_path):
    with pytest.raises(OptionError, match="`int8_epochs` must be 0 with `precision` float32"):
        tiny.shrink(tmp_path / "run", int8_epochs=2)
