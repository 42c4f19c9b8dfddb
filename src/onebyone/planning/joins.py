"""Joins: what is saved where two neighbors both compute in int8, as options of their own.

That saving is a product of two choices. A join may be picked only if an int8 option of each of its
ends is: the plan stays a linear problem in whole numbers, and is solved exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onebyone.core.records import Option, Step
from onebyone.planning.exact_search import AtLeast

# Steps that no rewrite carries out: the precision of a site, a join, a sum in int8, and a link.
INT8, JOIN, SUM, LINK = "int8", "join", "sum", "link"
_OWN = frozenset({INT8, JOIN, SUM, LINK})


def is_int8(option: Option) -> bool:
    """Whether an option computes its site in int8."""
    return option.steps[-1].rewrite == INT8


def is_own(option: Option) -> bool:
    """Whether an option is no site's: a join, a sum in int8, or a link."""
    return option.first.rewrite in (JOIN, SUM, LINK)


def rewrites_of(option: Option) -> tuple[Step, ...]:
    """Return the steps that change the network's structure."""
    return tuple(step for step in option.steps if step.rewrite not in _OWN)


def rows_of(options: Sequence[Option]) -> list[AtLeast]:
    """Return the bounds by which joins and sums are picked only with what they need."""
    places: dict[str, list[int]] = {}
    for place, option in enumerate(options):
        if is_int8(option) or option.first.rewrite == SUM:
            places.setdefault(option.site, []).append(place)
    rows = []
    for place, option in enumerate(options):
        for needed in _needs(option):
            amounts = [0] * len(options)
            amounts[place] = -1
            for other in places.get(needed, ()):
                amounts[other] = 1
            rows.append(AtLeast(tuple(amounts), 0))
    return rows


def completed(options: Sequence[Option], picked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a choice with all joins and sums that what is picked allows: they cost nothing."""
    picked = picked.copy()
    chosen = {o.site for o, take in zip(options, picked, strict=True) if take and is_int8(o)}
    while True:
        before = len(chosen)
        for place, option in enumerate(options):
            if option.first.rewrite in (JOIN, SUM) and all(
                name in chosen for name in _needs(option)
            ):
                picked[place] = True
                chosen.add(option.site)
        if len(chosen) == before:
            return picked


def _needs(option: Option) -> tuple[str, ...]:
    if option.first.rewrite == JOIN:
        return str(option.first.settings["first"]), str(option.first.settings["second"])
    if option.first.rewrite == SUM:
        return tuple(str(option.first.settings["inputs"]).split("\n"))
    return ()
