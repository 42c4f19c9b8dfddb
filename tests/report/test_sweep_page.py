"""The table and the page of a sweep have every trial, with the figures of the runs' records."""

from __future__ import annotations

import csv
import dataclasses
import io

from hypothesis import given
from hypothesis import strategies as st
from parsed_page import Page
from run_records import run_record

from onebyone.core.records import SweepRecord, SweepTrial
from onebyone.report.sweep_page import render_sweep, unbeaten
from onebyone.report.sweep_rows import csv_of, table_of

HOSTILE = "<script>alert(1)</script>\n\"'&amp;, \\"


def sweep_of(*trials):
    return SweepRecord(
        onebyone="0", created="2026-01-01", settings={}, versions={}, trials=tuple(trials)
    )


def trial(name, **changes):
    fields = {
        "network": "resnet20", "data": "cifar10", "group": "g", "budget": "macs=50%",
        "runtime": "eager", "seed": 3, "precision": "float32", "effort": "normal",
        "command": ("onebyone", "shrink"), "state": "finished", "host": "node1", "starts": 1,
    }  # fmt: skip
    return SweepTrial(name=name, **{**fields, **changes})


def run(ms=None, accuracy=None):
    """Return a run of another time and accuracy."""
    record = run_record()
    after = record.comparison.after
    if ms is not None:
        timing = dataclasses.replace(after.latency["eager"], median_ms=ms, q1_ms=ms, q3_ms=ms)
        after = dataclasses.replace(after, latency={**after.latency, "eager": timing})
    if accuracy is not None:
        metric = dataclasses.replace(after.metric, value=accuracy, low=0.0, high=1.0)
        after = dataclasses.replace(after, metric=metric)
    return record.with_(comparison=dataclasses.replace(record.comparison, after=after))


def text_of(page):
    shown = (
        *(each.text for each in page.elements),
        *(str(each.attributes) for each in page.elements),
    )
    return " ".join(shown)


def lines(sweep, runs):
    return list(csv.DictReader(io.StringIO(csv_of(sweep, runs))))


def test_the_table_has_a_line_for_each_trial_with_its_runs_figures():
    record = run(ms=1.25, accuracy=0.875)
    sweep = sweep_of(
        trial("a"), trial("b", state="failed", error=HOSTILE), trial("c", state="waiting")
    )
    first, second, third = lines(sweep, {"a": record})
    compared = record.comparison
    expected = {
        "latency_before_ms": compared.before.latency["eager"].median_ms,
        "latency_after_ms": 1.25,
        "latency_after_q3_ms": 1.25,
        "speed_up": compared.latency_ratio["eager"].value,
        "speed_up_low": compared.latency_ratio["eager"].low,
        "macs_after": compared.after.macs,
        "params_before": compared.before.params,
        "file_bytes_after": compared.after.file_bytes,
        "score_before": compared.before.metric.value,
        "score_after": 0.875,
        "score_change_high": compared.difference.high,
        "seed": 3,
        "threads": compared.after.latency["eager"].threads,
    }
    assert {name: float(first[name]) for name in expected} == expected
    assert (first["processor"], first["host"]) == (record.machine.processor, "node1")
    assert (second["status"], second["error"]) == ("failed", " ".join(HOSTILE.split()))
    assert second["speed_up"] == third["speed_up"] == ""
    assert third["status"] == "waiting"


def test_a_trial_whose_runtime_was_not_timed_has_no_time():
    (line,) = lines(sweep_of(trial("a", runtime="openvino")), {"a": run()})
    assert line["latency_after_ms"] == line["speed_up"] == ""
    assert line["macs_after"] != ""


def test_the_page_has_every_trial_its_error_and_the_front():
    runs = {"a": run(1e-3, 0.8), "b": run(2e-3, 0.99), "worse": run(3e-3, 0.7)}
    failed = trial("bad", state="failed", error=HOSTILE)
    sweep = sweep_of(*map(trial, runs), failed)
    page = Page(render_sweep(sweep, runs))
    text = text_of(page)
    assert "3 of 4 trials finished" in text
    rows = [each.children[0].text for each in page.find("tr") if each.children[0].tag == "th"]
    for name in (*runs, "bad"):
        assert any(row.startswith(name) for row in rows)
    assert "alert(1)" in text
    assert not [each for each in page.find("script") if "alert(1)" in each.text]
    # The original, slower and less accurate than b, is not in it either.
    assert "not beaten in both: 2 points from 80.0 % at 0.001 to 99.0 % at 0.002" in text_of(page)
    assert "resnet20, original" in text_of(page)


def test_a_sweep_without_a_result_has_a_page_of_its_errors():
    text = render_sweep(sweep_of(trial("bad", state="failed", error="no such file")), {})
    assert "no such file" in text
    assert 'id="front"' not in text


def test_the_printed_table_names_each_error():
    failed = trial("bad", state="failed", error="no such file")
    words = str(table_of(sweep_of(trial("a"), failed), {"a": run()}))
    assert "1 of 2 trials finished" in words
    assert "bad failed: no such file" in words


numbers = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
def test_the_front_is_what_no_other_point_beats(points):
    def beats(one, other):
        return one != other and one[0] <= other[0] and one[1] >= other[1]

    front = {points[place] for place in unbeaten(points)}
    assert front == {p for p in points if not any(beats(other, p) for other in points)}
