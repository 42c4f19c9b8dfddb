"""The report of a run that was really made, in a real browser, figure by figure."""

from __future__ import annotations

import json
import math
import re
import time

import pytest

from onebyone.cli import main
from onebyone.core.records import RunRecord
from onebyone.core.units import format_count, format_ms
from onebyone.report.layer_rows import match_layers

SCALES = {"k": 1e3, "M": 1e6, "G": 1e9, "": 1.0}
UNITS = {"B": 1.0, "ms": 1.0, "µs": 1e-3, "s": 1e3, "%": 0.01, "×": 1.0, "points": 0.01, "": 1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained network and its shrunk one, as the command line makes them."""
    folder = tmp_path_factory.mktemp("real")
    common = ["--data", "digits", "--limit", "240", "--threads", "1", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train = ["train", "onebyone:classic", "--epochs", "3", "--out", "runs/first"]
        assert main([*train, *common]) == 0
        shrink = ["shrink", "runs/first", "--budget", "params=4%", "--head", "gap"]
        options = ["--epochs", "2", "--calibration", "120", "--out", "runs/small"]
        assert main([*shrink, *options, "--runtime", "channels-last", *common]) == 0
    return folder / "runs" / "small"


@pytest.fixture(scope="module")
def record(made):
    return RunRecord.load(made / "run.json")


@pytest.fixture
def opened(browser, made):
    browser.console()
    browser.requests()
    browser.open(made / "report.html", width=1280)
    return browser


def test_the_console_is_silent_and_nothing_leaves_the_page(opened, made):
    opened.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    time.sleep(0.2)
    assert opened.requests() == [(made / "report.html").as_uri()]
    assert opened.console() == []


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_serious(browser, made, dark):
    browser.open(made / "report.html", width=1280, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.audit() == []


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_scrolls_sideways(opened, width):
    opened.resize(width)
    opened.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    time.sleep(0.2)
    assert opened.run("return document.documentElement.scrollWidth") <= width


def numbers(value):
    """Yield every number of a JSON document."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)


def derived(record: RunRecord):
    """Return the few figures that are not in the record but follow from it."""
    before, after = record.before, record.after
    yield from (before.file_bytes / after.file_bytes, before.macs / after.macs)
    yield before.params / after.params
    for network in (before, record.one_shot, after):
        if network.generalization_gap is not None:
            yield network.generalization_gap


def read(text: str) -> tuple[float, float] | None:
    """Return the number that a figure shows and half of its last digit; ``None`` for words."""
    shown = text.replace("\u00a0", " ").replace("−", "-").replace(",", "").strip()
    match = re.fullmatch(
        r"([+-]?\d+(?:\.(\d+))?(?:e-?\d+)?) ?([kMG]?)(B|ms|µs|s|%|×|points)?"
        r"(?: (?:faster|slower|smaller|larger|fewer|more|less))?",
        shown,
    )
    if match is None:
        return None
    # The large figures have their unit, points, beneath them.
    unit = match[4] or ("points" if shown[0] in "+-" else "")
    scale = SCALES[match[3]] * UNITS[unit]
    return float(match[1]) * scale, 0.51 * 10.0 ** -len(match[2] or "") * scale


def test_every_figure_is_that_of_the_record(opened, made, record):
    content = json.loads((made / "run.json").read_text())
    known = {*numbers(content), *derived(record)}
    shown = opened.run(
        "return [...document.querySelectorAll('main data')].map("
        "(d) => [Number(d.value), d.textContent, !!d.closest('#differences')])"
    )
    assert len(shown) > 40
    as_read = 0
    for value, text, by_class in shown:
        same = (math.isclose(value, n, rel_tol=1e-12, abs_tol=1e-15) for n in known)
        assert any(same), (value, text)
        figure = read(text)
        if figure is None or by_class:  # words; or counts of a class, which are shown as shares
            continue
        as_read += 1
        number, half = figure
        # 0.5 times as fast is told as 2 times slower.
        told = (value, 1 / value if value else 0.0)
        assert any(abs(number - each) <= half + 1e-12 for each in told), (value, text)
    assert as_read > 30


def test_the_charts_are_drawn_from_the_record(opened, record):
    charts = opened.run(
        "return [...document.querySelectorAll('[data-chart]')].map((f) => "
        "[JSON.parse(f.dataset.chart), f.querySelectorAll('.canvas svg').length])"
    )
    assert [drawn for _, drawn in charts] == [1, 1, 1]
    harm, loss, validation = (data for data, _ in charts)
    assert [point["y"] for point in harm["points"]] == pytest.approx(
        [max(1e-4, record.plan.harm), record.one_shot_divergence, record.comparison.divergence]
    )
    epochs = record.training.epochs
    assert loss["series"][0]["points"] == [[e.epoch, e.loss] for e in epochs]
    assert validation["series"][0]["points"] == [[e.epoch, e.validation] for e in epochs]


def test_each_layer_shows_its_own_figures(opened, record):
    rows = match_layers(record.profile_before, record.profile_after, record.plan)
    facts = opened.run(
        "return [...document.querySelectorAll('[data-layer]')].map((row) => Object.fromEntries("
        "[...row.querySelectorAll('dt')].map((dt) => [dt.textContent, dt.nextElementSibling.textContent])))"
    )
    assert len(facts) == len(rows) >= 3
    for row, shown in zip(rows, facts, strict=True):
        for name, of, form in (
            ("Parameters", lambda layer: layer.params, format_count),
            ("MACs", lambda layer: layer.macs, format_count),
            ("Time", lambda layer: layer.timing.median_ms, format_ms),
        ):
            sides = [form(sum(map(of, side))) if side else "–" for side in (row.before, row.after)]
            assert shown[name] == " → ".join(sides)
        for option in row.options:
            assert option.first.rewrite in shown["Rewrite"]
        if row.left_alone and not row.options:
            assert shown["Left alone"] == row.left_alone[0].reason


def test_bars_are_as_wide_as_the_layers_cost(opened, record):
    # Layers were timed in eager, and the run is about another runtime: their MACs are drawn.
    assert next(iter(record.comparison.latency_ratio)) == "channels-last"
    rows = match_layers(record.profile_before, record.profile_after, record.plan)
    widths = opened.run(
        "return ['before', 'after'].map((side) => { const all = {};"
        "document.querySelectorAll(`.whole .strip.${side} i`).forEach((i) => {"
        "all[i.dataset.row] = (all[i.dataset.row] ?? 0) + i.getBoundingClientRect().width; });"
        "return all; })"
    )
    macs = [
        {
            str(row.index): sum(layer.macs for layer in side)
            for row, side in zip(rows, sides, strict=True)
        }
        for sides in ([row.before for row in rows], [row.after for row in rows])
    ]
    scale = max(sum(each.values()) for each in macs)
    whole = opened.run(
        "return document.querySelector('.whole .strip').getBoundingClientRect().width"
    )
    for drawn, measured in zip(widths, macs, strict=True):
        for row, width in drawn.items():
            assert width == pytest.approx(whole * measured[row] / scale, abs=2.5)


def settled(browser, script: str):
    for _ in range(50):
        value = browser.run(script)
        if value:
            return value
        time.sleep(0.05)
    return value


def test_pointer_and_keyboard_show_a_layer(opened):
    x, y = opened.run(
        "const bar = document.querySelector('.whole .after i');"
        "bar.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const box = bar.getBoundingClientRect(); return [box.left + 2, box.top + 5];"
    )
    for step in range(3):
        opened.hover(x + step, y)
        time.sleep(0.1)
    assert settled(opened, "return !document.querySelector('.card').hidden")
    assert "features.conv1" in opened.run("return document.querySelector('.card').textContent")
    opened.run("document.querySelector('[data-layer] summary').focus()")
    opened.press("Enter")
    assert settled(opened, "return document.querySelector('[data-layer]').open")


def test_the_run_measured_all_that_a_report_shows(record):
    counts = record.confusion.counts
    assert sum(count.n for count in counts) == record.data.test
    for side, metric in (("before", record.before.metric), ("after", record.after.metric)):
        assert sum(getattr(c, side) for c in counts) == round(metric.value * metric.n)
    assert record.before.peak_activation_bytes == record.after.peak_activation_bytes > 0
    assert len(record.plan.front) > 4
    assert record.folder == "runs/small"


def test_a_new_head_shows_where_it_looks(record, opened):
    """Both networks are asked: only the rewritten one has a map of each class."""
    pictures = opened.run("return document.querySelectorAll('#differences img').length")
    expected = sum(bool(item.image) + sum(map(bool, item.maps)) for item in record.disagreements)
    assert pictures == expected
    assert not record.disagreements or all(
        [bool(each) for each in item.maps] == [False, True] for item in record.disagreements
    )
