"""The sections of a run's page, in their order: each makes its markup from the record, or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from markupsafe import Markup

from onebyone.records import RunRecord
from onebyone.report.differing import differences_section
from onebyone.report.measured import measured_section
from onebyone.report.network import network_picture
from onebyone.report.parts import figures, notice, paragraph, section
from onebyone.report.tradeoff import tradeoff_section, training_section
from onebyone.report.use import conditions_section, use_section
from onebyone.report.verdict import verdict, when


def subtitle(record: RunRecord) -> str:
    """Return what was run on what, in a line."""
    parts = [record.source.spec or "a network made in memory"]
    if record.data is not None:
        parts.append(f"on {record.data.name}")
    if record.plan is not None and record.plan.budgets:
        parts.append("budget " + ", ".join(budget.asked for budget in record.plan.budgets))
    return ", ".join([*parts, when(record)])


def status_notice(record: RunRecord) -> Markup:
    """Return the notice that a run is not whole; nothing for a finished run."""
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
    # No line ends inside an interval or between a number and its unit.
    for joined in (" … ", " → ", " %", " points", " ms", " µs", " images", " examples"):
        text = text.replace(joined, joined.replace(" ", "\u00a0"))
    return text


# ---------------------------------------------------------------- 3: the network


def network_section(record: RunRecord) -> Markup:
    """Return the picture of the network; nothing where it was not profiled."""
    if record.profile_before is None:
        return Markup("")
    drawn = network_picture(record.profile_before, record.profile_after, record.plan)
    return section("network", "The network, layer by layer", drawn)


SECTIONS: tuple[tuple[str, str, Callable[[RunRecord], Markup]], ...] = (
    ("verdict", "Verdict", verdict_section),
    ("measured", "Before and after", measured_section),
    ("network", "Network", network_section),
    ("tradeoff", "Trade-off", tradeoff_section),
    ("training", "Training", training_section),
    ("differences", "Where they differ", differences_section),
    ("use", "How to use it", use_section),
    ("conditions", "Conditions", conditions_section),
)
