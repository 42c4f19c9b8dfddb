"""Output of a command: tables, records, progress, and the folder of its results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onebyone.core.records import Record
    from onebyone.core.tables import Table


def free_folder(name: str) -> Path:
    """Return ``runs/NAME``, or the first of ``runs/NAME-2``, … that does not exist."""
    from onebyone.core.processes import on_main

    return on_main(lambda: _free_folder(name))


def _free_folder(name: str) -> Path:
    base = Path("runs") / "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    number, folder = 1, base
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def show(record: Record, args: argparse.Namespace, *tables: Table) -> None:
    """Print a record as JSON if asked, else as tables."""
    from onebyone.report.console import print_table

    if args.json:
        args.output.write(record.to_json())
        return
    for place, table in enumerate(tables):
        if place:
            sys.stdout.write("\n")
        print_table(table)


def say(args: argparse.Namespace, text: str) -> None:
    """Print a line unless only JSON was asked for."""
    if not args.json:
        sys.stdout.write(text + "\n")


def check_output(folder: str | None) -> None:
    """Check before any work that ``--out``, if given, can be written to.

    Raises:
        OutputError: If it cannot.
    """
    from onebyone.core.write_files import check_folder

    if folder is not None:
        check_folder(folder)


def write_record(record: Record, folder: str | None, name: str, args: argparse.Namespace) -> None:
    """Write a record to ``--out``, if given.

    Raises:
        OutputError: If the folder cannot be made, or the file cannot be written.
    """
    from onebyone.core.write_files import make_folder

    if folder is None:
        return
    path = Path(folder)
    make_folder(path)
    record.save(path / name)
    say(args, f"Wrote {path / name}")


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar on standard error if that is a terminal."""
    from onebyone.core.processes import is_main
    from onebyone.report.console import progress as bar

    if not is_main():
        yield lambda done, total, message: None  # noqa: ARG005
        return
    with bar(title) as update:
        yield update


@contextmanager
def stoppable(out: str | Path, how_to_go_on: Callable[[Path], str] | None = None) -> Iterator[None]:
    """On an interruption, say how to go on.

    Args:
        out: Folder of what is made.
        how_to_go_on: Says it; by default that of a run, which says where it is.
    """
    from onebyone.core.processes import is_main

    try:
        yield
    except KeyboardInterrupt:
        if is_main():
            sys.stderr.write(f"Stopped. {(how_to_go_on or _after_stop)(Path(out))}\n")
        raise


def _after_stop(out: Path) -> str:
    from onebyone.core.errors import OneByOneError
    from onebyone.core.records import RunRecord

    try:
        kept = RunRecord.load(out / "run.json").status.state == "finished"
    except OneByOneError:
        kept = False
    if kept:  # it was to be replaced, or the new run has just finished
        return f"The run in {out} has finished and is complete."
    return f"Resume the run with --out {out} --resume."
