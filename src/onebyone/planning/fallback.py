"""Plans in int8 that measurements show to be slower than doing less."""

from __future__ import annotations

from dataclasses import replace

from onebyone.core.records import LeftAlone, Plan
from onebyone.core.units import capitalized
from onebyone.planning.latency.planner import Deployed


def never_slower_in_int8(
    made: Plan, deployed: Deployed, *, fastest: bool, alone_harm: float = 0.0
) -> Plan:
    """Return an int8 plan, or the faster of the original in int8 and in float32.

    A plan for speed alone keeps its rewrites unless its network was measured to be slower than the
    original in int8, and int8 unless that was measured to be slower than the original in float32.
    A plan that has to make the network smaller, too, keeps them, and its notes say what they cost.

    Args:
        made: Measured. Not modified.
        deployed: What it was measured with.
        fastest: Whether rewrites must be shown to be faster than int8 alone, as they must be where
            the plan misses its budget.
        alone_harm: Predicted, of int8 alone: a plan in mixed precision that harms less may be
            slower.
    """
    latency = made.latency
    assert latency is not None
    assert latency.alone_ratio is not None
    for_speed = all(budget.quantity == "latency" for budget in made.budgets)
    verdict = latency.alone_ratio.verdict
    changed = made.choices or made.float32_layers or made.precision == "float32"
    harms = (made.harm or 0.0) >= alone_harm
    # What misses its budget has no other reason to be taken.
    fastest = fastest or any(budget.quantity == "latency" for budget, _ in made.missed())
    if changed and harms and (verdict == "slower" or (fastest and verdict != "faster")):
        said = f"the rewritten network is {_words(verdict)} than int8 alone: {latency.alone_ratio}"
        if not for_speed:
            made = replace(made, notes=(*made.notes, f"{capitalized(said)}."))
        else:
            alone = replace(_without_choices(made, deployed, said), harm=alone_harm)
            alone = replace(alone, precision="int8", float32_layers=())
            made = _with_measured_cost(deployed.measure(alone), deployed)
    latency = made.latency
    assert latency is not None
    if latency.ratio.verdict != "slower" or made.precision == "float32":
        return made
    said = f"int8 is slower than float32 in {latency.deployment.runtime} here: {latency.ratio}"
    if not for_speed:
        return replace(made, notes=(*made.notes, f"{capitalized(said)}."))
    made = _without_choices(made, deployed, said)
    # Times of the plan's own are those of float32 now.
    note = f"The network stays as it is, in float32: {said}."
    before = deployed.survey().before
    return replace(
        made,
        precision="float32",
        float32_layers=(),
        after=before,
        latency=None,
        notes=(*made.notes, note),
    )


def _with_measured_cost(made: Plan, deployed: Deployed) -> Plan:
    """Return a plan of int8 alone with the time that was measured, and its weights' bytes."""
    found = deployed.survey()
    assert made.latency is not None
    assert found.before.ms is not None
    size = found.in_floats_of(1).before.bytes if found.unchanged is None else found.base.bytes
    after = replace(made.after, ms=found.before.ms / made.latency.ratio.value, bytes=size)
    return replace(made, after=after)


def _words(verdict: str) -> str:
    return "slower" if verdict == "slower" else "not shown to be faster"


def _without_choices(made: Plan, deployed: Deployed, reason: str) -> Plan:
    left = [LeftAlone(site=option.site, reason=reason) for option in made.choices]
    return replace(
        made,
        choices=(),
        left_alone=(*left, *made.left_alone),
        after=deployed.survey().base,
        harm=0.0,
    )
