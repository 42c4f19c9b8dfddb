import dataclasses
import inspect
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebyone import records
from onebyone.errors import OutputError, RecordError
from onebyone.records import (
    Budget,
    CalibrationInfo,
    Comparison,
    Cost,
    Difference,
    LeftAlone,
    Machine,
    Measured,
    Metric,
    Option,
    Plan,
    Ratio,
    Record,
    Timing,
    write_text,
)
from onebyone.tables import Table, render


def plan(**changes):
    cost = Cost(params=100, macs=2000)
    fields = {
        "network": "net",
        "input_shape": (1, 3, 8, 8),
        "budgets": (Budget(quantity="macs", limit=1000, asked="macs=50%"),),
        "before": cost,
        "after": Cost(params=60, macs=900),
        "choices": (
            Option(
                site="body.0",
                rewrite="factorize",
                settings={"form": "tucker2", "ranks": [2, 3]},
                before=cost,
                after=Cost(params=60, macs=900),
                occupies=("body.0",),
                error=0.1,
                harm=0.02,
                measured=True,
            ),
        ),
        "left_alone": (LeftAlone(site="(head)", reason="none"),),
        "calibration": CalibrationInfo(data="digits", examples=10, seed=0),
        "harm": 0.02,
    }
    return Plan(**{**fields, **changes})


TIMING = Timing(
    runtime="eager",
    device="cpu",
    threads=1,
    batch=1,
    repeats=30,
    median_ms=2.0,
    q1_ms=1.9,
    q3_ms=2.2,
)


def comparison():
    measured = Measured(
        params=1000,
        macs=5000,
        file_bytes=4096,
        latency={"eager": TIMING},
        metric=Metric(name="accuracy", value=0.9, n=100, low=0.83, high=0.95),
        train_metric=Metric(name="accuracy", value=0.95, n=100, low=0.9, high=0.98),
        calibration_error=0.03,
    )
    return Comparison(
        before=measured,
        after=dataclasses.replace(measured, params=100),
        input_shape=(1, 3, 8, 8),
        latency_ratio={"eager": Ratio(value=2.0, low=1.8, high=2.2, rounds=30)},
        difference=Difference(
            value=-0.01, low=-0.03, high=0.01, n=100, p_value=0.5, test="McNemar"
        ),
        agreement=Metric(name="agreement", value=0.97, n=100, low=0.9, high=0.99),
        divergence=0.01,
        machine=Machine(processor="p", cores=2, threads=1, device="cpu", system="s", versions={}),
    )


@pytest.mark.parametrize("record", [plan(), comparison(), TIMING], ids=lambda r: type(r).__name__)
def test_a_record_is_saved_loads_equal_and_prints(record, tmp_path):
    path = tmp_path / "record.json"
    record.save(path)
    assert type(record).load(path) == record
    assert type(record).from_json(record.to_json()) == record
    assert path.read_text().startswith("{\n")
    assert str(record).strip()


def test_every_record_is_frozen_and_takes_keywords_only():
    kinds = [
        k
        for _, k in inspect.getmembers(records, inspect.isclass)
        if issubclass(k, Record) and k is not Record
    ]
    assert len(kinds) > 15
    for kind in kinds:
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(kind))


@given(st.builds(Cost, params=st.integers(0, 10**12), macs=st.integers(0, 10**12)))
def test_costs_add_and_subtract(cost):
    other = Cost(params=3, macs=5)
    assert (cost + other) - other == cost
    assert Cost.from_json(cost.to_json()) == cost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("choices"), "missing required field `choices`"),
        (lambda c: c.update(choices=3), r"Expected `array`, got `int` - at `\$.choices`"),
        (lambda c: c["choices"][0].update(site=5), r"at `\$.choices\[0\].site`"),
        (
            lambda c: c["choices"][0]["settings"].update(ranks=[1.5]),
            r"at `\$.choices\[0\].settings",
        ),
        (lambda c: c["budgets"][0].update(quantity="ms"), r"Invalid enum value 'ms'"),
        (
            lambda c: c.update(format=99),
            "the plan's format is 99; this onebyone reads up to 1: update it",
        ),
    ],
)
def test_a_file_that_is_not_the_record_says_where(change, message, tmp_path):
    content = json.loads(plan().to_json())
    change(content)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", b"\xff\xfe", "null"])
def test_text_that_is_no_json_object_is_refused(text):
    with pytest.raises(RecordError, match="This is not a saved Plan"):
        Plan.from_json(text)


def test_a_missing_file_or_a_folder_cannot_be_read(tmp_path):
    with pytest.raises(RecordError, match=r"Cannot read the Plan at .*No such file"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(RecordError, match=r"Cannot read the Plan at .*directory"):
        Plan.load(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    write_text(path, "new")
    assert path.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match=r"Cannot write .*No such file or directory"):
        write_text(tmp_path / "none" / "a.json", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"Cannot write .*[Dd]irectory"):
        write_text(tmp_path / "folder", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.1, 1.5, "faster"), (0.5, 0.9, "slower"), (0.9, 1.1, "no difference shown")],
)
def test_a_ratio_says_only_what_its_interval_shows(low, high, verdict):
    assert Ratio(value=1.0, low=low, high=high, rounds=30).verdict == verdict


def test_the_generalization_gap_is_train_less_test_or_none():
    measured = comparison().before
    assert measured.generalization_gap == pytest.approx(0.05)
    assert dataclasses.replace(measured, train_metric=None).generalization_gap is None


def test_a_comparison_prints_each_quantity():
    text = str(comparison())
    for word in (
        "params",
        "10.0× smaller",
        "latency, eager",
        "faster",
        "90.00 %",
        "agreement",
        "gap, points",
    ):
        assert word in text


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "hostile", ["[bold]x[/bold]", "a[0]", "[/]", "\\[x]", ":smile:", "[link=x]y"]
)
def test_names_are_printed_as_they_are(hostile):
    table = Table(
        columns=("a", ">b"), rows=[[hostile, "1"]], title=f"T {hostile}", notes=[f"N {hostile}"]
    )
    text = render(table)
    assert text.count(hostile) == 3


def test_a_table_keeps_to_its_width():
    table = Table(columns=("name", ">n"), rows=[["x" * 200, "123"]])
    assert max(map(len, str(table).splitlines())) <= 80
    assert "123" in str(table)
