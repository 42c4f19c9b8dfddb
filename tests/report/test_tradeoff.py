from __future__ import annotations

import dataclasses
import json

import pytest
from parsed_page import Page
from run_records import run_record

from onebyone.report.html import render_run
from onebyone.report.tradeoff import front_chart, learning_curves


@pytest.fixture(scope="module")
def record():
    return run_record()


def test_the_front_is_the_plans_own(record):
    plan, drawn = record.plan, front_chart(record)
    (line,) = drawn.lines
    assert line.x == tuple(point.after.macs / plan.before.macs for point in plan.front)
    assert line.y == tuple(point.harm for point in plan.front)


def test_predicted_and_measured_harm_stand_at_the_plans_cost(record):
    points = front_chart(record).points
    assert [point.y for point in points] == [
        record.plan.harm,
        record.one_shot_divergence,
        record.comparison.divergence,
    ]
    assert {point.x for point in points} == {record.plan.after.macs / record.plan.before.macs}


def test_without_fine_tuning_there_is_one_measured_point(record):
    drawn = front_chart(record.with_(training=None))
    assert [point.name for point in drawn.points] == [
        "this plan, predicted",
        "before fine-tuning, measured",
    ]


def test_a_plan_for_parameters_is_drawn_against_parameters(record):
    budget = dataclasses.replace(record.plan.budgets[0], quantity="params")
    plan = dataclasses.replace(record.plan, budgets=(budget,))
    drawn = front_chart(record.with_(plan=plan))
    assert drawn.title == "Harm against parameters"
    assert drawn.points[0].x == plan.after.params / plan.before.params


def test_a_plan_of_before_there_were_fronts_has_none(record):
    older = record.with_(plan=dataclasses.replace(record.plan, front=()))
    assert front_chart(older) is None
    assert len(Page(render_run(older)).find("figure", class_="chart")) == 2


def test_the_charts_of_the_page_are_those_of_the_record(record):
    shown = [
        json.loads(figure.attributes["data-chart"])
        for figure in Page(render_run(record)).find("figure", class_="chart")
    ]
    expected = [front_chart(record), *learning_curves(record.training)]
    assert shown == [json.loads(json.dumps(each.data())) for each in expected]


def test_a_training_without_a_plan_has_its_curves_alone(record):
    page = Page(render_run(record.with_(plan=None, comparison=None)))
    anchors = [section.attributes["id"] for section in page.find("section")]
    assert "training" in anchors
    assert "tradeoff" not in anchors


def test_many_choices_are_not_shown_unasked():
    page = Page(render_run(run_record(200)))
    (summary,) = (s for s in page.find("summary") if s.text == "All 150 choices")
    assert "open" not in summary.parent.attributes
