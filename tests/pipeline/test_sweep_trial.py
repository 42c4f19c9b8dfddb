"""What a worker does with a trial, whatever is in its folder."""

import os
import tempfile
from pathlib import Path

import pytest

from onebyone.core.records import Machine, ModelSource, RunRecord, Status, SweepTrial
from onebyone.pipeline.sweep.folder import trial_folder
from onebyone.pipeline.sweep.one_trial import Task

TRIAL = SweepTrial(
    name="1-a", network="n", data="d", group="g", budget="macs=50%", runtime="eager", seed=0,
    precision="float32", effort="normal", command=("onebyone", "shrink", "n"),
)  # fmt: skip


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task whose runs are counted."""
    monkeypatch.chdir(Path.cwd())  # the task goes elsewhere
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("ONEBYONE_ROUNDS", "3")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("{}")
    asked = []

    def shrink(command):
        asked.append(command)
        return "no memory" if len(asked) > 1 else ""

    made = Task(shrink, Path("out"), tmp_path, {"ONEBYONE_ROUNDS": "7"})
    return made, asked


def write_run(folder, state):
    folder.mkdir(parents=True)
    RunRecord(
        onebyone="0", created="2026", status=Status(state=state, stage="compare"),
        source=ModelSource(name="n", spec=None),
        machine=Machine(processor="p", cores=1, threads=1, device="cpu", system="s", versions={}),
    ).save(folder / "run.json")  # fmt: skip


@pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
def test_a_trial_that_did_not_finish_is_gone_on_with(task, tmp_path, state):
    carry_out, asked = task
    write_run(trial_folder(tmp_path / "out", TRIAL.name), state)
    ended = carry_out(TRIAL)
    assert (ended.error, asked) == ("", [TRIAL.command])
    assert (Path.cwd(), os.environ["ONEBYONE_ROUNDS"]) == (tmp_path, "7")


def test_a_trial_that_finished_is_not_made_again(task, tmp_path):
    carry_out, asked = task
    write_run(trial_folder(tmp_path / "out", TRIAL.name), "finished")
    assert carry_out(TRIAL).error == ""
    assert asked == []


def test_the_error_of_a_trial_is_what_ends_it(task):
    carry_out, _ = task
    carry_out(TRIAL)
    assert carry_out(TRIAL).error == "no memory"


def test_a_damaged_record_is_named_and_left_alone(task, tmp_path):
    carry_out, asked = task
    file = trial_folder(tmp_path / "out", TRIAL.name) / "run.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert "run.json" in carry_out(TRIAL).error
    assert (asked, file.read_text()) == ([], "{")


def test_a_machine_that_does_not_see_the_folder_says_so(task, tmp_path):
    carry_out, asked = task
    (tmp_path / "out" / "sweep.json").unlink()
    assert "All machines of a sweep must see its folder" in carry_out(TRIAL).error
    assert asked == []
