"""A distillation in int8 never ends farther away, and is resumed bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from onebyone.core.errors import OptionError
from onebyone.data import Data, TensorSplit
from onebyone.quantizing import NO_CLOSED_FORMS, Quantized, quantize
from onebyone.training import distill as distillation
from onebyone.training.int8 import DistilledInt8, distill_int8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    with torch.no_grad():
        layers[-1].weight.mul_(20)
    return nn.Sequential(*layers).eval()


def images(count: int = 320, seed: int = 0) -> TensorSplit:
    generator = torch.Generator().manual_seed(seed)
    return TensorSplit(torch.randn(count, 3, 8, 8, generator=generator))


def data() -> Data:
    return Data(name="drawn", train=images(), validation=images(160, 1), test=images(32, 2))


@pytest.fixture(scope="module")
def coarse() -> Quantized:
    """A network that was calibrated on so few examples that others are clipped."""
    forms = replace(NO_CLOSED_FORMS, bias=True)
    return quantize(network(), images().take(4, 0), forms=forms, weight_bits=7)


def trained(quantized: Quantized, **changes: Any) -> DistilledInt8:
    how = {"teacher": network(), "epochs": 4, "batch_size": 16, "learning_rate": 3e-4} | changes
    return distill_int8(quantized, data(), **how)


def test_it_comes_nearer_to_the_teacher_in_other_integers(coarse: Quantized) -> None:
    made = trained(coarse)
    assert made.after < 0.8 * made.before
    assert made.log.chosen_epoch == made.quantized.record.distilled > 0
    best = min(epoch.divergence for epoch in made.log.epochs)
    # What the training measured is what its simulation gives.
    assert made.after == pytest.approx(best, rel=1e-6)
    same = [torch.equal(made.quantized.integers[k], v) for k, v in coarse.integers.items()]
    assert not all(same)
    assert made.examples == 160


def test_what_leads_away_changes_nothing_bit_for_bit(coarse: Quantized) -> None:
    before = {name: value.clone() for name, value in coarse.integers.items()}
    made = trained(coarse, learning_rate=1.0, epochs=1)
    assert made.quantized is coarse
    assert made.log.chosen_epoch == 0
    assert made.after == made.before
    assert all(torch.equal(coarse.integers[name], value) for name, value in before.items())


def test_a_training_too_short_for_trials_uses_a_low_rate(coarse: Quantized) -> None:
    made = trained(coarse, learning_rate=None, epochs=1, batch_size=128)
    assert "tried" not in made.log.objective
    assert made.log.learning_rate == pytest.approx(1e-3 / 16)
    assert made.after < made.before


def test_rates_are_tried_and_a_resumed_training_gives_the_same_integers(
    coarse: Quantized, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of fewer epochs a trial would be too short to be made.
    how = {"learning_rate": None, "epochs": 12}
    whole = trained(coarse, **how)
    assert "of 3 tried" in whole.log.objective

    def interrupt(_done: int, _total: int, message: str) -> None:
        if message.startswith("epoch 3"):
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(coarse, **how, checkpoint=path, progress=interrupt)

    def tried(*_: Any, **__: Any) -> None:
        raise AssertionError("a rate was tried again")

    monkeypatch.setattr(distillation, "tried_rate", tried)
    resumed = trained(coarse, **how, checkpoint=path)
    assert resumed.quantized.record == whole.quantized.record
    for name, value in whole.quantized.integers.items():
        assert torch.equal(resumed.quantized.integers[name], value)
    other = quantize(network(), images().take(48, 0), forms=NO_CLOSED_FORMS)
    with pytest.raises(OptionError, match="must come from the same training"):
        trained(other, **how, checkpoint=path)
