"""The page of a run in a real browser; skipped where Chromium is not installed."""

from __future__ import annotations

import dataclasses
import time

import pytest
from run_records import dense_record, empty_record, run_record

from onebyone.core.records import Status
from onebyone.report.html import write_report, write_several

LONG = "a_very_long_name_without_any_place_to_break_it_" * 6

HOSTILE = "\u202e<script>hit = 1</script><img src=x onerror='hit = 1'>\"'{{ 7 * 7 }} 猫 \U0001f408"


def hostile_record():
    """Return a run whose every name tries to be more than text."""
    record = run_record()
    first = dataclasses.replace(record.profile_before.layers[0], name=HOSTILE, kind=HOSTILE)
    layers = (first, *record.profile_before.layers[1:])
    point = dataclasses.replace(record.plan.budgets[0], asked=HOSTILE)
    return record.with_(
        source=dataclasses.replace(record.source, name=HOSTILE, spec=HOSTILE, weights=HOSTILE),
        status=Status(state="failed", stage=HOSTILE, detail=HOSTILE),
        data=dataclasses.replace(record.data, name=HOSTILE, classes=(HOSTILE,) * 10),
        command=("onebyone", "shrink", HOSTILE, "--out", HOSTILE),
        plan=dataclasses.replace(record.plan, budgets=(point,)),
        profile_before=dataclasses.replace(record.profile_before, layers=layers),
        training=dataclasses.replace(record.training, metric=HOSTILE, objective=HOSTILE),
    )


RECORDS = {
    "20 layers": run_record,
    "200 layers": lambda: run_record(200),
    "failed": empty_record,
    "hostile": hostile_record,
    "boxes": lambda: dense_record("boxes"),
    "long names": lambda: run_record().with_(
        source=dataclasses.replace(run_record().source, name=LONG, spec=LONG),
        data=dataclasses.replace(run_record().data, classes=(LONG,) * 10),
    ),
}


SEVERAL = {
    "several": lambda: {
        "a": run_record(),
        LONG: run_record(50),
        HOSTILE: hostile_record(),
        "broken": empty_record(),
    }
}
PAGES = [*RECORDS, *SEVERAL]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in PAGES}
    for name, make in RECORDS.items():
        write_report(make(), paths[name])
    for name, make in SEVERAL.items():
        write_several(make(), paths[name])
    return paths


def settled(browser, script: str):
    """Return the script's value once it is true, or its last one."""
    for _ in range(50):
        value = browser.run(script)
        if value:
            return value
        time.sleep(0.05)
    return value


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_scrolls_sideways_and_the_console_is_silent(browser, pages, name, width):
    browser.console()
    browser.open(pages[name], width=width)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.console() == []


def test_only_the_page_itself_is_asked_for(browser, pages):
    browser.requests()
    browser.open(pages["20 layers"], width=1280)
    assert browser.requests() == [pages["20 layers"].as_uri()]


def test_charts_are_drawn_in_place_of_their_tables(browser, pages):
    browser.open(pages["20 layers"], width=1280)
    assert settled(browser, "return document.querySelectorAll('.canvas svg').length") == 3
    assert not browser.run("return document.querySelector('.chart details').open")


def test_pointing_at_a_layer_shows_its_facts(browser, pages):
    browser.open(pages["20 layers"], width=1280)
    x, y = browser.run(
        "const bar = document.querySelectorAll('.whole .after i')[4];"
        "bar.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const box = bar.getBoundingClientRect(); return [box.left + 2, box.top + 5];"
    )
    for step in range(3):  # a pointer moves; the first move may come before the scroll has ended
        browser.hover(x + step, y)
        time.sleep(0.1)
    assert settled(browser, "return !document.querySelector('.card').hidden")
    assert "Shapes" in browser.run("return document.querySelector('.card').textContent")


def test_layers_open_by_keyboard_and_show_their_card_on_focus(browser, pages):
    browser.open(pages["20 layers"], width=1280)
    browser.run("document.querySelector('.contents a[href=\"#use\"]').focus()")
    browser.press("Tab")  # the link after it
    browser.press("Tab")  # the first layer
    focused = "document.activeElement.closest('[data-layer]')"
    assert settled(browser, f"return {focused}?.dataset.layer") == "0"
    assert settled(browser, "return !document.querySelector('.card').hidden")
    browser.press("Escape")
    assert settled(browser, "return document.querySelector('.card').hidden")
    browser.press("Enter")
    assert settled(browser, f"return {focused}.open")


@pytest.mark.parametrize("name", ["hostile", "several"])
def test_hostile_names_are_text_and_run_nothing(browser, pages, name):
    browser.requests()
    browser.open(pages[name], width=1280)
    for x in range(120, 900, 90):  # charts' tips have names too
        browser.hover(x, 500)
    assert browser.run("return typeof hit") == "undefined"
    assert browser.run("return document.querySelector('img[src=x]')") is None
    assert "onerror='hit = 1'" in browser.run("return document.body.innerText")
    assert browser.requests() == [pages[name].as_uri()]


CONTRAST = """
const channel = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const color = parse(getComputedStyle(at).backgroundColor);
    if (color.length === 3 || color[3] > 0) return color;
  }
  return [255, 255, 255];
};
const low = [];
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim());
  if (!own || ['SCRIPT', 'STYLE'].includes(node.tagName) || node.closest('svg')) continue;
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) low.push(`${node.tagName}.${node.className} ${ratio.toFixed(2)}`);
}
return low;
"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["20 layers", "failed"])
def test_text_stands_out_from_its_ground(browser, pages, name, dark):
    browser.open(pages[name], width=1280, dark=dark)
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark
    assert browser.run(CONTRAST) == []


# Each page once; what differs between widths and colors is on the first.
AUDITED = [
    ("20 layers", 1280, False),
    ("20 layers", 360, True),
    ("200 layers", 360, False),
    ("failed", 1280, True),
    ("several", 360, False),
]


@pytest.mark.parametrize(("name", "width", "dark"), AUDITED)
def test_axe_finds_nothing_serious(browser, pages, name, width, dark):
    browser.open(pages[name], width=width, dark=dark)
    if name != "200 layers":  # as it opens: whole, it is the same elements many times
        browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.audit() == []


def test_paper_has_every_layer_and_table(browser, pages):
    """What is closed on the screen is shown in print, for paper has nothing to press."""
    browser.open(pages["200 layers"], width=1280)
    browser.devtools("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        browser.run("dispatchEvent(new Event('beforeprint'))")
        shown = "return [...document.querySelectorAll('[data-layer]')].every((row) => row.offsetHeight > 0)"
        assert browser.run(shown)
        assert browser.run("return document.querySelector('.contents').offsetHeight") == 0
        browser.run("dispatchEvent(new Event('afterprint'))")
        assert not browser.run("return document.querySelector('.group > details').open")
    finally:
        browser.devtools("Emulation.setEmulatedMedia", {"media": ""})
