from __future__ import annotations

import dataclasses

import pytest
from run_records import empty_record, metric, run_record

from onebyone.core.records import Ratio, Subnormals
from onebyone.core.records.measured import TaskInfo
from onebyone.report.html import render_run
from onebyone.report.section_verdict import ratio_interval, size_words, speed_words, verdict


def ratio(value: float, low: float, high: float) -> Ratio:
    return Ratio(value=value, low=low, high=high, rounds=60)


def judged(**changes):
    record = run_record()
    return verdict(record.with_(comparison=dataclasses.replace(record.comparison, **changes)))


def moved(value: float, low: float, high: float):
    difference = run_record().comparison.difference
    return dataclasses.replace(difference, value=value, low=low, high=high)


def test_whole_sentence():
    assert verdict(run_record()).sentence == (
        "The rewritten network is 1.62× faster and 2.54× smaller; its accuracy is 0.24 points "
        "lower here, which may be chance with 10,000 images (95 % interval −0.61 … +0.13); it "
        "agrees with the original on 95.84 % of the images."
    )


def test_segmenters_agree_on_pixels_and_a_metrics_name_keeps_its_letters():
    record = run_record()
    before = dataclasses.replace(record.comparison.before, metric=metric(0.4, name="mIoU"))
    found = verdict(
        record.with_(
            task=TaskInfo(name="segmentation", how="given", divergence="KL, nats"),
            comparison=dataclasses.replace(record.comparison, before=before),
        )
    )
    assert found.sentence.endswith("it agrees with the original on 95.84 % of the pixels.")
    assert any(line.startswith("mIoU: both networks") for line in found.conditions)


def test_interval_that_includes_one_shows_no_speed():
    found = judged(latency_ratio={"eager": ratio(1.08, 0.97, 1.19)})
    assert "no difference in speed is shown" in found.sentence
    assert "faster" not in found.sentence
    assert found.figures[0].label == "the speed, eager: no difference shown"


def test_slower_is_called_slower():
    found = judged(latency_ratio={"eager": ratio(0.8, 0.75, 0.85)})
    assert found.sentence.startswith("The rewritten network is 1.25× slower and 2.54× smaller")
    assert found.figures[0].value == "1.25×"
    assert found.figures[0].label == "slower, eager"
    assert found.figures[0].detail.startswith("1.18 … 1.33×")


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (-0.0024, -0.006, 0.001, "its accuracy is 0.24 points lower here, which may be chance"),
        (0, -0.006, 0.006, "its accuracy is the same on these 10,000 images"),
        (-0.0024, -0.006, -0.001, "its accuracy is 0.24 points lower (95 %"),
        (0.0024, 0.001, 0.006, "its accuracy is 0.24 points higher (95 %"),
    ],
)
def test_metric_is_called_changed_only_beyond_its_interval(value, low, high, said):
    found = judged(difference=moved(value, low, high))
    assert said in found.sentence
    chance = {True: "the same here", False: "may be chance"}[value == 0]
    assert found.figures[2].label.endswith(f": {chance}") == (low < 0 < high)


def test_other_runtimes_are_told_too():
    assert "In onnxruntime: no difference shown, 1.01× (0.97 … 1.05×)." in judged().conditions


def test_conditions_say_how_it_was_measured():
    speed = verdict(run_record()).conditions[0]
    for part in ("eager", "cpu", "2 threads", "batch 1", "60 interleaved rounds", "AMD EPYC 7B13"):
        assert part in speed


def test_without_a_test_metric_counts_take_its_place():
    found = judged(difference=None, agreement=None, divergence=None)
    assert [figure.label for figure in found.figures] == [
        "faster, eager",
        "smaller file",
        "fewer MACs",
        "fewer parameters",
    ]
    assert "accuracy" not in found.sentence


def test_metric_without_a_fraction_has_its_own_unit():
    record = run_record()
    before = dataclasses.replace(record.before, metric=metric(31.4, 100, name="psnr"))
    found = judged(before=before, difference=moved(-0.3, -0.42, -0.18))
    assert "its psnr is 0.3 lower (95 % interval −0.42 … −0.18" in found.sentence
    assert found.figures[2].label == "in psnr"


def test_larger_is_called_larger():
    record = run_record()
    found = judged(before=record.after, after=record.before)
    assert "2.54× larger" in found.sentence
    assert found.figures[1].label == "larger file"


@pytest.mark.parametrize("state", ["running", "failed", "interrupted", "finished"])
def test_there_is_no_verdict_without_a_comparison(state):
    found = verdict(empty_record(state))
    assert found.sentence.startswith("No verdict: ")
    assert found.figures == ()


def test_words_of_ratios():
    assert speed_words(ratio(2.3, 2.2, 2.4)) == "2.30× faster"
    assert speed_words(ratio(0.5, 0.4, 0.6)) == "2.00× slower"
    assert speed_words(ratio(1, 0.9, 1.1)) == "no difference shown"
    assert speed_words(ratio(2, 1.9, 2.1), too_wide=True).startswith("no verdict")
    assert ratio_interval(ratio(0.5, 0.4, 0.8)) == "1.25 … 2.50×"
    assert size_words(10, 5, less="fewer", more="more") == "2.00× fewer"
    assert size_words(5, 10, less="fewer", more="more") == "2.00× more"
    assert size_words(5, 5, less="fewer", more="more") == "the same"
    assert size_words(5, 0, less="fewer", more="more") == "none left"


def flushed(*, exact=True):
    timings = {"eager": run_record().before.latency["eager"]}
    return Subnormals(
        weights={"conv1.weight": 7}, values=100, error=1e-7 if exact else 0.5, exact=exact,
        before=timings if exact else {}, after=timings if exact else {},
        ratio={"eager": ratio(3.1, 3.0, 3.2)} if exact else {},
    )  # fmt: skip


def test_what_subnormal_weights_cost_is_told_apart_from_the_rewrites():
    record = run_record().with_(subnormals=flushed())
    assert verdict(record).sentence == verdict(run_record()).sentence
    (said,) = [line for line in verdict(record).conditions if "ubnormal" in line]
    assert "not a gain of the rewrites, which alone gave 3.10× [3.00–3.20] in eager." in said
    assert "Both networks were timed without them" in said
    page = " ".join(render_run(record).split())
    assert said in page
    assert "7 of 100" in page
    assert "3.10× [3.00–3.20]: no gain of a rewrite" in page
    assert "7 of 100" in " ".join(str(record).split())


def test_subnormal_weights_that_were_kept_are_no_condition_of_the_speed():
    record = run_record().with_(subnormals=flushed(exact=False))
    assert not [line for line in verdict(record).conditions if "ubnormal" in line]
    assert "They were left as they are" in " ".join(render_run(record).split())


def test_subnormal_activations_are_named_on_the_page_with_what_avoids_them():
    found = Subnormals(weights={}, values=100, activations={"features.0": 64})
    page = " ".join(render_run(run_record().with_(subnormals=found)).split())
    assert "Subnormal activations, which cost time too: in features.0 (64)." in page
    assert "torch.set_flush_denormal(True)" in page
    assert "Subnormal weights" not in page


def test_without_subnormal_weights_the_page_does_not_speak_of_them():
    assert "ubnormal weights" not in render_run(run_record()) + str(run_record())
