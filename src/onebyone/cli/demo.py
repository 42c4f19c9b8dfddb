"""Train the article's classic network on embedded digits, shrink it, and show the proof."""

from __future__ import annotations

import argparse

from onebyone.cli.arguments import add_output, progress, say, show

EPILOG = """Nothing is downloaded: the digits are scikit-learn's 1,797 real scans, shown at 28×28.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone demo``."""
    add_output(parser, "folder for the two runs (runs/demo, replaced if it is an earlier demo)")


def run(args: argparse.Namespace) -> None:
    """Run the demo."""
    from onebyone.demo import run_demo

    out = args.out or "runs/demo"
    with progress("demo") as update:
        shrunk = run_demo(out, command=args.command_line, progress=update)
    record = shrunk.record
    assert record.plan is not None
    assert record.comparison is not None
    show(record, args, record.plan.table(), record.comparison.table())
    say(args, f"Report: {out}/small/report.html")
    say(args, f'The smaller network: onebyone.load_model("{out}/small")')
