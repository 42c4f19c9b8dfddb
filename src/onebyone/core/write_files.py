"""Writes files whole or not at all, and checks output folders.

A file is written under a temporary name in its folder, flushed to disk, read back and then renamed.
If the process is killed or the disk is full, the earlier file remains, never a part of the new one.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onebyone.core.errors import OneByOneError, OutputError
from onebyone.core.read_files import reason_of

# Prefix of all temporary files that onebyone writes beside its output.
OWN = ".onebyone-"
_ASIDE = f"{OWN}aside-"
# A folder that contains this file is a run's.
RUN_RECORD = "run.json"
# How often to try to make a folder that another process removes.
TRIES = 10

Check = Callable[[Path], object]


def write_text(path: str | Path, text: str, *, check: Check | None = None) -> None:
    """Write a text file, whole or not at all; see :func:`write_file`."""
    write_bytes(path, text.encode(), check=check)


def write_bytes(path: str | Path, content: bytes, *, check: Check | None = None) -> None:
    """Write a file of bytes, whole or not at all; see :func:`write_file`."""

    def write(aside: Path) -> None:
        aside.write_bytes(content)

    write_file(path, write, check=check)


def write_file(
    path: str | Path, write: Callable[[Path], object], *, check: Check | None = None
) -> None:
    """Write a file whole or not at all.

    Args:
        path: The file. An earlier one is replaced.
        write: Writes the content to a given temporary path in the same folder.
        check: Reads the temporary file back before it is renamed; raises if it cannot be read.

    Raises:
        OutputError: If the file cannot be written or read back. An earlier one is unchanged.
    """
    target = Path(path)
    aside = target.with_name(_aside_name())
    try:
        aside.open("xb").close()
        mode = aside.stat().st_mode & 0o777  # as the user's umask gives it
        _written(write, aside)
        aside.chmod(mode)
        _sync(aside)
        if check is not None:
            _checked(check, aside, target)
        aside.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {reason_of(error)}.") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _aside_name() -> str:
    # Without the file's own name, which may have the greatest length allowed.
    return f"{_ASIDE}{secrets.token_hex(8)}.tmp"


def _written(write: Callable[[Path], object], aside: Path) -> None:
    try:
        write(aside)
    except (OSError, OneByOneError):
        raise
    except Exception as error:
        # Libraries wrap the system's error, such as of a full disk, in one of their own.
        cause = _cause(error)
        if cause is None:
            raise
        raise cause from error


def _cause(error: BaseException) -> OSError | None:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, OSError):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


def _checked(check: Check, aside: Path, target: Path) -> None:
    try:
        check(aside)
    except OneByOneError as error:
        told = str(error).replace(str(aside), str(target))
        raise OutputError(
            f"What was to be written to {target} cannot be read back, so it was not kept: {told}"
        ) from error


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder to flush
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- several files at once


@contextmanager
def written_together(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; its files are moved to the target folder if the block succeeds.

    Args:
        folder: Made if it does not exist. Files of the same names in it are replaced.

    Raises:
        OutputError: If the folder cannot be written. It is then unchanged, or still missing.
    """
    target = Path(folder)
    made = _make(target)
    aside = target / _aside_name()
    try:
        aside.mkdir()
        yield aside
        for file in sorted(aside.iterdir()):
            _sync(file)
        for file in sorted(aside.iterdir()):
            file.replace(target / file.name)
        _sync(target)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {reason_of(error)}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _remove_empty(made)


def make_folder(folder: str | Path) -> None:
    """Make a folder, and those above it.

    Raises:
        OutputError: If it cannot be made.
    """
    _make(Path(folder))


def _make(folder: Path) -> list[Path]:
    """Make a folder; return all folders that were made, the innermost first."""
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        _make_though_removed(folder)
    except OSError as error:
        raise OutputError(f"Cannot make the folder {folder}: {reason_of(error)}.") from error
    return missing


def _make_though_removed(folder: Path) -> None:
    """Make a folder; try again if another process removes it, or one above it, meanwhile."""
    for left in reversed(range(TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError):
            something_else = os.path.lexists(folder) and not folder.is_dir()
            if something_else or not left:
                raise
        else:
            return


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it stays if another process wrote a file to it
            folder.rmdir()


# ---------------------------------------------------------------- folders for output


def contents(folder: str | Path) -> list[str]:
    """Return the sorted names in a folder without our temporary files; none if it is missing.

    Raises:
        OutputError: If the folder cannot be read.
    """
    try:
        names = [path.name for path in Path(folder).iterdir()] if Path(folder).exists() else []
    except OSError as error:
        raise OutputError(f"Cannot read the folder {folder}: {reason_of(error)}.") from error
    return sorted(name for name in names if not name.startswith(OWN))


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files that killed processes of onebyone left in a folder."""
    with suppress(OSError):
        for path in Path(folder).glob(f"{_ASIDE}*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def check_folder(
    folder: str | Path,
    *,
    owner: str = "",
    marks: Collection[str] = (),
    known: Collection[str] | None = None,
) -> Path:
    """Check before any work that output can be written to a folder, and return the folder.

    Args:
        folder: The output folder; it need not exist.
        owner: Whose earlier output it may hold, such as ``"a comparison's"``. Without an owner it
            may hold any files.
        marks: Files of which an earlier output has at least one.
        known: All files of an earlier output, if no others are allowed.

    Raises:
        OutputError: If it is a file, has other content or that of a run, or cannot be written to.
    """
    path = Path(folder)
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(f"The output must be a folder, but {path} is a file.")
    except OSError as error:
        raise OutputError(f"Cannot use the folder {path}: {reason_of(error)}.") from error
    names = contents(path)
    if not owner and RUN_RECORD in names:
        # A plan or weights of another output would be taken for the run's own.
        raise OutputError(
            f"The output folder must not be a run's, whose files belong together, but {path} has "
            f"a {RUN_RECORD}. Choose another folder."
        )
    if owner and names:
        others = names if not set(marks) & set(names) else []
        if known is not None:
            others = [name for name in names if name not in known]
        if others:
            raise OutputError(
                f"The output folder must be new, empty, or {owner}, but {path} has other files, "
                f"such as {others[0]!r}. Choose another folder."
            )
    _try_to_write(path)
    return path


def check_file(path: str | Path) -> Path:
    """Check before any work that a file can be written, and return its path.

    Raises:
        OutputError: If it is a folder, or cannot be written.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise OutputError(f"The output must be a file, but {target} is a folder.")
        with suppress(FileNotFoundError, NotADirectoryError):
            target.lstat()  # refuses a name that is too long
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {reason_of(error)}.") from error
    _try_to_write(target.parent)
    return target


def _try_to_write(folder: Path) -> None:
    made = _make(folder)
    probe = folder / _aside_name()
    try:
        probe.open("xb").close()
    except OSError as error:
        raise OutputError(f"Cannot write to the folder {folder}: {reason_of(error)}.") from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        _remove_empty(made)
