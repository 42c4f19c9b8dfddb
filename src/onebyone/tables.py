"""Plain tables of aligned columns, at most 80 columns wide unless asked otherwise."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

_HEADING = 12  # columns that a heading may take though its numbers are shorter


@dataclass(frozen=True)
class Table:
    """A title, headed columns and rows of ready-made text.

    Attributes:
        columns: Headings. One that starts with ``>`` heads a right-aligned column.
        rows: As many cells a row as there are columns.
        title: A line above, or nothing.
        notes: Lines below: how the figures were obtained.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = field(default=())

    def to_rich(self) -> Group:
        """Return the table and its notes for a rich console."""
        # Under the table and as wide as the page, not as the table.
        notes = [Text(note, style="dim") for note in self.notes]
        return Group(self._grid(), *notes)

    def _grid(self) -> RichTable:
        table = RichTable(
            title=escape(self.title) or None,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for place, column in enumerate(self.columns):
            right = column.startswith(">")
            heading = column.removeprefix(">")
            if right:
                # A number is never broken; a long heading over it is.
                widest = max((cell_len(row[place]) for row in self.rows), default=0)
                heading = textwrap.fill(heading, max(widest, _HEADING))
            table.add_column(
                escape(heading),
                justify="right" if right else "left",
                no_wrap=right,
                overflow="fold",
            )
        for row in self.rows:
            # Names of layers and classes are the user's: brackets in them are not markup.
            table.add_row(*(escape(cell) for cell in row))
        return table

    def __str__(self) -> str:
        return render(self, width=80)


def render(table: Table, *, width: int = 80) -> str:
    """Return the table as text without colors, at most ``width`` columns wide."""
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, color_system=None, legacy_windows=False, emoji=False
    )
    console.print(table.to_rich())
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")
