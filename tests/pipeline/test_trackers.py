"""A run keeps a file of its epochs and reports to trackers; their faults do not end it."""

import csv
import importlib.util

import pytest
from tiny import shrink, train

from onebyone.core.errors import MissingExtraError, OptionError, UnknownNameError
from onebyone.pipeline import trackers


class Recorder:
    """A service that keeps what it is told."""

    def __init__(self, *, fails_at=None):
        self.told, self.closed, self._fails_at = [], None, fails_at

    def log(self, values, step):
        if step == self._fails_at:
            raise ConnectionError("no network\nand more")
        self.told.append((step, dict(values)))

    def close(self, *, failed):
        self.closed = failed


@pytest.fixture
def service(monkeypatch):
    def use(recorder):
        monkeypatch.setattr(trackers, "_SERVICES", {"csv": lambda *_: recorder})
        return recorder

    return use


def test_each_epoch_and_the_result_are_reported(service, tmp_path):
    kept = service(Recorder())
    made = train(tmp_path / "run", log=["csv"])
    epochs = [step for step, values in kept.told if "train/loss" in values]
    assert epochs == [1, 2, 3]
    assert kept.told[-1][1]["network/test accuracy"] == made.record.after.metric.value
    assert kept.closed is False


def test_a_distillation_is_reported_with_what_the_networks_cost(service, tmp_path):
    kept = service(Recorder())
    made = shrink(tmp_path / "run", log=["csv"])
    assert {"distil/loss", "distil/validation accuracy"} <= set(kept.told[0][1])
    assert kept.told[-1][1]["network/MACs"] == made.record.plan.after.macs
    assert kept.told[-1][1]["original/parameters"] == made.record.plan.before.params


def test_a_service_that_fails_gets_no_more_and_the_run_ends_well(service, tmp_path):
    kept = service(Recorder(fails_at=2))
    with pytest.warns(UserWarning, match=r"csv gets no more of it: ConnectionError: no network\."):
        made = train(tmp_path / "run", log=["csv"])
    assert made.record.status.state == "finished"
    assert [step for step, _ in kept.told] == [1]
    assert kept.closed is False


def test_a_run_that_fails_is_ended_as_failed(service, tmp_path):
    kept = service(Recorder())

    def stop(done, total, message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", log=["csv"], progress=stop)
    assert kept.closed is True


def test_the_folder_has_a_file_of_the_epochs(tmp_path):
    made = train(tmp_path / "run")
    with (tmp_path / "run" / "log.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    epochs = made.record.training.epochs
    assert [int(row["epoch"]) for row in rows] == [each.epoch for each in epochs]
    assert [float(row["loss"]) for row in rows] == pytest.approx([each.loss for each in epochs])


def test_the_log_does_not_decide_whether_a_run_can_be_resumed(service, tmp_path):
    service(Recorder())

    def stop(done, total, message):
        if message.startswith("measure"):
            raise KeyboardInterrupt

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", progress=stop)
    resumed = train(tmp_path / "run", resume=True, log=["csv"])
    assert resumed.record.after.metric == whole.record.after.metric


def test_unknown_services_and_those_without_their_library_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="'tensorbord'"):
        train(tmp_path / "run", log=["tensorbord"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"onebyone\[wandb\]"):
        train(tmp_path / "run", log=["wandb"])
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_each_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = train(tmp_path / "run", log=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert told == [
        (each.epoch, pytest.approx(each.loss, rel=1e-6)) for each in made.record.training.epochs
    ]
    with pytest.raises(OptionError, match="give `out`"):
        train(None, log=["tensorboard"])


def test_mlflow_gets_each_epoch(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlflow").as_uri())
    train(tmp_path / "run", log=["mlflow"])
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert found.info.status == "FINISHED"
    assert found.data.params["epochs"] == "3"
    assert "train/loss" in found.data.metrics


def test_wandb_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tmp_path / "run", log=["wandb"])
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
