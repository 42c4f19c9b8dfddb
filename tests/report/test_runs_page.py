from __future__ import annotations

import dataclasses
import json

import pytest
from parsed_page import Page
from run_records import empty_record, run_record, train_log

from onebyone.core.records import ModelSource, Ratio
from onebyone.report.html import render_runs
from onebyone.report.summary import Summary, summarize

HOSTILE = "<script>alert(1)</script>\"'&amp;"


def changed(ratio: float, accuracy: float):
    """Return a run of another speed and accuracy."""
    record = run_record()
    comparison = dataclasses.replace(
        record.comparison,
        latency_ratio={"eager": Ratio(value=ratio, low=0.95 * ratio, high=1.05 * ratio, rounds=40)},
        difference=dataclasses.replace(
            record.comparison.difference,
            value=accuracy,
            low=accuracy - 0.002,
            high=accuracy + 0.002,
        ),
    )
    return record.with_(comparison=comparison)


@pytest.fixture(scope="module")
def records():
    trained = run_record().with_(
        plan=None, comparison=None, before=None, one_shot=None, training=train_log()
    )
    return {
        "a": changed(2.0, -0.01),
        "b": changed(0.8, 0.004),
        "trained": trained,
        "broken": empty_record("failed"),
    }


@pytest.fixture(scope="module")
def page(records):
    return Page(render_runs(records))


def verdict_rows(page):
    table = page.find("table")[0]
    body = next(child for child in table.children if child.tag == "tbody")
    return {row.children[0].text: [cell.text for cell in row.children[1:]] for row in body.children}


def test_each_run_has_its_verdict_in_a_row(page):
    rows = {
        name.split("resnet20")[0].split("mystery")[0]: row
        for name, row in verdict_rows(page).items()
    }
    assert list(rows) == ["a", "b", "trained", "broken"]
    assert rows["a"][0].startswith("2.00× faster")
    assert rows["b"][0].startswith("1.25× slower")
    assert rows["a"][3].startswith("−1.00 points")
    assert rows["trained"][0] == "–"
    assert rows["trained"][2].startswith("91.03 %")
    assert "failed at calibrate" in next(name for name in verdict_rows(page) if "broken" in name)


def test_figures_are_the_records_own(page, records):
    shown = {float(value) for value in page.data_values()}
    for record in records.values():
        if record.comparison is None:
            continue
        expected = {ratio.value for ratio in record.comparison.latency_ratio.values()}
        expected |= {record.comparison.difference.value, record.comparison.agreement.value}
        expected |= {record.after.params, record.after.macs, record.after.peak_activation_bytes}
        assert expected <= shown


def test_trade_offs_are_drawn_together(page, records):
    charts = [json.loads(f.attributes["data-chart"]) for f in page.find("figure", class_="chart")]
    speed, harm, latency = charts
    assert [(p["x"], p["y"]) for p in speed["points"]] == [(2.0, -0.01), (0.8, 0.004)]
    assert speed["points"][0]["xi"] == [1.9, 2.1]
    assert len(harm["lines"]) == 1  # of one survey: they are the same
    assert len(harm["points"]) == 2
    assert [row[0] for row in latency["rows"]] == ["a, eager", "b, eager"]


def test_what_the_runs_do_not_share_is_named_first(page, records):
    notices = page.find("div", class_="notice")
    assert "These runs are not alike" in notices[0].text
    assert "the original network" in notices[0].text
    alike = Page(render_runs({"a": records["a"], "b": records["b"]}))
    assert not alike.find("div", class_="notice")
    other = dataclasses.replace(records["b"].machine, versions={"torch": "2.4.0"})
    unlike = Page(render_runs({"a": records["a"], "b": records["b"].with_(machine=other)}))
    assert "the version of torch" in unlike.find("div", class_="notice")[0].text


def test_the_training_of_what_was_rewritten_is_of_the_same_network(records):
    a = records["a"]
    source = dataclasses.replace(a.source, spec="onebyone:x", weights=None)
    trained = a.with_(plan=None, comparison=None, source=source)
    assert not Page(render_runs({"trained": trained, "a": a})).find("div", class_="notice")


def test_hostile_names_are_shown_as_text(records):
    named = records["a"].with_(source=ModelSource(name=HOSTILE, spec=HOSTILE))
    clean, dirty = Page(render_runs(records)), Page(render_runs({**records, HOSTILE: named}))
    assert len(dirty.find("script")) == len(clean.find("script"))
    assert dirty.text().count("alert(1)") >= 3


def test_runs_that_measured_nothing_still_have_a_page():
    page = Page(render_runs({"x": empty_record("failed"), "y": empty_record("interrupted")}))
    assert "failed at calibrate" in page.text()
    assert not page.find("figure")


def test_a_summary_has_the_figures_and_loads_again(records):
    summary = summarize(records)
    assert Summary.from_json(summary.to_json()) == summary
    first, _, trained, broken = summary.runs
    comparison = records["a"].comparison
    assert first.latency_ratio == comparison.latency_ratio
    assert first.macs_ratio == comparison.before.macs / comparison.after.macs
    assert trained.metric == records["trained"].after.metric
    assert (broken.state, broken.latency_ratio) == ("failed", None)
    text = str(summary.table())
    assert "2.00×" in text
    assert all(len(line) <= 80 for line in text.splitlines())
