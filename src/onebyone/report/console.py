"""Output in a terminal: tables, progress bars on standard error, and one-line errors."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
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

from onebyone.core.read_files import printable
from onebyone.core.run_lines import LOGGER
from onebyone.core.tables import Table, render

_WIDTH = 80  # fixed, so that tables look the same in a terminal, a file and a document
_COUNTS = 40  # columns of the counts, the elapsed time and the time left


class Update(Protocol):
    """Moves a progress bar and shows a message beside it."""

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
    """Print an error on standard error, in one line."""
    # Messages of libraries, quoted in ours, may have several lines.
    line = printable(" ".join(str(message).split()))
    # Shorten very long words, which would hide the message.
    line = re.sub(r"\S{300,}", lambda word: f"{word[0][:200]}…", line)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("Error: ", "bold red"), line))


def _ignore(done: int, total: int, message: str = "") -> None:
    """Ignore an update: there is no bar."""


@contextmanager
def progress(title: str) -> Iterator[Update]:
    """Show a progress bar on standard error while the block runs, and a line a finished stage.

    A plan has a line before as well: about how long it will take.

    The bar has the time that the command has taken, and the time left in its present step. If
    standard error is not a terminal, there are only the lines of finished stages. Standard output
    is not used, so that ``--json`` can be piped. There are no colors if ``NO_COLOR`` is set.

    Examples:
        >>> with progress("Calibrate") as update:
        ...     update(32, 512, "layer1.0.conv1")
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        with lines_shown():
            yield _ignore
        return
    wide = console.width >= _WIDTH
    bar_width = 24 if wide else 10
    left = [TextColumn("step left", style="dim"), TimeRemainingColumn(compact=True)] if wide else []
    room = max(10, console.width - len(title) - bar_width - _COUNTS)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=bar_width),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *left,
        TextColumn("{task.fields[message]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, message="")

        def update(done: int, total: int, message: str = "") -> None:
            # Cut a name that is too long, so that the bar stays on one line.
            short = message if len(message) <= room else f"{message[: room - 1]}…"
            bar.update(task, completed=done, total=total, message=short)

        with lines_shown(lambda line: bar.console.print(line, markup=False, highlight=False)):
            yield update


def _write_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")


@contextmanager
def lines_shown(show: Callable[[str], object] = _write_line) -> Iterator[None]:
    """Show the lines that a run says of itself, such as one for each stage that finishes.

    Args:
        show: Takes a line; by default it goes to standard error.
    """
    handler, before = _Shown(show), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before)


class _Shown(logging.Handler):
    """Passes messages on to a function."""

    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__()
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())
