from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from parsed_page import Page
from run_records import empty_record, metric, run_record, timing

from onebyone.core.errors import OutputError
from onebyone.core.records import Disagreement, LeftAlone, RunRecord, Status, Step
from onebyone.core.units import format_bytes, format_count, format_ms
from onebyone.report.html import render_run, write_report
from onebyone.report.sections import SECTIONS

HOSTILE = "<script>alert(1)</script>\"'</style>&amp;{{ 7 * 7 }}"
HOSTILE_STEPS = 2 * (Step(rewrite=HOSTILE, settings={HOSTILE: HOSTILE}),)


@pytest.fixture(scope="module")
def record():
    return run_record()


@pytest.fixture(scope="module")
def page(record):
    return Page(render_run(record))


def row_cells(page: Page, heading: str) -> list[str]:
    for row in page.find("tr"):
        if row.children[0].text.startswith(heading):
            return [cell.text for cell in row.children[1:]]
    raise AssertionError(f"no row {heading!r}")


def test_sections_come_in_their_order(page):
    anchors = [section.attributes["id"] for section in page.find("section")]
    assert anchors == [anchor for anchor, _, _ in SECTIONS if anchor in anchors]
    expected = "verdict measured network tradeoff differences use conditions"
    assert set(expected.split()) <= set(anchors)
    assert not set(anchors) & {
        "deployed",
        "training",
    }  # neither int8, nor a training without a plan


def test_contents_link_to_each_section(page):
    links = [
        link.attributes["href"] for link in page.find("a") if link.text != "Skip to the content"
    ]
    assert links == [f"#{section.attributes['id']}" for section in page.find("section")]


def test_headline_figures_are_the_records_own(page, record):
    values = [
        child.attributes["value"] for dd in page.find("dd", class_="value") for child in dd.children
    ]
    comparison = record.comparison
    assert [float(value) for value in values] == [
        comparison.latency_ratio["eager"].value,
        comparison.before.file_bytes / comparison.after.file_bytes,
        comparison.difference.value,
        comparison.agreement.value,
    ]


def test_table_figures_are_the_records_own(page, record):
    shown = {float(value) for value in page.data_values()}
    for network in (record.before, record.one_shot, record.after):
        expected = {
            network.params,
            network.macs,
            network.file_bytes,
            network.metric.value,
            network.train_metric.value,
            network.generalization_gap,
            network.calibration_error,
            *(timed.median_ms for timed in network.latency.values()),
        }
        assert expected <= shown
    rest = {record.one_shot_agreement.value, record.one_shot_divergence}
    comparison = record.comparison
    rest |= {comparison.divergence, comparison.difference.value, comparison.agreement.value}
    rest |= {ratio.value for ratio in comparison.latency_ratio.values()}
    rest |= {choice.harm for choice in record.plan.choices}
    assert rest <= shown


def test_table_figures_stand_in_their_columns(page, record):
    networks = (record.before, record.one_shot, record.after)
    assert row_cells(page, "Parameters")[:3] == [format_count(n.params) for n in networks]
    assert row_cells(page, "Weights file")[:3] == [format_bytes(n.file_bytes) for n in networks]
    assert row_cells(page, "MACs")[:3] == [format_count(n.macs) for n in networks]
    for cell, network in zip(row_cells(page, "Latencyeager"), networks, strict=False):
        assert cell.startswith(format_ms(network.latency["eager"].median_ms))
    for cell, network in zip(row_cells(page, "Test accuracy"), networks, strict=False):
        assert cell.startswith(f"{100 * network.metric.value:.2f} %")


def test_every_figure_for_programs_is_a_number(page):
    assert len(page.data_values()) > 50
    assert all(value == str(float(value)) or value.isdigit() for value in page.data_values())


@pytest.mark.parametrize("state", ["failed", "interrupted", "running"])
def test_run_that_stopped_says_so_before_anything_else(state):
    page = Page(render_run(empty_record(state)))
    headings = [element.text for element in page.elements if element.tag in {"h1", "h2"}]
    said = {"failed": "failed", "interrupted": "was interrupted", "running": "has not finished"}
    assert headings[:2] == ["mystery", f"This run {said[state]}"]
    assert "calibrate" in page.text()
    assert "DataError: 0 images in photos/." in page.text()
    assert "No verdict" in page.text()
    assert not page.find("dl", class_="figures")


def test_run_that_stopped_half_way_shows_what_there_is(record):
    stopped = record.with_(
        status=Status(state="interrupted", stage="train", detail="epoch 2 of 3"),
        after=None,
        comparison=None,
        profile_after=None,
        training=None,
        disagreements=(),
    )
    page = Page(render_run(stopped))
    header = next(row for row in page.find("tr"))
    assert [cell.text for cell in header.children] == ["", "Before", "One-shot", "Change"]
    assert "the colors show the plan" in page.text()
    assert "Load the rewritten network" not in page.text()


OPTIONAL = [
    field.name
    for field in dataclasses.fields(RunRecord)
    if field.default is None and field.name != "format"
]


@pytest.mark.parametrize("name", OPTIONAL)
def test_any_optional_part_may_be_missing(record, name):
    Page(render_run(record.with_(**{name: None})))


def test_any_optional_part_may_be_alone(record):
    for name in OPTIONAL:
        Page(render_run(empty_record("interrupted", **{name: getattr(record, name)})))


def test_hostile_names_are_shown_as_text(record):
    first = dataclasses.replace(record.profile_before.layers[0], name=HOSTILE, kind=HOSTILE)
    profile = dataclasses.replace(
        record.profile_before, layers=(first, *record.profile_before.layers[1:])
    )
    plan = dataclasses.replace(
        record.plan,
        network=HOSTILE,
        choices=(dataclasses.replace(record.plan.choices[0], site=HOSTILE, steps=HOSTILE_STEPS),),
        left_alone=(LeftAlone(site=HOSTILE, reason=HOSTILE),),
    )
    hostile = record.with_(
        source=dataclasses.replace(record.source, name=HOSTILE, spec=HOSTILE, weights=HOSTILE),
        data=dataclasses.replace(record.data, name=HOSTILE, classes=(HOSTILE,) * 10),
        status=Status(state="failed", stage=HOSTILE, detail=HOSTILE),
        command=("onebyone", "shrink", HOSTILE, "--out", HOSTILE),
        plan=plan,
        profile_before=profile,
        training=dataclasses.replace(record.training, metric=HOSTILE, objective=HOSTILE),
    )
    clean, page = Page(render_run(record)), Page(render_run(hostile))
    assert [s.text for s in page.find("script")] == [s.text for s in clean.find("script")]
    assert len(page.find("style")) == 1
    assert page.find("h1")[0].text == HOSTILE
    assert page.text().count("alert(1)") > 10
    assert "49" not in page.find("h1")[0].text


def test_nothing_is_loaded_from_elsewhere(record):
    foreign = Disagreement(
        index=1, label=0, before=1, after=2, image="https://example.org/a.png", maps=("//x/y.png",)
    )
    html = render_run(record.with_(disagreements=(*record.disagreements, foreign)))
    page = Page(html)
    for element in page.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            address = element.attributes.get(name)
            assert not address or address.startswith(("data:", "#")), (element.tag, address)
    styles = "".join(style.text for style in page.find("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    (policy,) = (
        meta for meta in page.find("meta") if meta.attributes.get("http-equiv") is not None
    )
    assert policy.attributes["content"].startswith("default-src 'none'")


def test_page_stays_small_with_200_layers_and_many_pictures():
    assert len(render_run(run_record(200)).encode()) < 3_000_000


def test_charting_library_is_left_out_where_nothing_is_drawn(record):
    assert (
        len(render_run(record.with_(plan=None, training=None, disagreements=())).encode()) < 200_000
    )


def test_tables_headings_and_pictures_are_accessible(page):
    for table in page.find("table"):
        headings = [cell for cell in page.find("th") if cell.attributes.get("scope")]
        assert headings
        assert table.attributes["role"] == "table"
    assert all(header.attributes.get("scope") in {"col", "row"} for header in page.find("th"))
    assert all(image.attributes.get("alt") for image in page.find("img"))
    for canvas in page.find("div", class_="canvas"):
        assert canvas.attributes["role"] == "img"
        assert canvas.attributes["aria-label"]
    levels = [int(e.tag[1]) for e in page.elements if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    anchors = [e.attributes["id"] for e in page.elements if e.attributes.get("id")]
    assert len(anchors) == len(set(anchors))
    assert [len(page.find(tag)) for tag in ("main", "header", "footer", "nav")] == [1, 1, 1, 1]


def test_without_a_script_the_charts_tables_are_open(page):
    for figure in page.find("figure", class_="chart"):
        (details,) = (child for child in figure.children if child.tag == "details")
        assert "open" in details.attributes


def test_metric_that_is_no_fraction_is_not_shown_as_a_percentage(record):
    def psnr(value: float):
        return metric(value, 100, name="psnr", half=0.4)

    comparison = dataclasses.replace(
        record.comparison,
        before=dataclasses.replace(record.before, metric=psnr(31.42), train_metric=None),
        after=dataclasses.replace(record.after, metric=psnr(31.12), train_metric=None),
        difference=dataclasses.replace(
            record.comparison.difference, value=-0.3, low=-0.42, high=-0.18, n=100
        ),
        agreement=None,
        divergence=0.0123,
    )
    changed = record.with_(
        before=comparison.before,
        after=comparison.after,
        comparison=comparison,
        one_shot=None,
        one_shot_agreement=None,
        one_shot_divergence=None,
        one_shot_difference=None,
    )
    page = Page(render_run(changed))
    assert "its psnr is 0.3 lower (95 % interval −0.42 … −0.18, 100 images)" in page.text()
    assert row_cells(page, "Test psnr")[0].startswith("31.42")
    assert "relative squared error" in page.text()
    assert "points of psnr" not in page.text()


def test_commands_are_those_of_the_run(page):
    text = page.text()
    assert "onebyone shrink benchmarks/resnet20.py:make --data cifar10" in text
    named = 'original="benchmarks/resnet20.py:make"'
    assert f'obo.load_model("runs/r20", {named})' in text
    loads = 'obo.load_model("benchmarks/resnet20.py:make", weights="resnet20-cifar10.safetensors")'
    assert loads in text
    assert 'obo.Plan.load("runs/r20/plan.json")' in text


def test_disagreements_are_named_and_counted(page):
    text = page.text()
    assert "disagree on 416 test images; 12 are shown" in text
    assert "the original is right on 8 and the rewritten network on 4; both are wrong on 0" in text
    assert len(page.find("img")) == 36


def test_report_is_written_whole(tmp_path, record):
    path = tmp_path / "report.html"
    write_report(record, path)
    assert path.read_text(encoding="utf-8") == render_run(record)
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_does_not_exist_is_refused(tmp_path, record):
    with pytest.raises(OutputError, match="Cannot write"):
        write_report(record, tmp_path / "missing" / "report.html")


def test_disturbed_timings_are_given_no_verdict(record):
    shaky = dataclasses.replace(record.after, latency={"eager": timing(0.8, disturbed=True)})
    comparison = dataclasses.replace(
        record.comparison,
        after=shaky,
        latency_ratio={"eager": record.comparison.latency_ratio["eager"]},
    )
    text = Page(render_run(record.with_(after=shaky, comparison=comparison))).text()
    assert "too disturbed for a verdict on speed" in text
    assert "1.62× faster" not in text
