"""mIoU: a score of a whole set of images."""

import numpy as np
import pytest
import torch

from onebyone.core.errors import OptionError
from onebyone.core.set_metrics import MeanIoU

CLASSES = 4


def scores_of(classes):
    return torch.nn.functional.one_hot(classes, CLASSES).movedim(-1, 1).float()


def drawn(seed, n=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CLASSES, (n, 8, 9), generator=generator)


def value(predicted, true, ignore_index=None, weights=None):
    metric = MeanIoU()
    counts = metric.counts(scores_of(predicted), true, ignore_index)
    weights = np.ones((1, len(true))) if weights is None else weights
    return metric.values(counts, weights)


def test_right_pixels_give_one_and_others_less():
    true = drawn(0)
    assert value(true, true) == 1
    assert value(drawn(1), true) < 0.5


@pytest.mark.parametrize("ignored", [None, 2])
def test_it_is_the_value_of_torchmetrics(ignored):
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    true, predicted = drawn(0), drawn(1)
    half = torch.rand(true.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    predicted = torch.where(half, true, predicted)
    wanted = torchmetrics.functional.classification.multiclass_jaccard_index(
        predicted, true, CLASSES, average="none"
    )
    if ignored is None:
        assert value(predicted, true)[0] == pytest.approx(float(wanted.mean()))
        return
    kept = true != ignored
    wanted = torchmetrics.functional.classification.multiclass_jaccard_index(
        predicted[kept], true[kept], CLASSES, average="none"
    )
    assert value(predicted, true, ignored)[0] == pytest.approx(float(wanted.mean()))


def test_a_class_that_is_nowhere_is_left_out():
    true = drawn(0).clamp(max=1)
    assert value(true, true) == 1


def test_an_image_of_weight_two_counts_as_two_images():
    true, predicted = drawn(0), drawn(1)
    weights = np.array([[2.0, 0, 1, 0, 0, 3]])
    rows = [0, 0, 2, 5, 5, 5]
    assert value(predicted, true, weights=weights) == value(predicted[rows], true[rows])


def test_targets_of_another_shape_are_refused():
    with pytest.raises(OptionError, match=r"class numbers of shape \(n, …\), got"):
        MeanIoU().counts(torch.rand(2, 3, 4, 4), torch.zeros(2, 3, 4), None)
