"""Train a network on embedded digits, halve its time, and show that on your machine."""

from __future__ import annotations

import argparse

from onebyone.cli.arguments import add_output
from onebyone.cli.output import progress, say, show

EPILOG = """Nothing is downloaded: the digits are scikit-learn's 1,797 real scans, enlarged to
28×28. The network is trained for 12 epochs, planned for half its time in PyTorch eager with one
thread, and distilled for 8 epochs without labels.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone demo``."""
    add_output(parser, "folder for the two runs (runs/demo, replaced if it is an earlier demo)")


def run(args: argparse.Namespace) -> None:
    """Run the demo."""
    from onebyone.pipeline.demo import run_demo
    from onebyone.report.section_verdict import verdict

    out = args.out or "runs/demo"
    with progress("demo") as update:
        shrunk = run_demo(out, command=args.command_line, progress=update)
    record = shrunk.record
    assert record.plan is not None
    assert record.comparison is not None
    show(record, args, record.plan.table(), record.comparison.table())
    say(args, f"\n{verdict(record).sentence}")
    if record.comparison.latency_ratio["eager"].verdict != "faster":
        say(args, "Here it is not shown to be faster: the report has the times of each layer.")
    say(args, f"Report: {out}/small/report.html")
    say(args, f'The smaller network: onebyone.load_model("{out}/small")')
