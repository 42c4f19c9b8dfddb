"""What commands show in a terminal: tables, progress on standard error, and errors in a line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from onebyone.tables import Table, render

_WIDTH = 80  # tables look the same in a terminal, a file and a document
_COUNTS = 30  # columns of what is done of how many, the time that it took, and the time left


class Update(Protocol):
    """Moves a bar: what is done, of how many, and a few words on what is being done."""

    def __call__(self, done: int, total: int, message: str = "") -> None:
        """Move the bar to ``done`` of ``total``."""


def print_table(table: Table) -> None:
    """Print a table on standard output, at most 80 columns wide."""
    console = Console(highlight=False, soft_wrap=False)
    if console.is_terminal:
        width = min(console.width, _WIDTH)
        console.print(table.to_rich(width), width=width)
    else:
        sys.stdout.write(render(table, width=_WIDTH) + "\n")


def print_error(message: object) -> None:
    """Print what went wrong on standard error, in one line."""
    # Libraries' own messages, quoted in ours, may have several.
    line = " ".join(str(message).split())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("Error: ", "bold red"), line))


def _ignore(done: int, total: int, message: str = "") -> None:
    """Take a step's news where nobody looks."""


@contextmanager
def progress(title: str) -> Iterator[Update]:
    """Show a bar on standard error with the time left, while the block runs.

    Where standard error is no terminal nothing is shown. Standard output stays clean, so that
    ``--json`` can be piped. Colors are left out if ``NO_COLOR`` is set.

    Examples:
        >>> with progress("Calibrate") as update:
        ...     update(32, 512, "layer1.0.conv1")
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _ignore
        return
    bar_width = 24 if console.width >= _WIDTH else 10
    room = max(10, console.width - len(title) - bar_width - _COUNTS)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=bar_width),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[message]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, message="")

        def update(done: int, total: int, message: str = "") -> None:
            # A name too long for the line is cut, so that the bar stays one line.
            short = message if len(message) <= room else f"{message[: room - 1]}…"
            bar.update(task, completed=done, total=total, message=short)

        yield update
