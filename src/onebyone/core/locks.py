"""Locks: one process at a time writes to a folder, or measures on a machine."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from onebyone.core.errors import OutputError
from onebyone.core.read_files import reason_of
from onebyone.core.write_files import OWN, contents, make_folder, write_text

# The system releases the lock of a process that ends, whatever the holder file says.
LOCK = f"{OWN}lock"
HOLDER = f"{OWN}holder"


class FolderLock:
    """The right to write to a folder, until it is released or the process ends.

    Args:
        folder: Made if it does not exist.
        wait: Seconds to wait for another process that holds it.

    Raises:
        OutputError: If another process holds it; says which, where, and since when.
    """

    def __init__(self, folder: str | Path, *, wait: float = 0.0) -> None:
        self._folder = Path(folder)
        self._made = not self._folder.exists()
        self._lock = FileLock(self._folder / LOCK)
        self._acquire(wait)
        with suppress(OutputError):  # only for the message to a process that is refused
            write_text(self._folder / HOLDER, json.dumps(_this_process()))

    def _acquire(self, wait: float) -> None:
        while True:
            make_folder(self._folder)
            try:
                self._lock.acquire(timeout=wait)
            except Timeout:
                raise OutputError(
                    f"{self._folder} is in use by {_holder(self._folder)}. Wait until it ends, or "
                    f"choose another folder."
                ) from None
            except FileNotFoundError:
                if wait:
                    continue  # the process that held it had made nothing, and removed the folder
                raise OutputError(f"Cannot write to {self._folder}: it was removed.") from None
            except OSError as error:
                raise OutputError(f"Cannot write to {self._folder}: {reason_of(error)}.") from error
            return

    def release(self) -> None:
        """Release the lock; remove the folder if it was made here and nothing was written."""
        if not self._lock.is_locked:
            return
        with suppress(OSError):
            (self._folder / HOLDER).unlink(missing_ok=True)
        with suppress(OSError, OutputError):
            if self._made and not contents(self._folder):
                (self._folder / LOCK).unlink(missing_ok=True)
                self._folder.rmdir()
        self._lock.release()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder's lock inside the block; see :class:`FolderLock`."""
    lock = FolderLock(folder)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone_on_machine() -> Iterator[None]:
    """Wait until no other process of this user is inside such a block on this machine."""
    # By user, since nobody else may be able to open the file. It is never removed: a process that
    # waits for a removed file would not see the next one's.
    user = getattr(os, "getuid", lambda: 0)()
    with FileLock(Path(tempfile.gettempdir()) / f"onebyone-{user}-measuring.lock"):
        yield


def _this_process() -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(folder: Path) -> str:
    try:
        held = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {held['process']} on {held['host']} since {held['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
