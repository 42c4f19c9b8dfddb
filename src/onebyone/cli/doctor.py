"""Say what this machine has for onebyone, what is missing, and how noisy it is now."""

from __future__ import annotations

import argparse

from onebyone.cli.arguments import add_json
from onebyone.cli.output import show

EPILOG = """examples:
  onebyone doctor
  onebyone doctor --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onebyone doctor``."""
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Look at the machine."""
    from onebyone.profiling.doctor import doctor

    record = doctor()
    show(record, args, *record.tables())
