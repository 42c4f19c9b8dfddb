"""Networks of one tensor and of several: the same laws, and every tensor counts the same."""

import dataclasses
from collections import OrderedDict
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.testing import assert_close
from torchvision.models._utils import IntermediateLayerGetter

import onebyone as obo
from onebyone.calibration.curvature import output_curvature
from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import ModelError
from onebyone.data import TensorSplit
from onebyone.data.convert import as_data
from onebyone.evaluation.scores import score
from onebyone.networks.outputs import (
    comparable,
    in_float32,
    one_tensor,
)

IMAGES = torch.randn(24, 3, 11, 9, generator=torch.Generator().manual_seed(5))
UNLABELLED = torch.zeros(len(IMAGES), 0)


class Named(NamedTuple):
    boxes: object
    scores: object


class Body(nn.Module):
    """Gives maps and class scores, in whatever ``given_in`` makes of them."""

    def __init__(self, given_in=None):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.maps = nn.Conv2d(16, 4, 1)
        self.scores = nn.Linear(16, 5)
        self.given_in = given_in

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        maps, scores = self.maps(x), self.scores(x.mean((2, 3)))
        return maps if self.given_in is None else self.given_in(maps, scores)


def body(given_in=None, seed=0):
    torch.manual_seed(seed)
    return Body(given_in).eval()


def alone(maps, scores):
    return OrderedDict(out=maps)


def both(maps, scores):
    return {"maps": maps, "more": (scores, scores.argmax(1))}


def twice(maps, scores):
    return [maps, maps]


# ---------------------------------------------------------------- how far


def test_every_tensor_counts_the_same():
    torch.manual_seed(0)
    maps, scores = torch.randn(2, 4, 3, 5, 6), torch.randn(2, 4, 7)
    pairs = [tuple(maps), tuple(scores)]
    each = [Meaning.measured("unknown", pair[:1]) for pair in pairs]
    both = Meaning.measured("unknown", (maps[0], scores[0]))

    def apart(meaning, *tensors):
        return meaning.divergence(*zip(*tensors, strict=True))

    found = apart(both, *pairs)
    assert found.shape == (4,)
    assert_close(found, (apart(each[0], pairs[0]) + apart(each[1], pairs[1])) / 2)
    # However large the numbers of one are: its squares are relative to the reference's.
    large = Meaning.measured("unknown", (1e3 * maps[0], scores[0]))
    assert_close(apart(large, tuple(1e3 * maps), pairs[1]), found)
    together = both.imitation_loss((maps[0], scores[0]), (maps[1], scores[1]), 2.0)
    assert_close(together, found.mean())


def test_networks_that_give_other_tensors_cannot_be_compared():
    maps = torch.randn(4, 3, 5, 6)
    one, two = (Meaning.measured("unknown", (maps,) * n) for n in (1, 2))
    with pytest.raises(ModelError, match="same number of tensors to be compared, got 1 and 2"):
        one.divergence((maps,), (maps, maps))
    with pytest.raises(ModelError, match=r"shape of the reference's, \(4, 3, 5, 6\)"):
        two.divergence((maps, maps), (maps, maps[:, :2]))


# ---------------------------------------------------------------- what is given


def test_tensors_are_found_in_order_and_other_numbers_left_out():
    maps, scores = torch.randn(2, 3, 5, 4), torch.randn(2, 7)
    given = OrderedDict(a=[maps, scores.argmax(1)], b=Named(scores, None), c=3)
    found = comparable(given, nn.Identity(), 2)
    assert [tensor is wanted for tensor, wanted in zip(found, (maps, scores), strict=True)]
    assert one_tensor({"out": maps}, nn.Identity()) is maps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x: 3, "Identity gave int"),
        (lambda x: {"kept": []}, "Identity gave dict"),
        (lambda x: x.argmax(1), r"floating-point numbers .* gave Tensor of 1 with shapes \(2,\)"),
        (lambda x: (x, x.mean()), r"batch first, here 2, .* of 2 with shapes \(2, 7\), \(\)"),
        (lambda x: [{"boxes": torch.rand(9, 4)}], r"batch first.*shapes \(9, 4\).*backbone"),
    ],
)
def test_what_cannot_be_compared_is_refused(given, message):
    with pytest.raises(ModelError, match=message):
        comparable(given(torch.rand(2, 7)), nn.Identity(), 2)


def test_numbers_become_float32_in_the_same_nesting():
    low = torch.ones(2, 3, dtype=torch.bfloat16)
    given = OrderedDict(a=[low, 1], b=Named(low, low.argmax(1)), c=(low.double(),))
    found = in_float32(given)
    assert type(found) is OrderedDict
    assert type(found["b"]) is Named
    assert type(found["c"]) is tuple
    assert found["a"][0].dtype == found["b"].boxes.dtype == found["c"][0].dtype == torch.float32
    assert found["b"].scores.dtype == torch.int64
    assert given["a"][0] is low, "what was given is not modified"


# ---------------------------------------------------------------- through the whole line


def test_the_curvature_of_several_tensors_is_the_mean_of_theirs():
    def curvature(given_in):
        torch.manual_seed(0)
        images = torch.randn(3000, 3, 5, 4)
        net = body(given_in)
        meaning = meaning_of(net, TensorSplit(images), "unknown")
        found = output_curvature(net, ["first"], lambda: images.split(500), meaning=meaning)
        return found["first"]

    maps, scores = curvature(None), curvature(lambda maps, scores: scores)
    assert (maps - scores).norm() > 0.3 * maps.norm(), "they are not alike"
    mean = (maps + scores) / 2
    assert (curvature(both) - mean).norm() < 0.15 * mean.norm()


@pytest.mark.parametrize("given_in", [alone, twice])
def test_the_plan_is_that_of_the_network_of_one_tensor(given_in):
    plain = obo.plan(body(), IMAGES, budget="macs=50%")
    found = obo.plan(body(given_in), IMAGES, budget="macs=50%")
    assert [choice.site for choice in found.choices] == [choice.site for choice in plain.choices]
    if given_in is alone:  # of two the curvature is drawn anew, so that weights differ a little
        assert found.choices == plain.choices
    for ours, theirs in zip(found.choices, plain.choices, strict=True):
        assert ours.harm == pytest.approx(theirs.harm, rel=0.3)


def test_a_full_rank_is_the_same_network():
    net = body(both).double()
    whole = obo.uniform_plan(net, IMAGES.double(), ranks=1.0, form="tucker2")
    small = obo.apply(net, whole, IMAGES.double())
    assert len(whole.choices) >= 1
    found = score([net, small], TensorSplit(IMAGES.double(), UNLABELLED))
    assert found.divergences[1] < 1e-12


def distance(first, second):
    with torch.no_grad():
        pair = [comparable(net(IMAGES), net, len(IMAGES)) for net in (first, second)]
    return float(Meaning.measured("unknown", pair[0]).divergence(*pair).mean())


def test_plan_apply_reconstruct_and_distil_bring_all_tensors_near():
    net = body(both)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    planned = obo.plan(net, IMAGES, budget="macs=40%")
    small = obo.apply(net, planned, IMAGES)
    assert planned.harm is not None
    assert planned.harm / 3 < distance(net, small) < 3 * planned.harm
    _, log = obo.reconstruct(small, teacher=net, calibration=IMAGES, steps=40)
    assert log.after <= log.before
    distilled = obo.distill(small, (IMAGES, UNLABELLED), teacher=net, epochs=30, mix=0.0).model
    assert distance(net, distilled) < distance(net, small)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_without_labels_it_is_said_how_like_the_outputs_are():
    net, other = body(both), body(both, seed=1)
    together = score([net, other], TensorSplit(IMAGES, UNLABELLED))
    assert not together.labelled
    assert [each.metric for each in together.each] == ["likeness"] * 2
    assert together.each[0].scores.tolist() == [1.0] * len(IMAGES)
    assert together.each[1].scores.mean() == pytest.approx(1 - together.divergences[1])
    record = obo.compare(net, other, data=(IMAGES, UNLABELLED), runtimes=["eager"]).pair(1)
    assert record.before.metric is record.difference is record.agreement is None
    assert record.divergence == pytest.approx(together.divergences[1])


def test_scores_beside_the_classes_they_are_highest_for_are_class_scores():
    net = body(lambda maps, scores: (scores, scores.argmax(1)))
    with torch.no_grad():
        right = net(IMAGES)[1]
    assert obo.evaluate(net, (IMAGES, right), task="classification").value == 1.0
    parts = (TensorSplit(IMAGES, UNLABELLED), TensorSplit(IMAGES[:8], UNLABELLED[:8]))
    teacher = body(net.given_in, seed=1)
    log = obo.distill(net, as_data(parts), teacher=teacher, epochs=1, task="classification").log
    assert log.metric == "agreement"


def test_a_metric_is_given_what_the_network_gives():
    def brightness(outputs, targets):
        assert outputs["maps"].dtype == torch.float32
        return outputs["maps"].mean((1, 2, 3)) + targets

    found = obo.evaluate(body(both), (IMAGES, torch.ones(len(IMAGES))), metric=brightness)
    with torch.no_grad():
        expected = body()(IMAGES).mean() + 1
    assert found.value == pytest.approx(float(expected), abs=1e-5)


def test_a_loss_is_given_what_the_network_gives():
    net = body(both)
    targets = torch.randint(5, (len(IMAGES),), generator=torch.Generator().manual_seed(0))

    def of_scores(outputs, targets):
        return nn.functional.cross_entropy(outputs["more"][0], targets)

    log = obo.train(net, (IMAGES, targets), epochs=8, loss=of_scores).log
    assert log.epochs[-1].loss < log.epochs[0].loss
    with pytest.raises(ModelError, match="labels needs one tensor of outputs, got dict"):
        obo.train(net, (IMAGES, targets), epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segmentation", "features"])
def test_real_networks_of_several_tensors_go_the_whole_line(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "segmentation":
        features = torchvision.models.mobilenet_v3_small(weights=None).features
        body = IntermediateLayerGetter(features, {"3": "low", "12": "high"})
        net = torchvision.models.segmentation.LRASPP(body, 24, 576, num_classes=4)
    else:
        net = timm.create_model("mobilenetv3_small_050", features_only=True, out_indices=(1, 2))
    images = torch.randn(20, 3, 64, 48)
    split = TensorSplit(images, torch.zeros(len(images), 0))
    small, record = obo.shrink(
        net,
        (split, split, split),
        budget="macs=70%",
        epochs=0,
        calibration_examples=16,
        out=tmp_path / "run",
    )
    assert record.comparison is not None
    assert record.comparison.after.macs <= 0.7 * record.comparison.before.macs
    assert record.comparison.divergence is not None
    assert (tmp_path / "run" / "report.html").exists()
    again = obo.load_model(tmp_path / "run", original=net)
    with torch.no_grad():
        pairs = [comparable(each(images[:2]), each, 2) for each in (small.eval(), again.eval())]
    for one, other in zip(*pairs, strict=True):
        assert torch.equal(one, other)


@dataclasses.dataclass(frozen=True)
class Record:
    scores: torch.Tensor
    note: object = None


def test_a_network_that_gives_a_dataclass_is_planned_and_compared():
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3))

        def forward(self, x):
            return Record(self.net(x).mean((2, 3)), note="maps")

    net = Gives().eval()
    plan = obo.uniform_plan(net, IMAGES[:1], ranks=0.5)
    small = obo.apply(net, plan, IMAGES, task="classification")
    assert len(score([net, small], TensorSplit(IMAGES), task="classification").divergences) == 2
    given = in_float32(Record(torch.ones(2, dtype=torch.float64)))
    assert (given.scores.dtype, given.note) == (torch.float32, None)
