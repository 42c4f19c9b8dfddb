"""Pictures of what two networks give for test examples: masks, boxes or patches of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from onebyone.core.average_precision import MeanAveragePrecision
from onebyone.core.precision import float32_in
from onebyone.core.records import OutputPictures
from onebyone.core.tensor_trees import map_tensors
from onebyone.data import Split
from onebyone.evaluation.pictures.boxes import box_pictures
from onebyone.evaluation.pictures.examples import Seen, examples_at
from onebyone.evaluation.pictures.masks import mask_pictures
from onebyone.evaluation.pictures.patches import patch_pictures
from onebyone.evaluation.scores import Together, copies_to_score
from onebyone.networks.outputs import in_float32, the_one
from onebyone.networks.surgery import as_device, in_type_of, run

# Few, because nobody would look at more, and a report is one small file.
MOST_DIFFERENT = 3
AT_RANDOM = 3
SEED = 0

Chosen = tuple[int, Literal["most", "random"]]
Kind = Literal["masks", "boxes", "patches"]


@float32_in("float32")
def picture_outputs(
    before: nn.Module,
    after: nn.Module,
    split: Split,
    scored: Together,
    *,
    classes: Sequence[str] = (),
    device: str = "cpu",
) -> OutputPictures | None:
    """Return pictures of what both networks give for a few test examples.

    Args:
        before: Not modified.
        after: Not modified.
        split: The test data that was scored.
        scored: The scores of both, in that order.
        classes: Names of the classes.
        device: Where to run.

    Returns:
        The pictures; ``None`` if outputs are no masks, boxes or images, or inputs several tensors.
    """
    kind = kind_of(scored)
    if kind is None or not split.inputs.is_single:
        return None
    seen = _seen((before, after), split, scored, device)
    begun = OutputPictures(
        kind=kind,
        examples=(),
        scored=len(scored.counted),
        seed=SEED,
        metric=scored.each[0].metric if scored.labelled else "",
    )
    ignored = scored.meaning.ignore_index
    metric = _detections(scored)
    if metric is not None:
        return box_pictures(begun, seen, metric, ignored)
    if kind == "masks":
        return mask_pictures(begun, seen, classes, ignored)
    return patch_pictures(begun, seen)


def kind_of(scored: Together) -> Kind | None:
    """Return what outputs are drawn as; ``None`` if they are not."""
    meaning = scored.meaning
    if _detections(scored) is not None:
        return "boxes"
    if meaning.task.name == "segmentation":
        return "masks" if meaning.decides else None
    shows_images = meaning.task.name == "restoration" or scored.each[0].metric.lower() == "psnr"
    return "patches" if shows_images else None


def choose(scored: Together) -> list[Chosen]:
    """Return which scored examples to show, and why: positions among those that were scored.

    The most different ones come first: by the share of pixels in other classes for segmentation,
    and by the divergence for all else, and among equals.
    """
    apart = scored.apart[1][scored.counted]
    agrees = scored.each[1].agrees
    changed = np.zeros_like(apart) if agrees is None else 1 - agrees
    order = np.lexsort((-apart, -changed))
    most = order[:MOST_DIFFERENT]
    rest = np.sort(order[MOST_DIFFERENT:])
    count = min(AT_RANDOM, len(rest))
    drawn = np.sort(np.random.default_rng(SEED).choice(rest, count, replace=False))
    first: list[Chosen] = [(int(place), "most") for place in most]
    return first + [(int(place), "random") for place in drawn]


def _seen(networks: Sequence[nn.Module], split: Split, scored: Together, device: str) -> list[Seen]:
    """Return the chosen examples with what both networks give for them."""
    chosen = choose(scored)
    rows = [int(scored.counted[place]) for place, _ in chosen]
    copies = copies_to_score(list(networks), as_device(device))
    found = []
    for (place, why), row, (inputs, target) in zip(
        chosen, rows, examples_at(split, rows), strict=True
    ):
        before, after = (_given(network, inputs.to(device)) for network in copies)
        found.append(
            Seen(
                index=row,
                chosen=why,
                divergence=float(scored.apart[1][row]),
                scores=(_score(scored, 0, place), _score(scored, 1, place)),
                image=split.image(row),
                inputs=inputs,
                target=None if target is None else target.cpu(),
                before=before,
                after=after,
            )
        )
    return found


@torch.no_grad()
def _given(network: nn.Module, inputs: Tensor) -> Any:
    """Return a network's output for one example, on the CPU in float32."""
    given = in_float32(the_one(run(network, in_type_of(network, inputs))))
    return map_tensors(lambda tensor: tensor.cpu(), given)


def _score(scored: Together, network: int, place: int) -> float | None:
    """Return a network's score on one example; ``None`` without labels."""
    scores = scored.each[network]
    if not scored.labelled:
        return None
    if scores.pooled is not None:
        return float(scores.pooled.metric.each([scores.pooled.counts[place]])[0])
    return float(scores.scores[place])


def _detections(scored: Together) -> MeanAveragePrecision | None:
    pooled, metric = scored.each[0].pooled, scored.meaning.task.metric
    found = metric if pooled is None else pooled.metric
    return found if isinstance(found, MeanAveragePrecision) else None
