from __future__ import annotations

import dataclasses

import pytest
from parsed_page import Page
from run_records import conv, layers, profile, rewritten, run_record

from onebyone.core.records import Cost, LeftAlone, Option
from onebyone.report.html import render_run
from onebyone.report.layer_rows import (
    amount,
    bar_quantity,
    group_layers,
    match_layers,
    settings_words,
)


def option(site: str, rewrite: str, *occupies: str) -> Option:
    nothing = Cost(params=0, macs=0, bytes=0)
    return Option.of(rewrite, {}, site=site, before=nothing, after=nothing, occupies=occupies)


def matched(before: list[str], after: list[str], *choices: Option, alone=()):
    plan = dataclasses.replace(run_record().plan, choices=choices, left_alone=tuple(alone))
    first, second = (profile([conv(n, (4, 4), 8) for n in names], 1) for names in (before, after))
    return [
        (row.name, row.rewrite, [p.name for p in row.before], [p.name for p in row.after])
        for row in match_layers(first, second, plan)
    ]


def test_parts_of_a_factorized_site_are_one_row():
    assert matched(
        ["a", "b", "c"], ["a", "b.reduce", "b.expand", "c"], option("b", "factorize", "b")
    ) == [
        ("a", "alone", ["a"], ["a"]),
        ("b", "factorize", ["b"], ["b.reduce", "b.expand"]),
        ("c", "alone", ["c"], ["c"]),
    ]


def test_names_that_begin_alike_are_not_mixed_up():
    assert matched(["b", "b1"], ["b.reduce", "b1"], option("b", "factorize")) == [
        ("b", "factorize", ["b"], ["b.reduce"]),
        ("b1", "alone", ["b1"], ["b1"]),
    ]


def test_head_takes_all_the_modules_that_it_occupies():
    head = option("classifier", "head", "flatten", "classifier.0", "classifier.2")
    assert matched(["a", "classifier.0", "classifier.2"], ["a", "classifier.score"], head)[1:] == [
        ("classifier", "head", ["classifier.0", "classifier.2"], ["classifier.score"])
    ]


def test_head_may_stand_at_a_module_beside_its_site():
    head = option("fc", "head", "pool", "fc")
    assert matched(["a", "fc"], ["a", "pool.score"], head)[1:] == [
        ("fc", "head", ["fc"], ["pool.score"])
    ]


def test_rewrites_inside_a_new_head_are_in_its_row():
    plan = dataclasses.replace(
        run_record().plan,
        choices=(option("fc", "head", "pool", "fc"), option("fc.0", "factorize", "fc.0")),
        left_alone=(LeftAlone(site="fc.2", reason="too small"),),
    )
    before = profile([conv(n, (4, 4), 8) for n in ("a", "fc")], 1)
    after = profile([conv(n, (4, 4), 8) for n in ("a", "fc.0.reduce", "fc.0.expand", "fc.2")], 1)
    for choices in (plan.choices, plan.choices[::-1]):
        rows = match_layers(before, after, dataclasses.replace(plan, choices=choices))
        assert [row.name for row in rows] == ["a", "fc"]
        assert [option.site for option in rows[1].options] == ["fc", "fc.0"]
        assert [item.site for item in rows[1].left_alone] == ["fc.2"]
        made = [rows[1].rewrite_of(layer) for layer in rows[1].after]
        assert made == ["factorize", "factorize", "head"]


def test_inserted_layer_follows_the_layer_before_it():
    deepen = option("relu1", "deepen")
    assert [row[0] for row in matched(["a", "b"], ["a", "relu1.deepen", "b"], deepen)] == [
        "a",
        "relu1",
        "b",
    ]


def test_layer_that_is_gone_keeps_its_row():
    assert matched(["a", "bn", "b"], ["a", "b"])[1] == ("bn", "alone", ["bn"], [])


def test_rewritten_root_is_one_row():
    assert matched([""], ["reduce", "expand"], option("", "factorize")) == [
        ("(root)", "factorize", [""], ["reduce", "expand"])
    ]


def test_every_layer_is_in_exactly_one_row():
    record = run_record(60)
    rows = match_layers(record.profile_before, record.profile_after, record.plan)
    assert sum(len(row.before) for row in rows) == len(record.profile_before.layers)
    assert sum(len(row.after) for row in rows) == len(record.profile_after.layers)
    total = sum(amount(row.after, "macs") for row in rows)
    assert total == record.profile_after.macs


def test_bars_show_multiplications_where_nothing_is_timed():
    timed, untimed = run_record(), run_record(timed=False)
    for record, expected in ((timed, "ms"), (untimed, "macs")):
        rows = match_layers(record.profile_before, record.profile_after, record.plan)
        assert bar_quantity(rows) == expected
    half = match_layers(timed.profile_before, untimed.profile_after, timed.plan)
    assert bar_quantity(half) == "macs"


def test_groups_go_by_the_beginning_of_names():
    rows = match_layers(run_record(200).profile_before, None, None)
    groups = group_layers(rows)
    assert [group.name for group in groups] == ["conv1", "layer1", "layer2", "layer3", "fc"]
    assert sum(len(group.rows) for group in groups) == 200


@pytest.mark.parametrize("name", ["{}", "features.{}", "a.b.c.d.{}"])
def test_names_that_suggest_no_group_are_cut_in_blocks(name):
    parts = [conv(name.format(index), (4, 4), 8) for index in range(90)]
    groups = group_layers(match_layers(profile(parts, 1), None, None))
    assert [len(group.rows) for group in groups] == [20, 20, 20, 20, 10]


def test_settings_have_their_names():
    assert settings_words({"form": "tucker2", "ranks": [8, 12]}) == "form tucker2; ranks 8, 12"


@pytest.mark.parametrize("count", [20, 200])
def test_picture_has_a_row_a_layer_with_its_facts(count):
    page = Page(render_run(run_record(count)))
    rows = page.find("li", class_="layer")
    assert len(rows) == count
    # In a group, the group's name is left out.
    name = "layer1.0.conv1" if count == 20 else "0.conv1"
    factorized = next(row for row in rows if row.text.strip().startswith(name))
    if count > 40:
        (whole,) = page.find("span", data_name="layer1.0.conv1")
        assert whole.text == name
    for fact in ("Shapes", "ranks 8, 6", "Harm", "Parameters", "MACs", "Time", ".spatial"):
        assert fact in factorized.text
    assert "the first layer: 3 input channels" in rows[0].text


def test_bars_of_the_whole_are_the_layers_shares():
    record = run_record()
    page = Page(render_run(record))
    (whole,) = page.find("div", class_="whole")
    before, after = (child for child in whole.children if child.tag == "span")
    widths = [
        [float(bar.attributes["style"].removeprefix("width:").removesuffix("%")) for bar in bars]
        for bars in (before.children, after.children)
    ]
    times = [layer.timing.median_ms for layer in record.profile_before.layers]
    assert widths[0] == pytest.approx([100 * ms / sum(times) for ms in times], abs=1e-3)
    after_times = [layer.timing.median_ms for layer in record.profile_after.layers]
    assert sum(widths[1]) == pytest.approx(100 * sum(after_times) / sum(times), abs=0.05)


def widths(element) -> float:
    bars = next(child for child in element.children if child.attributes.get("class") == "bars")
    return sum(
        float(bar.attributes["style"].removeprefix("width:").removesuffix("%"))
        for bar in bars.children[0].children
    )


def test_layer_beside_groups_is_drawn_on_their_scale():
    record = run_record(200)
    times = {layer.name: layer.timing.median_ms for layer in record.profile_before.layers}
    page = Page(render_run(record))
    top = next(item for item in page.find("ol", class_="layers")).children
    drawn = {item.text.split()[0]: widths(item.children[0].children[0]) for item in top}
    group = sum(ms for name, ms in times.items() if name.startswith("layer1."))
    assert drawn["conv1"] / drawn["layer1"] == pytest.approx(times["conv1"] / group, rel=1e-2)
    assert drawn["layer1"] == pytest.approx(100, abs=0.1)  # widths are rounded


def test_unplanned_network_is_drawn_without_rewrites():
    parts = layers(8)
    rows = match_layers(profile(parts, 1), profile(parts, 1), None)
    assert {row.rewrite for row in rows} == {"alone"}


def test_reason_is_given_for_what_was_left_alone():
    before = layers(8)
    after, choices, _ = rewritten(before)
    plan = dataclasses.replace(
        run_record().plan,
        choices=choices,
        left_alone=(LeftAlone(site="conv1", reason="because of this"),),
    )
    rows = match_layers(profile(before, 1), profile(after, 1), plan)
    assert [item.reason for item in rows[0].left_alone] == ["because of this"]
