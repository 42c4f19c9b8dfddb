from __future__ import annotations

import dataclasses
import json

import pytest
from parsed_page import Page
from run_records import run_record

from onebyone.core.records import Budget, Deployment, PlannedLatency, Ratio
from onebyone.report.html import render_run
from onebyone.report.section_tradeoff import front_chart, learning_curves


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


def timed_front(record):
    """Return a plan for latency of which one front point was measured and one was corrected."""
    whole = dataclasses.replace(record.plan.before, ms=10.0)
    deployment = Deployment(runtime="onnxruntime", version="1")
    ratio = Ratio(value=2.0, low=1.9, high=2.1, rounds=15)
    time = record.after.latency["eager"]
    first, second = record.plan.front[2:4]
    timed = [dataclasses.replace(p.after, ms=ms) for p, ms in [(first, 5.0), (second, 7.0)]]
    points = (
        dataclasses.replace(first, after=timed[0], obtained="measured", ratio=ratio, timing=time),
        dataclasses.replace(second, after=timed[1], obtained="corrected"),
    )
    latency = PlannedLatency(
        deployment=deployment,
        machine=record.machine,
        before=time,
        after=time,
        ratio=ratio,
        predicted_ms=time.median_ms / 2,
        corrections=0,
        share=1.0,
    )
    return dataclasses.replace(
        record.plan,
        budgets=(Budget(quantity="latency", limit=5.0, asked="latency=50%"),),
        before=whole,
        after=dataclasses.replace(record.plan.after, ms=5.0),
        front=points,
        latency=latency,
    )


def test_points_whose_time_was_measured_are_drawn_with_their_interval(record):
    plan = timed_front(record)
    drawn = front_chart(record.with_(plan=plan))
    (dot,) = [point for point in drawn.points if point.small]
    assert (dot.x, dot.y) == (0.5, plan.front[0].harm)
    assert dot.x_interval == (1 / 2.1, 1 / 1.9)
    assert "measured, 2.00× [1.90–2.10]" in dot.name
    assert "1 measured in turns with the original in onnxruntime 1" in drawn.caption
    assert "1 predicted, corrected by the networks that were measured" in drawn.caption


def test_the_page_says_of_each_time_on_the_front_how_it_was_obtained(record):
    page = render_run(record.with_(plan=timed_front(record)))
    assert "how times were obtained" in page
    assert "measured, 2.00× [1.90–2.10]" in page
    assert "predicted, corrected" in page
    assert "how times were obtained" not in render_run(record)


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
