"""Turns exceptions of the user's code into errors of onebyone.

Such code is a forward, a loss, a metric, a factory or a data set. It may raise anything, so every
exception is caught, and becomes an error that says what failed, why and where.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import torch

from onebyone.core.errors import ModelError, OneByOneError

# Frames of files in these folders are not the user's code.
_OURS = tuple(
    f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(torch.__file__).parent)
)
_STANDARD = f"{sysconfig.get_path('stdlib')}{os.sep}"
_INSTALLED = f"{sysconfig.get_path('purelib')}{os.sep}"
MEMORY_CURE = "Free memory, give a smaller batch or smaller inputs, or run where there is more"


@contextmanager
def users_code(
    must: str, cure: str, *, on: str = "", raises: type[OneByOneError] = ModelError
) -> Iterator[None]:
    """Turn any exception of the user's code in the block into an error of onebyone.

    Errors of onebyone pass unchanged, since the user's code may call it.

    Args:
        must: What the code must do, a clause: ``The metric must give one score for each example``.
        cure: What the user can do, without a full stop.
        on: Its inputs: ``outputs (8, 10) and targets (8,)``.
        raises: The error's class.
    """
    try:
        yield
    except OneByOneError:
        raise
    except Exception as error:
        raise users_fault(error, must, cure, on=on, raises=raises) from error


def users_fault(
    error: BaseException,
    must: str,
    cure: str,
    *,
    layer: str = "",
    what: str = "it",
    on: str = "",
    raises: type[OneByOneError] = ModelError,
) -> OneByOneError:
    """Return the error to raise for an exception of the user's code; raise it ``from`` that.

    Args:
        error: The exception.
        must: As for :func:`users_code`, as are ``cure`` and ``raises``.
        cure: Not used if memory ran out, which has its own cure.
        layer: Name of the module that was running.
        what: Name of the code that failed.
        on: As for :func:`users_code`.
        raises: The error's class.
    """
    given = f" on {on}" if on else ""
    where = [f"in layer {layer!r}"] if layer else []
    place = place_of(error)
    where += [f"at {place}"] if place else []
    told = ", ".join([type(error).__name__, *where])
    advice = MEMORY_CURE if is_out_of_memory(error) else cure
    return raises(f"{must}, but {what} failed{given}: {message_of(error)} ({told}). {advice}.")


def message_of(error: BaseException) -> str:
    """Return the first line of an exception's message without its full stop; else its class."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # noqa: BLE001 - the class is the user's too
        lines = []
    return lines[0].rstrip(".") if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or on a device."""
    # On the CPU torch raises a plain RuntimeError, which only its message identifies.
    return isinstance(
        error, (MemoryError, torch.OutOfMemoryError)
    ) or "can't allocate memory" in message_of(error)


def place_of(error: BaseException) -> str:
    """Return ``file:line`` of the user's code that failed; empty if there is none.

    It is the innermost frame outside torch, Python's standard library and onebyone.
    """
    found = ""
    for frame, line in frames_of(error):
        file = frame.f_code.co_filename
        if not _is_ours(file):
            found = f"{_shown(file)}:{line}"
    return found


def _is_ours(file: str) -> bool:
    # Generated code, such as torch.fx's, has no file: <eval_with_key>.0.
    if file.startswith((*_OURS, "<")):
        return True
    # Packages may be installed in a folder inside the standard library's.
    return file.startswith(_STANDARD) and "-packages" not in file


def frames_of(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames of an exception's traceback with their lines, the outermost first."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _shown(file: str) -> str:
    """Return the shortest form of a path."""
    if file.startswith(_INSTALLED):
        return file.removeprefix(_INSTALLED)
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere; or the folder is gone
        return file
