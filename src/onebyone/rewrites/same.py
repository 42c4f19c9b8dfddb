"""What the rewrites that keep the function share: the options that do, and their plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from onebyone.profiling.trace import trace_layers
from onebyone.records import Cost, LeftAlone, Option, Plan
from onebyone.sites import Inputs, tensors_in

T = TypeVar("T")


def keeping(
    kept: Sequence[T],
    found: Sequence[T],
    why_changed: Callable[[Sequence[T]], str | None],
    site: Callable[[T], str],
) -> tuple[list[T], list[LeftAlone]]:
    """Return the candidates that together leave the outputs as they were, and why not the others.

    Sought by halves, for most networks have none of the others.

    Args:
        kept: Candidates that are carried out already.
        found: Those to try.
        why_changed: Says of candidates carried out together why the outputs changed.
        site: Says where a candidate is.
    """
    accepted = list(kept)
    rejected: list[LeftAlone] = []
    waiting = [list(found)]
    while waiting:
        group = waiting.pop()
        reason = why_changed([*accepted, *group])
        if reason is None:
            accepted += group
        elif len(group) == 1:
            rejected.append(LeftAlone(site=site(group[0]), reason=reason))
        else:
            half = len(group) // 2
            waiting += [group[half:], group[:half]]
    return accepted, rejected


def plan_of(
    model: nn.Module,
    inputs: Inputs,
    options: Sequence[Option],
    left_alone: Sequence[LeftAlone],
    *,
    name: str | None,
) -> Plan:
    """Return the plan of options that harm nothing, without a budget.

    Args:
        model: Not modified; a copy is run for its cost.
        inputs: An input.
        options: All are chosen.
        left_alone: What is not rewritten, and why.
        name: What to call the network; its class by default.
    """
    counted = trace_layers(model, inputs)
    before = Cost(params=counted.params, macs=counted.macs)
    after = before
    for option in options:
        after = after - option.saved
    return Plan(
        network=name or type(model).__name__,
        input_shape=tuple(next(tensors_in(inputs)).shape),
        budgets=(),
        before=before,
        after=after,
        choices=tuple(options),
        left_alone=tuple(left_alone),
        harm=0.0,
    )
