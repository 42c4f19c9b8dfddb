"""One run in several processes, started by ``torchrun``; without it there is one process.

All processes run the same code on the same inputs, step by step. What is worth dividing they divide
by :func:`share`, and add up by :func:`add_up` or collect by :func:`gathered`. All else, such as
timing and writing, the main process does alone by :func:`on_main` while the others wait for its
result. A single process passes straight through every function here.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from onebyone.core import torchrun
from onebyone.core.errors import OneByOneError, OptionError, ProcessError, first_line

T = TypeVar("T")

# A step waits this long for a process that neither answers nor ends.
STEP_WAIT = timedelta(minutes=30)
# What the main process does alone, such as timing and comparing, may take this long.
ALONE_WAIT = timedelta(days=7)
# After another process has ended, its message is waited for this long.
MESSAGE_WAIT = 3.0  # seconds
_RESUME = "A run with --out goes on by --resume."
_FAILED, _SAID = "onebyone/failed", "onebyone/said"


@dataclass
class _Group:
    """The processes of this run.

    Attributes:
        rank: The number of this one.
        count: How many there are.
        store: What they know of one another without waiting.
        patient: The group in which the others wait for the main process.
        alone: Whether the main process does something that the others wait for.
    """

    rank: int
    count: int
    store: Any
    patient: Any
    alone: bool = False


_group: _Group | None = None


@dataclass(frozen=True)
class _Failure:
    """An error of the main process, as the others get it."""

    kind: type[Exception]
    text: str

    def error(self) -> Exception:
        """Return the same error, since callers may catch it by its type."""
        if not issubclass(self.kind, OneByOneError):
            return _ended_by(f"{self.kind.__name__}: {self.text}", 0)
        try:
            return self.kind(self.text)
        except TypeError:  # it makes its message from other arguments
            return self.kind.__new__(self.kind, self.text)


def count() -> int:
    """Return how many processes share the present work; 1 within :func:`on_main`."""
    return 1 if _group is None or _group.alone else _group.count


def rank() -> int:
    """Return the number of this process, from 0."""
    return 0 if _group is None else _group.rank


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def share(n: int) -> slice:
    """Return which of ``n`` things are this process's; the shares differ in length by 1 at most."""
    start, stop = (n * place // count() for place in (rank(), rank() + 1))
    return slice(start, stop) if count() > 1 else slice(0, n)


def is_mine(place: int) -> bool:
    """Whether this process takes the thing at a place, where they take turns."""
    return count() == 1 or place % count() == rank()


def on_main(call: Callable[[], T]) -> T:
    """Let the main process call a function, and return its result in all processes.

    It starts once all others wait, so that what it times is not disturbed by them.

    Args:
        call: What it returns must be picklable where there are several processes.

    Raises:
        ProcessError: If another process failed or ended.
        Exception: What the call raises, in all processes.
    """
    if _group is None or _group.alone:
        return call()
    with _together():
        dist.barrier(group=_group.patient)
    if _group.rank:
        got = _sent(None)
        if isinstance(got, _Failure):
            raise got.error()
        value: T = got
        return value
    _group.alone = True
    try:
        found = call()
    except Exception as error:
        _group.alone = False
        _sent(_Failure(type(error), str(error)))
        raise
    finally:
        _group.alone = False
    _sent(found)
    return found


def _sent(value: Any) -> Any:
    """Return the main process's value."""
    assert _group is not None
    box = [value]
    with _together():
        dist.broadcast_object_list(box, src=0, group=_group.patient, device=torch.device("cpu"))
    return box[0]


def gathered(value: T) -> list[T]:
    """Return the value of each process, in order."""
    if count() == 1:
        return [value]
    assert _group is not None
    values: list[Any] = [None] * _group.count
    with _together():
        dist.all_gather_object(values, value, group=_group.patient)
    return values


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one device by their sums over all processes, in place."""
    if count() == 1 or not tensors:
        return
    kinds = {tensor.dtype for tensor in tensors}
    for kind in sorted(kinds, key=str):  # one message for all of a type
        same = [tensor for tensor in tensors if tensor.dtype == kind]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
        with _together():
            dist.all_reduce(flat)
        _write(same, flat)


def copy_from_main(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by those of the main process, in place."""
    if count() == 1:
        return
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).clone()
        with _together():
            dist.broadcast(flat, src=0)
        _write([tensor], flat)


@torch.no_grad()
def _write(tensors: Sequence[Tensor], flat: Tensor) -> None:
    start = 0
    for tensor in tensors:
        end = start + tensor.numel()
        tensor.copy_(flat[start:end].view(tensor.shape))
        start = end


# ---------------------------------------------------------------- the start and the end


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, inside the block; else do nothing.

    Only the main process prints. An error in one process ends all of them within seconds; it is
    printed once.

    Raises:
        OptionError: If the processes cannot reach one another.
        ProcessError: If another process failed or ended.
    """
    global _group  # noqa: PLW0603 - it belongs to the process
    if _group is not None or torchrun.process_count() == 1:
        yield
        return
    _group = _join()
    try:
        with _quiet():
            yield
    except KeyboardInterrupt as stop:
        # torchrun ends the others by SIGTERM once one has failed: that is no interruption.
        told = _told_by_another(0.0)
        if told is None:
            _tell("It was interrupted.")
            raise
        raise told from stop
    except Exception as error:
        if not isinstance(error, ProcessError) and not _tell(str(error) or type(error).__name__):
            error.__dict__["told"] = True  # another one has printed the same
        raise
    else:
        dist.destroy_process_group()
    finally:
        _group = None


def _join() -> _Group:
    # Late: builds of torch without distributed computing lack it.
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    here = int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        torch.cuda.set_device(here % gpus)  # what "cuda" means from here on
    own = gpus >= int(os.environ["LOCAL_WORLD_SIZE"])
    try:
        store, number, total = next(iter(rendezvous("env://")))
        # Objects always go from CPU to CPU; NCCL takes no two processes on a GPU.
        backend = "cpu:gloo,cuda:nccl" if own else "gloo"
        dist.init_process_group(
            backend, store=store, rank=number, world_size=total, timeout=STEP_WAIT
        )
        patient = dist.new_group(backend="gloo", timeout=ALONE_WAIT)
    except (RuntimeError, ValueError) as error:
        raise OptionError(
            f"The processes that torchrun started must reach one another, but: "
            f"{first_line(error)}. Check --rdzv-endpoint, and name the network by "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME."
        ) from error
    return _Group(number, total, store, patient)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the main process alone print and warn."""
    if is_main():
        yield
        return
    nothing = Path(os.devnull)
    with (
        nothing.open("w", encoding="utf-8") as stream,
        redirect_stdout(stream),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _together() -> Iterator[None]:
    """Turn an error of a collective operation into one that says which process has ended."""
    try:
        yield
    except RuntimeError as error:
        # torchrun now ends all processes; the message comes first.
        if threading.current_thread() is threading.main_thread():
            with suppress(ValueError):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told = _told_by_another(MESSAGE_WAIT)
        if told is None:
            reason = first_line(error).partition(". This is typically")[0]
            told = ProcessError(
                "Another process of this run ended without a message, or did not answer: "
                f"{reason}. It may have been killed for want of memory; torchrun says which one it "
                f"was. Start fewer processes, or give a smaller batch. {_RESUME}"
            )
            told.told = not _is_first("without a message")
        raise told from error


def _ended_by(text: str, number: int) -> ProcessError:
    assert _group is not None
    error = ProcessError(
        f"The process of rank {number} of {_group.count} failed, and the run with it: "
        f"{text.rstrip('.')}. {_RESUME}"
    )
    error.told = True
    return error


def _told_by_another(seconds: float) -> ProcessError | None:
    """Return the error that another process has told of, if it does within a time."""
    assert _group is not None
    end = time.monotonic() + seconds
    with suppress(RuntimeError, ValueError):  # the store may be gone
        while not _group.store.check([_FAILED]):
            if time.monotonic() > end:
                return None
            time.sleep(0.05)
        number, _, text = _group.store.get(_FAILED).decode().partition("\n")
        if int(number) != _group.rank:
            return _ended_by(text, int(number))
    return None


def _tell(text: str) -> bool:
    """Tell the others why this process fails; return whether it is the first to say so."""
    assert _group is not None
    with suppress(RuntimeError, ValueError):
        _group.store.compare_set(_FAILED, "", f"{_group.rank}\n{text}")
    return _is_first(text)


def _is_first(text: str) -> bool:
    assert _group is not None
    key = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    with suppress(RuntimeError, ValueError):
        return bool(_group.store.add(f"{_SAID}/{key}", 1) == 1)
    return True
