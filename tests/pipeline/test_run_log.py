"""The log of a run: a line for each stage, also where it stopped."""

import contextlib
import io
from dataclasses import replace

import pytest
from tiny import shrink, stop_in

from onebyone.core.records import RunRecord
from onebyone.pipeline.run_times import times_of
from onebyone.report.console import progress
from onebyone.report.html import write_report

STAGES = ["profile", "plan", "apply", "one-shot", "distil", "compare"]


def lines(folder):
    return (folder / "run.log").read_text(encoding="utf-8").splitlines()


def test_each_stage_has_a_line_with_its_number_and_time(tmp_path):
    shrink(tmp_path / "run")
    said = [line.partition("UTC  ")[2] for line in lines(tmp_path / "run")]
    assert [line.partition(":")[0] for line in said] == [
        f"{stage} ({number} of 6)" for number, stage in enumerate(STAGES, 1)
    ]
    assert all("finished after" in line for line in said)


def test_a_stop_is_in_the_log_and_a_resumed_run_adds_to_it(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        shrink(folder, progress=stop_in("distil"))
    stopped = lines(folder)
    assert "distil (5 of 6): interrupted" in stopped[-1]
    shrink(folder, resume=True)
    assert lines(folder)[: len(stopped)] == stopped
    assert "compare (6 of 6): finished" in lines(folder)[-1]
    shrink(folder, overwrite=True, epochs=0)
    assert len(lines(folder)) == 5


def test_lines_are_shown_where_no_terminal_is(tmp_path, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with contextlib.suppress(KeyboardInterrupt), progress("shrink") as update:
        shrink(None, progress=stop_in("apply"))
        update(1, 1)
    said = stream.getvalue().splitlines()
    names = [line.partition(":")[0] for line in said]
    # The plan says how long it will take before it is finished.
    assert names == ["profile (1 of 6)", "options of 3 layers", "plan (2 of 6)"]


def test_the_last_report_is_of_the_finished_run(tmp_path):
    shrink(tmp_path / "run")
    record = RunRecord.load(tmp_path / "run" / "run.json")
    assert record.status.state == "finished"
    write_report(record, tmp_path / "again.html")
    assert (tmp_path / "run" / "report.html").read_bytes() == (tmp_path / "again.html").read_bytes()


def test_after_a_run_like_it_a_run_says_how_long_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEBYONE_CACHE", str(tmp_path / "cache"))
    shrink(tmp_path / "first", epochs=0)
    assert not any("left" in line for line in lines(tmp_path / "first"))
    record = RunRecord.load(tmp_path / "first" / "run.json")
    stages, taken = [name for name in STAGES if name != "distil"], record.seconds
    times = times_of(record)
    assert times.left(stages, "one-shot") == pytest.approx(taken["compare"])
    assert times.left(stages, "profile") == pytest.approx(sum(taken[name] for name in stages[1:]))
    assert times.left(stages, "compare") is None
    assert times.left([*stages, "export"], "plan") is None  # it never ran
    shrink(tmp_path / "second", epochs=0, seed=5)
    said = lines(tmp_path / "second")
    assert all(" left, by the last run like it" in line for line in said[:-1])
    assert "left" not in said[-1]
    assert not times_of(with_setting(record, "epochs", "7")).earlier
    assert times_of(with_setting(record, "budget", "macs=20%")).earlier
    times.file.write_text('{"seconds": {"plan": "long"}}')
    assert not times_of(record).earlier


def with_setting(record, name, value):
    settings = record.identity.settings | {name: value}
    return record.with_(identity=replace(record.identity, settings=settings))
