"""The whole line: what shrink leaves in its folder, and what survives an interruption."""

import json

import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone.calibration.infer_task import Known, meaning_of
from onebyone.core.errors import (
    DataError,
    OptionError,
    OutputError,
    PlanError,
    UnknownNameError,
    WeightsError,
)
from onebyone.core.randomness import seeded
from onebyone.core.records import ModelSource, Plan, RunRecord
from onebyone.core.settings.runs import ShrinkSettings, TrainRunSettings
from onebyone.core.write_files import contents
from onebyone.data import TensorSplit, load_data
from onebyone.networks.subnormals import count_subnormals
from onebyone.networks.zoo import classic
from onebyone.pipeline.loading import load_source
from onebyone.pipeline.shrink import shrink_loaded
from onebyone.pipeline.train import train_loaded
from onebyone.profiling.trace import trace_layers

SPEC = ModelSource(name="classic", spec="onebyone:classic")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A classic network trained for a moment, as a run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "classic"
    with seeded(0):
        model = classic()
    train_loaded(model, SPEC, digits, TrainRunSettings(epochs=6, out=folder, num_threads=1))
    return folder


@pytest.fixture(scope="module")
def shrunk(trained, digits, tmp_path_factory):
    """That network shrunk, and the folder."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    result = obo.shrink(
        trained, digits, budget="params=5%", epochs=2, out=folder, calibration_examples=200
    )
    return result, folder


def _test_inputs(data):
    return torch.cat([inputs for inputs, _ in data.test.batches(250)])


def test_training_learns_and_the_folder_is_the_network(trained, digits):
    record = RunRecord.load(trained / "run.json")
    assert record.status.state == "finished"
    assert record.after.metric.value > 0.85
    model = obo.load_model(trained)
    inputs, targets = next(digits.test.batches(500))
    with torch.no_grad():
        accuracy = (model(inputs).argmax(1) == targets).float().mean()
    assert float(accuracy) == pytest.approx(record.after.metric.value)


def test_the_folder_of_a_shrink_gives_the_same_network_back(shrunk, digits):
    (model, _), folder = shrunk
    again = obo.load_model(folder)
    inputs = _test_inputs(digits)
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), model(inputs), rtol=0, atol=0)


def test_the_record_counts_what_the_network_costs(shrunk, digits):
    (model, record), folder = shrunk
    costs = trace_layers(model, _test_inputs(digits)[:1])
    assert (record.after.params, record.after.macs) == (costs.params, costs.macs)
    assert record.after.params == sum(p.numel() for p in model.parameters())
    assert record.plan.after.params == record.after.params
    assert record.after.params <= 0.05 * record.before.params
    assert record.after.file_bytes == (folder / "model.safetensors").stat().st_size


def test_one_shot_is_already_close(shrunk):
    (_, record), _ = shrunk
    assert record.one_shot.metric.value > record.before.metric.value - 0.05


def test_the_folder_has_all_that_was_promised(shrunk):
    _, folder = shrunk
    names = set(contents(folder))
    assert names == {
        "run.json",
        "plan.json",
        "model.safetensors",
        "original.safetensors",
        "log.csv",
        "run.log",
        "report.html",
    }
    written = json.loads((folder / "run.json").read_text())
    for side in ("before", "after"):
        assert {"params", "macs", "latency", "metric"} <= written[side].keys()
        assert {"median_ms", "q1_ms", "q3_ms", "threads", "batch"} <= (
            written[side]["latency"]["eager"].keys()
        )
        assert {"name", "value", "n", "low", "high", "interval"} == written[side]["metric"].keys()


def test_the_record_saved_and_loaded_is_the_record(shrunk):
    (_, record), folder = shrunk
    assert RunRecord.load(folder / "run.json") == record
    assert Plan.load(folder / "plan.json") == record.plan


def test_the_model_passed_in_is_unchanged(digits):
    model = classic().train()
    model.features[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    small = digits.__class__(
        name="few",
        train=digits.train.take(64, 0),
        validation=digits.validation.take(32, 0),
        test=digits.test.take(32, 0),
        classes=digits.classes,
    )
    obo.shrink(model, small, budget="params=30%", epochs=1, head="keep")
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_interrupted_shrink_says_where_and_resumes_to_the_same_network(
    trained, digits, shrunk, tmp_path
):
    (uninterrupted, _), _ = shrunk
    loaded = load_source(trained)

    def interrupt(done, total, message):
        if message.startswith("distil") and done > total // 2 + 1:
            raise KeyboardInterrupt

    folder = tmp_path / "small"
    common = {"budget": "params=5%", "epochs": 2, "out": folder, "calibration_examples": 200}
    settings = ShrinkSettings(**common, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        shrink_loaded(loaded.model, loaded.source, digits, settings)
    stopped = RunRecord.load(folder / "run.json")
    assert (stopped.status.state, stopped.status.stage) == ("interrupted", "distil")
    assert "of" in stopped.status.detail
    assert "interrupted" in (folder / "report.html").read_text().lower()
    with pytest.raises(WeightsError, match="interrupted at 'distil'"):
        obo.load_model(folder)
    with pytest.raises(OutputError, match="did not finish"):
        shrink_loaded(loaded.model, loaded.source, digits, ShrinkSettings(**common))
    other = ShrinkSettings(**{**common, "budget": "params=6%"}, resume=True)
    with pytest.raises(OptionError, match="budget params=5% instead of params=6%"):
        shrink_loaded(loaded.model, loaded.source, digits, other)
    settings = ShrinkSettings(**common, resume=True)
    resumed = shrink_loaded(loaded.model, loaded.source, digits, settings)
    assert resumed.record.status.state == "finished"
    for name, value in uninterrupted.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)


def test_reconstruction_takes_more_inputs_than_the_weights_are_fitted_on(trained, digits):
    _, record = obo.shrink(
        trained, digits, budget="params=5%", epochs=0, calibration_examples=100, reconstruct=20,
        head="exact",
    )  # fmt: skip
    log = record.reconstruction
    assert record.plan.calibration.examples == 100
    assert log.examples + log.held_out == len(digits.train)
    assert log.steps == 20
    assert log.after <= log.before
    assert log.augmentation == "none"


def test_a_failing_stage_leaves_a_record_that_says_so(digits, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError("in a stage")

    monkeypatch.setattr("onebyone.pipeline.shrink.planned", fails)
    with pytest.raises(ZeroDivisionError):
        obo.shrink(classic(), digits, out=tmp_path / "x", calibration_examples=64)
    record = RunRecord.load(tmp_path / "x" / "run.json")
    assert (record.status.state, record.status.stage) == ("failed", "plan")
    assert "in a stage" in record.status.detail


def test_a_foreign_folder_is_refused_and_untouched(digits, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"other files, such as 'thesis.tex'"):
        obo.shrink(classic(), digits, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_finished_run_is_not_overwritten_by_accident(shrunk, trained, digits):
    _, folder = shrunk
    before = (folder / "run.json").read_bytes()
    with pytest.raises(OutputError, match="has finished"):
        obo.shrink(trained, digits, out=folder)
    assert (folder / "run.json").read_bytes() == before


def test_a_run_of_a_module_in_memory_needs_the_module_to_load(digits, tmp_path):
    few = (digits.train.take(64, 0), digits.validation.take(32, 0), digits.test.take(32, 0))
    model = nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10))
    small, _ = obo.shrink(model, few, budget="params=50%", epochs=0, out=tmp_path / "r")
    with pytest.raises(OptionError, match="module in memory, a Sequential"):
        obo.load_model(tmp_path / "r")
    again = obo.load_model(tmp_path / "r", original=model)
    inputs = _test_inputs(digits)[:8]
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), small(inputs), rtol=0, atol=0)


def test_a_plan_edited_by_hand_is_carried_out(trained, digits, shrunk, tmp_path):
    shrunk[0].record.plan.save(tmp_path / "plan.json")
    edited = json.loads((tmp_path / "plan.json").read_text())
    edited["choices"] = [c for c in edited["choices"] if c["site"].startswith("head")]
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    given = Plan.load(tmp_path / "plan.json")
    assert given.choices
    result = obo.shrink(trained, digits, plan=given, epochs=0, calibration_examples=200)
    assert {c.site for c in result.record.plan.choices} == {c.site for c in given.choices}
    assert isinstance(result.model.get_submodule("features.conv1"), nn.Conv2d)


def test_a_plan_for_another_size_is_refused(trained, digits, tmp_path):
    inputs = torch.zeros(8, 1, 32, 32)
    plan = obo.plan(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)), inputs)
    with pytest.raises(PlanError, match="1×28×28, but this one is for 1×32×32"):
        obo.shrink(trained, digits, plan=plan, out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_setting_that_does_not_exist_is_named(digits):
    with pytest.raises(UnknownNameError, match="Did you mean 'budget'"):
        obo.shrink(classic(), digits, budgett="macs=50%")


def test_without_labels_the_line_says_where_the_networks_agree(trained, digits, tmp_path):
    original = load_source(trained).model
    inputs = [next(iter(part.batches(len(part))))[0] for part in (digits.train, digits.test)]
    small, record = obo.shrink(
        original,
        tuple(map(TensorSplit, inputs)),
        budget="macs=50%",
        task="classification",
        head="keep",
        calibration_examples=200,
        epochs=1,
        num_threads=1,
        out=tmp_path / "small",
    )
    labelled = obo.compare(original, small, data=digits.test, rounds=3).pair(1)
    assert record.comparison.agreement == labelled.agreement
    assert record.one_shot_agreement.n == len(digits.test)
    for figure in (record.before, record.after, record.one_shot):
        assert figure.metric is figure.train_metric is figure.calibration_error is None
    assert record.comparison.difference is record.one_shot_difference is None
    assert record.training.metric == "agreement"
    page = (tmp_path / "small" / "report.html").read_text(encoding="utf-8")
    assert "it agrees with the original on" in page
    assert "accuracy" not in page.partition('<section id="conditions"')[0].partition("<body")[2]


def test_a_runs_folder_knows_its_task(trained, digits):
    inputs = TensorSplit(next(iter(digits.train.batches(50)))[0])
    loaded = load_source(trained)
    found = meaning_of(loaded.model, inputs, known=Known.of(loaded.source))
    assert (found.task.name, found.how) == ("classification", "as the network's run says")
    assert meaning_of(loaded.model, inputs).task.name == "unknown"


def test_what_cannot_be_scored_is_refused_before_there_is_a_folder(trained, digits, tmp_path):
    def stopped(*_):
        raise AssertionError("something was measured")

    images, labels = next(iter(digits.test.batches(300)))
    original = load_source(trained).model
    with pytest.raises(DataError, match="Labels must be from 0 to 9"):
        obo.shrink(
            original, (images, labels + 1), budget="macs=50%", progress=stopped, out=tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()


def test_labels_take_their_share_of_the_distilling(trained, shrunk, digits):
    plan = shrunk[0].record.plan
    result = obo.shrink(
        trained, digits, plan=plan, epochs=1, calibration_examples=200, label_weight=0.3
    )
    assert "30% labels" in result.record.training.objective
    assert "labels" not in shrunk[0].record.training.objective
    with pytest.raises(OptionError, match="`label_weight` must be at most 1, got 2"):
        ShrinkSettings(label_weight=2)


def test_images_are_mixed_as_asked(trained, shrunk, digits):
    plan = shrunk[0].record.plan
    how = {"plan": plan, "epochs": 1, "calibration_examples": 200}
    assert (
        "25% with a rectangle"
        in obo.shrink(trained, digits, **how, mix=0.25).record.training.augmentation
    )
    assert "rectangle" not in obo.shrink(trained, digits, **how, mix=0).record.training.augmentation
    with pytest.raises(OptionError, match="`mix` must be at most 1, got 2"):
        ShrinkSettings(mix=2)
    with pytest.raises(OptionError, match="no label fits a mixture"):
        ShrinkSettings(mix=0.5, label_weight=0.1)


def test_subnormal_weights_go_first_and_what_that_gives_is_told_apart(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(120, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 3, (120,), generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[2].weight[:, ::2] = 1e-40
    held = {name: value.clone() for name, value in net.state_dict().items()}
    small, record = obo.shrink(
        net, TensorSplit(inputs, labels), budget="macs=70%", epochs=0, out=tmp_path / "run",
        calibration_examples=40,
    )  # fmt: skip
    assert all(torch.equal(held[name], value) for name, value in net.state_dict().items())
    assert not count_subnormals(small)
    found = record.subnormals
    assert found.weights == {"2.weight": 8 * 4 * 9}
    assert found.exact
    assert set(found.before) == set(found.after) == set(found.ratio) == set(record.before.latency)
    assert record.plan.subnormals == found
    # Both networks of the comparison were timed without: the ratio is the rewrites' own.
    assert record.comparison.subnormals == (None, None)
    assert "no gain of a rewrite" in " ".join(str(record).split())
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "is not a gain of the rewrites" in " ".join(page.split())
    assert RunRecord.load(tmp_path / "run" / "run.json").subnormals == found


def test_only_one_of_budget_drop_and_plan_is_taken():
    with pytest.raises(OptionError, match=r"Give one of .*, got `budget` and `max_drop`"):
        ShrinkSettings(budget="macs=50%", max_drop=0.5)
