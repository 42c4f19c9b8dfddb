"""The end of a command: its exit status, and an error message of a line or two.

A user's mistake never ends in a traceback. Any unexpected exception is a fault of onebyone itself:
the message says so, and a file for a bug report is written.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from onebyone.core import torchrun
from onebyone.core.errors import OneByOneError
from onebyone.core.read_files import printable, reason_of

if TYPE_CHECKING:
    from pathlib import Path

FAULT = 70  # the exit status of a fault of onebyone, as in sysexits.h
INTERRUPTED, TERMINATED = 130, 143
TRACEBACK = "ONEBYONE_TRACEBACK"

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "onnx", "onnxruntime", "openvino")
# Torch's CPU allocator raises a plain RuntimeError, which only its message identifies.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")
_SYSTEM = {
    errno.ENOSPC: "The disk is full. Free some space, then repeat the command",
    errno.EDQUOT: "The disk quota is used up. Free some space, then repeat the command",
    errno.EACCES: "The system does not permit this. Choose another place, or change its mode",
    errno.EPERM: "The system does not permit this. Choose another place, or change its mode",
    errno.EROFS: "The file system is read-only. Choose another place",
    errno.ENAMETOOLONG: "A name is too long for the file system. Choose a shorter one",
    errno.EMFILE: "Too many files are open. Raise the limit by `ulimit -n`",
    errno.ENOMEM: "There is not enough memory",
}


def guarded(command: Callable[[], int], arguments: Sequence[str]) -> int:
    """Run a command and return its exit status; print a message for any exception.

    With ``ONEBYONE_TRACEBACK=1`` the traceback of every error is printed too.

    Args:
        command: The command; returns its status.
        arguments: The command line's arguments, for the report of a fault.
    """
    asked_to_end: list[int] = []
    try:
        _open_output()
        with _terminable(asked_to_end):
            status = command()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe, such as head, has ended: this is no error.
        _close_output()
        return 0
    except KeyboardInterrupt as stop:
        # Ray raises a plain KeyboardInterrupt in place of what a handler of signals raised.
        ended = isinstance(stop, _Terminated) or bool(asked_to_end)
        others = " torchrun also does this once another process has ended."
        why = others if torchrun.is_started() else ""
        sys.stderr.write(f"Terminated.{why}\n" if ended else "Interrupted.\n")
        return TERMINATED if ended else INTERRUPTED
    except BaseException as error:  # noqa: BLE001 - this is the boundary
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            _print_traceback(error)
        words, status = _explain(error, arguments)
        if not getattr(error, "told", False):  # by another process that torchrun started
            _print(words)
        _close_output()
    return status


def message_of(error: BaseException, arguments: Sequence[str]) -> str:
    """Return the message for an error; for a fault of onebyone, write its report.

    Args:
        error: What a command raised.
        arguments: The command line's arguments, for the report of a fault.
    """
    return _explain(error, arguments)[0]


class _Terminated(KeyboardInterrupt):
    """The system asked the process to end (SIGTERM); runs stop as on ^C."""


@contextmanager
def _terminable(asked: list[int]) -> Iterator[None]:
    """Turn SIGTERM, which a scheduler may send, into an exception inside the block.

    Args:
        asked: Gets the number of the signal.
    """

    def stop(number: int, frame: object) -> NoReturn:
        del frame
        asked.append(number)
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_output() -> None:
    """Make standard output accept any text: characters outside its encoding become JSON escapes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    codecs.register_error("json", _as_in_json)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="json")


def _as_in_json(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    import json

    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _close_output() -> None:
    """Flush standard output; if that fails, discard it, so that the exit does not fail again."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """Return the message for an error, and the exit status."""
    if isinstance(error, OneByOneError):
        return str(error), error.exit_status
    if _is_out_of_memory(error):
        return _memory_words(error), 1
    where = _in_code_of_user(error)
    if where is not None:
        return f"Your code failed at {where}: {type(error).__name__}: {reason_of(error)}.", 1
    if isinstance(error, OSError) and error.errno is not None:
        file = "" if error.filename is None else f" ({printable(error.filename)})"
        return f"{_SYSTEM.get(error.errno, f'The system reports: {reason_of(error)}')}{file}.", 1
    return _fault_words(error, arguments), FAULT


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in _NO_MEMORY
    )


def _memory_words(error: BaseException) -> str:
    detail = "" if isinstance(error, MemoryError) else f" ({reason_of(error)})"
    return (
        f"There is not enough memory{detail}. Give a smaller --batch, --limit, --calibration or "
        "--input-shape, or run where there is more."
    )


def _in_code_of_user(error: BaseException) -> str | None:
    """Return the line of the user's code where an error arose, or ``None``."""
    import traceback
    from pathlib import Path

    ours = Path(__file__).resolve().parents[1]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = Path(frame.f_code.co_filename)
        if ours in path.parents:
            return None
        if path.is_file() and not any(folder in path.parents for folder in _libraries()):
            return f"{path}, line {line}, in {frame.f_code.co_name}"
    return None


def _libraries() -> Iterator[Path]:
    import sysconfig
    from pathlib import Path

    for kind in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield Path(sysconfig.get_path(kind))


def _fault_words(error: BaseException, arguments: Sequence[str]) -> str:
    what = f"{type(error).__name__}: {reason_of(error)}"
    try:
        file = _write_fault(error, arguments)
    except (OSError, ImportError, MemoryError):
        _print_traceback(error)
        place = "the lines above"
    else:
        place = str(file)
    return (
        f"This is a fault of onebyone, not of your input ({what}). Please report it where "
        f"you got onebyone from, with {place}: the command, the versions and the place in the "
        "code, and none of your data."
    )


def _write_fault(error: BaseException, arguments: Sequence[str]) -> Path:
    """Write the report of a fault, and return the file."""
    # Imported here, because `onebyone --help` needs none of it.
    import platform
    import shlex
    import tempfile
    import traceback
    from pathlib import Path

    lines = [
        f"onebyone {_version('onebyone')}: {type(error).__name__}",
        f"command: onebyone {shlex.join(arguments)}",
        f"python {platform.python_version()} on {platform.platform()}",
        ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "",
        # Only the frames of code: the user's data must not be in the report.
        *traceback.format_tb(error.__traceback__),
        f"{type(error).__name__}: {error}",
    ]
    text = "\n".join(lines) + "\n"
    descriptor, path = tempfile.mkstemp(prefix="onebyone-fault-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
    return Path(path)


def _print_traceback(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error)


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "–"


def _print(words: str) -> None:
    try:
        from onebyone.report.console import print_error
    except (ImportError, MemoryError):
        sys.stderr.write(f"Error: {words}\n")
        return
    print_error(words)
