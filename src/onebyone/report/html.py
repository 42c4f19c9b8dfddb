"""The page of a run, and the parts for other pages.

:func:`page` and the parts come from :mod:`onebyone.report.components`, which shows an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from onebyone.core.records import RunRecord
from onebyone.core.write_files import write_text
from onebyone.report import sections
from onebyone.report.components import (
    Figure,
    chart,
    code,
    disclosure,
    figures,
    gallery,
    notice,
    page,
    paragraph,
    picture,
    quantity,
    section,
    table,
)
from onebyone.report.runs_page import render_runs
from onebyone.report.section_verdict import verdict, when

__all__ = [
    "Figure",
    "chart",
    "code",
    "disclosure",
    "figures",
    "gallery",
    "notice",
    "page",
    "paragraph",
    "picture",
    "quantity",
    "render_run",
    "render_runs",
    "section",
    "table",
    "write_report",
    "write_several",
]


def render_run(record: RunRecord) -> str:
    """Return the page of a run: one HTML file, made from the record alone.

    Sections without content are left out. The page of an unfinished run starts with a notice.
    """
    shown = [
        (anchor, label, part) for anchor, label, make in sections.SECTIONS if (part := make(record))
    ]
    parts = [sections.status_notice(record), *(part for _, _, part in shown)]
    return page(
        sections.title(record) or record.source.name,
        Markup("\n").join(part for part in parts if part),
        subtitle=sections.subtitle(record),
        kicker="report of a run",
        description=verdict(record).sentence,
        contents=[(anchor, label) for anchor, label, _ in shown],
        footer=f"Made by onebyone {record.onebyone} from the run of {when(record)}.",
    )


def write_report(record: RunRecord, path: str | Path) -> None:
    """Write :func:`render_run`'s page to a file, whole or not at all.

    Raises:
        OutputError: If the file cannot be written.
    """
    write_text(path, render_run(record))


def write_several(records: Mapping[str, RunRecord], path: str | Path) -> None:
    """Write :func:`render_runs`'s page to a file, whole or not at all.

    Raises:
        OutputError: If the file cannot be written.
    """
    write_text(path, render_runs(records))
