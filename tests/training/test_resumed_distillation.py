"""A distillation that is resumed repeats no trial, and gives the same weights."""

import pytest
import torch
from torch import nn

from onebyone.data import TensorSplit
from onebyone.training import distill as distillation
from onebyone.training.distill import distill


def network(seed):
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(*layers).eval()


def images():
    generator = torch.Generator().manual_seed(0)
    return TensorSplit(
        torch.randint(0, 256, (160, 3, 6, 6), dtype=torch.uint8, generator=generator)
    )


def test_trials_are_not_repeated_and_the_weights_are_the_same(tmp_path, monkeypatch):
    teacher, student, data = network(0), network(1), images()
    how = {"teacher": teacher, "epochs": 24, "batch_size": 16, "seed": 0}
    whole = distill(student, data, **how)
    assert "tried" in whole.log.objective

    def interrupt(done, total, message):
        if message.startswith("epoch 3"):
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        distill(student, data, **how, checkpoint=path, progress=interrupt)

    def tried(*_, **__):
        raise AssertionError("a rate was tried again")

    monkeypatch.setattr(distillation, "tried_rate", tried)
    resumed = distill(student, data, **how, checkpoint=path)
    assert resumed.log.objective == whole.log.objective
    assert resumed.log.learning_rate == whole.log.learning_rate
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


def test_what_was_decided_is_kept_before_the_first_epoch(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    how = {"teacher": network(0), "epochs": 24, "batch_size": 16}
    with pytest.raises(KeyboardInterrupt):
        distill(network(1), images(), **how, checkpoint=path, progress=interrupt)
    assert torch.load(path, weights_only=True)["decision"][2]
