"""Mean average precision of detected boxes, matched by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebyone.core.errors import OptionError
from onebyone.core.set_metrics import Array, SetMetric

Detections = Mapping[str, Tensor]
"""What a detector found in one image: ``boxes`` ``(k, 4)``, ``scores`` and ``labels`` ``(k,)``."""

IOU_LEVELS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST_FOUND = 100  # detections of one class in one image that count, the most confident ones
SETS_AT_ONCE = 64  # which bounds the memory for resampled sets


@dataclass(frozen=True)
class Matches:
    """The detections of one class in one image.

    Attributes:
        objects: The number of true boxes.
        scores: Confidence of each detection, from the highest, shape ``(k,)``.
        hits: Whether a detection matches a true box, by level of overlap; ``(10, k)``.
    """

    objects: int
    scores: Array
    hits: NDArray[np.bool_]


@dataclass(frozen=True)
class MeanAveragePrecision(SetMetric):
    """COCO's mean average precision of boxes, averaged over overlaps of 0.50, 0.55, …, 0.95.

    pycocotools matches detections with true boxes in each image. Precision and recall are then
    computed as it does; so the value is the one that it would print.

    Args:
        decode: Makes what a network gives for ``n`` images into boxes, a mapping for each image:
            ``boxes`` ``(k, 4)`` as left, top, right and bottom, ``scores`` and ``labels`` ``(k,)``.
            For torchvision's detectors of one stage that is :meth:`onebyone.RawDetector.decode`.

    References:
        Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, and its evaluation code.
    """

    decode: Callable[[Any], Sequence[Detections]]
    name: str = "mAP"

    def __str__(self) -> str:
        return self.name

    def counts(
        self, outputs: Any, targets: Tensor, ignore_index: int | None
    ) -> list[dict[int, Matches]]:
        """Return each image's matches by class.

        Args:
            outputs: What the network gave.
            targets: True boxes, shape ``(n, most, 5)``: left, top, right, bottom and class; rows
                with a class below 0 only fill up.
            ignore_index: A class that is left out.
        """
        if targets.ndim != 3 or targets.shape[2] != 5:
            raise OptionError(
                "mAP needs targets of shape (n, most, 5): left, top, right, bottom and class of "
                f"each box, where a class of -1 fills up; got {tuple(targets.shape)}."
            )
        found = self.decode(outputs)
        if len(found) != len(targets):
            raise OptionError(
                f"`decode` must give the boxes of each of {len(targets)} images, got {len(found)}."
            )
        true = [rows[rows[:, 4] >= 0] for rows in targets.detach().cpu().double()]
        if ignore_index is not None:
            true = [rows[rows[:, 4] != ignore_index] for rows in true]
        return matches(found, true)

    def values(self, counts: Sequence[Any], weights: Array) -> Array:
        """Return the mAP of each set; 0 for a set without true boxes.

        A class that a set has no true box of is left out of its mean.
        """
        total, classes = np.zeros(len(weights)), np.zeros(len(weights))
        for label in sorted({label for image in counts for label in image}):
            known, precision = _average_precision([image.get(label) for image in counts], weights)
            total += np.where(known, precision, 0.0)
            classes += known
        return total / np.maximum(classes, 1)


def matches(found: Sequence[Detections], true: Sequence[Tensor]) -> list[dict[int, Matches]]:
    """Return each image's detections of each class, matched with the true boxes by pycocotools.

    Args:
        found: What was detected in each image.
        true: Left, top, right, bottom and class of each true box in each image, ``(k, 5)``.

    Raises:
        OptionError: If pycocotools is not installed.
    """
    evaluation = _evaluation(found, true)
    result: list[dict[int, Matches]] = [{} for _ in true]
    for each in evaluation.evalImgs:
        if each is not None:
            result[each["image_id"]][each["category_id"]] = Matches(
                objects=len(each["gtIds"]),
                scores=np.asarray(each["dtScores"], dtype=np.float64),
                hits=np.asarray(each["dtMatches"]) > 0,
            )
    return result


def _evaluation(found: Sequence[Detections], true: Sequence[Tensor]) -> Any:
    try:
        from pycocotools.coco import COCO  # noqa: PLC0415  # an extra
        from pycocotools.cocoeval import COCOeval  # noqa: PLC0415
    except ImportError as error:
        raise OptionError(
            "mAP needs pycocotools, which is not installed: pip install 'onebyone[detection]'."
        ) from error
    objects = [row for place, rows in enumerate(true) for row in _annotations(place, rows)]
    guesses = [
        row
        for place, each in enumerate(found)
        for row in _annotations(place, _rows(each), each["scores"])
    ]
    labels = sorted({row["category_id"] for row in (*objects, *guesses)})
    images = [{"id": place} for place in range(len(true))]
    categories = [{"id": label} for label in labels]
    tables = []
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        for rows in (objects, guesses):
            table = COCO()
            # It takes an identifier of 0 for no match.
            numbered = [{"id": place, **row} for place, row in enumerate(rows, start=1)]
            table.dataset = {"images": images, "categories": categories, "annotations": numbered}
            table.createIndex()
            tables.append(table)
        evaluation = COCOeval(*tables, iouType="bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.iouThrs, evaluation.params.maxDets = IOU_LEVELS, [MOST_FOUND]
        evaluation.evaluate()
    return evaluation


def _rows(found: Detections) -> Tensor:
    boxes, labels = found["boxes"].detach().cpu().double(), found["labels"].detach().cpu().double()
    return torch.cat([boxes.reshape(-1, 4), labels.reshape(-1, 1)], dim=1)


def _annotations(image: int, rows: Tensor, scores: Tensor | None = None) -> list[dict[str, Any]]:
    confident = [1.0] * len(rows) if scores is None else scores.detach().cpu().double().tolist()
    return [
        {
            "image_id": image,
            "category_id": int(label),
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": 0,
            "score": score,
        }
        for (left, top, right, bottom, label), score in zip(rows.tolist(), confident, strict=True)
    ]


def _average_precision(
    images: Sequence[Matches | None], weights: Array
) -> tuple[NDArray[np.bool_], Array]:
    """Return for each set whether it has objects of a class, and the class's average precision.

    An image that is in a set several times counts as so many images with the same detections.
    """
    objects = weights @ np.array([0 if one is None else one.objects for one in images])
    there = [(place, one) for place, one in enumerate(images) if one is not None]
    owners = np.concatenate([np.full(len(one.scores), place) for place, one in there])
    scores = np.concatenate([one.scores for _, one in there])
    hits = np.concatenate([one.hits for _, one in there], axis=1)
    order = np.argsort(-scores, kind="stable")
    owners, hits = owners[order], hits[:, order]
    known = objects > 0
    found = np.zeros(len(weights))
    if not len(order):
        return known, found
    for start in range(0, len(weights), SETS_AT_ONCE):
        part = slice(start, start + SETS_AT_ONCE)
        found[part] = _of_sets(hits, weights[part][:, owners], objects[part])
    return known, found


def _of_sets(hits: NDArray[np.bool_], weights: Array, objects: Array) -> Array:
    """Return the average precision of each set over the levels of overlap, shape ``(sets,)``."""
    said = np.cumsum(weights, axis=1)  # detections up to each
    total = np.zeros(len(weights))
    for level in hits:
        # Recall rises, and precision has its peaks, at the hits alone.
        places = np.flatnonzero(level)
        if not len(places):
            continue
        right, upto = np.cumsum(weights[:, places], axis=1), said[:, places]
        precision = np.divide(right, upto, out=np.zeros_like(right), where=upto > 0)
        # The highest precision at this recall or a higher one.
        highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for place in np.flatnonzero(objects > 0):
            reached = np.searchsorted(right[place] / objects[place], RECALLS, side="left")
            inside = reached[reached < right.shape[1]]
            total[place] += highest[place, inside].sum() / len(RECALLS)
    return total / len(hits)
