"""A run is gone on with only as the same run; otherwise it is refused and untouched."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from onebyone.core.errors import BudgetError, OneByOneError, OptionError, OutputError
from onebyone.core.records import Plan, RunRecord
from onebyone.core.settings.runs import ShrinkSettings, TrainRunSettings
from onebyone.core.write_files import OWN, contents
from onebyone.pipeline.run_folder import RunFolder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    return tiny.shrink(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def stopped(tmp_path):
    """The folder of a run that was stopped in its last stage but one."""
    with pytest.raises(KeyboardInterrupt):
        tiny.shrink(tmp_path / "run", progress=tiny.stop_in("distil", after=5))
    return tmp_path / "run"


def same_weights(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "macs=70%"}, "budget macs=60% instead of macs=70%"),
        ({"head": "keep"}, "head auto instead of keep"),
        ({"leave": ["0"]}, "leave none instead of 0"),
        ({"reconstruct": 5}, "reconstruct 3 instead of 5"),
        ({"label_weight": 0.5}, "label_weight 0.0 instead of 0.5"),
        ({"mix": 0.0}, "mix not given instead of 0.0"),
        ({"epochs": 3}, "epochs 2 instead of 3"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"calibration_examples": 16}, "calibration_examples 32 instead of 16"),
        (
            {"runtimes": ("eager", "channels-last")},
            "runtimes eager instead of eager, channels-last",
        ),
        ({"net": tiny.network(1)}, "another network or other weights"),
        ({"examples": tiny.data(1)}, "other data"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_and_the_folder_untouched(stopped, changes, message):
    before = tiny.content(stopped)
    with pytest.raises(OptionError, match=f"was started with .*{message}"):
        tiny.shrink(stopped, resume=True, **changes)
    assert tiny.content(stopped) == before


def test_another_plan_is_refused(whole, tmp_path):
    plan = whole.record.plan
    how = {"budget": None, "plan": plan}
    with pytest.raises(KeyboardInterrupt):
        tiny.shrink(tmp_path / "run", progress=tiny.stop_in("distil"), **how)
    other = dataclasses.replace(plan, choices=plan.choices[:-1])
    assert isinstance(other, Plan)
    with pytest.raises(OptionError, match=r"plan SHA-256 .* instead of SHA-256"):
        tiny.shrink(tmp_path / "run", resume=True, **{**how, "plan": other})


def test_after_a_refusal_the_run_can_still_be_resumed(stopped, whole):
    for _ in range(2):
        with pytest.raises(OptionError, match="budget"):
            tiny.shrink(stopped, resume=True, budget="macs=70%")
    same_weights(tiny.shrink(stopped, resume=True).model, whole.model)


def test_a_run_that_is_stopped_while_its_end_is_written_was_interrupted(tmp_path, monkeypatch):
    save = RunFolder.save

    def stopped_at_the_end(folder, record):
        if record.status.state == "finished":
            raise KeyboardInterrupt
        save(folder, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", stopped_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            tiny.train(tmp_path / "run")
    assert RunRecord.load(tmp_path / "run" / "run.json").status.state == "interrupted"
    resumed = tiny.train(tmp_path / "run", resume=True)
    same_weights(resumed.model, tiny.train(tmp_path / "whole").model)


@pytest.mark.parametrize("stage", ["apply", "one-shot", "distil", "compare"])
def test_a_run_that_is_stopped_twice_loses_nothing(tmp_path, whole, stage):
    out = tmp_path / "run"
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            tiny.shrink(out, resume=resume, progress=tiny.stop_in(stage))
    record = RunRecord.load(out / "run.json")
    assert (record.status.state, record.status.stage) == ("interrupted", stage)
    resumed = tiny.shrink(out, resume=True)
    same_weights(resumed.model, whole.model)
    assert resumed.record.reconstruction.steps == whole.record.reconstruction.steps
    assert resumed.record.reconstruction.after == whole.record.reconstruction.after
    assert resumed.record.seconds.keys() == whole.record.seconds.keys()
    assert resumed.record.plan.choices == whole.record.plan.choices
    assert set(contents(out)) == {
        "run.json", "plan.json", "report.html", "model.safetensors", "original.safetensors",
        "log.csv", "run.log",
    }  # fmt: skip


def test_seconds_of_earlier_attempts_are_added_up(stopped):
    earlier = RunRecord.load(stopped / "run.json").seconds
    resumed = tiny.shrink(stopped, resume=True).record.seconds
    assert resumed["profile"] == earlier["profile"]
    assert resumed["distil"] > earlier["distil"]


def test_a_training_is_resumed_to_the_same_weights(tmp_path):
    whole = tiny.train(None)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path / "run", progress=tiny.stop_in("train", after=6))
    with pytest.raises(OptionError, match="epochs 3 instead of 4"):
        tiny.train(tmp_path / "run", resume=True, epochs=4)
    same_weights(tiny.train(tmp_path / "run", resume=True).model, whole.model)


def test_a_training_is_not_resumed_as_a_shrink(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path / "run", progress=tiny.stop_in("train", after=6))
    with pytest.raises(OptionError, match="work train instead of shrink"):
        tiny.shrink(tmp_path / "run", resume=True)


def test_every_setting_decides_but_for_those_that_are_named():
    others = {"out", "resume", "overwrite", "command", "uses", "progress", "log"}
    for kind in (ShrinkSettings, TrainRunSettings):
        names = {field.name for field in dataclasses.fields(kind)}
        asked = kind() if kind is ShrinkSettings else kind(epochs=1)
        assert asked.deciding.keys() == names - others | {"work"}


def test_a_folder_that_was_moved_and_data_of_another_name_are_the_same(stopped, whole):
    moved = stopped.rename(stopped.with_name("moved"))
    renamed = dataclasses.replace(tiny.data(), name="elsewhere")
    same_weights(tiny.shrink(moved, resume=True, examples=renamed).model, whole.model)


# ---------------------------------------------------------------- folders


def test_an_attempt_that_made_nothing_does_not_block_its_folder(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        tiny.shrink(tmp_path / "run", progress=tiny.stop_in("plan"))
    assert RunRecord.load(tmp_path / "run" / "run.json").status.stage == "plan"
    same_weights(tiny.shrink(tmp_path / "run").model, whole.model)


def test_what_killed_processes_left_is_swept(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / f"{OWN}aside-12.tmp").write_text("half")
    tiny.train(out)
    assert not list(out.glob(f"{OWN}aside-*"))


def test_a_run_that_is_overwritten_stays_until_the_new_one_is_begun(tmp_path):
    out = tmp_path / "run"
    tiny.train(out)
    before = tiny.content(out)
    with pytest.raises(OptionError):
        tiny.train(out, overwrite=True, device="nowhere")
    assert tiny.content(out) == before
    tiny.shrink(out, overwrite=True, epochs=0, reconstruct=0)
    assert RunRecord.load(out / "run.json").plan is not None


def unreachable(out, **how):
    """Ask for a budget that no plan meets."""
    with pytest.raises(BudgetError, match="the least that these rewrites reach"):
        tiny.shrink(out, budget="macs=0.1%", **how)


def test_a_budget_out_of_reach_leaves_nothing_behind(tmp_path):
    unreachable(tmp_path / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    unreachable(tmp_path / "run", resume=True)
    assert not [path for path in (tmp_path / "run").iterdir() if not path.name.startswith(OWN)]
    tiny.shrink(tmp_path / "run", epochs=0, reconstruct=0)


@pytest.mark.parametrize("make", [tiny.train, tiny.shrink])
def test_a_budget_out_of_reach_leaves_the_run_that_was_to_be_replaced(make, tmp_path):
    out = tmp_path / "run"
    make(out)
    before = tiny.content(out)
    unreachable(out, overwrite=True)
    assert tiny.content(out) == before


@pytest.mark.parametrize("place", ["run.Run.profile", "shrink.planned"])
def test_a_run_to_be_overwritten_stays_if_the_new_one_stops_before_its_plan(
    place, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    tiny.train(out)
    before = tiny.content(out)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"onebyone.pipeline.{place}", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.shrink(out, overwrite=True)
    assert tiny.content(out) == before


@pytest.mark.parametrize("place", ["loop", "loop/below"])
def test_a_link_to_itself_is_no_folder(place, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match=r"Cannot (use|make) the folder"):
        tiny.train(tmp_path / place)


def test_a_damaged_record_can_be_overwritten(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text('{"onebyone":')
    tiny.train(out, overwrite=True)
    assert RunRecord.load(out / "run.json").status.state == "finished"


@pytest.mark.parametrize(
    "place", ["source", "source/in", "source/a/b", ".", "link", "other/../source"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_is_apart_from_the_run_that_it_is_made_from(tmp_path, place, overwrite, monkeypatch):
    source = tmp_path / "source"
    tiny.train(source)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(source)
    if place == ".":
        (tmp_path / "run.json").write_bytes((source / "run.json").read_bytes())
    before = tiny.content(source)
    spec = dataclasses.replace(tiny.SOURCE, spec=str(source))
    with pytest.raises(OutputError, match=r"must be apart from the run.s inputs"):
        tiny.shrink(tmp_path / place, source=spec, overwrite=overwrite)
    assert tiny.content(source) == before


def test_an_overwritten_run_does_not_hold_the_weights_that_are_used(tmp_path):
    out = tmp_path / "run"
    tiny.train(out)
    before = tiny.content(out)
    with pytest.raises(OutputError, match="apart"):
        tiny.shrink(out, overwrite=True, uses=[out / "model.safetensors"])
    assert tiny.content(out) == before


# ---------------------------------------------------------------- two processes

HOLD = """
import sys
sys.path[:0] = [sys.argv[2]]
import tiny
def hold(*_):
    print("begun", flush=True)
    sys.stdin.read()
tiny.train(sys.argv[1], progress=hold)
"""


@pytest.fixture
def held(tmp_path):
    """The folder of a run that another process is at, and the process."""
    folder = str(Path(tiny.__file__).parent)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), folder]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    yield tmp_path / "run", process
    process.kill()
    process.communicate()


def test_a_run_that_another_process_is_at_is_refused_and_untouched(held):
    folder, process = held
    before = tiny.content(folder)
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match=rf"in use by process {process.pid} on .* since \d"):
            tiny.train(folder, **how)
    assert tiny.content(folder) == before
    process.kill()
    process.wait()
    tiny.train(folder, resume=True)  # the lock of a dead process does not block
    assert json.loads((folder / "run.json").read_text())["status"]["state"] == "finished"


def test_resuming_and_replacing_are_not_both_meant(tmp_path):
    with pytest.raises(OptionError, match="Give only one of `resume`"):
        tiny.shrink(tmp_path / "run", resume=True, overwrite=True)


@pytest.mark.parametrize("metric", ["nosuch", lambda outputs: outputs])
def test_a_training_that_cannot_be_scored_leaves_no_folder(tmp_path, metric):
    with pytest.raises(OneByOneError, match=r"No metric named|must give one score"):
        tiny.train(tmp_path / "run", metric=metric)
    assert not (tmp_path / "run").exists()
