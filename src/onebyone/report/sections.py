"""The sections of a run's page in their order; each function makes one from the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePath

from markupsafe import Markup

from onebyone.core.records import RunRecord
from onebyone.report.components import figures, notice, paragraph, section
from onebyone.report.section_deployed import deployed_section
from onebyone.report.section_differences import differences_section
from onebyone.report.section_measured import measured_section
from onebyone.report.section_network import network_picture
from onebyone.report.section_tradeoff import tradeoff_section, training_section
from onebyone.report.section_use import conditions_section, use_section
from onebyone.report.section_verdict import verdict, when


def title(record: RunRecord) -> str:
    """Return the name of a run: that of its folder, or of the network if it has none."""
    return PurePath(record.folder).name if record.folder else record.source.name


def subtitle(record: RunRecord) -> str:
    """Return a line with the network and the data of a run."""
    network = record.source.spec or f"{record.source.name}, a network made in memory"
    parts = [network if record.plan is None else f"made from {network}"]
    if record.data is not None:
        parts.append(f"on {record.data.name}")
    if record.plan is not None and record.plan.budgets:
        parts.append("budget " + ", ".join(budget.asked for budget in record.plan.budgets))
    return ", ".join([*parts, when(record)])


def status_notice(record: RunRecord) -> Markup:
    """Return a notice for an unfinished run; empty for a finished one."""
    state, stage = record.status.state, record.status.stage
    if state == "finished":
        return Markup("")
    heading, text = {
        "failed": ("This run failed", f"It stopped with an error while it was at “{stage}”."),
        "interrupted": ("This run was interrupted", f"It was stopped while it was at “{stage}”."),
        "running": ("This run has not finished", f"It was at “{stage}” when this page was made."),
    }[state]
    return notice(
        heading,
        f"{text} What was measured before is shown below.",
        failed=state == "failed",
        preformatted=record.status.detail,
    )


# ---------------------------------------------------------------- 1: the verdict


def verdict_section(record: RunRecord) -> Markup:
    """Return the sentence, the figures and how they were measured."""
    found = verdict(record)
    lines = Markup("").join(paragraph(line, note=True) for line in found.conditions)
    conditions = Markup('<div class="conditions">{}</div>').format(lines) if lines else ""
    lead = Markup('<p class="lead">{}</p>').format(_kept_together(found.sentence))
    together = [replace(item, detail=_kept_together(item.detail)) for item in found.figures]
    shown = figures(together) if together else ""
    return section("verdict", "The verdict", lead, shown, conditions, heading_shown=False)


def _kept_together(text: str) -> str:
    # Lines must not break inside an interval or between a number and its unit.
    for joined in (" … ", " → ", " %", " points", " ms", " µs", " images", " examples"):
        text = text.replace(joined, joined.replace(" ", "\u00a0"))
    return text


# ---------------------------------------------------------------- 3: the network


def network_section(record: RunRecord) -> Markup:
    """Return the picture of the network; empty if it was not profiled."""
    if record.profile_before is None:
        return Markup("")
    timed_in = next(iter(record.comparison.latency_ratio), None) if record.comparison else None
    drawn = network_picture(
        record.profile_before, record.profile_after, record.plan, timed_in=timed_in
    )
    return section("network", "The network, layer by layer", drawn)


SECTIONS: tuple[tuple[str, str, Callable[[RunRecord], Markup]], ...] = (
    ("verdict", "Verdict", verdict_section),
    ("measured", "Before and after", measured_section),
    ("network", "Network", network_section),
    ("deployed", "Int8", deployed_section),
    ("tradeoff", "Trade-off", tradeoff_section),
    ("training", "Training", training_section),
    ("differences", "Where they differ", differences_section),
    ("use", "How to use it", use_section),
    ("conditions", "Conditions", conditions_section),
)
