"""The demo: two runs on embedded data, and a sentence that is true on any processor."""

import argparse
import dataclasses
import sys

import pytest

from onebyone.cli import demo as command
from onebyone.core.records import Ratio
from onebyone.data import load_data
from onebyone.pipeline import demo
from onebyone.pipeline.loading import load_source


def narrow(spec):
    return load_source(spec, **({"width": 8} if spec == "onebyone:plain" else {}))


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEBYONE_CACHE", str(out / "cache"))
        patch.setattr(demo, "load_data", lambda name: load_data(name, limit=60))
        patch.setattr(demo, "load_source", narrow)
        patch.setattr(demo, "EPOCHS", 1)
        patch.setattr(demo, "DISTIL_EPOCHS", 1)
        yield demo.run_demo(out), out


def test_it_keeps_the_network_before_and_after(shrunk):
    (_, record), out = shrunk
    assert (out / "plain" / "run.json").exists()
    assert (out / "small" / "report.html").exists()
    assert record.status.state == "finished"
    assert record.plan.budgets[0].asked == demo.BUDGET
    assert record.after.macs <= record.before.macs
    assert list(record.comparison.latency_ratio) == ["eager"]
    assert record.after.latency["eager"].threads == 1


@pytest.mark.parametrize(("low", "high"), [(1.9, 2.1), (0.7, 0.8), (0.9, 1.1)])
def test_it_says_where_it_is_not_faster(shrunk, low, high, monkeypatch, capsys):
    (model, record), out = shrunk
    ratio = Ratio(value=(low + high) / 2, low=low, high=high, rounds=20)
    comparison = dataclasses.replace(record.comparison, latency_ratio={"eager": ratio})
    found = demo.Shrunk(model, record.with_(comparison=comparison))
    monkeypatch.setattr(demo, "run_demo", lambda *args, **named: found)
    command.run(argparse.Namespace(out=str(out), json=False, command_line=(), output=sys.stdout))
    text = " ".join(capsys.readouterr().out.split())
    assert ("Here it is not shown to be faster" in text) == (low < 1)
    assert f"{out}/small/report.html" in text
