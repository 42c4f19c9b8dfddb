"""Pictures of outputs show what both networks give, for the examples that differ most and others."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import onebyone as obo
from onebyone.core.average_precision import MeanAveragePrecision
from onebyone.core.records import OutputPictures
from onebyone.core.task import Task
from onebyone.data import as_split
from onebyone.evaluation.pictures.examples import examples_at
from onebyone.evaluation.pictures.outputs import (
    AT_RANDOM,
    MOST_DIFFERENT,
    choose,
    picture_outputs,
)
from onebyone.evaluation.scores import score
from onebyone.report.masks import CLEAR, OTHERS, STYLES, draw_mask

N, CLASSES, SIDE = 12, 4, 10
NAMES = ("ground", "tree", "car", "house")


class Told(nn.Module):
    """Gives the outputs that it is told, by the number that the input's corner holds."""

    def __init__(self, outputs):
        super().__init__()
        self.register_buffer("outputs", outputs)

    def forward(self, x):
        return self.outputs[(x[:, 0, 0, 0] * 255).round().long()]


def numbered(n=N, size=(SIDE, SIDE), channels=3):
    inputs = torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(0))
    inputs[:, 0, 0, 0] = torch.arange(n) / 255
    return inputs


def decoded(address):
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def pixels(address, mode="RGB"):
    return np.asarray(decoded(address).convert(mode), dtype=np.int64)


def pictured(outputs, targets=None, *, classes=NAMES, **how):
    """Return the pictures of two networks that give these outputs, and their scores."""
    inputs = how.pop("inputs", None)
    inputs = numbered(len(outputs[0])) if inputs is None else inputs
    split = as_split(inputs if targets is None else (inputs, targets))
    networks = [Told(each) for each in outputs]
    scored = score(networks, split, **how)
    return picture_outputs(*networks, split, scored, classes=classes), scored


# ---------------------------------------------------------------- masks


def masks(seed, n=N):
    drawn = torch.Generator().manual_seed(seed)
    classes = torch.zeros(n, SIDE, SIDE, dtype=torch.int64)
    classes[:, 2:7, 3:9] = torch.randint(1, CLASSES, (n, 1, 1), generator=drawn)
    return classes


def scores_of(classes):
    return nn.functional.one_hot(classes, CLASSES).movedim(-1, 1).float() * 5


def changed_masks():
    """Return the masks before, and after: of example k, k pixels have another class."""
    before = masks(0)
    after = before.clone()
    for k in range(N):
        flat = after[(5 * k) % N].view(-1)
        flat[:k] = (flat[:k] + 1) % CLASSES
    return before, after


@pytest.fixture(scope="module")
def segmented():
    before, after = changed_masks()
    found, scored = pictured(
        [scores_of(before), scores_of(after)], masks(3), task="segmentation", metric="mIoU"
    )
    return found, scored, before, after


def test_the_most_different_come_first_and_others_are_drawn_from_the_rest(segmented):
    found, scored, before, after = segmented
    shares = (before != after).double().mean((1, 2)).tolist()
    order = sorted(range(N), key=lambda row: -shares[row])
    assert [each.index for each in found.examples[:MOST_DIFFERENT]] == order[:MOST_DIFFERENT]
    others = [each.index for each in found.examples[MOST_DIFFERENT:]]
    assert len(set(others)) == AT_RANDOM
    assert set(others) <= set(order[MOST_DIFFERENT:])
    assert [each.chosen for each in found.examples] == (
        ["most"] * MOST_DIFFERENT + ["random"] * AT_RANDOM
    )
    assert choose(scored) == choose(scored)
    assert found.scored == N
    for each in found.examples:
        assert each.changed == pytest.approx(shares[each.index])
        assert each.divergence == pytest.approx(scored.apart[1][each.index])


def test_masks_are_those_of_each_network_and_of_the_labels(segmented):
    found, _, before, after = segmented
    truth = masks(3)
    shown = sorted(set(truth.unique().tolist()) | set(before.unique().tolist()) - {0})
    for each in found.examples:
        given = (each.before, each.after, each.truth)
        for output, classes in zip(given, (before, after, truth), strict=True):
            # The ground has the most pixels; the others are styled in the order of their numbers.
            assert output.picture == draw_mask(classes[each.index].numpy() - 1)
    assert [entry.name for entry in found.legend] == [NAMES[label] for label in [0, *shown[1:]]]
    assert found.legend[0].sample == ""
    assert len({entry.sample for entry in found.legend}) == len(found.legend)


def test_each_image_has_its_own_scores_and_stays_as_it_is(segmented):
    found, scored, *_ = segmented
    first = found.examples[0]
    place = int(np.flatnonzero(scored.counted == first.index)[0])
    metric, (one, two) = scored.each[0].pooled.metric, scored.each
    assert first.before.score == metric.each([one.pooled.counts[place]])[0]
    assert first.after.score == metric.each([two.pooled.counts[place]])[0]
    assert found.metric == "mIoU"
    assert first.truth.score is None
    expected = as_split(numbered()).image(first.index)
    assert np.array_equal(pixels(first.image), expected)


def test_without_labels_there_is_no_truth_and_no_score():
    outputs = [scores_of(each) for each in changed_masks()]
    found, _ = pictured(outputs, task="segmentation")
    assert {each.truth for each in found.examples} == {None}
    assert {each.before.score for each in found.examples} == {None}
    assert found.metric == ""


def test_of_two_examples_both_are_shown_once():
    before = masks(0, n=2)
    found, _ = pictured([scores_of(before), scores_of(before)], task="segmentation")
    assert sorted(each.index for each in found.examples) == [0, 1]


def test_ignored_pixels_are_drawn_as_not_counted():
    before, after = changed_masks()
    truth = masks(3)
    truth[:, 8:] = 9
    found, _ = pictured(
        [scores_of(before), scores_of(after)], truth, task="segmentation", ignore_index=9
    )
    assert found.legend[-1].name == "not counted"
    assert found.legend[-1].sample
    mask = pixels(found.examples[0].truth.picture, "RGBA")
    assert (mask[-20:, :, 3] > 0).all()


def test_examples_without_a_label_that_counts_are_not_shown():
    before, after = changed_masks()
    truth = masks(3)
    truth[:3] = 9
    found, scored = pictured(
        [scores_of(before), scores_of(after)], truth, task="segmentation", ignore_index=9
    )
    assert found.scored == N - 3
    for each in found.examples:
        assert each.index >= 3
        assert each.divergence == pytest.approx(scored.apart[1][each.index])
        assert np.array_equal(pixels(each.image), as_split(numbered()).image(each.index))


def test_classes_are_listed_in_the_order_of_their_numbers():
    classes = torch.zeros(1, SIDE, SIDE, dtype=torch.int64)
    for label, width in ((1, 1), (2, 2), (3, 3)):
        classes[0, :2, 3 * label - 3 : 3 * label - 3 + width] = label
    outputs = scores_of(classes)
    found, _ = pictured([outputs, outputs], task="segmentation", inputs=numbered(1))
    assert tuple(entry.name for entry in found.legend) == NAMES


def test_examples_are_found_in_any_batch():
    inputs, targets = torch.arange(600.0).view(-1, 1, 1, 1), torch.arange(600)
    rows = [599, 0, 250, 249]
    found = examples_at(as_split((inputs, targets)), rows)
    assert [(float(x), int(y)) for x, y in found] == [(row, row) for row in rows]


def test_a_region_has_its_own_look_and_what_is_clear_is_transparent():
    size = 240
    looks = {draw_mask(np.full((size, size), style)) for style in (*range(STYLES), OTHERS)}
    assert len(looks) == STYLES + 1
    half = np.full((6, 12), CLEAR)
    half[:, 6:] = 3
    drawn = pixels(draw_mask(half), "RGBA")
    assert drawn.shape == (120, size, 4)
    assert (drawn[:, : size // 2 - 1, 3] == 0).all()
    assert (drawn[:, size // 2 :, 3] > 0).all()
    assert (drawn[:, size // 2 - 1] == (0, 0, 0, drawn[..., 3].max())).all()  # the line between


def test_of_many_classes_the_smallest_share_one_look():
    count = STYLES + 6
    classes = torch.arange(count).repeat_interleave(2)[None, None].repeat(1, SIDE, 1)
    outputs = nn.functional.one_hot(classes, count).movedim(-1, 1).float()
    found, _ = pictured(
        [outputs, outputs], task="segmentation", classes=(), inputs=numbered(1, classes.shape[1:])
    )
    names = [entry.name for entry in found.legend]
    assert len(names) == STYLES + 2
    assert names[-1] == "all other classes"
    assert names[0].startswith("class ")


# ---------------------------------------------------------------- boxes


def boxes_of(rows):
    """Return outputs that :func:`decode` reads: left, top, right, bottom, class, confidence."""
    return torch.tensor(rows, dtype=torch.float32)


def decode(outputs):
    return [
        {"boxes": rows[:, :4], "labels": rows[:, 4].long(), "scores": rows[:, 5]}
        for rows in outputs
    ]


def apart(reference, outputs):
    return (reference - outputs).abs().flatten(1).mean(1)


BOXES = Task("boxes", apart, metric=MeanAveragePrecision(decode))


def detected(confidence, targets=None, **how):
    """Return the pictures of detectors whose two boxes an image have these confidences."""
    before = boxes_of([[[2, 1, 8, 5, 1, confidence], [0, 0, 4, 4, 2, confidence / 2]]] * 4)
    after = before.clone()
    after[2, 0, 0] = 4
    return pictured([before, after], targets, task=BOXES, inputs=numbered(4, (10, 20)), **how)[0]


def test_boxes_are_shares_of_the_image_and_of_each_network():
    found = detected(0.9)
    assert found.kind == "boxes"
    first = found.examples[0]
    assert first.index == 2  # the only one that differs
    (box,) = first.before.boxes
    assert (box.left, box.top, box.right, box.bottom) == (0.1, 0.1, 0.4, 0.5)
    assert (box.label, box.confidence) == (1, 0.9)
    assert first.after.boxes[0].left == 0.2
    assert first.truth is None
    assert decoded(first.image).size == (20, 10)


def test_boxes_below_the_confidence_that_is_said_are_left_out():
    assert detected(0.9).least_confidence == 0.5
    assert {len(each.before.boxes) for each in detected(0.9).examples} == {1}
    # A detector that is never so sure: it shows as many as are wanted, one an image.
    unsure = detected(0.3)
    assert unsure.least_confidence == pytest.approx(0.3, abs=0.011)
    assert {len(each.before.boxes) for each in unsure.examples} == {1}
    assert {each.before.boxes for each in detected(0.01).examples} == {()}


def test_true_boxes_are_shown_without_those_that_only_fill_up():
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    rows = torch.tensor([[2.0, 1, 8, 5, 1], [0, 0, 30, 4, 3], [0, 0, 0, 0, -1]])
    found = detected(0.9, rows.repeat(4, 1, 1))
    first = found.examples[0]
    assert [box.label for box in first.truth.boxes] == [1, 3]
    assert first.truth.boxes[1].right == 1  # clipped to the image
    assert {box.confidence for box in first.truth.boxes} == {None}
    assert found.metric == "mAP"
    assert first.before.score > 0
    # Two true boxes an image are wanted.
    assert found.least_confidence == 0.45
    assert len(first.before.boxes) == 2


def test_a_box_that_turns_inside_out_does_not_end_a_run():
    rows = boxes_of([[[8, 5, 2, 1, 1, 0.9], [-5, -5, -1, 99, 0, 1.2]]] * 2)
    found, _ = pictured([rows, rows], task=BOXES, inputs=numbered(2, (10, 20)))
    assert {len(each.before.boxes) for each in found.examples} == {2}


# ---------------------------------------------------------------- patches


def restored(channels=1, side=100, size=0.24):
    clean = torch.rand(3, channels, side, side, generator=torch.Generator().manual_seed(4)) / 2
    after = clean.clone()
    after[1, :, 80:84, 10:14] += size
    return pictured(
        [clean, after], clean, task="restoration", inputs=numbered(3, (side, side), channels)
    )[0], clean, after  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_cut_where_the_outputs_differ_most(channels):
    found, _, after = restored(channels)
    first = found.examples[0]
    assert (found.kind, first.index) == ("patches", 1)
    assert decoded(first.before.picture).size == (64, 64)
    assert first.before.picture == first.truth.picture
    difference = pixels(first.difference)
    moved = np.abs(difference - difference[0, 0]).max(axis=2) > 2
    assert moved.sum() == 16
    assert difference.max() == pytest.approx(127.5 + first.amplified * 0.24 * 255, abs=1)
    top, left = (int(places.min()) for places in np.nonzero(moved))
    shown = pixels(first.after.picture)[top : top + 4, left : left + 4]
    expected = (after[1, :, 80:84, 10:14] * 255).permute(1, 2, 0).numpy()
    assert np.abs(shown - expected).max() <= 1
    assert first.after.score < first.before.score


def test_the_difference_is_amplified_as_far_as_it_stays_within_the_scale():
    for size, factor in ((0.24, 2), (0.2, 2), (0.1, 4), (0.0009, 512)):
        found, *_ = restored(size=size)
        assert found.examples[0].amplified == factor, size
    assert found.examples[1].amplified == 1  # no difference at all


def test_a_larger_output_shows_the_same_part_of_its_input():
    inputs = numbered(1, (40, 40), 1)
    large = inputs.repeat_interleave(2, 2).repeat_interleave(2, 3)
    after = large.clone()
    after[..., 70:, 70:] += 0.3
    found, _ = pictured([large, after], task="restoration", inputs=inputs)
    (first,) = found.examples
    assert decoded(first.before.picture).size == (64, 64)
    assert decoded(first.image).size == (32, 32)
    enlarged = pixels(first.image).repeat(2, axis=0).repeat(2, axis=1)
    ordinary = np.corrcoef(enlarged.ravel(), pixels(first.before.picture).ravel())[0, 1]
    assert ordinary > 0.999


# ---------------------------------------------------------------- all


def test_records_of_large_images_stay_small_and_are_read_again():
    large = torch.randint(0, 255, (6, 3, 400, 300), dtype=torch.uint8)
    large[:, 0, 0, 0] = torch.arange(6)
    classes = torch.randint(0, CLASSES, (6, 1, 1)).repeat(1, 400, 300)
    found, _ = pictured(
        [scores_of(classes), scores_of(classes.flip(0))], classes, task="segmentation",
        inputs=large,
    )  # fmt: skip
    text = found.to_json()
    assert len(text) < 500_000
    assert OutputPictures.from_json(text) == found


def test_other_outputs_have_no_pictures():
    scores = torch.rand(N, CLASSES)
    assert pictured([scores, scores], task="classification")[0] is None
    assert pictured([scores, scores], task="embedding")[0] is None
    maps = torch.rand(N, 5, SIDE, SIDE)  # no gray or RGB images
    assert pictured([maps, maps], maps, task="restoration")[0] is None


def test_a_run_of_a_segmenter_keeps_pictures_for_its_report(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, CLASSES, 3, padding=1)
    )
    inputs, labels = torch.rand(24, 3, SIDE, SIDE), masks(0, 24)
    parts = [(inputs[part], labels[part]) for part in (slice(12), slice(12, 16), slice(16, 24))]
    _, record = obo.shrink(
        network, tuple(parts), budget="macs=40%", task="segmentation", epochs=0, effort="quick",
        out=tmp_path / "run",
    )  # fmt: skip
    assert record.pictures.kind == "masks"
    assert record.pictures.scored == 8
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "The most different" in page
    assert "Drawn at random" in page
    first = record.pictures.examples[0]
    for address in (first.before.picture, first.after.picture, first.truth.picture, first.image):
        assert address in page
