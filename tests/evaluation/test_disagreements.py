"""Confusions are counts of the predictions themselves; pictures stay small."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from onebyone.data import as_split
from onebyone.evaluation.disagreements import (
    LARGEST,
    MOST_CLASSES,
    MOST_PAIRS,
    count_confusions,
    find_disagreements,
)
from onebyone.evaluation.scores import score
from onebyone.networks.layers import GlobalAverageHead


class Told(nn.Module):
    """Predicts the classes that it is told, by the number that the input holds."""

    def __init__(self, predictions, classes):
        super().__init__()
        self.register_buffer("scores", torch.eye(classes)[torch.as_tensor(predictions)])

    def forward(self, x):
        return self.scores[x[:, 0, 0, 0].long()]


def told(targets, predictions, classes):
    """Return the data, and two networks that predict what is given, scored on it."""
    inputs = torch.arange(len(targets), dtype=torch.float32).reshape(-1, 1, 1, 1).repeat(1, 1, 3, 5)
    split = as_split((inputs, torch.as_tensor(targets)))
    return split, score([Told(each, classes) for each in predictions], split)


def drawn(classes, n, seed=0):
    random = np.random.default_rng(seed)
    targets = random.integers(0, classes, n)
    predictions = [
        np.where(random.random(n) < 0.6, targets, random.integers(0, classes, n)) for _ in range(2)
    ]
    return targets, predictions


def test_counts_and_pairs_are_the_predictions_own():
    targets, predictions = drawn(7, 400)
    found = count_confusions(*told(targets, predictions, 7))
    assert found.classes == 7
    assert found.pairs_left_out == 0
    matrices = np.zeros((2, 7, 7), int)
    for side, each in enumerate(predictions):
        np.add.at(matrices[side], (targets, each), 1)
    for count in found.counts:
        assert count.n == (targets == count.label).sum()
        assert (count.before, count.after) == tuple(matrices[:, count.label, count.label])
    for pair in found.pairs:
        assert (pair.before, pair.after) == tuple(matrices[:, pair.label, pair.predicted])
        matrices[:, pair.label, pair.predicted] = 0
    assert matrices.sum() == sum(count.before + count.after for count in found.counts)
    most = [max(pair.before, pair.after) for pair in found.pairs]
    assert most == sorted(most, reverse=True)


def test_of_a_thousand_classes_those_that_tell_most_are_kept():
    targets, predictions = drawn(1000, 6000)
    lost = targets == 321
    predictions[0][lost], predictions[1][lost] = 321, 5  # all of one class are lost to another
    found = count_confusions(*told(targets, predictions, 1000))
    assert (len(found.counts), len(found.pairs)) == (MOST_CLASSES, MOST_PAIRS)
    assert (found.pairs[0].label, found.pairs[0].predicted) == (321, 5)
    assert 321 in [count.label for count in found.counts]
    wrong = np.unique(
        np.concatenate([targets[p != targets] * 1000 + p[p != targets] for p in predictions])
    )
    assert found.pairs_left_out == len(wrong) - MOST_PAIRS
    assert len(found.to_json()) < 25_000


def test_targets_that_are_no_classes_are_not_counted():
    split = as_split((torch.rand(9, 2, 3, 5), torch.rand(9, 2)))
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(30, 2)) for _ in range(2)]
    scored = score(networks, split, metric=lambda y, t: -(y - t).square().mean(1))
    assert count_confusions(split, scored) is None


def decoded(address):
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


@pytest.mark.parametrize(("size", "kind"), [((28, 20), "PNG"), ((300, 220), "JPEG")])
def test_pictures_are_small_and_small_ones_exact(size, kind):
    torch.manual_seed(0)
    inputs = torch.randint(0, 256, (40, 3, *size), dtype=torch.uint8)
    split = as_split((inputs, torch.randint(0, 3, (40,))))
    networks = [nn.Sequential(nn.Conv2d(3, 4, 3), GlobalAverageHead(4, 3)) for _ in range(2)]
    for favorite, network in enumerate(networks):
        list(network.parameters())[-1].data[favorite] += 10  # the bias of the scores
    scored = score(networks, split)
    found = find_disagreements(*networks, split, scored, most=5)
    assert 0 < len(found) <= 5
    for item in found:
        assert item.before != item.after
        assert len(item.maps) == 2
        for address in (item.image, *item.maps):
            picture = decoded(address)
            assert picture.format == kind
            assert max(picture.size) == min(max(size), LARGEST)
    if kind == "PNG":
        shown = np.asarray(decoded(found[0].image))
        assert np.array_equal(shown, inputs[found[0].index].numpy().transpose(1, 2, 0))


def pictured(*networks):
    """Return the disagreements of two networks made to disagree."""
    torch.manual_seed(0)
    split = as_split((torch.rand(12, 3, 20, 28), torch.randint(0, 3, (12,))))
    for favorite, network in enumerate(networks):
        list(network.parameters())[-1].data[favorite] += 10
    return find_disagreements(*networks, split, score(list(networks), split), most=3)


def averaged_features():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def flattened():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 18 * 26, 3))


def test_averaged_features_have_maps_and_flattened_ones_have_none():
    both = pictured(averaged_features(), averaged_features())
    assert both
    assert all(len(item.maps) == 2 and all(item.maps) for item in both)
    one = pictured(flattened(), averaged_features())
    assert one
    assert all([bool(each) for each in item.maps] == [False, True] for item in one)
    assert all(item.maps == () for item in pictured(flattened(), flattened()))
