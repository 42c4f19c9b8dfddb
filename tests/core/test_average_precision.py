"""mAP: pycocotools' matches, and the value of torchmetrics."""

import sys

import numpy as np
import pytest
import torch

from onebyone.core.average_precision import IOU_LEVELS, RECALLS, MeanAveragePrecision
from onebyone.core.errors import OptionError

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

IMAGES, MOST = 8, 5


def scenes(seed):
    """Return true boxes ``(n, most, 5)``; some images have fewer, one has none."""
    generator = torch.Generator().manual_seed(seed)
    corner = 60 * torch.rand(IMAGES, MOST, 2, generator=generator)
    sides = 40 + 30 * torch.rand(IMAGES, MOST, 2, generator=generator)
    labels = torch.randint(1, 4, (IMAGES, MOST, 1), generator=generator).float()
    boxes = torch.cat([corner, corner + sides, labels], dim=2)
    for image in range(IMAGES):
        boxes[image, image % (MOST + 1) :] = -1
    return boxes


def as_found(boxes, noise=0.0, seed=0):
    """Return detections at true boxes, moved at random, in some with another class."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows in boxes:
        real = rows[rows[:, 4] >= 0]
        moved = real[:, :4] + noise * torch.randn(len(real), 4, generator=generator)
        scores = torch.rand(len(real), generator=generator)
        labels = real[:, 4].long()
        if noise:
            labels = torch.where(scores < 0.2, labels % 3 + 1, labels)
        found.append({"boxes": moved, "scores": scores, "labels": labels})
    return found


def value(found, boxes, weights=None):
    metric = MeanAveragePrecision(lambda outputs: outputs)
    weights = np.ones((1, len(boxes))) if weights is None else weights
    return metric.values(metric.counts(found, boxes, None), weights)[0]


def test_perfect_boxes_give_one_and_those_of_other_images_less():
    boxes = scenes(0)
    found = as_found(boxes)
    assert value(found, boxes) == pytest.approx(1)
    assert value(found[1:] + found[:1], boxes) < 0.3


def test_boxes_that_are_nowhere_lower_it_and_no_boxes_give_zero():
    boxes = scenes(0)
    found = as_found(boxes)
    for each in found:
        each["boxes"] = torch.cat([each["boxes"], torch.tensor([[0.0, 0, 99, 99]])])
        each["scores"] = torch.cat([each["scores"], torch.tensor([2.0])])
        each["labels"] = torch.cat([each["labels"], torch.tensor([1])])
    assert value(found, boxes) < 0.95
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    assert value([none] * IMAGES, boxes) == 0
    assert value([none] * IMAGES, torch.full_like(boxes, -1)) == 0


@pytest.mark.parametrize("noise", [1.0, 3.0, 7.0])
def test_it_is_the_value_of_torchmetrics(noise):
    detection = pytest.importorskip(
        "torchmetrics.detection", reason="torchmetrics is not installed"
    )
    boxes = scenes(1)
    found = as_found(boxes, noise)
    # Its own levels are rounded to float32, which moves some recalls across them.
    metric = detection.MeanAveragePrecision(
        iou_thresholds=IOU_LEVELS.tolist(), rec_thresholds=RECALLS.tolist()
    )
    real = [rows[rows[:, 4] >= 0] for rows in boxes]
    metric.update(found, [{"boxes": r[:, :4], "labels": r[:, 4].long()} for r in real])
    assert value(found, boxes) == pytest.approx(float(metric.compute()["map"]), abs=1e-6)
    assert 0 < value(found, boxes) < 1


def test_an_image_of_weight_two_counts_as_two_images():
    boxes = scenes(2)
    found = as_found(boxes, 4.0)
    weights = np.array([[1.0, 2, 0, 0, 3, 1, 1, 0]])
    rows = [place for place, count in enumerate(weights[0]) for _ in range(int(count))]
    repeated = value([found[row] for row in rows], boxes[rows])
    assert value(found, boxes, weights) == pytest.approx(repeated, abs=1e-12)


def test_a_class_that_is_left_out_does_not_count():
    boxes = scenes(0)
    metric = MeanAveragePrecision(lambda outputs: outputs)
    counts = metric.counts(as_found(boxes), boxes, 2)
    assert sum(image[2].objects for image in counts if 2 in image) == 0


def test_what_it_cannot_use_is_refused_with_what_to_do(monkeypatch):
    metric = MeanAveragePrecision(lambda outputs: outputs)
    with pytest.raises(OptionError, match=r"shape \(n, most, 5\).*got \(2, 4\)"):
        metric.counts([], torch.zeros(2, 4), None)
    with pytest.raises(OptionError, match="boxes of each of 8 images, got 1"):
        metric.counts(as_found(scenes(0))[:1], scenes(0), None)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(OptionError, match=r"pip install 'onebyone\[detection\]'"):
        metric.counts(as_found(scenes(0)), scenes(0), None)
