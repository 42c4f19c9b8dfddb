"""A network of several inputs is shrunk, resumed, reported and loaded as any other."""

import dataclasses

import pytest
import tiny
import torch

import branches
import onebyone as obo
from onebyone.core.errors import NetworkInputError, OptionError, PlanError
from onebyone.core.records import Plan, RunRecord

FORMS = pytest.mark.parametrize("form", ["positional", "keywords", "items"])
QUICK = {"budget": "macs=60%", "epochs": 2, "reconstruct": 3, "calibration_examples": 32}


def network(form):
    return branches.rgb_depth() if form == "positional" else branches.masked()


def examples(form, count=96):
    if form == "items":
        return branches.Named(count)
    return branches.positional(count) if form == "positional" else branches.keywords(count)


def shrink(form, out, **changes):
    data = tuple(examples(form, count) for count in (96, 40, 40))
    how = {**QUICK, "learning_rate": 1e-3, "num_threads": 1, "task": "classification"}
    return obo.shrink(network(form), data, out=out, **{**how, **changes})


def outputs(model, form):
    inputs, _ = examples("keywords" if form == "items" else form, 8)
    with torch.no_grad():
        return model(*inputs) if isinstance(inputs, tuple) else model(**inputs)["logits"]


@FORMS
def test_a_run_is_whole_and_loads_again(form, tmp_path):
    small, record = shrink(form, tmp_path / "run")
    assert record.after.macs <= 0.6 * record.before.macs
    assert record.before.metric is not None
    assert record.training.augmentation in {"none", "the data set's own"}
    assert record.profile_before.inputs.same_examples(record.data.inputs)
    assert RunRecord.from_json(record.to_json()) == record
    assert RunRecord.load(tmp_path / "run" / "run.json") == record
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert str(record.profile_before.inputs).split(",")[0] in report
    again = obo.load_model(tmp_path / "run", original=network(form))
    assert torch.equal(outputs(again, form), outputs(small, form))


def test_inputs_have_the_names_of_the_forward(tmp_path):
    _, record = shrink("positional", tmp_path / "run", epochs=0)
    assert record.profile_before.inputs.call == record.plan.inputs.call == "(rgb, depth)"
    assert record.comparison.inputs.call == "(rgb, depth)"


@pytest.mark.parametrize(("form", "stage"), [("positional", "distil"), ("items", "one-shot")])
def test_a_stopped_run_gives_the_same_weights(form, stage, tmp_path):
    whole = shrink(form, tmp_path / "whole").model.state_dict()
    stop = tiny.stop_in(stage, after=4 if stage == "distil" else 0)
    with pytest.raises(KeyboardInterrupt):
        shrink(form, tmp_path / "run", progress=stop)
    resumed = shrink(form, tmp_path / "run", resume=True).model.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_other_values_are_other_data(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        shrink("positional", tmp_path / "run", progress=tiny.stop_in("distil"))
    inputs, labels = branches.positional()
    inputs[1][-1] += 1
    data = ((inputs, labels), branches.positional(40), branches.positional(40))
    how = {**QUICK, "learning_rate": 1e-3, "num_threads": 1, "task": "classification"}
    with pytest.raises(OptionError, match="was started with other data"):
        obo.shrink(network("positional"), data, out=tmp_path / "run", resume=True, **how)


def test_without_labels_agreement_is_counted():
    data = [examples("keywords", count)[0] for count in (96, 40)]
    record = obo.shrink(branches.masked(), data, **QUICK, task="classification").record
    assert record.before.metric is None
    assert record.comparison.agreement is not None


@pytest.mark.parametrize("form", ["positional", "keywords"])
def test_a_plan_for_these_inputs_is_taken_and_one_for_others_is_not(form):
    net, data = network(form), examples(form)
    plan = obo.plan(net, data, budget="macs=70%", task="classification")
    how = {"epochs": 0, "reconstruct": 0, "task": "classification"}
    made = obo.shrink(net, data, plan=Plan.from_json(plan.to_json()), **how)
    assert made.record.plan.after.macs == plan.after.macs
    first, second = (dataclasses.replace(each) for each in plan.inputs.tensors)
    wider = dataclasses.replace(second, shape=(*second.shape[:-1], 9))
    other = dataclasses.replace(plan.inputs, tensors=(first, wider))
    with pytest.raises(PlanError, match="must be made for the size of the data's inputs"):
        obo.shrink(net, data, plan=dataclasses.replace(plan, inputs=other), **how)


def test_int8_is_refused_before_anything_is_done(tmp_path):
    how = {"precision": "int8", "runtimes": ("onnxruntime",)}
    with pytest.raises(NetworkInputError, match=r"Int8 needs .* one tensor .* Wrap it"):
        shrink("positional", tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()
