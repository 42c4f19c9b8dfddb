"""Scores of sets of examples: intervals by a bootstrap, paired for two networks."""

import numpy as np
import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone.core.errors import DataError, OptionError
from onebyone.core.set_metrics import MeanIoU
from onebyone.evaluation.scores import score
from onebyone.evaluation.set_scores import Pooled
from onebyone.evaluation.statistics import paired_difference

CLASSES = 3


def segmenter(seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(3, CLASSES, 3, padding=1).eval()


def pictures(n=40):
    inputs = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        targets = segmenter()(inputs).argmax(1)
    noise = torch.rand(targets.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    return inputs, torch.where(noise, 0, targets)


def test_a_network_has_its_miou_with_an_interval_around_it():
    data = pictures()
    metric = obo.evaluate(segmenter(), data, task="segmentation", metric="mIoU")
    whole = Pooled(MeanIoU(), MeanIoU().counts(segmenter()(data[0]), data[1], None))
    assert metric.value == whole.value
    assert metric.low < metric.value < metric.high
    assert metric.high - metric.low < 0.2
    assert "bootstrap over the examples, 1,000 sets, seed 0" in metric.interval
    assert str(metric).endswith("n = 40")


def test_batches_of_any_size_give_the_same_value():
    values = {
        obo.evaluate(segmenter(), pictures(), task="segmentation", metric="mIoU", batch_size=size)
        for size in (7, 40)
    }
    assert len(values) == 1


def test_a_network_against_itself_differs_by_exactly_zero():
    compared = obo.compare(
        segmenter(), segmenter(), data=pictures(), task="segmentation", metric="mIoU", rounds=3
    )
    difference = compared.contenders[1].difference
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert difference.p_value == 1
    assert "test mIoU" in str(compared)


def test_the_better_network_is_told_with_an_interval_that_is_narrower_than_unpaired():
    torch.manual_seed(5)
    worse = segmenter()
    with torch.no_grad():
        worse.weight += 0.05 * torch.randn_like(worse.weight)
    both = score([segmenter(), worse], obo.data.as_split(pictures(200)), task="segmentation",
                 metric="mIoU")  # fmt: skip
    found = paired_difference(*both.each)
    assert found.low <= found.value <= found.high < 0
    assert found.p_value < 0.01
    alone = [each.summary() for each in both.each]
    assert found.high - found.low < sum(each.high - each.low for each in alone) / 2
    assert found.value == pytest.approx(alone[1].value - alone[0].value)


def test_the_interval_covers_the_value_of_the_population():
    true, predicted = (torch.rand(4000, 6, 6, generator=torch.Generator().manual_seed(seed)) < 0.4
                       for seed in (0, 1))  # fmt: skip
    scores = torch.stack([~predicted, predicted], dim=1).float()
    counts = MeanIoU().counts(scores, true.long(), None)
    whole = Pooled(MeanIoU(), counts).value
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        some = Pooled(MeanIoU(), [counts[row] for row in rng.integers(4000, size=50)]).summary()
        covered += some.low <= whole <= some.high
    assert covered >= 33  # of 40: 95 % but for chance


def test_pixels_of_the_ignored_label_and_images_without_others_do_not_count():
    inputs, targets = pictures()
    targets = targets.clone()
    targets[:4] = 255
    targets[5, :4] = 255
    some = obo.evaluate(
        segmenter(), (inputs, targets), task="segmentation", metric="mIoU", ignore_index=255
    )
    kept = MeanIoU().counts(segmenter()(inputs[4:]), targets[4:], 255)
    assert (some.n, some.value) == (36, Pooled(MeanIoU(), kept).value)


def test_what_cannot_be_scored_is_refused():
    inputs = torch.randn(8, 4)
    with pytest.raises(OptionError, match="mIoU needs the task 'segmentation'"):
        obo.evaluate(nn.Linear(4, 3), (inputs, torch.arange(8) % 3), metric="mIoU")
    counts = MeanIoU().counts(*(segmenter()(pictures()[0]), pictures()[1]), None)
    with pytest.raises(DataError, match="got 40 and 3"):
        Pooled(MeanIoU(), counts).difference(Pooled(MeanIoU(), counts[:3]))
