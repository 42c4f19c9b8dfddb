"""Laws of the tasks' divergences, losses and metrics, against independent implementations."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

import onebyone as obo
from onebyone.calibration.curvature import places_of
from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import DataError, OptionError, UnknownNameError
from onebyone.core.label_losses import class_loss, labels_loss
from onebyone.core.measures import CURVATURE_TEMPERATURE, is_distribution
from onebyone.core.metrics import f1, negative_squared_error, pixel_accuracy, psnr
from onebyone.core.task import TASKS, UNKNOWN, find_task, label_loss_of

NAMES = [*TASKS, UNKNOWN.name]


def apart(name, reference, outputs):
    measure = find_task(name).measure
    return measure.apart(reference, outputs, measure.scale_of(reference))


# ---------------------------------------------------------------- divergences


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 10_000), st.booleans())
def test_the_divergence_is_zero_for_equal_outputs_and_never_below(name, seed, maps):
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 4, 3, 2) if maps or name == "sequence" else (6, 4)
    reference = 3 * torch.randn(shape, generator=generator)
    other = reference + torch.randn(shape, generator=generator)
    assert (apart(name, reference, reference) >= 0).all()
    assert apart(name, reference, reference).max() < 1e-6
    assert apart(name, reference, other).shape == (6,)
    assert apart(name, reference, other).mean() > 1e-3
    near = reference + 1e-4 * torch.randn(shape, generator=generator)
    assert (apart(name, reference, near) >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_only_classes_are_blind_to_a_constant(name):
    torch.manual_seed(0)
    reference = torch.randn(50, 4, 3)
    moved = apart(name, reference, reference + 100).mean()
    assert (moved < 1e-4) == (name in ("classification", "segmentation", "sequence"))


def test_a_sequence_is_a_segmentation_with_its_classes_last():
    torch.manual_seed(0)
    pair = torch.randn(2, 6, 5, 4).unbind()
    turned = [each.movedim(-1, 1) for each in pair]
    last, second = (
        Meaning.measured("sequence", pair[:1]),
        Meaning.measured("segmentation", turned[:1]),
    )
    assert_close(
        last.divergence((pair[0],), (pair[1],)), second.divergence((turned[0],), (turned[1],))
    )
    losses = [
        meaning.imitation_loss((one,), (other,), 2.0)
        for meaning, (one, other) in ((last, pair), (second, turned))
    ]
    assert_close(*losses)
    assert places_of((pair[0],), last) == places_of((turned[0],), second) == 5
    assert not TASKS["sequence"].measure.fits(torch.randn(6, 4))


@pytest.mark.parametrize("name", ["regression", UNKNOWN.name])
def test_an_output_of_small_numbers_counts_as_one_of_large_ones(name):
    torch.manual_seed(0)
    reference = torch.randn(200, 2) * torch.tensor([1000.0, 0.01]) + torch.tensor([5.0, 2.0])
    wrong = reference.clone()
    wrong[:, 1] = wrong[:, 1].mean()
    assert apart(name, reference, wrong).mean() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_the_relative_error_does_not_depend_on_the_unit(scale):
    torch.manual_seed(0)
    reference, other = torch.randn(2, 64, 3)
    for name in ("regression", "restoration", "embedding"):
        assert_close(apart(name, scale * reference, scale * other), apart(name, reference, other))


def test_a_constant_network_has_a_finite_divergence():
    reference = torch.zeros(8, 3, 2)
    for name in NAMES:
        assert torch.isfinite(apart(name, reference, reference + 1)).all()
        assert torch.isfinite(apart(name, reference + 7, reference)).all()


def test_the_divergences_of_classes_and_labels_are_kullback_leiblers():
    torch.manual_seed(0)
    reference, outputs = torch.randn(2, 5, 4).double()
    p, q = reference.softmax(1).numpy(), outputs.softmax(1).numpy()
    found = apart("classification", reference, outputs).numpy()
    assert found == pytest.approx(stats.entropy(p, q, axis=1))
    p, q = reference.sigmoid().numpy(), outputs.sigmoid().numpy()
    each = stats.entropy([p, 1 - p], [q, 1 - q])
    assert apart("multilabel", reference, outputs).numpy() == pytest.approx(each.sum(1))
    maps = torch.randn(2, 5, 4, 3, 2).double()
    by_place = [apart("classification", *maps[:, :, :, y, x]) for y in range(3) for x in range(2)]
    assert_close(apart("segmentation", *maps), torch.stack(by_place).mean(0))


@pytest.mark.parametrize("name", ["classification", "segmentation", "multilabel"])
def test_probabilities_are_as_far_apart_as_the_scores_they_come_from(name):
    torch.manual_seed(0)
    shape = (8, 3, 2, 2) if name == "segmentation" else (8, 3)
    scores = [2 * torch.randn(shape) for _ in range(2)]
    made = [s.sigmoid() if name == "multilabel" else s.softmax(1) for s in scores]
    measure = find_task(name).measure
    assert [measure.form_of(each) for each in made] == ["probabilities"] * 2
    assert [measure.form_of(each) for each in scores] == ["scores"] * 2
    read = [measure.scores(each, "probabilities") for each in made]
    assert_close(apart(name, *read), apart(name, *scores), rtol=1e-4, atol=1e-5)
    if name != "multilabel":  # logarithms of probabilities are scores
        logs = [each.log() for each in made]
        assert_close(apart(name, *logs), apart(name, *scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_softmax_of_any_precision_is_told_from_scores(dtype):
    torch.manual_seed(0)
    assert is_distribution((3 * torch.randn(32, 10)).softmax(1).to(dtype))
    assert not is_distribution(torch.rand(32, 10).to(dtype))
    assert not is_distribution(torch.ones(32, 1, dtype=dtype)), "one class is none"


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 1000))
def test_the_curvature_is_that_of_the_divergence(name, seed):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(1, 3, 2, generator=generator).double()
    if name in ("regression", "unknown", "multilabel", "classification"):
        reference = reference[..., 0]
    measure = find_task(name).measure
    scale = measure.scale_of(torch.randn(40, *reference.shape[1:]).double())
    many = reference.expand(20_000, *reference.shape[1:]).clone().requires_grad_()
    measure.sampled(many, scale, generator).backward()
    rows = many.grad.flatten(1).double()
    error = 1e-3 * torch.randn(reference.shape, generator=generator).double()
    predicted = (rows @ error.flatten()).square().mean() / 2
    found = measure.imitation(reference, reference + error, scale, CURVATURE_TEMPERATURE)
    assert float(predicted) == pytest.approx(float(found), rel=0.1, abs=1e-12)


# ---------------------------------------------------------------- the user's own


def test_a_function_is_a_task_of_its_own():
    def mean_distance(reference, outputs):
        return (reference - outputs).abs().flatten(1).mean(1)

    task = find_task(mean_distance)
    assert (task.name, task.metric, task.is_built_in) == ("mean_distance", None, False)
    assert obo.Task("depth", divergence=mean_distance).measure.unit.endswith("'depth'")
    assert_close(apart(mean_distance, torch.zeros(2, 3), torch.ones(2, 3)), torch.ones(2))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda r, o: (r - o).square().mean(), r"one number an example, shape \(4,\), got \(\)"),
        (lambda r, o: 3.0, "got float"),
        (lambda r, o: (r - o).mean(1) - 1, "above 0 for others, got -1"),
        (lambda r, o: r @ o, "failed on outputs .*RuntimeError"),
    ],
)
def test_a_divergence_that_is_none_is_refused(function, message):
    with pytest.raises(OptionError, match=message):
        apart(obo.Task("mine", divergence=function), torch.ones(4, 3), torch.ones(4, 3))


def test_what_is_no_task_is_refused():
    with pytest.raises(UnknownNameError, match=r"No task named 'clasification'. Did you mean"):
        find_task("clasification")
    with pytest.raises(OptionError, match="or a divergence function, got a int"):
        find_task(3)
    with pytest.raises(OptionError, match="a name of its own, got 'regression'"):
        obo.Task("regression", divergence=lambda r, o: r)
    with pytest.raises(OptionError, match="`divergence` must be a function"):
        obo.Task("mine", divergence="mse")
    with pytest.raises(OptionError, match="'mine' has no `loss` for labels"):
        label_loss_of(obo.Task("mine", divergence=lambda r, o: r))


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("shape", [(8,), (8, 3, 2)])
def test_what_is_left_out_has_no_part_in_the_loss(shape):
    torch.manual_seed(0)
    scores = torch.randn(8, 5, *shape[1:])
    labels = torch.randint(5, shape)
    whole = class_loss(scores, labels, None, 0.1)
    assert_close(whole, F.cross_entropy(scores, labels, label_smoothing=0.1))
    marked = labels.clone()
    marked[:4] = 255
    assert_close(
        class_loss(scores, marked, 255, 0.1), class_loss(scores[4:], labels[4:], None, 0.1)
    )
    assert class_loss(scores, torch.full_like(labels, 255), 255, 0.0) == 0


@pytest.mark.parametrize("label", [-1, -100, 5, 255])
def test_a_label_that_is_no_class_is_refused_unless_it_is_left_out(label):
    scores, labels = torch.randn(8, 5), torch.full((8,), 2)
    labels[3:5] = label
    message = rf"from 0 to 4.*got {label} \(2 of 8 are outside\).*--ignore-index {label}"
    with pytest.raises(DataError, match=message):
        class_loss(scores, labels, None, 0.0)
    assert torch.isfinite(class_loss(scores, labels, label, 0.0))


def test_labels_of_several_kinds_are_refused_by_their_dtype():
    scores = torch.randn(8, 5)
    with pytest.raises(DataError, match=r"got torch.float32 of shape \(8,\).*labels.long"):
        class_loss(scores, torch.zeros(8), None, 0.0)
    with pytest.raises(DataError, match=r"got torch.bool of shape \(8, 5\).*multilabel"):
        class_loss(scores, scores > 0, None, 0.0)
    with pytest.raises(DataError, match=r"'multilabel' must be 0 or 1, got 2 \(40 of 40"):
        labels_loss(scores, torch.full((8, 5), 2.0), None, 0.0)


def test_labels_that_are_not_known_have_no_part_in_the_loss():
    torch.manual_seed(0)
    scores, labels = torch.randn(6, 4), torch.randint(2, (6, 4)).float()
    marked = labels.clone()
    marked[:, 3] = -1
    expected = F.binary_cross_entropy_with_logits(scores[:, :3], labels[:, :3])
    assert_close(labels_loss(scores, marked, -1, 0.0), expected)


# ---------------------------------------------------------------- metrics


def test_the_metrics_by_hand():
    scores = torch.tensor([[[2.0, 0.0], [1.0, 1.0]]])  # of two classes at two positions
    assert pixel_accuracy(scores, torch.tensor([[0, 1]])).tolist() == [1.0]
    assert pixel_accuracy(scores, torch.tensor([[0, 0]])).tolist() == [0.5]
    counted = torch.tensor([[True, False]])
    assert pixel_accuracy(scores, torch.tensor([[0, 0]]), counted).tolist() == [1.0]
    there = torch.tensor([[1, 1, 0], [0, 0, 0]])
    said = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]])
    assert f1(said, there).tolist() == [0.5, 1.0]
    assert negative_squared_error(torch.ones(2, 2), torch.zeros(2, 2)).tolist() == [-1.0, -1.0]
    assert psnr(torch.full((1, 4), 0.1), torch.zeros(1, 4)).tolist() == pytest.approx([20.0])
    assert psnr(torch.zeros(1, 4), torch.zeros(1, 4)).tolist() == [120.0]
