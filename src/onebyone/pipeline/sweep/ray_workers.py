"""Trials on Ray: an embedded Ray on this machine, or the nodes of a cluster."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from onebyone.core.errors import MissingExtraError, OptionError, first_line
from onebyone.core.read_files import reason_of
from onebyone.core.records import SweepTrial
from onebyone.pipeline.sweep.one_trial import Ended, Task
from onebyone.pipeline.sweep.schedule import Lost

# Ray's store of objects holds nothing but trials; by default it takes a third of the memory.
_STORE_BYTES = 80_000_000
_CONNECT_SECONDS = 10.0


class RayWorkers:
    """The nodes of a Ray cluster, each with all its processors for one trial at a time.

    Args:
        ray: The package, connected.
        task: What to do with a trial.
        hosts: Names or addresses of the nodes to use; by default all.

    Raises:
        OptionError: If there is no node of a name.
    """

    def __init__(self, ray: Any, task: Task, hosts: Collection[str]) -> None:
        self._ray = ray
        # A process for each trial, which so depends on none before it. `carry_out` decides where
        # a trial runs again.
        self._task = ray.remote(max_calls=1, max_retries=0)(_carried_out)
        self._how = ray.put(task)
        self._hosts = frozenset(hosts)
        self._running: dict[Any, tuple[SweepTrial, str]] = {}
        self._gone: set[str] = set()  # Ray takes a while to see that a node is dead
        known = {name for node in ray.nodes() if node["Alive"] for name in _names(node)}
        missing = sorted(self._hosts - known)
        if missing:
            raise OptionError(
                f"--node must name nodes of the Ray cluster, got {missing[0]!r}. There are: "
                f"{', '.join(sorted(known))}."
            )

    def free(self) -> list[str]:
        """Return the nodes that are there and have no trial of this sweep."""
        busy = {node for _, node in self._running.values()}
        return [node for node in self._nodes() if node not in busy]

    def running(self) -> list[SweepTrial]:
        """Return the trials that were started and have not been returned by :meth:`ended`."""
        return [trial for trial, _ in self._running.values()]

    def start(self, trial: SweepTrial, node: str) -> None:
        """Start a trial on a node, with all its processors and GPUs.

        Ray lets no other task run there meanwhile, and the trial waits until those there end.
        """
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        resources = self._nodes().get(node, {})
        options: dict[str, Any] = {
            "num_cpus": resources.get("CPU", 1),
            "name": trial.name,
            "scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(node, soft=False),
        }
        if resources.get("GPU"):
            options["num_gpus"] = resources["GPU"]  # a task without GPUs sees none
        self._running[self._task.options(**options).remote(self._how, trial)] = trial, node

    def ended(self, seconds: float) -> list[tuple[SweepTrial, Ended | Lost]]:
        """Wait for trials to end, some seconds at most; return those that did."""
        if not self._running:
            threading.Event().wait(seconds)
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        return [self._outcome(each) for each in done]

    def _outcome(self, reference: Any) -> tuple[SweepTrial, Ended | Lost]:
        trial, node = self._running.pop(reference)
        errors = self._ray.exceptions
        try:
            outcome: Ended | Lost = self._ray.get(reference)
        except errors.RayTaskError as error:
            outcome = Ended(f"Ray could not run it: {first_line(error.cause or error)}.", "", 0.0)
        except errors.RayError as error:
            if not isinstance(error, errors.WorkerCrashedError | errors.OutOfMemoryError):
                self._gone.add(node)
            outcome = Lost(first_line(error))
        return trial, outcome

    def _nodes(self) -> dict[str, Mapping[str, float]]:
        """Return the resources of the nodes that trials may use."""
        return {
            node["NodeID"]: node["Resources"]
            for node in self._ray.nodes()
            if node["Alive"]
            and node["NodeID"] not in self._gone
            and node["Resources"].get("CPU", 0) >= 1
            and (not self._hosts or self._hosts & _names(node))
        }


def _names(node: Mapping[str, Any]) -> set[str]:
    return {node[name] for name in ("NodeName", "NodeManagerHostname", "NodeManagerAddress")}


def _carried_out(task: Task, trial: SweepTrial) -> Ended:
    return task(trial)


@contextmanager
def connected(task: Task, *, address: str | None, hosts: Sequence[str]) -> Iterator[RayWorkers]:
    """Yield the nodes of a cluster, or this machine with an embedded Ray, which ends afterwards.

    Args:
        task: What to do with a trial.
        address: Of a cluster, such as ``auto`` or ``10.0.0.1:6379``; ``None`` for this machine.
        hosts: Names or addresses of the nodes to use; by default all.

    Raises:
        MissingExtraError: If Ray is not installed.
        OptionError: If there is no cluster at the address, or no node of a name.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise MissingExtraError("ray", "ray", "A sweep") from None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # "local": also where a variable of the environment names a cluster.
        own = {"include_dashboard": False, "object_store_memory": _STORE_BYTES, "num_cpus": 1}
        quiet |= {"address": "local", **own}
    else:
        _check_listens(address)
        quiet |= {"address": address}
    # Processes of an embedded Ray have this one's environment. Ray would give them one thread.
    threads = str(torch.get_num_threads())
    with _environment(OMP_NUM_THREADS=threads, RAY_USAGE_STATS_ENABLED="0"), _signals_kept():
        try:
            ray.init(**quiet)
        except (OSError, RuntimeError, ValueError) as error:
            where = "on this machine" if address is None else f"at --address {address}"
            raise OptionError(f"Ray cannot be used {where}: {first_line(error)}.") from error
    try:
        # Ray prints pages of its nodes' state there when one of them ends; the sweep says it in a
        # line, on standard error.
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield RayWorkers(ray, task, hosts)
    finally:
        ray.shutdown()


def _check_listens(address: str) -> None:
    """Check that something listens at an address with a port: Ray would try for minutes.

    Raises:
        OptionError: If nothing does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return  # such as auto: Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise OptionError(
            f"--address must be that of a Ray cluster, but nothing answers at {address} "
            f"({reason_of(error)}). `ray status` on its head node shows whether it runs."
        ) from error


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables of the environment inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Undo what the block does to the handler of SIGTERM: Ray's would end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # by Ray's handler: the signal is for the one before
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
