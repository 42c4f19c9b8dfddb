"""Scripts that complete commands and options in a shell."""

from __future__ import annotations

import argparse
import importlib.util

from onebyone.core.errors import MissingExtraError


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell.

    Args:
        parser: Of the whole command line.
        shell: ``bash``, ``zsh`` or ``tcsh``.

    Raises:
        MissingExtraError: If shtab is not installed.
    """
    if importlib.util.find_spec("shtab") is None:
        raise MissingExtraError("shtab", "completion", "The completion script")
    import shtab

    return str(shtab.complete(parser, shell=shell)) + "\n"
