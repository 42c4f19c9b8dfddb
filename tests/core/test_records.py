import dataclasses
import inspect
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebyone.core import records
from onebyone.core.errors import OutputError, RecordError
from onebyone.core.json_text import MAX_BYTES
from onebyone.core.records import (
    Budget,
    CalibrationInfo,
    Comparison,
    Cost,
    Difference,
    InputSpec,
    LeftAlone,
    Machine,
    Measured,
    Metric,
    Option,
    Plan,
    Ratio,
    Record,
    Step,
    Timing,
)
from onebyone.core.tables import Table, render
from onebyone.core.write_files import write_text


def plan(**changes):
    cost = Cost(params=100, macs=2000, bytes=400)
    fields = {
        "network": "net",
        "inputs": InputSpec.of_shape((1, 3, 8, 8)),
        "budgets": (Budget(quantity="macs", limit=1000, asked="macs=50%"),),
        "before": cost,
        "after": Cost(params=60, macs=900, bytes=240),
        "choices": (
            Option(
                site="body.0",
                steps=(Step(rewrite="factorize", settings={"form": "tucker2", "ranks": [2, 3]}),),
                before=cost,
                after=Cost(params=60, macs=900, bytes=240),
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
        inputs=InputSpec.of_shape((1, 3, 8, 8)),
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


COUNTS = st.integers(0, 10**12)


@given(st.builds(Cost, params=COUNTS, macs=COUNTS, bytes=COUNTS))
def test_costs_add_and_subtract(cost):
    other = Cost(params=3, macs=5, bytes=12)
    assert (cost + other) - other == cost
    assert Cost.from_json(cost.to_json()) == cost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("choices"), "missing required field `choices`"),
        (lambda c: c.update(choices=3), r"Expected `array`, got `int` - at `\$.choices`"),
        (lambda c: c["choices"][0].update(site=5), r"at `\$.choices\[0\].site`"),
        (
            lambda c: c["choices"][0]["steps"][0]["settings"].update(ranks=[1.5]),
            r"at `\$.choices\[0\].steps\[0\].settings",
        ),
        (lambda c: c["budgets"][0].update(quantity="ms"), r"Invalid enum value 'ms'"),
        (
            lambda c: c.update(format=99),
            r"by a later version of onebyone: it has format 99 .* reads format 3\. Update onebyone",
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


def test_a_long_value_does_not_hide_where_it_is():
    content = json.loads(plan().to_json())
    content["budgets"][0]["quantity"] = 10_000 * "9"
    with pytest.raises(RecordError, match=r"\$\.budgets\[0\]\.quantity`\.$") as caught:
        Plan.from_json(json.dumps(content))
    assert len(str(caught.value)) < 500


def test_a_missing_file_or_a_folder_cannot_be_read(tmp_path):
    with pytest.raises(
        RecordError, match=r"Cannot read the Plan at .*none.json: it does not exist"
    ):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(RecordError, match=r"Cannot read the Plan at .*: it is a folder"):
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


def test_slower_is_told_as_how_many_times_slower():
    assert Ratio(value=0.5, low=0.4, high=0.8, rounds=9).change == "2.00× [1.25–2.50] slower"
    assert Ratio(value=2.0, low=1.9, high=2.1, rounds=9).change == "2.00× [1.90–2.10] faster"
    equal = Ratio(value=1.0, low=0.9, high=1.1, rounds=9)
    assert equal.change == "1.00× [0.90–1.10] no difference shown"


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


# ---------------------------------------------------------------- strict reading


def edited(**changes):
    return json.dumps({**json.loads(plan().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited(chioces=[]), r"no field 'chioces' at `\$`\. Did you mean 'choices'\?"),
        (
            edited(before={"params": 1, "macs": 2, "bytes": 4, "mss": 3}),
            r"no field 'mss' at `\$\.before`",
        ),
        (
            edited(format=0),
            r"by an earlier version of onebyone: it has format 0 and .* format 3\. Plan anew",
        ),
        (edited(format="2"), r"Expected `int`, got `str` - at `\$\.format`"),
        (edited(inputs={"tensors": [], "call": "(input)"}), r"length >= 1 - at `\$\.inputs"),
        (
            edited(inputs={"tensors": [{"name": "input", "shape": [1, -3]}], "call": "(input)"}),
            r"`int` >= 1 - at `\$\.inputs\.tensors\[0\]\.shape\[1\]",
        ),
        (edited(memory_bytes=-1), r"`int` >= 0 - at `\$\.memory_bytes`"),
        (
            edited(before={"params": -1, "macs": 1, "bytes": 4}),
            "`before` must have parameters, MACs",
        ),
        (edited(harm=True), r"Expected `float \| null`, got `bool`"),
        (edited()[:-1] + ', "harm": 1}', "the key 'harm' comes twice"),
        (edited(harm=1).replace('"harm": 1', '"harm": NaN'), "finite, but it has NaN"),
        (edited(harm=1).replace('"harm": 1', '"harm": 1e999'), "finite, but it has 1e999"),
        (edited(harm=1).replace('"harm": 1', f'"harm": {"9" * 5000}'), "at most 400 digits"),
        (edited(memory_bytes=10**399), "a whole number of 64 bits"),
        ("[" * 100_000, "nests deeper than 64 levels"),
        ('{"a":' * 100 + "1" + "}" * 100, "nests deeper than 64 levels"),
        ("\ufeff{}".encode(), "without a byte order mark"),
        ("{}".encode("utf-16"), "without a byte order mark"),
        (b'{"network": "\xff"}', "UTF-8 text, but byte 13 is not"),
        (b'{"network": "\x00"}', "not JSON text: Invalid control character"),
    ],
)
def test_a_plan_is_read_strictly(text, message):
    with pytest.raises(RecordError, match=message):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ratio(value=1, low=0.9, high=0, rounds=30), "`high` must be above 0, got 0"),
        (lambda: Ratio(value=1, low=2.0, high=1.0, rounds=30), "`low` must be at most `high`"),
        (lambda: Ratio(value=math.nan, low=1, high=1, rounds=1), "`value` must be a finite number"),
        (lambda: Ratio(value=math.inf, low=1, high=1, rounds=1), "`value` must be a finite number"),
        (lambda: Ratio(value="2", low=1, high=1, rounds=1), "`value` must be a number, got '2'"),
        (lambda: Cost(params=1.5, macs=1, bytes=6), "`params` must be a whole number, got 1.5"),
        (lambda: Cost(params=True, macs=1, bytes=4), "`params` must be a whole number, got True"),
        (lambda: plan(inputs=(1, 3, 8, 8)), "`inputs` must be of type InputSpec"),
        (lambda: plan(network="caf\udce9"), "`network` must be text that UTF-8 can hold"),
        (lambda: plan(choices=(3,)), r"`choices\[0\]` must be of type Option, got 3"),
        (lambda: plan(format=7), "format 7 .* Update onebyone"),
        (
            lambda: dataclasses.replace(comparison(), latency_ratio={"x": comparison().latency_ratio["eager"]}),
            r"`before.latency` must have a time in 'x', got \['eager'\]",
        ),
        (
            lambda: Metric(name="accuracy", value=1.5, n=3, low=0, high=1),
            "must be from 0 to 1, got 1.5",
        ),
    ],
)  # fmt: skip
def test_what_is_made_is_checked_as_what_is_read(make, message):
    with pytest.raises(RecordError, match=message):
        make()


def test_numbers_of_numpy_are_written_as_numbers():
    made = Cost(params=np.int64(3), macs=7, ms=np.float32(0.5), bytes=np.int64(12))
    assert Cost.from_json(made.to_json()) == Cost(params=3, macs=7, ms=0.5, bytes=12)


def test_what_would_not_be_read_back_is_not_written(tmp_path):
    made = plan()
    object.__setattr__(made, "harm", math.nan)
    path = tmp_path / "plan.json"
    with pytest.raises(RecordError, match="would not be read back"):
        made.save(path)
    assert not path.exists()


def test_a_file_of_any_size_and_kind_is_refused_at_once(tmp_path):
    large = tmp_path / "plan.json"
    with large.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(RecordError, match="larger than 256 MiB"):
        Plan.load(large)
    with pytest.raises(RecordError, match="is a folder"):
        Plan.load(tmp_path)
    with pytest.raises(RecordError, match="null character"):
        Plan.load("a\0b")
    with pytest.raises(RecordError, match="a name that is too long"):
        Plan.load("n" * 300)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(RecordError, match="neither a file nor a folder"):
        Plan.load(pipe)


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
