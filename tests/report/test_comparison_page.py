"""The page of a comparison: its figures are the record's, and it works in a browser."""

from __future__ import annotations

import dataclasses

import pytest
from parsed_page import Page
from run_records import run_record
from test_chromium import CONTRAST

from onebyone.core.compared import Compared, Contender
from onebyone.core.records import ModelSource, Ratio, Subnormals
from onebyone.report.comparison_page import render_compared

HOSTILE = '<script>alert("x")</script> & <b>網絡</b>'
LONG = "a_very_long_name_without_any_place_to_break_it_" * 4


def compared(names=("first", "second", HOSTILE, LONG)) -> Compared:
    comparison = run_record().comparison
    assert comparison is not None
    others = [
        Contender(
            name=name,
            measured=comparison.after,
            source=ModelSource(name=name, spec=f"net.py:{name}", weights=f"{name}.safetensors"),
            latency_ratio={
                runtime: Ratio(value=ratio.value + place, low=ratio.low, high=ratio.high + place,
                               rounds=40)
                for runtime, ratio in comparison.latency_ratio.items()
            },
            difference=comparison.difference,
            agreement=comparison.agreement,
            divergence=comparison.divergence,
        )
        for place, name in enumerate(names[1:])
    ]  # fmt: skip
    return Compared(
        contenders=(Contender(name=names[0], measured=comparison.before), *others),
        inputs=comparison.inputs,
        rounds=40,
        machine=run_record().machine,
        onebyone="0.1.0",
        created="2026-01-01T00:00:00+00:00",
        data=run_record().data,
        command=("onebyone", "compare", HOSTILE),
    )


def test_every_figure_of_the_page_is_the_records():
    record = compared()
    shown = {float(value) for value in Page(render_compared(record)).data_values()}
    for each in record.contenders:
        measured = each.measured
        wanted = {measured.params, measured.macs, measured.file_bytes}
        wanted |= {timing.median_ms for timing in measured.latency.values()}
        wanted |= {ratio.value for ratio in each.latency_ratio.values()}
        wanted.add(measured.metric.value)
        if each.difference is not None:
            wanted |= {each.difference.value, each.agreement.value, each.divergence}
        assert wanted <= shown


def test_hostile_names_are_text():
    page = Page(render_compared(compared()))
    assert HOSTILE in page.text()
    assert not [b for b in page.find("b") if "網絡" in b.text]
    assert all("alert(" not in script.text for script in page.find("script"))


def test_a_comparison_without_data_has_no_scores():
    record = compared()
    bare = dataclasses.replace(
        record,
        data=None,
        contenders=tuple(
            dataclasses.replace(
                each,
                measured=dataclasses.replace(each.measured, metric=None, train_metric=None),
                difference=None, agreement=None, divergence=None,
            )
            for each in record.contenders
        ),
    )  # fmt: skip
    text = Page(render_compared(bare)).text()
    assert "Scores" not in text
    assert "Times in the same rounds" in text


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_works_in_a_browser(browser, tmp_path, width, dark):
    path = tmp_path / "report.html"
    path.write_text(render_compared(compared()), encoding="utf-8")
    browser.console()
    browser.requests()
    browser.open(path, width=width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return document.querySelectorAll('.canvas svg').length") == 2
    assert browser.console() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.run(CONTRAST) == []


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_axe_finds_nothing_serious(browser, tmp_path, width, dark):
    path = tmp_path / "report.html"
    path.write_text(render_compared(compared()), encoding="utf-8")
    browser.open(path, width=width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.audit() == []


def test_the_page_tells_what_subnormal_weights_cost_a_network():
    record = compared()
    found = Subnormals(weights={"a.weight": 7}, values=100, error=0.0)
    first = dataclasses.replace(record.contenders[2], subnormals=found)
    changed = dataclasses.replace(record, contenders=(*record.contenders[:2], first))
    page = render_compared(changed)
    assert "&lt;b&gt;網絡&lt;/b&gt;: Subnormal weights" in page
    assert "7 of 100" in page
    assert "ubnormal" not in render_compared(record)
