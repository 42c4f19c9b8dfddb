"""The options of a network's head: the exact one, and averaging heads fitted to the data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, cast

import numpy as np
from torch import nn

from onebyone.calibration.inputs import CalibrationData
from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import ModelError, PlanError
from onebyone.core.records import LeftAlone, Option
from onebyone.core.tensor_trees import Inputs, only_tensor
from onebyone.networks.layers import GlobalAverageHead
from onebyone.planning.applicability import HEAD
from onebyone.rewrites.apply import head_data
from onebyone.rewrites.head import rewrite as head
from onebyone.rewrites.head.fit import fit_gap

HeadChoice = Literal["auto", "keep", "exact", "gap"]
# Share of the calibration data that an averaging head is judged by, not fitted to.
HELD_OUT = 0.25
# Widths of such a head, from which a trend of its harm is drawn.
FEWEST_FOR_TREND = 3


def with_exact_head(
    base: nn.Module,
    example: Inputs,
    site: head.HeadSite,
    choice: HeadChoice,
    notes: list[LeftAlone],
) -> nn.Module | None:
    """Return the network with its head as convolutions, or note why it would not be the same."""
    try:
        network = head.rewrite(
            base,
            only_tensor(example, "The rewrite 'head'"),
            name=site.name,
            form="exact",
            hidden=[],
        )
    except PlanError as error:
        if choice == "exact":
            raise
        notes.append(LeftAlone(site=HEAD, reason=str(error).rstrip(".")))
        return None
    if site.note:
        notes.append(LeftAlone(site=HEAD, reason=site.note))
    return network


def exact_option(site: head.HeadSite) -> Option:
    """Return the head as convolutions, which harms nothing."""
    return Option.of(
        "head",
        {"form": "exact"},
        site=site.name,
        before=site.cost,
        after=head.cost(site, "exact", []),
        occupies=site.occupies,
        error=0.0,
        harm=0.0,
    )


def gap_options(site: head.HeadSite, inside: tuple[str, ...]) -> list[Option]:
    """Return an averaging head of each width and context, by its cost alone.

    Args:
        site: The head.
        inside: Names of the sites that an averaging head leaves no room for.
    """
    options = []
    for settings in head.gap_settings(site.channels):
        _, hidden, context = head.form_and_widths(settings, site=site.name)
        options.append(
            Option.of(
                "head",
                settings,
                site=site.name,
                before=site.cost,
                after=head.cost(site, "gap", hidden, context),
                occupies=tuple(dict.fromkeys((*site.occupies, *inside))),
            )
        )
    return options


def head_site(
    network: nn.Module, example: Inputs, choice: HeadChoice, notes: list[LeftAlone]
) -> head.HeadSite | None:
    """Return the head, if it is to be rewritten and can be; otherwise note why not."""
    if choice == "keep":
        return None
    found = head.of_inputs(network, example)
    if isinstance(found, head.NoHead):
        reason = found.reason
    else:
        refusal = None if choice == "exact" else head.why_not(found, "gap")
        if refusal is None:
            return found
        reason = refusal
    if choice != "auto":
        raise ModelError(
            f"The head of {type(network).__name__} cannot be rewritten as {choice!r}: {reason}."
        )
    notes.append(LeftAlone(site=HEAD, reason=reason))
    return None


def fit_heads(
    options: Sequence[Option],
    site: head.HeadSite,
    base: nn.Module,
    example: Inputs,
    *,
    data: CalibrationData,
    meaning: Meaning,
) -> list[Option]:
    """Fit and measure averaging heads.

    Args:
        options: Each such head.
        site: The head as it was.
        base: The network with that head.
        example: An input.
        data: What they are fitted to.
        meaning: What the outputs mean.

    Raises:
        ModelError: If none of them can be fitted.
    """
    network = head.rewrite(
        base, only_tensor(example, "The rewrite 'head'"), name=site.name, form="gap", hidden=[]
    )
    features, targets = head_data(network, base, site.name, data)
    classes = site.linears[-1].out_features
    failed: list[ModelError] = []

    def tried(option: Option) -> list[Option]:
        _, hidden, context = head.form_and_widths(option.first.settings, site=site.name)
        new = GlobalAverageHead(site.channels, classes, hidden, context=context)
        # Of what they learned from, heads of many parameters remember more than they know.
        try:
            harm = fit_gap(
                new,
                features,
                targets,
                part=meaning.parts[0],
                linear=site.linears[0],
                held_out=HELD_OUT,
            )
        except ModelError as error:
            failed.append(error)
            return []
        return [replace(option, harm=harm, measured=True)]

    found = [each for group in _by_context(options) for each in _judged(group, tried)]
    if failed and not found:
        raise failed[0]
    return found


def _by_context(options: Sequence[Option]) -> list[list[Option]]:
    """Return the heads with hidden channels in groups of one context each, all others alone."""
    groups: dict[object, list[Option]] = defaultdict(list)
    for option in options:
        settings = option.first.settings
        groups[settings.get("context", 0) if settings["hidden"] else id(option)].append(option)
    return list(groups.values())


def _judged(group: list[Option], tried: Callable[[Option], list[Option]]) -> list[Option]:
    """Return heads that differ in their width alone, with their harm.

    Three of them tell the trend: the narrowest, the widest and the one between. The others are
    fitted too where there is no trend.

    Args:
        group: The heads.
        tried: Fits a head; returns it with its harm, or nothing where it cannot be fitted.
    """
    widths = sorted(group, key=_width)
    few = {id(widths[0]), id(widths[len(widths) // 2]), id(widths[-1])}
    first = [found for option in group if id(option) in few for found in tried(option)]
    others = [option for option in group if id(option) not in few]
    if (trend := _trend(first)) is None:
        found = first + [each for option in others for each in tried(option)]
        if (trend := _trend(found)) is None:
            return found
    else:
        found = first + others
    return [
        replace(option, harm=trend(_width(option)), measured=False)
        for option in sorted(found, key=_width)
    ]


def _trend(options: Sequence[Option]) -> Callable[[int], float] | None:
    """Return the harm that a width is expected to have, or ``None`` where no trend shows.

    A wider head can do what a narrower one does, but fits of some hundred steps scatter by several
    percent, more than a step of width is worth: of neighbors the plan would take one by luck.
    A line through the logarithms tells them apart, if it falls.
    """
    if len(options) < FEWEST_FOR_TREND or not all(option.harm for option in options):
        return None
    widths = np.log([_width(option) for option in options])
    harms = np.log([cast("float", option.harm) for option in options])
    slope, level = np.polyfit(widths, harms, 1)
    return (lambda width: float(np.exp(level + slope * np.log(width)))) if slope < 0 else None


def _width(option: Option) -> int:
    hidden = cast("list[int]", option.first.settings["hidden"])
    return hidden[0] if hidden else 0
