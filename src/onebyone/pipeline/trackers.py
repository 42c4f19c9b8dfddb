"""Reports to TensorBoard, MLflow and Weights & Biases, by their own libraries."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from onebyone.core.errors import MissingExtraError, OptionError, UnknownNameError, first_line
from onebyone.core.records import RunRecord, TrainLog

PROJECT = "onebyone"  # in Weights & Biases, where WANDB_PROJECT names no other


class Service(Protocol):
    """What a tracking library is used for."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add values at a step."""

    def close(self, *, failed: bool) -> None:
        """End the run there."""


class Tracker:
    """Reports a run to a service; an error of the service ends the reports, not the run.

    Args:
        name: Of the service.
        service: It.
    """

    def __init__(self, name: str, service: Service) -> None:
        self._name = name
        self._service = service
        self._fails = False

    def log(self, stage: str, log: TrainLog) -> None:
        """Report the last epoch of a training."""
        epoch = log.epochs[-1]
        values = {"loss": epoch.loss, "learning_rate": epoch.learning_rate}
        if epoch.validation is not None:
            values[f"validation {log.metric}"] = epoch.validation
        if epoch.seconds:
            values["examples_per_second"] = log.examples / epoch.seconds
        if epoch.waited is not None:
            values["waited_seconds"] = epoch.waited
        self._send({f"{stage}/{key}": value for key, value in values.items()}, epoch.epoch)

    def close(self, record: RunRecord, *, failed: bool) -> None:
        """Report what the run's networks cost and score, and end the run there."""
        self._send(_results(record), record.training.epochs[-1].epoch if record.training else 0)
        # Also after a fault: what the caller reports next must not go into this run.
        self._try(lambda: self._service.close(failed=failed))

    def _send(self, values: Mapping[str, float], step: int) -> None:
        if values and not self._fails:
            self._try(lambda: self._service.log(values, step))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the library's, whatever it is
            if not self._fails:
                self._warn(error)
            self._fails = True

    def _warn(self, error: Exception) -> None:
        warnings.warn(
            f"The run goes on, but {self._name} gets no more of it: {type(error).__name__}: "
            f"{first_line(error)}.",
            stacklevel=2,
        )


def _results(record: RunRecord) -> dict[str, float]:
    """Return what the networks of a run cost and score, by name."""
    found: dict[str, float] = {}
    for name, measured in (("original", record.before), ("network", record.after)):
        if measured is not None and measured.metric is not None:
            found[f"{name}/test {measured.metric.name}"] = measured.metric.value
    if record.plan is not None:
        for name, cost in (("original", record.plan.before), ("network", record.plan.after)):
            found |= {f"{name}/MACs": float(cost.macs), f"{name}/parameters": float(cost.params)}
    return found


class _TensorBoard:
    def __init__(self, name: str, config: Mapping[str, str], folder: Path | None) -> None:
        del name, config  # the folder's record has them
        if folder is None:
            raise OptionError("TensorBoard needs a folder to write to: give `out`.")
        writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(log_dir=str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        del failed
        self._writer.close()


class _MLflow:
    def __init__(self, name: str, config: Mapping[str, str], folder: Path | None) -> None:
        del folder  # MLFLOW_TRACKING_URI says where
        self._mlflow: Any = importlib.import_module("mlflow")
        nested = self._mlflow.active_run() is not None
        self._mlflow.start_run(run_name=name, nested=nested)
        self._mlflow.log_params(dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class _WandB:
    def __init__(self, name: str, config: Mapping[str, str], folder: Path | None) -> None:
        wandb: Any = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        place = None if folder is None else str(folder)
        self._run = wandb.init(project=project, name=name, config=dict(config), dir=place)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


_SERVICES: Mapping[str, Callable[[str, Mapping[str, str], Path | None], Service]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WandB,
}


def check_trackers(names: Sequence[str]) -> None:
    """Check that services are known, and that their libraries are installed.

    Raises:
        UnknownNameError: If there is no such service.
        MissingExtraError: If a library is not installed.
    """
    for name in names:
        if name not in _SERVICES:
            raise UnknownNameError("`log`", name, list(_SERVICES))
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, name, f"`log` to {name!r}")


def trackers_of(
    names: Sequence[str], run: str, config: Mapping[str, str], folder: Path | None
) -> tuple[Tracker, ...]:
    """Begin to report a run.

    Args:
        names: Of the services, each once.
        run: What to call the run.
        config: Its settings, in words.
        folder: The run's, where there is one.

    Raises:
        OptionError: If a service needs a folder and there is none, or does not start.
    """
    found = []
    for name in dict.fromkeys(names):
        try:
            service = _SERVICES[name](run, config, folder)
        except OptionError:
            raise
        except Exception as error:  # the library's, whatever it is
            raise OptionError(
                f"`log` to {name!r} does not start: {first_line(error)}. Check its settings, or "
                "leave it out."
            ) from error
        found.append(Tracker(name, service))
    return tuple(found)
