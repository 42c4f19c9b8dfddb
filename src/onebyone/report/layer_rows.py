"""Matches the layers before and after the rewrites by name, as rows of the network's picture."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from onebyone.core.records import LayerCost, LeftAlone, Option, Plan, Profile, Settings, Step

GROUPED_ABOVE = 40  # rows are grouped only above this number
_MOST_GROUPS = 24
_BLOCK = 20  # rows of a group if the names suggest no groups

Quantity = Literal["ms", "macs"]


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A position in the network, before and after; layers that a rewrite joins are one row.

    Attributes:
        index: Its position in the order of execution.
        options: The options chosen here. Rewrites of the layers that the first one makes follow.
        left_alone: Sites that the plan skipped here, and why.
        before: Layers of the original network.
        after: Layers that replace them.
    """

    index: int
    name: str
    options: tuple[Option, ...]
    left_alone: tuple[LeftAlone, ...]
    before: tuple[LayerCost, ...]
    after: tuple[LayerCost, ...]

    @property
    def rewrite(self) -> str:
        """Name of the first rewrite of its layers, or ``alone``."""
        return self.options[0].first.rewrite if self.options else "alone"

    def rewrite_of(self, layer: LayerCost) -> str:
        """Return the name of the rewrite that made a layer, or ``alone``."""
        inner = [option for option in self.options[1:] if _is_within(layer.name, option.site)]
        if not inner:
            return self.rewrite
        return max(inner, key=lambda option: len(option.site)).first.rewrite


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Consecutive rows whose names have the same start."""

    name: str
    rows: tuple[LayerRow, ...]


@dataclass
class _Draft:
    before: list[LayerCost] = field(default_factory=list)
    after: list[LayerCost] = field(default_factory=list)


def match_layers(before: Profile, after: Profile | None, plan: Plan | None) -> list[LayerRow]:
    """Return the rows in the order of execution.

    A layer belongs to the option whose site, or occupied module, is the longest prefix of its name;
    otherwise to the layer of the same name. So ``site.reduce`` and ``site.expand`` are in one row
    with the ``site`` that they replace.
    """
    owners = _owners(plan)
    drafts: dict[str, _Draft] = defaultdict(_Draft)
    for layer in before.layers:
        drafts[_owner(layer.name, owners)].before.append(layer)
    order = list(drafts)
    last = -1
    for layer in after.layers if after else ():
        name = _owner(layer.name, owners)
        if name not in drafts:
            order.insert(last + 1, name)
        drafts[name].after.append(layer)
        last = order.index(name)
    options: dict[str, list[Option]] = defaultdict(list)
    for option in sorted(plan.choices, key=lambda o: len(o.site)) if plan else ():
        options[_owner(option.site, owners)].append(option)
    alone: dict[str, list[LeftAlone]] = defaultdict(list)
    for item in plan.left_alone if plan else ():
        alone[_owner(item.site, owners)].append(item)
    return [
        LayerRow(
            index=index,
            name=name or "(root)",
            options=tuple(options[name]),
            left_alone=tuple(alone[name]),
            before=tuple(drafts[name].before),
            after=tuple(drafts[name].after),
        )
        for index, name in enumerate(order)
    ]


def _owners(plan: Plan | None) -> dict[str, str]:
    """Return the site whose rewrite replaces each module, by module name.

    A site inside another one, such as a layer of the new head, belongs to that one.
    """
    owners: dict[str, str] = {}
    for option in sorted(plan.choices, key=lambda o: len(o.site)) if plan else ():
        outer = _owner(option.site, owners) if owners else option.site
        for module in (*option.occupies, option.site):
            owners.setdefault(module, outer)
    return owners


def _is_within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _owner(name: str, owners: dict[str, str]) -> str:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        beginning = ".".join(parts[:length])
        if beginning in owners:
            return owners[beginning]
    return owners.get("", name)


# ---------------------------------------------------------------- what the bars measure


def bar_quantity(rows: Sequence[LayerRow]) -> Quantity:
    """Return the quantity to draw: times if both networks have them, else multiply-accumulates."""
    before = any(layer.timing for row in rows for layer in row.before)
    after_layers = [layer for row in rows for layer in row.after]
    after = any(layer.timing for layer in after_layers) or not after_layers
    return "ms" if before and after else "macs"


def amount(layers: Iterable[LayerCost], quantity: Quantity) -> float:
    """Return the layers' milliseconds or multiply-accumulates; a layer not timed counts as 0."""
    if quantity == "macs":
        return float(sum(layer.macs for layer in layers))
    return sum(layer.timing.median_ms for layer in layers if layer.timing)


# ---------------------------------------------------------------- groups


def group_layers(rows: Sequence[LayerRow]) -> list[LayerGroup]:
    """Return rows in groups by the start of their names, so that 200 rows stay readable.

    Uses the shortest prefixes that give at least three groups, but not too many. If the names
    suggest no groups, uses blocks of equal length.
    """
    for depth in (1, 2, 3):
        groups = _by_beginning(rows, depth)
        if 3 <= len(groups) <= _MOST_GROUPS:
            return groups
    return [
        LayerGroup(
            name=f"{block[0].name} … {block[-1].name}",
            rows=tuple(block),
        )
        for block in (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))
    ]


def _by_beginning(rows: Sequence[LayerRow], depth: int) -> list[LayerGroup]:
    runs = itertools.groupby(rows, lambda row: _beginning(row.name, depth))
    return [LayerGroup(name=name, rows=tuple(members)) for name, members in runs]


def _beginning(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def step_words(step: Step) -> str:
    """Return a step with its settings' names: ``factorize: form tucker2; ranks 8, 12``."""
    settings = settings_words(step.settings)
    return f"{step.rewrite}: {settings}" if settings else step.rewrite


def settings_words(settings: Settings) -> str:
    """Return settings with their names: ``form tucker2, ranks 8, 12``."""
    return "; ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in settings.items()
    )
