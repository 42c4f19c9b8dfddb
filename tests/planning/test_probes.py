"""Probes measure how far outputs move, on the examples that tell most."""

import pytest
import torch
from torch import nn

from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import UnknownNameError
from onebyone.core.settings.planning import PlanSettings
from onebyone.data.splits import TensorSplit
from onebyone.planning import plan
from onebyone.planning.estimate import survey_macs
from onebyone.planning.probes import LIMITS, Counts, Probes, _chosen
from onebyone.profiling.trace import trace_layers

CLASSES = 4


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    return layers.eval().requires_grad_(False)


def data(n, scale=1.0):
    torch.manual_seed(1)
    inputs = scale * torch.randn(n, 6)
    return CalibrationData(TensorSplit(inputs, torch.zeros(n, dtype=torch.long)), "noise")


def meaning_on(net, calibration):
    outputs = torch.cat([net(x) for x in calibration.batches()]).detach()
    return Meaning.measured("classification", (outputs,))


def counts_of(net, calibration, effort="normal"):
    layers = {layer.name: layer for layer in trace_layers(net, calibration.example()).layers}
    return Counts.of(layers, ["0", "2"], len(calibration), effort)


def probes_of(net, calibration):
    counts = counts_of(net, calibration)
    return Probes(net, calibration, meaning_on(net, calibration), ["0", "2"], counts)


def other(layer, by=0.1):
    new = nn.Linear(layer.in_features, layer.out_features)
    generator = torch.Generator().manual_seed(2)
    new.requires_grad_(False)
    with torch.no_grad():
        new.weight.copy_(layer.weight + by * torch.randn(layer.weight.shape, generator=generator))
        new.bias.copy_(layer.bias)
    return new


def test_the_same_module_does_no_harm():
    net, calibration = network(), data(600)
    found = probes_of(net, calibration).harm_with("0", net[0])
    assert (found.softened, found.divergence) == pytest.approx((0, 0), abs=1e-12)


def test_on_few_examples_all_of_them_count_alike():
    net, calibration = network(), data(16)
    inputs = next(iter(calibration.batches()))
    meaning, new = meaning_on(net, calibration), other(net[0])
    changed = nn.Sequential(new, *net[1:])
    expected = meaning.divergence((net(inputs).double(),), (changed(inputs).double(),)).mean()
    found = probes_of(net, calibration).harm_with("0", new)
    assert found.divergence == pytest.approx(float(expected), rel=1e-5)
    assert 0 < found.chance < 1


def test_the_most_sensitive_examples_are_among_those_chosen_and_weights_add_up():
    net, calibration = network(), data(4 * 40, scale=3.0)
    meaning = meaning_on(net, calibration)
    batches = _chosen(net, calibration, meaning, 40)
    chosen = torch.cat([batch.inputs for batch in batches])
    assert len(chosen) == 40
    assert len(chosen.unique(dim=0)) == 40
    assert sum(batch.weight for batch in batches) == pytest.approx(1)
    everything = torch.cat(list(calibration.batches()))
    sensitivity = meaning.sensitivity((net(everything),))
    for row in sensitivity.argsort(descending=True)[:20].tolist():
        assert (chosen == everything[row]).all(dim=1).any()


def test_chosen_examples_stand_for_all():
    net, calibration = network(), data(512, scale=3.0)
    meaning, new = meaning_on(net, calibration), other(net[2], by=0.3)
    changed = nn.Sequential(*net[:2], new)
    everything = torch.cat(list(calibration.batches()))

    def apart(inputs):
        return meaning.divergence((net(inputs).double(),), (changed(inputs).double(),))

    estimate = sum(
        batch.weight * float(apart(batch.inputs).mean())
        for batch in _chosen(net, calibration, meaning, 128)
    )
    assert estimate == pytest.approx(float(apart(everything).mean()), rel=0.25)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_sensitivity_is_the_trace_of_the_curvature(task):
    torch.manual_seed(0)
    scores = 2 * torch.randn(3, CLASSES, dtype=torch.float64)
    meaning = Meaning.measured(task, (scores,))
    step = 1e-4
    for row, found in zip(scores, meaning.sensitivity((scores,)), strict=True):
        moved = row + step * torch.eye(CLASSES, dtype=torch.float64)
        apart = meaning.divergence((row.expand(CLASSES, -1),), (moved,))
        assert float(found) == pytest.approx(float((2 * apart / step**2).sum()), rel=1e-3)


def test_more_effort_is_more_examples_and_options():
    net, calibration = network(), data(600)
    found = [counts_of(net, calibration, effort) for effort in LIMITS]
    examples = [each.examples for each in found]
    assert examples == sorted(examples)
    assert examples[0] < examples[-1]
    counts = [each.at("0") for each in found]
    assert counts == sorted(counts)


def test_an_unknown_effort_is_refused_by_name():
    with pytest.raises(UnknownNameError, match=r"No `effort` named 'quik'. Did you mean 'quick'"):
        PlanSettings(effort="quik")


def test_the_estimate_is_told_before_the_first_pass_and_grows_with_examples(caplog):
    net, seconds = network(), {}
    for n in (100, 600):
        calibration = data(n)
        layers = {layer.name: layer for layer in trace_layers(net, calibration.example()).layers}
        counts = counts_of(net, calibration)
        seconds[n] = survey_macs(net, layers, ["0", "2"], counts, [], examples=n)
    assert seconds[600] > seconds[100]
    with caplog.at_level("INFO", logger="onebyone.run"):
        plan(net, data(100), budget="macs=70%", task="classification")
    assert "options of 2 layers: about" in caplog.messages[0]
