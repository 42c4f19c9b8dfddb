"""The test examples on which two networks disagree, as pictures with class activation maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onebyone.data import Split
from onebyone.evaluation import Together
from onebyone.layers import GlobalAverageHead
from onebyone.records import Disagreement
from onebyone.report.maps import data_uri, overlay
from onebyone.sites import hooks_removed, in_evaluation_mode

# More pictures would not be looked at.
MOST = 24


def find_disagreements(
    before: nn.Module,
    after: nn.Module,
    split: Split,
    scored: Together,
    *,
    device: str = "cpu",
    most: int = MOST,
) -> tuple[Disagreement, ...]:
    """Return test examples that the networks classify differently, the surest first.

    Args:
        before: Not modified.
        after: Not modified.
        split: The test data that was scored.
        scored: The scores of both, in that order.
        device: Where to run.
        most: How many to return at most.
    """
    first, second = scored.each
    targets = split.targets
    if first.predictions is None or second.predictions is None or targets is None:
        return ()
    if first.confidences is None or second.confidences is None:
        return ()
    differ = np.flatnonzero(first.predictions != second.predictions)
    sure = np.minimum(first.confidences[differ], second.confidences[differ])
    rows = [int(row) for row in differ[np.argsort(-sure)][:most]]
    inputs = _inputs(split, rows)
    maps = [class_maps(network, inputs, device=device) for network in (before, after)]
    found = []
    for place, row in enumerate(rows):
        predictions = (int(first.predictions[row]), int(second.predictions[row]))
        picture = split.image(row)
        found.append(
            Disagreement(
                index=row,
                label=int(targets[row]),
                before=predictions[0],
                after=predictions[1],
                image="" if picture is None else data_uri(picture),
                maps=_overlays(
                    picture, [None if m is None else m[place] for m in maps], predictions
                ),
            )
        )
    return tuple(found)


def _inputs(split: Split, rows: list[int]) -> Tensor:
    """Return the inputs of those rows, in that order."""
    wanted = {row: place for place, row in enumerate(rows)}
    kept: dict[int, Tensor] = {}
    start = 0
    for inputs, _ in split.batches(250):
        for row in wanted.keys() & set(range(start, start + len(inputs))):
            kept[wanted[row]] = inputs[row - start]
        start += len(inputs)
    return torch.stack([kept[place] for place in range(len(rows))]) if rows else torch.empty(0)


def class_maps(network: nn.Module, inputs: Tensor, *, device: str = "cpu") -> list[Tensor] | None:
    """Return the class maps ``(classes, height, width)`` of each input, exact ones only.

    Args:
        network: Not modified. Its maps are known if it ends in a global average of class maps.
        inputs: Shape ``(n, channels, height, width)``.
        device: Where to run.

    Returns:
        A map for each input, or ``None`` where the network has no such head.
    """
    heads = [m for m in network.modules() if isinstance(m, GlobalAverageHead)]
    if len(heads) != 1 or not len(inputs):
        return None
    runnable = in_evaluation_mode(network, device=device)
    head = next(m for m in runnable.modules() if isinstance(m, GlobalAverageHead))
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, GlobalAverageHead)
        seen.append(module.class_maps(args[0]).float().cpu())

    with hooks_removed([head.register_forward_pre_hook(keep)]), torch.inference_mode():
        runnable(inputs.to(device))
    return list(seen[0])


def _overlays(
    picture: Any, maps: list[Tensor | None], predictions: tuple[int, int]
) -> tuple[str, ...]:
    if picture is None:
        return ()
    image = np.moveaxis(np.asarray(picture, dtype=np.float64), -1, 0)
    return tuple(
        data_uri(overlay(image, each[prediction].numpy()))
        for each, prediction in zip(maps, predictions, strict=True)
        if each is not None
    )
