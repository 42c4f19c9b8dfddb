"""Laws of the moving average, of gradients in parts, of the schedules and of the early stop."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onebyone.core.errors import OptionError, UsageError
from onebyone.data import Data, TensorSplit
from onebyone.evaluation.scores import evaluate
from onebyone.training import loop
from onebyone.training.train import train
from onebyone.training.weight_average import WeightAverage


def network(*, norm=True):
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(6)] if norm else []
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )  # fmt: skip


def toy(n=66, *, noise=0.0):
    """Make pictures with a bright row for each class; ``noise`` is the share of wrong labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 1, 6, 6, generator=generator)
    targets = torch.arange(n) % 3
    for label in range(3):
        images[targets == label, :, 2 * label] += 1
    wrong = torch.rand(n, generator=generator) < noise
    targets = torch.where(wrong, (targets + 1) % 3, targets)
    split = TensorSplit(images, targets)
    return Data(name="toy", train=split, validation=split, test=split, classes=("a", "b", "c"))


def same(one: nn.Module, other: nn.Module, **tolerance):
    assert_close(one.state_dict(), other.state_dict(), **tolerance)


# ---------------------------------------------------------------- gradients in parts


def gradients_of_the_first_step(parts, monkeypatch):
    seen = []

    def noted(parameters, most):
        seen.append([parameter.grad.clone() for parameter in parameters])

    with monkeypatch.context() as patch:
        patch.setattr(loop.nn.utils, "clip_grad_norm_", noted)
        log = train(
            network(norm=False),
            toy(),
            epochs=1,
            batch_size=22,
            accumulate=parts,
            precision="float32",
        ).log
    return seen[0], log


def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(monkeypatch):
    whole, _ = gradients_of_the_first_step(1, monkeypatch)
    parts, log = gradients_of_the_first_step(4, monkeypatch)  # of six or five examples
    assert_close(parts, whole, rtol=1e-5, atol=1e-7)
    assert "4 parts" in log.schedule


def test_parts_are_never_of_one_example(monkeypatch):
    sizes = []
    forward = loop.forward
    monkeypatch.setattr(loop, "forward", lambda job, x: (sizes.append(len(x)), forward(job, x))[1])
    train(network(), toy(21), epochs=1, batch_size=8, accumulate=100)
    assert sum(sizes) == 21
    assert min(sizes) >= 2
    assert max(sizes) == 3


# ---------------------------------------------------------------- moving average


def test_the_average_is_what_its_formula_says():
    layer = nn.BatchNorm1d(1)
    average = WeightAverage(layer, 0.5)
    expected = 1.0
    for step in range(1, 6):
        with torch.no_grad():
            layer.weight.fill_(10.0 * step)
        layer.num_batches_tracked.fill_(step)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * 10.0 * step
    with average.in_place():
        assert layer.weight.item() == pytest.approx(expected, rel=1e-6)
        assert layer.num_batches_tracked.item() == 5
    assert layer.weight.item() == 50.0
    average.put_in()
    assert layer.weight.item() == pytest.approx(expected, rel=1e-6)


def test_the_average_is_scored_and_returned():
    made = train(network(), toy(), epochs=3, ema=0.9)
    plain = train(network(), toy(), epochs=3)
    assert not torch.equal(made.model[0].weight, plain.model[0].weight)
    score = evaluate(made.model, toy().validation).value
    assert made.log.epochs[-1].validation == pytest.approx(score)
    assert "moving average of the weights with decay 0.9" in made.log.schedule


def test_an_average_of_no_memory_is_the_weights():
    same(
        train(network(), toy(), epochs=2, ema=0.0).model,
        train(network(), toy(), epochs=2).model,
        rtol=0,
        atol=0,
    )


# ---------------------------------------------------------------- schedules


def test_a_constant_rate_stays_after_its_warm_up():
    log = train(network(), toy(), epochs=12, schedule="constant", learning_rate=0.01).log
    assert {epoch.learning_rate for epoch in log.epochs[2:]} == {0.01}
    assert "then constant" in log.schedule


# ---------------------------------------------------------------- the early stop


def test_a_training_without_gain_stops_and_gives_the_weights_of_its_best_epoch():
    data = toy(noise=0.3)
    made = train(network(), data, epochs=40, patience=3, learning_rate=0.05)
    scores = [epoch.validation for epoch in made.log.epochs]
    best = scores.index(max(scores)) + 1
    assert len(scores) < 40
    assert made.log.chosen_epoch == best == len(scores) - 3
    assert f"stopped after epoch {len(scores)} of 40" in made.log.schedule
    assert evaluate(made.model, data.validation).value == pytest.approx(max(scores))


def test_an_early_stop_needs_a_score():
    with pytest.raises(OptionError, match="`patience` needs a validation score"):
        train(network(), toy().train, epochs=2, patience=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 1.0}, "`ema` must be below 1"),
        ({"ema": -0.1}, "`ema` must be"),
        ({"accumulate": 0}, "`accumulate` must be"),
        ({"patience": 0}, "`patience` must be"),
        ({"schedule": "linear"}, "No `schedule` named 'linear'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        train(network(), toy(), epochs=1, **options)


# ---------------------------------------------------------------- resuming, and being told


class StopError(Exception):
    pass


def stopping_after(epochs):
    def on_epoch(log):
        if len(log.epochs) == epochs:
            raise StopError

    return on_epoch


@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{"ema": 0.9}, {"patience": 2}, {"ema": 0.8, "patience": 3, "accumulate": 2}]
)
def test_a_resumed_training_ends_in_the_same_weights(options, when, tmp_path: Path):
    how = {"epochs": 6, "learning_rate": 0.02, **options}
    data = toy(noise=0.2)
    whole = train(network(), data, **how)
    kept = tmp_path / "checkpoint.pt"
    if len(whole.log.epochs) >= when:
        with pytest.raises(StopError):
            train(network(), data, checkpoint=kept, on_epoch=stopping_after(when), **how)
    resumed = train(network(), data, checkpoint=kept, **how)
    same(resumed.model, whole.model, rtol=0, atol=0)
    assert resumed.log.chosen_epoch == whole.log.chosen_epoch


def test_a_checkpoint_of_another_average_is_refused(tmp_path: Path):
    kept = tmp_path / "checkpoint.pt"
    train(network(), toy(), epochs=1, ema=0.9, checkpoint=kept)
    with pytest.raises(OptionError, match="ema"):
        train(network(), toy(), epochs=1, ema=0.8, checkpoint=kept)


def test_each_epoch_is_told_with_all_before_it():
    told = []
    log = train(network(), toy(), epochs=3, on_epoch=told.append).log
    assert [len(each.epochs) for each in told] == [1, 2, 3]
    assert told[-1].epochs == log.epochs
    lines = log.csv().splitlines()
    assert len(lines) == 1 + len(log.epochs)
    assert {line.count(",") for line in lines} == {6}
