from __future__ import annotations

import json
import math

from parsed_page import Page

from onebyone.report.charts import (
    Axis,
    Interval,
    IntervalChart,
    LineChart,
    Point,
    ScatterChart,
    Series,
)
from onebyone.report.html import chart, page, section


def lines(**changes) -> LineChart:
    series = Series(name="loss", x=(1.0, 2.0, 3.0), y=(0.9, 0.5, 0.25))
    return LineChart(
        **({"title": "Loss", "x": "epoch", "y": "loss", "series": (series,)} | changes)
    )


def test_alternative_says_where_a_line_starts_and_ends():
    assert lines().alternative == "Loss, loss over epoch. loss: from 0.9 to 0.25."


def test_table_has_every_point():
    table = lines().table()
    assert table.columns == ("epoch", ">loss")
    assert table.rows == [["1", "0.9"], ["2", "0.5"], ["3", "0.25"]]


def test_fractions_are_percentages():
    assert lines(percent=True).table().rows[0] == ["1", "90.00 %"]


def test_lines_of_different_lengths_share_a_table():
    short = Series(name="b", x=(2.0,), y=(1.0,), color=1)
    table = lines(series=(*lines().series, short)).table()
    assert [row[2] for row in table.rows] == ["–", "1", "–"]


def test_points_that_are_not_finite_are_not_drawn():
    series = Series(name="loss", x=(1.0, 2.0), y=(math.nan, 0.5))
    assert lines(series=(series,)).data()["series"][0]["points"] == [[2.0, 0.5]]


def test_bands_go_with_their_points():
    series = Series(name="a", x=(1.0,), y=(0.5,), low=(0.4,), high=(0.6,))
    assert lines(series=(series,)).data()["series"][0]["points"] == [[1.0, 0.5, 0.4, 0.6]]


def test_intervals_are_drawn_and_tabled():
    rows = (Interval(name="classic", value=2.0, low=1.0, high=3.0),)
    drawn = IntervalChart(title="Gap", x="points", rows=rows, reference=0.0)
    assert drawn.data()["rows"] == [["classic", 2.0, 1.0, 3.0, 0]]
    assert drawn.data()["zero"] == 0.0
    assert drawn.table().rows == [["classic", "2", "1", "3"]]
    assert drawn.alternative == "Gap, points. classic 2, interval 1 to 3."


def test_chart_in_a_page_carries_its_data_and_the_library():
    html = page("Title", section("one", "One", chart(lines(title="<b>&\"'"))))
    parsed = Page(html)
    (figure,) = parsed.find("figure", class_="chart")
    assert json.loads(figure.attributes["data-chart"]) == lines().data()
    assert "<b>&\"'" in parsed.text()
    assert len(parsed.find("script")) == 2


def scatter(**changes) -> ScatterChart:
    line = Series(name="other budgets", x=(0.1, 0.5, 1.0), y=(2.0, 0.03, 0.0))
    point = Point(name="this plan", x=0.4, y=0.05, color=1, x_interval=(0.3, 0.5))
    return ScatterChart(
        **(
            {
                "title": "Harm",
                "x": Axis(name="MACs", percent=True, log=True),
                "y": Axis(name="harm", log=True, floor=1e-4),
                "points": (point,),
                "lines": (line,),
            }
            | changes
        )
    )


def test_what_a_logarithm_cannot_show_is_drawn_at_the_floor_and_told_as_it_is():
    drawn = scatter().data()["lines"][0]["points"]
    assert [place[:2] for place in drawn] == [[0.1, 2.0], [0.5, 0.03], [1.0, 1e-4]]
    assert drawn[2][2] == "other budgets\nMACs: 100.0 %\nharm: 0"
    assert scatter().table().rows[2] == ["other budgets", "100.0 %", "", "0", ""]


def test_without_a_floor_what_a_logarithm_cannot_show_is_left_out():
    drawn = scatter(y=Axis(name="harm", log=True)).data()["lines"][0]["points"]
    assert [place[0] for place in drawn] == [0.1, 0.5]


def test_points_have_their_intervals_in_the_chart_and_in_the_table():
    chart_ = scatter()
    assert chart_.data()["points"][0]["xi"] == [0.3, 0.5]
    assert chart_.table().rows[3] == ["this plan", "40.0 %", "30.0 % … 50.0 %", "0.05", ""]
    assert chart_.alternative == (
        "Harm, harm against MACs. this plan: 40.0 %, 0.05; other budgets: 3 points from 2 at "
        "10.0 % to 0 at 100.0 %."
    )
    assert [(key.name, key.dot) for key in chart_.keys] == [
        ("other budgets", False),
        ("this plan", True),
    ]


def test_differences_have_their_sign():
    axis = Axis(name="accuracy", percent=True, signed=True, unit=" points")
    assert axis.text(-0.0051) == "−0.51 points"
    assert axis.text(0.002) == "+0.20 points"
