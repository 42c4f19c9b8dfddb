"""Write the report of a run again, or of several runs side by side in one page.

The page is one file, made only from each run's run.json. It works offline.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from onebyone.cli.arguments import add_json
from onebyone.cli.output import say, show
from onebyone.core.errors import OptionError, RecordError

EPILOG = """examples:
  onebyone report runs/small
  onebyone report runs/a runs/b runs/c --out page.html
  onebyone report runs/a runs/b --out page.html --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone report``."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or its run.json")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the page to write (for one run, report.html in its folder)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Write a report."""
    files = [_record_file(Path(run)) for run in args.runs]
    if len(files) > 1 and args.out is None:
        raise OptionError("The page of several runs needs a name. Give --out, such as page.html.")
    out = files[0].with_name("report.html") if args.out is None else Path(args.out)
    if out.is_dir() or out.suffix.lower() not in {".html", ".htm"}:
        raise OptionError(f"--out must name an .html file, got {str(out)!r}.")
    from onebyone.core.records import RunRecord
    from onebyone.core.write_files import check_file
    from onebyone.report.html import write_report, write_several
    from onebyone.report.summary import summarize

    check_file(out)
    records = dict(zip(_names(files), map(RunRecord.load, files), strict=True))
    if len(records) == 1:
        write_report(next(iter(records.values())), out)
    else:
        write_several(records, out)
    summary = summarize(records)
    show(summary, args, summary.table())
    say(args, f"Report: {out}")


def _record_file(path: Path) -> Path:
    """Return the path of a run's record.

    Raises:
        RecordError: If there is none.
    """
    file = path / "run.json" if path.is_dir() else path
    if not file.is_file():
        raise RecordError(
            f"There must be a run's record at {file}, but there is none. Give the folder that "
            f"`onebyone shrink --out` or `onebyone train --out` wrote."
        )
    return file


def _names(files: list[Path]) -> list[str]:
    """Return a name for each run: the last part of its path that differs from the others'.

    Raises:
        OptionError: If a run was given twice.
    """
    folders = [file.resolve().parent for file in files]
    if len(set(folders)) < len(folders):
        raise OptionError("Each run must be given once; one of them was given twice.")
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names
