"""The page of a run in a real browser; skipped where Chromium is not installed."""

from __future__ import annotations

import dataclasses
import time

import pytest
from run_records import empty_record, run_record

from onebyone.report.html import write_report

LONG = "a_very_long_name_without_any_place_to_break_it_" * 6

RECORDS = {
    "20 layers": run_record,
    "200 layers": lambda: run_record(200),
    "failed": empty_record,
    "long names": lambda: run_record().with_(
        source=dataclasses.replace(run_record().source, name=LONG, spec=LONG),
        data=dataclasses.replace(run_record().data, classes=(LONG,) * 10),
    ),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in RECORDS}
    for name, path in paths.items():
        write_report(RECORDS[name](), path)
    return paths


def settled(browser, script: str):
    """Return the script's value once it is true, or its last one."""
    for _ in range(50):
        value = browser.run(script)
        if value:
            return value
        time.sleep(0.05)
    return value


@pytest.mark.parametrize("name", RECORDS)
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
    asked = [address for address in browser.requests() if not address.startswith("data:")]
    assert asked == [pages["20 layers"].as_uri()]


def test_charts_are_drawn_in_place_of_their_tables(browser, pages):
    browser.open(pages["20 layers"], width=1280)
    assert settled(browser, "return document.querySelectorAll('.canvas svg').length") == 2
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
