import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import DataError, ModelError, OptionError, UnknownNameError
from onebyone.core.metrics import accuracy, find_metric
from onebyone.core.statistics import share_interval
from onebyone.data import Data, TensorSplit, as_split
from onebyone.evaluation.feature_error import feature_error
from onebyone.evaluation.scores import check_scorable, evaluate, score
from onebyone.evaluation.statistics import (
    Scores,
    agreement,
    expected_calibration_error,
    paired_difference,
    summarize,
)


def classifier(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))


def data(n=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorSplit(
        torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)
    )


def hits(*values, metric="accuracy"):
    return Scores(metric=metric, scores=np.array(values, float))


# ---------------------------------------------------------------- one network


@pytest.mark.parametrize("batch_size", [1, 5, 36, 37, 100])
def test_scores_in_batches_are_the_scores_all_at_once(batch_size):
    networks, split = [classifier(0), classifier(1)], data()
    whole = score(networks, split, batch_size=1000)
    parts = score(networks, split, batch_size=batch_size)
    for one, other in zip(whole.each, parts.each, strict=True):
        assert np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.predictions, other.predictions)
        assert one.confidences == pytest.approx(other.confidences)
    assert parts.divergences == pytest.approx(whole.divergences)
    assert whole.divergences[0] == 0


def test_accuracy_is_the_share_of_highest_scores_that_are_the_targets():
    network, split = classifier(), data()
    (inputs, targets), *_ = split.batches(100)
    right = int((network(inputs).argmax(1) == targets).sum())
    metric = evaluate(network, split)
    assert (metric.name, metric.n, metric.value) == ("accuracy", 37, right / 37)
    assert (metric.low, metric.high) == share_interval(right, 37)


def test_a_network_in_training_mode_is_scored_as_in_evaluation_mode():
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3))
    network(torch.randn(50, 4))
    assert evaluate(network, data()) == evaluate(network.eval(), data())


def test_a_metric_may_be_a_function_of_outputs_and_targets():
    def closeness(outputs, targets):
        return -(outputs[:, 0] - targets).abs()

    metric = evaluate(classifier(), data(), metric=closeness)
    assert metric.name == "closeness"
    assert metric.low < metric.value < metric.high < 0


@pytest.mark.parametrize("shape", [(), (2,), (1, 4, 4)])
def test_networks_that_do_not_classify_are_scored_too(shape):
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, max(1, math.prod(shape)))

        def forward(self, x):
            return self.fc(x).reshape(len(x), *shape)

    torch.manual_seed(0)
    networks = [Regression(), Regression()]
    together = score(
        networks, data(), metric=lambda o, t: o.reshape(len(o), -1).mean(1), batch_size=8
    )
    assert together.divergences[0] == 0
    assert together.divergences[1] > 0
    assert together.each[0].predictions is None or shape == (2,)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            lambda o, t: (o.argmax(1) == t).float().mean(),
            r"one score for each example, shape \(37,\), got Tensor",
        ),
        (lambda o, t: 0.5, r"got float"),
        (lambda o, t: None, r"got NoneType"),
        (lambda o, t: o, r"got \(37, 3\)"),
        (lambda o, t: o @ t, r"failed on outputs \(37, 3\) and targets \(37,\)"),
        (lambda o, t: o[:, 9], r"failed on outputs"),
    ],
)
def test_a_metric_that_gives_no_score_an_example_is_refused(metric, message):
    with pytest.raises(OptionError, match=message):
        evaluate(classifier(), data(), metric=metric)


def test_bad_arguments_have_clear_errors():
    with pytest.raises(
        UnknownNameError, match=r"No metric named 'acuracy'. Did you mean 'accuracy'"
    ):
        find_metric("acuracy")
    with pytest.raises(DataError, match=r"Task: not known .*may mean several.*a `metric`"):
        evaluate(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), data())

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(DataError, match="the network gives 2 tensors"):
        evaluate(Pair(), data())

    class Nothing:
        def __len__(self):
            return 0

        def batches(self, *_, **__):
            raise AssertionError("there are none")

    with pytest.raises(DataError, match="at least one example, got none"):
        evaluate(classifier(), Nothing())


def test_networks_with_other_classes_cannot_be_compared():
    with pytest.raises(ModelError, match=r"shape of the reference's, \(37, 3\), got \(37, 1\)"):
        score([classifier(), classifier(classes=1)], data())


# ---------------------------------------------------------------- what is given as data


def test_examples_may_be_of_any_usual_kind_and_of_data_the_test_part_is_taken():
    net, split = classifier(), data()
    (inputs, targets), *_ = split.batches(37)
    expected = evaluate(net, split)
    kinds = [(inputs, targets), (inputs.numpy(), targets.numpy()), TensorDataset(inputs, targets)]
    for kind in [*kinds, DataLoader(kinds[-1], batch_size=5)]:
        assert evaluate(net, kind) == expected
    parts = Data(name="parts", train=data(seed=1), validation=data(seed=2), test=split)
    assert evaluate(net, parts) == expected


def test_without_labels_networks_are_scored_by_their_agreement_with_the_first():
    first, second = classifier(0), classifier(1)
    (inputs, _), *_ = data().batches(37)
    unlabelled = TensorSplit(inputs)
    both = score([first, second], unlabelled, task="classification")
    assert not both.labelled
    assert [each.metric for each in both.each] == ["agreement", "agreement"]
    assert both.each[0].scores.all()
    same = agreement(*score([first, second], data()).each)
    assert both.each[1].summary() == same
    assert 0 < same.value < 1
    with pytest.raises(DataError, match=r"needs labels.*`compare`"):
        evaluate(first, unlabelled)


@pytest.mark.parametrize("check", [evaluate, partial(check_scorable, metric=None)])
def test_labels_that_are_no_classes_of_the_network_are_refused(check):
    (inputs, targets), *_ = data().batches(37)
    with pytest.raises(DataError, match=r"from 0 to 2.*got 9 \(1 of 37 are outside\)"):
        check(classifier(), TensorSplit(inputs, targets.index_fill(0, torch.tensor([30]), 9)))
    with pytest.raises(DataError, match=r"integer dtype, got torch.float32 of shape .*argmax\(1\)"):
        check(classifier(), TensorSplit(inputs, torch.eye(3)[targets]), task="classification")
    with pytest.raises(DataError, match=r"integer dtype, got torch.bool of .*labels.long\(\)"):
        check(classifier(), TensorSplit(inputs, targets > 0), task="classification")
    with pytest.raises(DataError, match=r"from 0 to 2.*got -1 \(1 of 37.*--ignore-index -1"):
        check(classifier(), TensorSplit(inputs, targets.index_fill(0, torch.tensor([30]), -1)))


class Pairs(Dataset):
    """A torch data set whose labels are known from its items alone."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets_of_items = inputs, targets

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, place):
        return self.inputs[place], self.targets_of_items[place]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.index_fill(0, torch.tensor([30]), 9), "from 0 to 2.*got 9"),
        (lambda t: t.index_fill(0, torch.tensor([30]), -1), "from 0 to 2.*got -1"),
        (lambda t: t + 3, "from 0 to 2.*got 5"),
        (lambda t: t > 0, "integer dtype, got torch.bool|targets of bool"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"task": "classification"}, {"metric": "accuracy"}])
def test_labels_that_are_known_from_items_alone_are_checked_too(change, message, options):
    (inputs, targets), *_ = data().batches(37)
    split = as_split(Pairs(inputs, change(targets)))
    assert split.targets is None
    with pytest.raises(DataError, match=message):
        evaluate(classifier(), split, batch_size=10, **options)


def test_a_network_that_does_not_fit_the_examples_is_said_to():
    with pytest.raises(ModelError, match="must run on an input of shape 37×4, but it failed"):
        evaluate(nn.Linear(5, 3), data())


# ---------------------------------------------------------------- divergence


def divergence(reference, outputs, task="classification"):
    return Meaning.measured(task, (reference,)).divergence((reference,), (outputs,))


def test_the_divergence_of_classifiers_is_kullback_leiblers_and_blind_to_a_constant():
    reference, outputs = torch.randn(5, 4), torch.randn(5, 4)
    p, q = reference.softmax(1).double().numpy(), outputs.softmax(1).double().numpy()
    assert divergence(reference, outputs).numpy() == pytest.approx(
        stats.entropy(p, q, axis=1), rel=1e-4
    )
    assert divergence(reference, reference + 7).abs().max() < 1e-5


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9])
def test_an_error_of_features_is_relative_at_any_size(size):
    ours, theirs = torch.randn(5, 4), 3 + torch.randn(5, 4)
    expected = (ours - theirs).square().mean() / theirs.var()
    assert float(feature_error(ours, theirs, "conv")) == pytest.approx(float(expected), rel=1e-5)
    found = feature_error(size * ours, size * theirs, "conv")
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    assert feature_error(torch.zeros(5, 4), torch.zeros(5, 4), "conv") == 0


# ---------------------------------------------------------------- intervals and tests


def test_the_interval_of_other_scores_is_students_or_wider():
    scores = np.random.default_rng(0).normal(3, 2, 20)
    metric = summarize("loss", scores)
    expected = stats.ttest_1samp(scores, 0).confidence_interval()
    assert metric.low <= expected.low * (1 + 1e-12)
    assert metric.high >= expected.high * (1 - 1e-12)
    assert metric.high - metric.low < 1.2 * (expected.high - expected.low)
    assert "Student" in metric.interval
    assert summarize("accuracy", np.array([1.0, 0.0])).interval == "Wilson"


@pytest.mark.parametrize("n", [1, 2, 10])
def test_one_score_or_equal_scores_are_not_certain(n):
    metric = summarize("loss", np.full(n, 2.5))
    assert metric.low < metric.value == 2.5 < metric.high


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_by_their_example(wrong):
    scores = np.array([1.0, 0.5, wrong])
    with pytest.raises(DataError, match=r"got -?(nan|inf) for example 2 \(1 of 3\)"):
        summarize("loss", scores)
    fine = hits(1, 0.5, 1, metric="loss")
    with pytest.raises(DataError, match="for example 2"):
        paired_difference(fine, hits(*scores, metric="loss"))
    with pytest.raises(DataError, match="at least one example"):
        summarize("loss", np.array([]))


def test_mcnemars_test_by_hand():
    # Of 10 examples 1 was gained and 5 were lost: twice P(X <= 1) of a fair coin thrown 6 times.
    before = hits(0, 1, 1, 1, 1, 1, 1, 1, 0, 0)
    after = hits(1, 0, 0, 0, 0, 0, 1, 1, 0, 0)
    difference = paired_difference(before, after)
    assert difference.p_value == pytest.approx(2 * (1 + 6) / 64)
    assert (difference.value, difference.n) == (pytest.approx(-0.4), 10)
    center, m = (1.5 - 5.5) / 12, 12
    reach = 1.959964 * math.sqrt(7 - 16 / m) / m
    assert (difference.low, difference.high) == pytest.approx((center - reach, center + reach))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_paired_difference_is_the_opposite_the_other_way_round(pairs):
    before, after = (hits(*column) for column in zip(*pairs, strict=True))
    there, back = paired_difference(before, after), paired_difference(after, before)
    assert there.value == pytest.approx(-back.value)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.p_value == pytest.approx(back.p_value)
    assert -1 <= there.low <= there.high <= 1
    assert 0 < there.p_value <= 1


def test_few_scores_that_are_no_hits_are_compared_with_all_signs():
    before, after = hits(1, 2, 3, metric="x"), hits(2, 4, 3.5, metric="x")
    difference = paired_difference(before, after)
    assert difference.p_value == pytest.approx(2 / 8)
    assert difference.low < 0 < difference.value < difference.high
    assert "exact sign-flip test" in difference.test


def test_a_rare_difference_that_no_example_shows_is_in_the_interval():
    rng = np.random.default_rng(0)
    for size in (30, 100):
        held = 0
        for _ in range(100):
            first = rng.random(size)
            second = first + (rng.random(size) < 0.02)
            difference = paired_difference(hits(*first, metric="x"), hits(*second, metric="x"))
            held += difference.low <= 0.02 <= difference.high
        # One event in 100 looks like fewer than there are to expect.
        assert held >= 85


def test_many_scores_without_a_difference_are_not_told_apart():
    rng = np.random.default_rng(1)
    first = rng.normal(0, 1, 60)
    noise = rng.normal(0, 0.1, 60)
    difference = paired_difference(
        hits(*first, metric="x"), hits(*(first + noise - noise.mean()), metric="x")
    )
    assert difference.p_value > 0.9
    assert difference.low < 0 < difference.high


def test_hits_of_any_metric_are_compared_by_mcnemars_test():
    first, second = hits(0, 1, 1, metric="top5"), hits(1, 1, 1, metric="top5")
    assert "McNemar" in paired_difference(first, second).test


def test_a_difference_without_spread_is_as_certain_as_its_examples_are_many():
    first = np.array([0.2, 0.5, 0.9])
    same = paired_difference(hits(*first, metric="x"), hits(*first, metric="x"))
    moved = paired_difference(hits(*first, metric="x"), hits(*(first + 0.1), metric="x"))
    assert (same.value, same.p_value) == (0, 1)
    assert same.low < 0 < same.high
    assert moved.value == pytest.approx(0.1)
    assert moved.p_value == 0.25  # as by the two of eight signs that are alike
    assert moved.low < 0 < moved.high


@pytest.mark.parametrize(("n", "p_value"), [(1, 1.0), (2, 0.5), (3, 0.25), (6, 2**-5)])
def test_a_few_examples_that_all_gain_one_prove_little(n, p_value):
    before = hits(*range(1, n + 1), metric="x")
    after = hits(*range(2, n + 2), metric="x")
    difference = paired_difference(before, after)
    assert (difference.value, difference.p_value) == (1, p_value)
    assert difference.low < 1 < difference.high


def test_the_calibration_error_by_hand():
    # Two bins: 0.62 and 0.64 with one hit of two, 0.95 with a hit; 15 bins of width 1/15.
    error = expected_calibration_error(np.array([0.62, 0.64, 0.95]), np.array([1.0, 0.0, 1.0]))
    assert error == pytest.approx((2 * abs(0.63 - 0.5) + abs(0.95 - 1)) / 3)
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0
    assert hits(1, 0).calibration_error() is None


def test_agreement_is_the_share_of_equal_predictions():
    first, second = score([classifier(0), classifier(1)], data()).each
    share = agreement(first, second)
    assert share.value == (first.predictions == second.predictions).mean()
    assert agreement(first, first).value == 1
    assert agreement(hits(1, 0), first) is None


def test_accuracy_of_ties_takes_the_first_class():
    assert accuracy(torch.zeros(2, 3), torch.tensor([0, 1])).tolist() == [1, 0]
