"""Changes to process-wide state that several threads may need at once."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


class SharedChange:
    """A change of process-wide state that is made once, however many threads need it.

    The first thread that enters makes the change, and the last one that leaves undoes it. If each
    thread made the change itself, a thread that enters second and leaves last would restore the
    changed state, for good.

    Args:
        change: Returns a context manager that makes the change and undoes it.

    Examples:
        >>> quiet = SharedChange(lambda: contextlib.redirect_stdout(io.StringIO()))
        >>> with quiet(), quiet():
        ...     print("not heard")
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change = change
        self._guard = threading.Lock()
        self._inside = 0
        self._made = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Make the change inside."""
        with self._guard:
            if self._inside == 0:
                self._made.enter_context(self._change())
            self._inside += 1
        try:
            yield
        finally:
            with self._guard:
                self._inside -= 1
                if self._inside == 0:
                    self._made.close()


@contextmanager
def _ignoring() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


#: Ignore all warnings inside.
warnings_ignored = SharedChange(_ignoring)
#: Drop what Python writes to standard error inside.
errors_unprinted = SharedChange(lambda: contextlib.redirect_stderr(io.StringIO()))
