"""Checks of paths, and file names as printable text."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def why_no_file(path: Path) -> str | None:
    """Return why a path is not a readable file, such as ``"does not exist"``; ``None`` if it is.

    Unlike :meth:`pathlib.Path.is_file` it never raises, even if the name is too long.
    """
    return _why_not(path, stat.S_ISREG)


def why_no_folder(path: Path) -> str | None:
    """Return why a path is not a folder, as text; ``None`` if it is one."""
    return _why_not(path, stat.S_ISDIR)


def printable(name: object) -> str:
    r"""Return a name with escapes in place of characters that cannot be printed.

    File names may contain bytes that are not UTF-8, line breaks and terminal control codes, which
    must not get into a record or a message.

    Examples:
        >>> printable("caf\udce9")
        'caf\\xe9'
    """
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message; without a message the name of its class."""
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0].rstrip(".")) if lines else type(error).__name__


def _why_not(path: Path, wanted: Callable[[int], bool]) -> str | None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return _unreachable(path, error)
    except ValueError:
        return "has a name with a null character"
    if wanted(mode):
        return None
    if stat.S_ISDIR(mode):
        return "is a folder"
    return "is a file" if stat.S_ISREG(mode) else "is neither a file nor a folder"


def _unreachable(path: Path, error: OSError) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return "has a name that is too long"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "is a link to what does not exist" if _is_link(path) else "does not exist"
    return f"cannot be reached ({reason_of(error)})"


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:
        return False
