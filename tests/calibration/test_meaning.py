"""What outputs mean: given, certain from the data, or not known; and all that follows it."""

import copy
import math

import pytest
import torch
from small_networks import mapped, net
from torch import nn

import onebyone as obo
from onebyone.calibration.infer_task import Known, meaning_of
from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import DataError, ModelError, OptionError, PlanError
from onebyone.core.records import Plan
from onebyone.data import TensorSplit
from onebyone.evaluation.scores import score

X = torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))
UNLABELLED = torch.zeros(len(X), 0)


def moved(network, by=100.0):
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[6].bias += by
    return other


def integers(high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def found(network, targets, **known):
    meaning = meaning_of(network, TensorSplit(X, targets), known=Known(**known))
    return meaning.task.name, meaning.how


# ---------------------------------------------------------------- all that follows


@pytest.mark.parametrize("targets", [None, numbers(48, 4)])
def test_networks_that_differ_by_a_constant_are_not_the_same(targets):
    split = TensorSplit(X, UNLABELLED if targets is None else targets)
    pair = score([net(), moved(net())], split)
    assert pair.divergences[1] > 1
    record = obo.compare(net(), moved(net()), data=split, rounds=3)
    assert record.pair().agreement is None
    assert record.task.name in ("unknown", "regression")
    assert "Task: " in str(record)


def test_classes_are_the_same_whatever_is_added_to_all_of_them():
    pair = score([net(), moved(net())], TensorSplit(X, integers(4, 48)))
    assert 0 <= pair.divergences[1] < 1e-4
    assert pair.each[1].agrees.all()


def test_distilling_a_regression_brings_a_constant_back():
    student = moved(net(), by=1.0)
    trained = obo.distill(
        student, (X, UNLABELLED), teacher=net(), epochs=40, learning_rate=0.02, norms=False
    )
    apart = [
        score([net(), each], TensorSplit(X)).divergences[1] for each in (student, trained.model)
    ]
    assert apart[1] < apart[0] / 10
    assert trained.log.task.name == "unknown"


def test_a_plan_keeps_its_task_and_is_refused_for_another(tmp_path):
    planned = obo.plan(net(), (X, numbers(48, 4)), budget="macs=50%")
    assert (planned.task.name, planned.task.known) == ("regression", True)
    assert "Task: regression" in str(planned)
    planned.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").task == planned.task
    assert obo.apply(net(), planned, X) is not None
    with pytest.raises(PlanError, match=r"made for the task 'regression'.*got 'classification'"):
        obo.apply(net(), planned, X, task="classification")
    with pytest.raises(PlanError, match=r"made for the task 'regression'.*got 'classification'"):
        obo.shrink(net(), ((X, integers(4, 48)), (X, integers(4, 48))), plan=planned, epochs=0)


def test_a_task_of_the_users_own_goes_the_whole_line():
    def distance(reference, outputs):
        return (reference - outputs).abs().mean(1)

    def loss(outputs, targets):
        return (outputs - targets).abs().mean()

    def closeness(outputs, targets):
        return -(outputs - targets).abs().mean(1)

    task = obo.Task("distance", divergence=distance, metric=closeness, loss=loss)
    data = tuple((X, numbers(48, 4)) for _ in range(3))
    small, record = obo.shrink(
        net(), data, task=task, budget="macs=60%", epochs=1, learning_rate=1e-3, reconstruct=2
    )
    assert record.task.name == record.plan.task.name == record.comparison.task.name == "distance"
    assert record.comparison.before.metric.name == "closeness"
    apart = score([net(), small], TensorSplit(X), task=task).divergences[1]
    with torch.no_grad():
        assert apart == pytest.approx(float(distance(net()(X), small(X)).mean()), rel=1e-4)


# ---------------------------------------------------------------- probabilities


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_a_network_that_gives_probabilities_is_as_calibrated_and_as_far_as_by_its_scores(last):
    first, second, labels = net(seed=0), net(seed=1), integers(4, 48)
    made = [nn.Sequential(each, last).eval() for each in (first, second)]
    split = TensorSplit(X, labels)
    plain, ended = score([first, second], split), score(made, split)
    mixed = score([first, made[1]], split)
    for pair in (ended, mixed):
        assert pair.divergences[1] == pytest.approx(plain.divergences[1], rel=1e-3)
        for one, other in zip(pair.each, plain.each, strict=True):
            assert one.confidences == pytest.approx(other.confidences, rel=1e-4)


def test_a_network_that_is_always_right_and_certain_is_calibrated():
    class Certain(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(x[:, 0].long(), 4).float()

    labels = integers(4, 48)
    scores = score([Certain()], TensorSplit(labels[:, None].float(), labels)).each[0]
    assert scores.calibration_error() == pytest.approx(0, abs=1e-6)


def test_a_network_of_sigmoids_is_scored_as_one_of_logits():
    labels = integers(2, 48, 4)
    ended = nn.Sequential(net(), nn.Sigmoid()).eval()
    plain, made = (obo.evaluate(each, (X, labels.float())) for each in (net(), ended))
    assert plain == made
    assert plain.name == "F1"
    pair = score([net(), ended], TensorSplit(X, labels.float()))
    assert pair.divergences[1] < 1e-6


def test_a_head_before_a_softmax_is_fitted_to_the_scores():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 4)]
    plain = nn.Sequential(*body).eval()
    ended = nn.Sequential(*body, nn.Softmax(1)).eval()
    harms = []
    for each in (plain, ended):
        made = obo.plan(each, X, budget="params=60%", head="gap", task="classification")
        small = obo.apply(each, made, X)
        harms.append(score([each, small], TensorSplit(X), task="classification").divergences[1])
    assert harms[1] == pytest.approx(harms[0], rel=0.2)


# ---------------------------------------------------------------- labels and scores


def test_what_is_left_out_is_left_out_of_every_count():
    labels = integers(4, 48)
    marked = labels.clone()
    marked[::3] = -1
    kept = marked >= 0
    with pytest.raises(DataError, match=r"got -1 \(16 of 48.*`ignore_index`"):
        obo.evaluate(net(), (X, marked))
    with pytest.raises(DataError, match=r"got -1 \(16 of 48.*`ignore_index`"):
        obo.train(net(), (X, marked), epochs=1)
    found = obo.evaluate(net(), (X, marked), ignore_index=-1)
    assert found == obo.evaluate(net(), (X[kept], labels[kept]))
    record = obo.compare(net(), net(seed=1), data=(X, marked), ignore_index=-1, rounds=3).pair()
    assert record.difference.n == int(kept.sum())
    assert record.task.ignore_index == -1
    trained = obo.train(net(), (X, marked), epochs=1, ignore_index=-1)
    assert trained.log.task.ignore_index == -1
    with pytest.raises(DataError, match="48 examples that all have the label -1"):
        obo.evaluate(net(), (X, torch.full((48,), -1)), ignore_index=-1, task="classification")


def test_pixels_that_are_left_out_do_not_count():
    labels = integers(4, 48, 12, 12)
    marked = labels.clone()
    marked[:, :6] = 255
    marked[0] = 255
    with pytest.raises(DataError, match=r"from 0 to 3.*got 255"):
        obo.evaluate(mapped(), (X, marked))
    found = obo.evaluate(mapped(), (X, marked), ignore_index=255)
    with torch.no_grad():
        right = (mapped()(X).argmax(1) == labels)[1:, 6:]
    assert (found.name, found.n) == ("pixel accuracy", 47)
    assert found.value == pytest.approx(float(right.double().mean()))
    trained = obo.train(mapped(), (X, marked), epochs=1, ignore_index=255)
    assert trained.log.epochs[-1].loss < 10


def test_segmentation_goes_the_whole_line():
    data = tuple((X, integers(4, 48, 12, 12)) for _ in range(3))
    _, record = obo.shrink(mapped(), data, budget="macs=70%", epochs=1, learning_rate=1e-3)
    assert record.task.name == "segmentation"
    assert record.comparison.before.metric.name == "pixel accuracy"
    assert 0 < record.comparison.agreement.value <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused_with_its_example(value):
    def odd(outputs, targets):
        return torch.where(targets == 41, torch.tensor(value), 1.0)

    with pytest.raises(OptionError, match=r"'odd' must give a finite score .* for example 41"):
        obo.evaluate(net(), (X, torch.arange(48)), metric=odd, batch_size=10)


def test_outputs_that_are_not_finite_are_refused_with_the_layer():
    broken = net()
    with torch.no_grad():
        broken[2].weight.fill_(1e38)  # finite itself: refused for what it gives
    for call in (
        lambda: obo.evaluate(broken, (X, integers(4, 48))),
        lambda: obo.compare(net(), broken, data=(X, integers(4, 48)), rounds=3),
    ):
        with pytest.raises(ModelError, match=r"NaN or infinity .* first .* is '2' \(Conv2d\)"):
            call()


def squared(reference, outputs):
    return (reference - outputs).square().flatten(1).mean(1)


@pytest.mark.parametrize(("task", "power"), [(None, 0), (squared, 2)])
def test_the_size_of_the_outputs_changes_no_plan(task, power):
    # A power of two changes no digit: 9.3e-10.
    size, network = 2.0**-30, net()
    small = copy.deepcopy(network)
    with torch.no_grad():
        small[6].weight *= size
        small[6].bias *= size
    plan, other = (obo.plan(each, X, budget="macs=60%", task=task) for each in (network, small))
    shown = [(c.site, c.first.settings) for c in plan.choices]
    assert shown == [(c.site, c.first.settings) for c in other.choices]
    harms = [choice.harm * size**power for choice in plan.choices]
    assert harms == pytest.approx([choice.harm for choice in other.choices], rel=1e-6)


def test_training_on_targets_that_may_mean_several_things_is_refused():
    one_hot = torch.eye(4)[integers(4, 48)]
    with pytest.raises(DataError, match=r"one-hot rows.*Give a `task`"):
        obo.train(net(), (X, one_hot), epochs=1)
    with pytest.raises(DataError, match=r"integer dtype, got torch.float32 of shape .*labels.long"):
        obo.train(net(), (X, numbers(48)), epochs=1)
    assert obo.train(net(), (X, one_hot), epochs=1, task="regression").log.task.how == "given"


def test_meanings_of_other_networks_are_read_in_their_own_form():
    scores = numbers(6, 3)
    meaning = Meaning.measured("classification", (scores,))
    other = meaning.of_other((scores.softmax(1),))
    assert meaning.divergence((scores,), (scores.softmax(1),), other).max() < 1e-5


# ---------------------------------------------------------------- the temperature


def test_softened_answers_of_many_classes_stay_the_networks_own():
    scores = torch.zeros(20, 5000)
    scores[:, 7] = 10
    at_half = 10 / math.log(4999)
    meaning = Meaning.measured("classification", (scores,))
    assert meaning.temperature((scores,), 4.0) == pytest.approx(at_half, rel=0.02)
    assert meaning.temperature((scores,), 1.1) == 1.1
    assert meaning.temperature((0.1 * scores,), 4.0) == 1  # unsure at any
    sequence = scores.softmax(1).view(4, 5, 5000)
    spoken = Meaning.measured("sequence", (sequence,))
    assert spoken.temperature((sequence,), 4.0) == pytest.approx(at_half, rel=0.02)


def test_few_classes_and_numbers_keep_the_highest_temperature():
    sure = torch.zeros(20, 10)
    sure[:, 3] = 12
    for task in ("classification", "embedding", "unknown"):
        assert Meaning.measured(task, (sure,)).temperature((sure,), 4.0) == 4


def test_steps_take_that_temperature():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(432, 3000)).eval()
    asked = {"teacher": network, "calibration": X, "steps": 1, "task": "classification"}
    assert obo.reconstruct(network, **asked).log.temperature == 1
    assert obo.reconstruct(network, **asked, temperature=0.5).log.temperature == 0.5
