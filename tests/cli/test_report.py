"""``onebyone report`` as a user meets it; made-up records, no network is run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from onebyone.cli import main
from onebyone.core.records import FORMAT, Machine, Measured, Metric, ModelSource, RunRecord, Status


def record(name="net", accuracy=0.9):
    return RunRecord(
        onebyone="0.1.0",
        created="2026-05-04T12:31:07+00:00",
        status=Status(state="finished", stage="measure"),
        source=ModelSource(name=name, spec="onebyone:classic"),
        machine=Machine(
            processor="a",
            cores=2,
            threads=1,
            device="cpu",
            system="Linux",
            versions={"torch": "2.9"},
        ),
        after=Measured(
            params=10,
            macs=20,
            file_bytes=30,
            latency={},
            metric=Metric(name="accuracy", value=accuracy, n=50, low=0.8, high=0.95),
        ),
    )


@pytest.fixture(autouse=True)
def _runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, value in (("runs/a", 0.9), ("runs/b", 0.8), ("other/a", 0.7)):
        (tmp_path / folder).mkdir(parents=True)
        record(accuracy=value).save(tmp_path / folder / "run.json")


def test_the_report_of_a_run_is_written_into_its_folder(tmp_path, capsys):
    assert main(["report", "runs/a"]) == 0
    page = (tmp_path / "runs/a/report.html").read_text()
    assert "90.00 % accuracy on 50 test" in page
    assert "Report: runs/a/report.html" in capsys.readouterr().out
    assert main(["report", "runs/a/run.json", "--out", "x.html"]) == 0
    assert (tmp_path / "x.html").read_text() == page


def test_several_runs_make_one_page_and_are_told_apart(tmp_path, capsys):
    assert main(["report", "runs/a", "runs/b", "other/a", "--out", "all.html", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found["runs"]] == ["runs/a", "runs/b", "other/a"]
    assert [run["metric"]["value"] for run in found["runs"]] == [0.9, 0.8, 0.7]
    page = (tmp_path / "all.html").read_text()
    assert "3 runs side by side" in page
    assert not (tmp_path / "runs/a/report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/a", "runs/b"], "Give --out"),
        (["runs/none"], "There must be a run's record at runs/none"),
        (["runs"], "There must be a run's record at runs/run.json"),
        (["runs/a", "./runs/a", "--out", "x.html"], "given once"),
        (["runs/a", "--out", "runs"], "must name an .html file"),
        (["runs/a", "--out", "page.pdf"], "must name an .html file"),
        (["runs/a", "--out", "nowhere/page.html"], "Cannot write"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, capsys):
    assert main(["report", *arguments]) != 0
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_record_that_is_none_is_refused_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "runs/a/run.json").write_text(f'{{"format": {FORMAT}}}')
    assert main(["report", "runs/a"]) == 1
    assert "not a saved RunRecord" in capsys.readouterr().err
    assert not (tmp_path / "runs/a/report.html").exists()


def test_a_report_needs_no_torch():
    code = (
        "import sys; from onebyone.cli import main; status = main(['report', 'runs/a']); "
        "sys.exit('imported torch' if 'torch' in sys.modules or status else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
