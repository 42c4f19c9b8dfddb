"""Masks of two segmenters, drawn to lie over their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from onebyone.core.records import LegendEntry, OutputPictures, PicturedOutput
from onebyone.evaluation.pictures.examples import Seen, address, reduced
from onebyone.report.masks import CLEAR, IGNORED, OTHERS, SIDE, STYLES, draw_mask, draw_sample

Integers = NDArray[np.int64]


def mask_pictures(
    begun: OutputPictures, seen: Sequence[Seen], classes: Sequence[str], ignored: int | None
) -> OutputPictures | None:
    """Return the masks of both networks, and the true ones.

    Args:
        begun: The record without examples.
        seen: Examples; the networks' outputs are scores ``(1, classes, height, width)``.
        classes: Names of the classes.
        ignored: The label of pixels that are not counted.

    Returns:
        The record; ``None`` if the outputs are no images of classes.
    """
    if any(each.before.ndim != 4 or each.after.shape != each.before.shape for each in seen):
        return None
    masks = [
        (_classes(each.before), _classes(each.after), _truth(each.target, each.before))
        for each in seen
    ]
    known = [mask for triple in masks for mask in triple if mask is not None]
    styles = _styles(known, ignored)
    examples = []
    for each, (before, after, truth) in zip(seen, masks, strict=True):
        outputs = [
            None if mask is None else PicturedOutput(picture=draw_mask(_styled(mask, styles)))
            for mask in (before, after, truth)
        ]
        first, second, true = outputs
        assert first is not None
        assert second is not None
        examples.append(
            each.pictured(
                first,
                second,
                true,
                image=address(reduced(each.image, SIDE)),
                changed=float((before != after).mean()),
            )
        )
    return replace(begun, examples=tuple(examples), legend=_legend(styles, classes, ignored))


def _classes(outputs: Tensor) -> Integers:
    mask: Integers = outputs[0].argmax(dim=0).numpy()
    return mask


def _truth(target: Tensor | None, outputs: Tensor) -> Integers | None:
    """Return the true classes of an example; ``None`` if its target is no mask of this size."""
    if target is None or target.is_floating_point() or target.shape[1:] != outputs.shape[2:]:
        return None
    mask: Integers = target[0].long().numpy()
    return mask


def _styles(masks: Sequence[Integers], ignored: int | None) -> Mapping[int, int]:
    """Return the style of each class that there is in these masks.

    The class with the most pixels is not drawn, because it is usually the background.
    """
    labels, counts = np.unique(np.concatenate([mask.ravel() for mask in masks]), return_counts=True)
    by_size = [int(label) for label in labels[np.argsort(-counts, kind="stable")]]
    named = [label for label in by_size if label != ignored]
    styles = dict.fromkeys(named[1 + STYLES :], OTHERS)
    styles |= {label: style for style, label in enumerate(sorted(named[1 : 1 + STYLES]))}
    styles |= dict.fromkeys(named[:1], CLEAR)
    return styles | dict.fromkeys(set(by_size) - set(named), IGNORED)


def _styled(mask: Integers, styles: Mapping[int, int]) -> Integers:
    labels, places = np.unique(mask, return_inverse=True)
    found: Integers = np.array([styles[int(label)] for label in labels])[places.reshape(mask.shape)]
    return found


def _legend(
    styles: Mapping[int, int], classes: Sequence[str], ignored: int | None
) -> tuple[LegendEntry, ...]:
    """Return how classes are drawn: the one that is not drawn comes first."""
    entries = []
    for label, style in sorted(styles.items(), key=lambda item: item[1]):
        named = classes[label] if 0 <= label < len(classes) else f"class {label}"
        if style == OTHERS:
            named = "all other classes"
        elif label == ignored:
            named = "not counted"
        sample = "" if style == CLEAR else draw_sample(style)
        entries.append(LegendEntry(name=named, sample=sample))
    return tuple(dict.fromkeys(entries))
