"""Any text is a record that can be shown and written again, or is refused by name."""

import dataclasses
import json

import pytest
import torch
from article_records import record as article_record
from cases import some
from edited_json import VALUES, damaged_text, edits
from hypothesis import example, given
from hypothesis import strategies as st
from run_records import MACHINE, empty_record, output_pictures, run_record, timing
from torch import nn

from onebyone import apply, restructure, uniform_plan
from onebyone.article.page import render_article
from onebyone.article.record import ArticleRecord
from onebyone.core.compared import Compared, Contender
from onebyone.core.errors import OneByOneError, RecordError
from onebyone.core.records import InputSpec, Plan, RunRecord
from onebyone.pipeline.exporting.record import ExportCheck, ExportRecord, Preprocessing
from onebyone.planning.latency.cache import Timings
from onebyone.profiling.bench import BenchEntry, BenchRecord
from onebyone.report.comparison_page import render_compared
from onebyone.report.html import render_run, render_runs
from onebyone.report.summary import summarize
from onebyone.runtimes.output_check import OutputDifference

SAME = OutputDifference(max_abs=1e-6, relative=1e-6)


def small_run():
    made = run_record(count=3)
    shown = output_pictures("boxes", count=2)
    return dataclasses.replace(made, disagreements=made.disagreements[:2], pictures=shown)


def compared():
    found = run_record(count=3).comparison
    second = Contender(
        name="b",
        measured=found.after,
        latency_ratio=found.latency_ratio,
        difference=found.difference,
        agreement=found.agreement,
        divergence=found.divergence,
    )
    return Compared(
        contenders=(Contender(name="a", measured=found.before), second, dataclasses.replace(second, name="c")),
        inputs=found.inputs,
        rounds=40,
        machine=MACHINE,
        onebyone="0.1.0",
        created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def bench():
    entry = BenchEntry(
        runtime="eager", version="1", options={}, timing=timing(2.0), difference=SAME, ratio=None,
        behind=None, prepare_seconds=0.1, resident_bytes=-5, call_bytes=None,
    )  # fmt: skip
    return BenchRecord(
        network="n", inputs=InputSpec.of_shape((1, 3, 8, 8)), entries=(entry,), left_out={"x": "why"},
        allocator="default", machine=MACHINE,
    )  # fmt: skip


def exported():
    check = ExportCheck(
        format="onnx", files=("model.onnx",), file_bytes=3, runtime="onnxruntime", version="1",
        dynamic=("batch",), inputs="8 random inputs", shapes=((1, 3, 8, 8),), difference=SAME,
    )  # fmt: skip
    info = Preprocessing(inputs=InputSpec.of_shape((1, 3, 8, 8)), mean=(0.5,), std=(0.5,))
    return ExportRecord(
        network="n", inputs=InputSpec.of_shape((1, 3, 8, 8)), checks=(check,), preprocessing=info
    )


# What is shown of each kind of record, in every way there is.
SHOWN = {
    RunRecord: [str, render_run, lambda r: str(summarize({"a": r}).table()),
                lambda r: render_runs({"a": r, "b": small_run()})],
    Compared: [str, render_compared, lambda r: r.p_values()],
    ArticleRecord: [str, render_article],
    BenchRecord: [str],
    ExportRecord: [str],
    Plan: [str, lambda r: str(r.front_table())],
}  # fmt: skip
SAMPLES = [
    small_run(),
    empty_record(),
    compared(),
    article_record(),
    bench(),
    exported(),
    small_run().plan,
]
CONTENT = [(type(each), json.loads(each.to_json())) for each in SAMPLES]
NAMES = [f"{kind.__name__}{place}" for place, (kind, _) in enumerate(CONTENT)]


def holds(kind, text):
    """Check the law for one text; return whether it is a record."""
    try:
        record = kind.from_json(text)
    except RecordError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600
        return False
    for show in SHOWN[kind]:
        assert show(record) is not None
    assert kind.from_json(record.to_json()) == record
    return True


@pytest.mark.parametrize(("kind", "content"), CONTENT, ids=NAMES)
def test_the_samples_hold(kind, content):
    assert holds(kind, json.dumps(content))


@pytest.mark.parametrize(("kind", "content"), CONTENT, ids=NAMES)
def test_edited_records(kind, content):
    @some(dearer=4)
    @given(edits(content))
    def law(text):
        holds(kind, text)

    law()


@pytest.mark.parametrize(("kind", "content"), CONTENT, ids=NAMES)
def test_damaged_texts(kind, content):
    @some(dearer=2)
    @given(damaged_text(json.dumps(content)))
    @example(b"[" * 100_000)
    @example(b'{"a":' * 100_000)
    @example(b"\xef\xbb\xbf{}")
    def law(text):
        holds(kind, text)

    law()


@some()
@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(text):
    for kind in SHOWN:
        assert not holds(kind, text)


# ---------------------------------------------------------------- plans carried out


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4),
    ).eval()  # fmt: skip


NET = net()
SHAPE = (2, 3, 8, 8)
PLANS = [json.loads(uniform_plan(NET, SHAPE, form=form).to_json()) for form in ("auto", "tucker2")]


@some(dearer=10)
@given(st.sampled_from(PLANS).flatmap(edits))
def test_edited_plans_are_carried_out_or_refused(text):
    before = [parameter.clone() for parameter in NET.parameters()]
    try:
        plan = Plan.from_json(text)
    except RecordError:
        return
    x = torch.randn(SHAPE)
    for make in (lambda: restructure(NET, plan), lambda: apply(NET, plan, None)):
        try:
            changed = make()
        except OneByOneError as error:
            assert len(str(error).splitlines()) == 1
        else:
            with torch.no_grad():
                assert changed(x).shape == NET(x).shape
    assert all(torch.equal(a, b) for a, b in zip(before, NET.parameters(), strict=True))


@some()
@given(damaged_text('{"conditions": {"a": "b"}, "times": {"c": {"d": {"before_ms": 1.0}}}}'))
def test_a_cache_of_times_that_is_damaged_is_no_cache(tmp_path_factory, text):
    from onebyone.core.records import Deployment

    folder = tmp_path_factory.getbasetemp() / "cache"
    folder.mkdir(exist_ok=True)
    fresh = Timings(Deployment(runtime="eager"), folder)
    assert fresh._file is not None
    fresh._file.write_bytes(text)
    Timings(Deployment(runtime="eager"), folder)
