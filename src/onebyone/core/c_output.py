"""Standard output of C code: file descriptor 1, which Python's own redirection does not reach."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def c_output_dropped() -> Iterator[None]:
    """Drop what C code prints to standard output meanwhile.

    The descriptor belongs to the whole process: if other threads run, nothing is dropped, since
    what they print must not be lost.
    """
    if threading.active_count() > 1:
        yield
        return
    with _sent_to(None):
        yield


@contextmanager
def c_output_to_errors() -> Iterator[None]:
    """Send what C code prints to standard output to standard error instead.

    Only the main thread does so, since the descriptor belongs to the whole process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _sent_to(2):
        yield


@contextmanager
def _sent_to(descriptor: int | None) -> Iterator[None]:
    """Make descriptor 1 a copy of another one, or of the null device; then restore it."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # it is closed, so nothing is printed
        yield
        return
    _flush_c()
    try:
        _copy_to_1(descriptor)
        yield
    finally:
        _flush_c()
        os.dup2(kept, 1)
        os.close(kept)


def _copy_to_1(descriptor: int | None) -> None:
    if descriptor is not None:
        try:
            os.dup2(descriptor, 1)
        except OSError:  # that one is closed
            pass
        else:
            return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _flush_c() -> None:
    # C writes to a pipe only when its buffer is full: text must go where it was printed to.
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
