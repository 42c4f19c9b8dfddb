"""Detectors up to their raw outputs: the same layers, and a whole detector back."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models import detection as d
from torchvision.models.detection import faster_rcnn, keypoint_rcnn, mask_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.ops import MultiScaleRoIAlign

import onebyone as obo
from onebyone.core.errors import OptionError
from onebyone.networks.detectors import RawDetector, spread_boxes

SIZE = 48


class Backbone(nn.Module):
    """Two maps of features, of which the second has half the size."""

    def __init__(self, channels=32):
        super().__init__()
        self.out_channels = channels
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 4, 1), nn.ReLU(), nn.Conv2d(12, 32, 3, 1, 1))
        self.down = nn.Sequential(nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1))

    def forward(self, x):
        first = self.stem(x)
        return OrderedDict([("0", first), ("1", self.down(first))])


def anchors():
    return AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)


SIZES = {"min_size": SIZE, "max_size": SIZE}
POOL = MultiScaleRoIAlign(["0", "1"], 3, 2)


def two_stages(make, **more):
    return make(
        Backbone(), rpn_anchor_generator=anchors(), rpn_post_nms_top_n_test=6, **SIZES, **more,
        box_roi_pool=POOL, box_head=faster_rcnn.TwoMLPHead(32 * 9, 24),
        box_predictor=faster_rcnn.FastRCNNPredictor(24, 4),
    )  # fmt: skip


MAKE = {
    "retinanet": lambda: d.RetinaNet(Backbone(), 4, anchor_generator=anchors(), **SIZES),
    "fcos": lambda: d.FCOS(Backbone(), 4, anchor_generator=anchors(), **SIZES),
    "ssd": lambda: d.ssd.SSD(
        Backbone([32, 32]), DefaultBoxGenerator([[2], [2]]), (SIZE, SIZE), 4
    ),
    "faster": lambda: two_stages(d.FasterRCNN),
    "mask": lambda: two_stages(
        d.MaskRCNN, mask_roi_pool=POOL, mask_head=mask_rcnn.MaskRCNNHeads(32, (16,), 1),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(16, 16, 4),
    ),
    "keypoint": lambda: two_stages(
        d.KeypointRCNN, keypoint_roi_pool=POOL,
        keypoint_head=keypoint_rcnn.KeypointRCNNHeads(32, (16,)),
        keypoint_predictor=keypoint_rcnn.KeypointRCNNPredictor(16, 3),
    ),
}  # fmt: skip


@pytest.fixture(params=sorted(MAKE))
def detector(request):
    torch.manual_seed(0)
    return MAKE[request.param]().eval()


def pictures(count=4):
    return list(torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))


def test_outputs_have_the_batch_first_and_do_not_depend_on_the_others_of_a_batch(detector):
    raw = RawDetector(detector)
    x = raw.prepared(pictures())
    together, alone = raw(x), raw(x[:1])
    assert together.keys() == alone.keys()
    for name, each in together.items():
        assert len(each) == len(x), name
        torch.testing.assert_close(each[:1], alone[name], rtol=1e-4, atol=1e-5)


def test_a_detector_in_training_gives_outputs_of_the_same_shapes(detector):
    raw = RawDetector(detector)
    x = raw.prepared(pictures(2))
    shapes = [{name: each.shape for name, each in net(x).items()} for net in (raw, raw.train())]
    assert shapes[0] == shapes[1]


def test_a_detector_is_shrunk_distilled_and_compared():
    torch.manual_seed(0)
    raw = RawDetector(MAKE["faster"]().eval())
    run = obo.shrink(raw, raw.prepared(pictures(12)), budget="macs=90%", epochs=1)
    assert run.record.status.state == "finished"
    assert run.record.plan.choices
    assert str(run) == str(run.record)
    assert len(run.model.detector()(pictures(1))[0]["boxes"]) <= 100


def test_a_whole_detector_comes_back_and_finds_the_same(detector):
    back = RawDetector(detector).detector()
    for before, after in zip(detector(pictures()), back(pictures()), strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_raw_outputs_are_what_a_detector_of_one_stage_decodes():
    torch.manual_seed(0)
    detector = MAKE["retinanet"]().eval()
    seen = []
    detector.head.register_forward_hook(lambda _m, _i, given: seen.append(given))
    detector(pictures())
    raw = RawDetector(MAKE["retinanet"]())
    raw.load_state_dict(detector.state_dict())
    given = raw.eval()(raw.prepared(pictures()))
    assert all(torch.equal(given[name], seen[0][name]) for name in given)


@pytest.mark.parametrize("name", ["mask", "retinanet", "ssd"])
def test_a_detector_is_planned_rewritten_and_put_together_and_the_callers_is_as_before(name):
    torch.manual_seed(0)
    detector = MAKE[name]().eval()
    before = copy.deepcopy(detector.state_dict())
    raw = RawDetector(detector)
    x = raw.prepared(pictures(8))
    plan = obo.plan(raw, x, budget="macs=70%")
    assert plan.choices
    if name == "retinanet":  # its heads run once for each map
        assert any(option.site.startswith("head.") for option in plan.choices)
    small = obo.apply(raw, plan, x).detector()
    assert sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in detector.parameters()
    )
    found = small(pictures(1))[0]
    assert found["boxes"].shape[1] == 4
    assert all(torch.equal(detector.state_dict()[name], each) for name, each in before.items())
    # Structure and weights fit a whole detector as they do the raw one: sites have the same names.
    assert {name for name, _ in small.named_parameters()} == {
        name for name, _ in obo.restructure(raw, plan).named_parameters()
    }


def test_boxes_lie_in_the_image_and_are_the_same_each_time():
    boxes = spread_boxes(200, (40, 64))
    assert torch.equal(boxes, spread_boxes(200, (40, 64)))
    assert (boxes >= 0).all()
    assert (boxes[:, 0::2] <= 64).all()
    assert (boxes[:, 1::2] <= 40).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= 16 - 1e-9
    assert sides[:, 0].max() > 48
    assert (spread_boxes(9, (8, 8)) <= 8).all()


def test_what_is_no_such_detector_is_refused_with_what_to_do():
    with pytest.raises(OptionError, match=r"got Sequential\. Of another detector, write a module"):
        RawDetector(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(OptionError, match="`proposals` must be at least 1, got 0"):
        RawDetector(MAKE["faster"](), proposals=0)
    with pytest.raises(OptionError, match=r"shape \(3, height, width\), got \(1, 3, 4, 4\)"):
        RawDetector(MAKE["ssd"]()).prepared([torch.rand(1, 3, 4, 4)])


ONE_STAGE = ("fcos", "retinanet", "ssd")


def made(name):
    torch.manual_seed(0)
    detector = MAKE[name]().eval()
    for module in detector.modules() if name in ("fcos", "retinanet") else ():
        if isinstance(module, nn.Conv2d):  # their own random weights are sure of nothing
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return detector


def labelled(detector, count=6):
    """Return prepared pictures, and the detector's own boxes as what is in them."""
    raw = RawDetector(detector)
    x = raw.prepared(pictures(count))
    targets = torch.full((count, 3, 5), -1.0)
    for rows, found in zip(targets, detector(pictures(count)), strict=True):
        some = torch.cat([found["boxes"], found["labels"][:, None]], dim=1)[:3]
        rows[: len(some)] = some.detach()
    return raw, x, targets


@pytest.mark.parametrize("name", ONE_STAGE)
def test_raw_outputs_are_decoded_into_the_boxes_of_the_whole_detector(name):
    detector = made(name)
    raw = RawDetector(detector)
    x = raw.prepared(pictures())
    for mine, whole in zip(raw.decode(raw(x)), detector(pictures()), strict=True):
        assert mine.keys() == whole.keys()
        assert len(whole["boxes"])
        for key in whole:
            torch.testing.assert_close(mine[key], whole[key])


@pytest.mark.parametrize("name", ONE_STAGE)
def test_detectors_are_compared_by_their_map_and_full_rank_finds_the_same(name):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    detector = made(name)
    raw, x, targets = labelled(detector)
    whole = obo.apply(raw, obo.uniform_plan(raw, tuple(x[:1].shape), ranks=1.0), None)
    for mine, theirs in zip(whole.decode(whole(x)), raw.decode(raw(x)), strict=True):
        torch.testing.assert_close(mine["boxes"], theirs["boxes"], rtol=1e-3, atol=1e-2)
    compared = obo.compare(raw, whole, data=(x, targets), rounds=3)
    first, second = compared.contenders
    assert compared.task.name == "detection"
    assert first.measured.metric.name == "mAP"
    assert first.measured.metric.value > 0.01  # its own boxes, and many others
    assert abs(second.difference.value) < 1e-3
    assert second.divergence < 1e-6


def test_what_cannot_be_decoded_is_refused_with_what_to_do():
    raw = RawDetector(made("faster"))
    assert raw.task is None
    with pytest.raises(OptionError, match=r"got those of FasterRCNN.*Run `detector\(\)` instead"):
        raw.decode({})
    unsized = RawDetector(made("fcos"))
    assert unsized.task.name == "detection"
    with pytest.raises(OptionError, match="give `size` to RawDetector, or make the images by its"):
        unsized.decode({})
    assert (
        len(RawDetector(made("fcos"), size=(SIZE, SIZE)).decode(unsized(torch.rand(1, 3, 48, 48))))
        == 1
    )
