"""Boxes that two detectors find, and the true ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from onebyone.core.average_precision import Detections, MeanAveragePrecision
from onebyone.core.records import OutputPictures, PicturedBox, PicturedOutput
from onebyone.evaluation.pictures.examples import Seen, address, reduced

LARGEST = 240  # pixels a side of a picture
MOST = 15  # boxes in a picture
LEAST_CONFIDENCE = 0.5
LOWEST_CONFIDENCE = 0.05  # for an original that is seldom sure
_DIGITS = 4


def box_pictures(
    begun: OutputPictures,
    seen: Sequence[Seen],
    metric: MeanAveragePrecision,
    ignored: int | None,
) -> OutputPictures | None:
    """Return the boxes that both networks find, and the true ones.

    Args:
        begun: The record without examples.
        seen: Examples; the networks' outputs are what ``metric`` decodes.
        metric: Decodes outputs.
        ignored: A class that is left out of the true boxes.

    Returns:
        The record; ``None`` if inputs are no images.
    """
    if any(each.inputs.ndim != 4 for each in seen):
        return None
    sizes = [(int(each.inputs.shape[3]), int(each.inputs.shape[2])) for each in seen]
    found = [
        [_found(metric.decode(given)[0], size) for given in (each.before, each.after)]
        for each, size in zip(seen, sizes, strict=True)
    ]
    truths = [_truth(each.target, ignored, size) for each, size in zip(seen, sizes, strict=True)]
    wanted = sum(1 if truth is None else len(truth.boxes) for truth in truths)
    least = _least_confidence([box for before, _ in found for box in before], wanted)
    hidden, examples = 0, []
    for each, both, truth in zip(seen, found, truths, strict=True):
        sure = [[box for box in boxes if (box.confidence or 0) >= least] for boxes in both]
        hidden += sum(max(0, len(boxes) - MOST) for boxes in sure)
        before, after = (PicturedOutput(boxes=tuple(boxes[:MOST])) for boxes in sure)
        picture = address(reduced(each.image, LARGEST))
        examples.append(each.pictured(before, after, truth, image=picture))
    return replace(begun, examples=tuple(examples), least_confidence=least, hidden=hidden)


def _least_confidence(boxes: Sequence[PicturedBox], wanted: int) -> float:
    """Return from which confidence on boxes are shown.

    It is lower than usual for an original that is seldom sure: so low that it shows as many boxes
    as are wanted.

    Args:
        boxes: All that the original finds in the examples.
        wanted: The number of true boxes; one an image without labels.
    """
    sure = sorted((box.confidence or 0 for box in boxes), reverse=True)[:wanted]
    lowest = min([LEAST_CONFIDENCE, *sure])
    return max(LOWEST_CONFIDENCE, math.floor(100 * lowest) / 100)


def _found(detections: Detections, size: tuple[int, int]) -> list[PicturedBox]:
    """Return the boxes of one image that may be shown, the most confident first."""
    scores = detections["scores"].detach().float().cpu()
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= LOWEST_CONFIDENCE]
    boxes, labels = (detections[name].detach().cpu()[order] for name in ("boxes", "labels"))
    return [
        _box(corners, int(label), size, float(score))
        for corners, label, score in zip(boxes, labels, scores[order], strict=True)
    ]


def _truth(
    target: Tensor | None, ignored: int | None, size: tuple[int, int]
) -> PicturedOutput | None:
    """Return the true boxes of an example; ``None`` without labels."""
    if target is None or target.ndim != 3 or target.shape[2] != 5:
        return None
    rows = [row for row in target[0] if int(row[4]) >= 0 and int(row[4]) != ignored]
    return PicturedOutput(boxes=tuple(_box(row[:4], int(row[4]), size) for row in rows))


def _box(
    corners: Tensor, label: int, size: tuple[int, int], confidence: float | None = None
) -> PicturedBox:
    """Return a box with its edges as shares of the image's width and height."""
    width, height = size
    shares = corners.double() / torch.tensor([width, height, width, height])
    left, top, right, bottom = (round(share, _DIGITS) for share in shares.clamp(0, 1).tolist())
    return PicturedBox(
        left=left,
        top=top,
        right=max(left, right),
        bottom=max(top, bottom),
        label=label,
        confidence=None if confidence is None else round(min(confidence, 1.0), _DIGITS),
    )
