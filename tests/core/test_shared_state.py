"""What belongs to the process is as before, in whatever order threads enter and leave."""

import contextlib
import gc
import sys
import threading
import warnings

import pytest
import torch

from onebyone.core.shared_state import SharedChange, errors_unprinted, warnings_ignored
from onebyone.profiling import latency, trace

STATES = {
    "warnings": (warnings_ignored, lambda: list(warnings.filters)),
    "standard error": (errors_unprinted, lambda: sys.stderr),
    "garbage collector": (latency._quiet_interpreter, gc.isenabled),
    "attention": (trace._plain_attention, torch.backends.mha.get_fastpath_enabled),
}


def in_thread(shared, entered, leave):
    def run():
        with shared():
            entered.set()
            assert leave.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    assert entered.wait(60)
    return thread


@pytest.mark.parametrize("first_leaves", [0, 1])
@pytest.mark.parametrize("name", STATES)
def test_state_is_changed_until_the_last_thread_leaves_and_then_as_before(name, first_leaves):
    shared, state = STATES[name]
    before = state()
    leave = [threading.Event(), threading.Event()]
    workers = [in_thread(shared, threading.Event(), each) for each in leave]
    changed = state()
    assert changed != before
    for place in (first_leaves, 1 - first_leaves):
        assert state() == changed
        leave[place].set()
        workers[place].join()
    assert state() == before


def test_state_is_put_back_after_an_error_and_one_that_cannot_be_changed_is_left():
    made = []

    @contextlib.contextmanager
    def change():
        made.append("in")
        yield
        made.append("out")

    shared = SharedChange(change)
    with shared(), pytest.raises(ZeroDivisionError), shared():
        raise ZeroDivisionError
    assert made == ["in", "out"]

    def failing():
        raise OSError("no")

    broken = SharedChange(failing)
    for _ in range(2):
        with pytest.raises(OSError, match="no"), broken():
            pass
