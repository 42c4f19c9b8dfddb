"""The report shows both networks' outputs side by side, says what they are, and stays small."""

import dataclasses
import json

import pytest
from parsed_page import Page
from run_records import dense_record

from onebyone.core.records import RunRecord
from onebyone.report.html import render_run
from onebyone.report.pictures import data_uri
from onebyone.report.section_differences import differences_section

KINDS = ("masks", "boxes", "patches")
HOSTILE = "<script>hit = 1</script>\"'猫"


@pytest.fixture(scope="module", params=KINDS)
def record(request):
    return dense_record(request.param)


def part(record):
    return f"<body>{differences_section(record)}</body>"


def panels(page):
    """Return what each panel is said to show, and its caption."""
    return [
        (panel.children[0].attributes["aria-label"], panel.children[1].text.strip())
        for panel in page.find("div", class_="panel")
    ]


def test_before_after_and_truth_are_beside_each_other_for_every_example(record):
    shown = panels(Page(part(record)))
    each = {"masks": 4, "boxes": 3, "patches": 5}[record.pictures.kind]
    assert len(shown) == each * len(record.pictures.examples)
    for place, example in enumerate(record.pictures.examples):
        said = shown[each * place : each * (place + 1)]
        for (label, caption), name in zip(said, ("Before", "After", "True answer"), strict=False):
            assert caption.startswith(name)
            assert label.startswith(f"Test example {example.index}: ")
            assert name.lower() in label


def test_the_pictures_are_each_networks_own(record):
    text = part(record)
    for example in record.pictures.examples:
        before, after, truth = example.before, example.after, example.truth
        if record.pictures.kind != "boxes":
            places = [text.index(each.picture) for each in (before, after, truth)]
            assert places == sorted(places)
    assert record.pictures.examples[0].image in text


def test_how_they_were_chosen_is_said(record):
    text = Page(part(record)).text()
    assert "the 3 of 400 test images on which the two networks differ most" in text
    assert "3 drawn at random from the others (seed 0)" in text
    headings = [heading.text for heading in Page(part(record)).find("h3")]
    assert headings == ["The most different", "Drawn at random"]


def test_scores_are_those_of_the_example():
    found = {kind: Page(part(dense_record(kind))).text() for kind in KINDS}
    assert "60.0 % → 70.0 %" in found["masks"]
    assert "7.0 % of the pixels" in found["masks"]
    assert "60.0 % → 70.0 %" in found["boxes"]
    assert "0.60 dB → 0.70 dB" in found["patches"]
    assert "Difference, 16×" in found["patches"]


def test_classes_are_told_by_more_than_their_colors():
    masks = Page(part(dense_record("masks")))
    (legend,) = masks.find("ul", class_="samples")
    assert [entry.text.strip() for entry in legend.children] == [
        "background (not colored)", "road", "car",
    ]  # fmt: skip
    drawn = part(dense_record("boxes"))
    assert "airplane 0.75</text>" in drawn
    assert "horse 0.75</text>" in drawn
    assert drawn.count("airplane</text>") == 6  # the truth has no confidence
    assert "stroke-dasharray" in drawn
    assert "3 boxes in full images are left out" in drawn


def test_boxes_lie_where_the_record_says():
    drawn = part(dense_record("boxes"))
    assert 'x="10.0%" y="20.0%" width="30.0%" height="40.0%"' in drawn


def test_names_of_classes_are_text_and_nothing_is_loaded(record):
    found = record.pictures
    foreign = dataclasses.replace(
        found.examples[0],
        image="https://example.org/a.png",
        difference="//x/y.png",
        before=dataclasses.replace(found.examples[0].before, picture="file:///a.png"),
    )
    legend = tuple(
        dataclasses.replace(entry, name=HOSTILE, sample="https://example.org/b.png")
        for entry in found.legend
    )
    changed = record.with_(
        pictures=dataclasses.replace(
            found, examples=(foreign, *found.examples[1:]), legend=legend, metric=HOSTILE
        ),
        data=dataclasses.replace(record.data, classes=(HOSTILE,) * 10),
    )
    html = part(changed)
    assert "<script" not in html
    assert "example.org" not in html
    for image in Page(html).find("img"):
        assert image.attributes["src"].startswith("data:image/")


def test_a_page_stays_small_whatever_the_pictures():
    record = dense_record("masks")
    huge = data_uri(b"A" * 60_000)
    examples = tuple(
        dataclasses.replace(each, image=huge + str(place))
        for place, each in enumerate(record.pictures.examples * 10)
    )
    found = dataclasses.replace(record.pictures, examples=examples)
    html = render_run(record.with_(pictures=found))
    assert len(html.encode()) < 3_000_000
    assert "Some pictures are left out" in html
    assert html.count(">test example") == 60


def test_a_record_from_before_there_were_pictures_is_read(record):
    content = json.loads(record.to_json())
    del content["pictures"]
    old = RunRecord.from_json(json.dumps(content))
    assert old.pictures is None
    assert old.with_(pictures=record.pictures) == record
    assert "The most different" not in render_run(old)
