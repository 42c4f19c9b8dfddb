"""Plain tables of aligned columns, at most 80 columns wide unless asked otherwise."""

from __future__ import annotations

import html
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

_HEADING = 12  # columns of a heading before it is broken, even if its numbers are shorter
_NAME = 7  # the fewest columns in which a name can be recognized


@dataclass(frozen=True)
class Table:
    """A title, column headings and rows of formatted text.

    Attributes:
        columns: Headings. A heading that starts with ``>`` right-aligns its column.
        rows: Rows, each with one cell a column.
        title: A line above the table; may be empty.
        notes: Lines below the table: how the figures were measured.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = field(default=())

    def to_rich(self, width: int) -> Group:
        """Return the table and its notes for a rich console ``width`` columns wide.

        If names have no room beside the numbers, each row becomes a block of lines.
        """
        grid = self._grid() if self._least_width() <= width else self._blocks()
        # Notes are as wide as the page, not as the table.
        notes = [Text(note, style="dim") for note in self.notes]
        return Group(grid, *notes)

    def _least_width(self) -> int:
        """Return the width that unbroken numbers and shortened names need."""
        total = 2 * len(self.columns)
        for place, column in enumerate(self.columns):
            widest = max((cell_len(row[place]) for row in self.rows), default=0)
            total += widest if column.startswith(">") else min(widest, _NAME)
        return total

    def _frame(self) -> RichTable:
        return RichTable(
            title=escape(self.title) or None,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )

    def _grid(self) -> RichTable:
        table = self._frame()
        for place, column in enumerate(self.columns):
            right = column.startswith(">")
            heading = column.removeprefix(">")
            if right:
                # Numbers are never broken; long headings are.
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

    def _blocks(self) -> Group:
        """Return each row as a name with a line below it for each other cell."""
        headings = [column.removeprefix(">") for column in self.columns]
        parts: list[Text | Padding] = [Text(self.title, style="bold")] if self.title else []
        for row in self.rows:
            parts.append(Text(f"\n{row[0]}"))
            block = RichTable(show_header=False, box=None, pad_edge=False)
            block.add_column(style="dim", overflow="fold")
            block.add_column(overflow="fold")
            for heading, cell in zip(headings[1:], row[1:], strict=True):
                if cell:
                    block.add_row(escape(heading), escape(cell))
            parts.append(Padding(block, (0, 0, 0, 2)))
        return Group(*parts, Text())

    def __str__(self) -> str:
        return render(self, width=80)

    def to_html(self) -> str:
        """Return the table as HTML without styles of its own, for a notebook."""
        sides = ["right" if column.startswith(">") else "left" for column in self.columns]

        def row(tag: str, cells: Sequence[str]) -> str:
            each = (
                f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
                for side, cell in zip(sides, cells, strict=True)
            )
            return f"<tr>{''.join(each)}</tr>"

        head = row("th", [column.removeprefix(">") for column in self.columns])
        body = "".join(row("td", cells) for cells in self.rows)
        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        notes = "".join(f"<p><small>{html.escape(note)}</small></p>" for note in self.notes)
        return f"<table>{title}<thead>{head}</thead><tbody>{body}</tbody></table>{notes}"

    def to_markdown(self) -> str:
        """Return the table as Markdown: its title as a heading, its notes as paragraphs."""
        heads = [column.removeprefix(">") for column in self.columns]
        sides = ["---:" if column.startswith(">") else "---" for column in self.columns]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        lines = ["| " + " | ".join(row) + " |" for row in (heads, sides, *cells)]
        grid = "\n".join(lines) if self.rows else ""
        return "\n\n".join(filter(None, [f"## {self.title}", grid, *self.notes])) + "\n"


def render(table: Table, *, width: int = 80) -> str:
    """Return the table as text without colors, at most ``width`` columns wide."""
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, color_system=None, legacy_windows=False, emoji=False
    )
    console.print(table.to_rich(width))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")
