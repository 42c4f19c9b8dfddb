from __future__ import annotations

import dataclasses

import pytest
from parsed_page import Page
from run_records import confusion, disagreements, metric, run_record

from onebyone.report.html import render_run


@pytest.fixture(scope="module")
def record():
    return run_record()


def rows_of(page: Page, caption: str):
    (table,) = (t for t in page.find("table") if t.children[0].text.startswith(caption))
    body = next(child for child in table.children if child.tag == "tbody")
    return [[cell.text for cell in row.children] for row in body.children]


def test_classes_are_shown_with_both_shares_and_their_change(record):
    rows = rows_of(Page(render_run(record)), "Right, by class, 1,000 each")
    names = record.data.classes
    assert [row[0] for row in rows] == list(names)
    for row, count in zip(rows, record.confusion.counts, strict=True):
        assert row[1] == f"{100 * count.before / count.n:.1f} %"
        assert row[2] == f"{100 * count.after / count.n:.1f} %"


def test_the_most_confused_pairs_come_first_and_the_others_when_asked_for(record):
    page = Page(render_run(record))
    rows = rows_of(page, "The most confused")
    first = record.confusion.pairs[0]
    names = record.data.classes
    assert rows[0][0] == f"{names[first.label]} → {names[first.predicted]}"
    assert rows[0][1:3] == [str(first.before), str(first.after)]
    assert len(rows) == 12
    assert "8 more pairs" in page.text()


def test_of_a_thousand_classes_the_most_changed_are_shown(record):
    large = record.with_(
        confusion=confusion(1000, 50),
        data=dataclasses.replace(
            record.data, classes=tuple(f"class number {i}" for i in range(1000))
        ),
    )
    html = render_run(large)
    page = Page(html)
    rows = rows_of(page, "Right, by class: the most changed")
    changes = [abs(float(row[3].replace("−", "-"))) for row in rows]
    assert len(rows) == 20
    assert changes == sorted(changes, reverse=True)
    assert "80 more of 1,000 classes" in page.text()
    assert "rarer ones are not kept" in page.text()
    assert len(html) - len(render_run(record)) < 120_000


def test_networks_that_never_differ_say_so(record):
    comparison = dataclasses.replace(record.comparison, agreement=metric(1.0, name="agreement"))
    counts = tuple(dataclasses.replace(c, after=c.before) for c in record.confusion.counts)
    same = record.with_(
        disagreements=(),
        comparison=comparison,
        confusion=dataclasses.replace(record.confusion, counts=counts),
    )
    text = Page(render_run(same)).text()
    assert "The two networks predict the same for all 10,000 test images." in text
    assert "is right as often as the original in each of the 10 classes" in text


def test_classes_that_did_not_change_are_behind_a_click(record):
    counts = tuple(
        dataclasses.replace(c, after=c.before if c.label in (0, 3) else c.before - 1)
        for c in record.confusion.counts
    )
    some = record.with_(confusion=dataclasses.replace(record.confusion, counts=counts))
    page = Page(render_run(some))
    shown = [row[0] for row in rows_of(page, "Right, by class: the most changed")]
    names = record.data.classes
    assert shown == [name for place, name in enumerate(names) if place not in (0, 3)]
    assert "2 more classes" in page.text()


def test_a_page_stays_below_its_size_whatever_the_pictures(record):
    huge = tuple(
        dataclasses.replace(item, image=item.image + "A" * 150_000) for item in disagreements(24)
    )
    html = render_run(record.with_(disagreements=huge))
    assert len(html.encode()) < 3_000_000
    assert "Some pictures are left out" in html
    assert html.count("test example") == 24


def test_a_map_is_named_for_its_own_network(record):
    whole = record.disagreements[0]
    only = dataclasses.replace(whole, maps=("", whole.maps[1]))
    page = Page(render_run(record.with_(disagreements=(only,))))
    named = {image.attributes["title"]: image.attributes["src"] for image in page.find("img")}
    assert named == {"image": whole.image, "rewritten network’s map": whole.maps[1]}
