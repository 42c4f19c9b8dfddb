"""The test examples on which two networks disagree, as pictures with class activation maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onebyone.core.records import ClassCount, ConfusedPair, Confusion, Disagreement
from onebyone.data import Split
from onebyone.evaluation.class_maps import exact_class_maps
from onebyone.evaluation.pictures.examples import Pixels, address, examples_at, reduced
from onebyone.evaluation.scores import Together
from onebyone.report.pictures import overlay

Integers = NDArray[np.int64]

# Nobody would look at more pictures.
MOST = 24
# Most pixels a side of a kept picture. Larger photographs would outweigh the rest of the report.
LARGEST = 160
# Keeps a record small with a thousand classes: of more, only the most informative ones are kept.
MOST_CLASSES = 100
MOST_PAIRS = 150


def find_disagreements(
    before: nn.Module,
    after: nn.Module,
    split: Split,
    scored: Together,
    *,
    device: str = "cpu",
    most: int = MOST,
) -> tuple[Disagreement, ...]:
    """Return test examples that two networks classify differently, the most confident first.

    Args:
        before: Not modified.
        after: Not modified.
        split: The test data that was scored.
        scored: The scores of both, in that order.
        device: Where to run.
        most: The largest number to return.
    """
    first, second = scored.each
    targets = split.targets
    if first.predictions is None or second.predictions is None or targets is None:
        return ()
    if first.confidences is None or second.confidences is None:
        return ()
    differ = np.flatnonzero(first.predictions != second.predictions)
    sure = np.minimum(first.confidences[differ], second.confidences[differ])
    chosen = differ[np.argsort(-sure)][:most]
    rows = [int(row) for row in scored.counted[chosen]]
    maps: list[Tensor | None] = [None, None]
    if rows and split.inputs.is_single:  # of several inputs, a map could belong to any
        inputs = torch.cat([each for each, _ in examples_at(split, rows)]).to(device)
        maps = [_class_maps(network, inputs) for network in (before, after)]
    found = []
    for place, (index, row) in enumerate(zip(chosen, rows, strict=True)):
        predictions = (int(first.predictions[index]), int(second.predictions[index]))
        picture = reduced(split.image(row), LARGEST)
        found.append(
            Disagreement(
                index=row,
                label=int(targets[row]),
                before=predictions[0],
                after=predictions[1],
                image=address(picture),
                maps=_overlays(
                    picture, [None if m is None else m[place] for m in maps], predictions
                ),
            )
        )
    return tuple(found)


def count_confusions(split: Split, scored: Together) -> Confusion | None:
    """Count for each class what two networks classify correctly, and which classes they confuse.

    Args:
        split: The test data that was scored.
        scored: The scores of both, in that order.

    Returns:
        The counts; ``None`` if the networks are no classifiers or the targets no classes.
    """
    first, second = scored.each
    if first.predictions is None or second.predictions is None or split.targets is None:
        return None
    targets = split.targets.numpy()[scored.counted]
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
        return None
    predicted = [first.predictions, second.predictions]
    classes = int(max(targets.max(), *(each.max() for each in predicted))) + 1
    counts = _class_counts(targets, predicted, classes)
    pairs = _confused_pairs(targets, predicted, classes)
    return Confusion(
        classes=classes,
        counts=counts,
        pairs=pairs[:MOST_PAIRS],
        pairs_left_out=max(0, len(pairs) - MOST_PAIRS),
    )


def _class_counts(
    targets: Integers, predicted: Sequence[Integers], classes: int
) -> tuple[ClassCount, ...]:
    n = np.bincount(targets, minlength=classes)
    right = [np.bincount(targets[each == targets], minlength=classes) for each in predicted]
    kept = np.flatnonzero(n)
    if len(kept) > MOST_CLASSES:
        change = np.abs(right[1] - right[0])[kept]
        kept = np.sort(kept[np.argsort(-change, kind="stable")][:MOST_CLASSES])
    return tuple(
        ClassCount(label=int(c), n=int(n[c]), before=int(right[0][c]), after=int(right[1][c]))
        for c in kept
    )


def _confused_pairs(
    targets: Integers, predicted: Sequence[Integers], classes: int
) -> tuple[ConfusedPair, ...]:
    """Return all confused pairs, the most frequent first."""
    found: dict[int, list[int]] = {}
    for side, each in enumerate(predicted):
        wrong = each != targets
        codes, counts = np.unique(targets[wrong] * classes + each[wrong], return_counts=True)
        for code, count in zip(codes, counts, strict=True):
            found.setdefault(int(code), [0, 0])[side] = int(count)
    ordered = sorted(found.items(), key=lambda item: (-max(item[1]), -sum(item[1]), item[0]))
    return tuple(
        ConfusedPair(label=code // classes, predicted=code % classes, before=before, after=after)
        for code, (before, after) in ordered
    )


def _class_maps(network: nn.Module, inputs: Tensor) -> Tensor | None:
    """Return maps ``(n, classes, height, width)`` of scores minus the mean over classes."""
    exact = exact_class_maps(network, inputs)
    if exact is None:
        return None
    # Softmax depends only on differences of scores.
    return (exact.maps - exact.maps.mean(dim=1, keepdim=True)).float().cpu()


def _overlays(
    picture: Pixels | None, maps: list[Tensor | None], predictions: tuple[int, int]
) -> tuple[str, ...]:
    """Return each network's map of its predicted class, as a URL; empty if it has none."""
    if picture is None or all(each is None for each in maps):
        return ()
    image = np.moveaxis(np.asarray(picture, dtype=np.float64), -1, 0)
    return tuple(
        "" if each is None else address(overlay(image, each[prediction].numpy()))
        for each, prediction in zip(maps, predictions, strict=True)
    )
