"""Reconstruction: never worse than the start, nothing that was passed in changes, seeds repeat."""

import copy

import pytest
import torch
from torch import nn

import onebyone as obo
from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import DataError, ModelError, OptionError, UsageError
from onebyone.data import TensorSplit
from onebyone.data.augment import Augmentation
from onebyone.rewrites import restructure
from onebyone.training import reconstruct as reconstruction
from onebyone.training.eigenbasis_adam import Basis, EigenbasisAdam, has_basis
from onebyone.training.reconstruct import Reconstruction, inputs_for, reconstruct


def divergence(reference, outputs):
    return Meaning.measured("unknown", (reference,)).divergence((reference,), (outputs,))


def _network(out=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, out),
    ).eval()


class _Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
            nn.Conv2d(12, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, x):
        return x - self.body(x)


def _perturbed(network, size=0.05):
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * parameter.square().mean().sqrt() * noise)
    return other


def _images(n=64, channels=3, size=8, seed=0):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def _apart(teacher, network, inputs):
    with torch.no_grad():
        return float(divergence(teacher(inputs), network(inputs)).mean())


def _states_equal(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("kind", ["classes", "pictures"])
def test_it_comes_nearer_to_the_teacher_on_inputs_it_has_not_seen(kind):
    teacher = _network() if kind == "classes" else _Denoiser().eval()
    channels = 3 if kind == "classes" else 1
    student = _perturbed(teacher, 0.2)
    found = reconstruct(
        student, teacher=teacher, calibration=_images(128, channels), steps=60, learning_rate=1e-3
    )
    fresh = _images(128, channels, seed=7)
    assert _apart(teacher, found.model, fresh) < 0.5 * _apart(teacher, student, fresh)


@pytest.mark.parametrize("kind", ["classes", "pictures"])
def test_steps_in_bf16_come_as_near_and_are_judged_in_full(kind):
    teacher = _network() if kind == "classes" else _Denoiser().eval()
    images = _images(128, 3 if kind == "classes" else 1)
    student, logs = _perturbed(teacher, 0.2), {}
    for precision in ("float32", "bf16"):
        found = reconstruct(
            student, teacher=teacher, calibration=images, steps=60, learning_rate=1e-3,
            precision=precision,
        )  # fmt: skip
        logs[precision] = found.log
        assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    assert logs["bf16"].precision == "bf16 autocast"
    assert logs["float32"].precision == "float32"
    assert logs["bf16"].before == logs["float32"].before
    assert logs["bf16"].after < 0.5 * logs["bf16"].before
    assert logs["bf16"].after == pytest.approx(logs["float32"].after, rel=0.3)


@pytest.mark.parametrize("rate", [1e-4, 1.0, 1e3])
def test_it_never_ends_farther_away_than_it_started(rate):
    teacher = _network()
    student = _perturbed(teacher)
    found = reconstruct(
        student, teacher=teacher, calibration=_images(), steps=12, learning_rate=rate
    )
    log = found.log
    assert log.after <= log.before
    assert log.after == min(value for _, value in log.judged if value is not None)
    assert Reconstruction.from_json(log.to_json()) == log
    assert log.judged[0] == (0, log.before)
    assert dict(log.judged)[log.kept_step] == log.after


def test_a_gradient_that_is_rounding_moves_nothing_far():
    layer = nn.Linear(2, 2)
    basis = Basis(torch.eye(3)[None], torch.eye(2)[None])
    optimizer = EigenbasisAdam(nn.Sequential(layer), {"0": basis})
    before = copy.deepcopy(layer)
    for size in (1e-25, 1e-38, 1.0, 1e10):
        layer.weight.grad = torch.tensor([[size, 1e-25], [0.0, -size]])
        layer.bias.grad = torch.zeros(2)
        optimizer.forget()
        optimizer.step(1e-3)
        # Adam's first step is of the size of the rate at most.
        assert float((layer.weight - before.weight).detach().abs().max()) <= 4.1e-3
        assert torch.equal(layer.bias, before.bias)


def test_where_no_step_helps_the_weights_are_those_of_the_start():
    teacher = _network()
    found = reconstruct(teacher, teacher=teacher, calibration=_images(), steps=8)
    assert found.log.kept_step == 0
    assert _states_equal(found.model, teacher)


def test_what_it_returns_is_what_the_record_judged():
    teacher = _network()
    student = _perturbed(teacher)
    images = _images(16)
    found = reconstruct(student, teacher=teacher, calibration=images, steps=8)
    assert found.log.examples + found.log.held_out == 16
    # The two that are held out are two of the sixteen: their mean is that of some pair.
    with torch.no_grad():
        each = divergence(teacher(images), found.model(images))
    pairs = (each[:, None] + each[None]) / 2
    assert float((pairs - found.log.after).abs().min()) < 1e-6 + 1e-4 * found.log.after


class _Counted(nn.Module):
    """A teacher that counts the inputs that it is asked about, on whatever copy it is asked."""

    seen = 0

    def __init__(self):
        super().__init__()
        self.inner = _network()

    def forward(self, x):
        _Counted.seen += len(x)
        return self.inner(x)


@pytest.mark.parametrize(
    ("calibration", "steps", "asked"),
    [
        # All 40 at first, twice: what the outputs mean, and whether they stay the same.
        (_images(40), 30, 2 * 40 + 5 + 35),
        (_images(40), 2, 2 * 40 + 5 + 2 * 8),  # fewer than a pass: not all
        (_images(40), 8, 2 * 40 + 5 + 8 * 8),  # fewer than two: as they come
        (TensorSplit(_images(40), augmentation=Augmentation(flip=True)), 30, 2 * 40 + 5 + 30 * 8),
    ],
)
def test_a_teacher_is_asked_once_where_inputs_stay_as_they_are(
    calibration, steps, asked, monkeypatch
):
    teacher, student = _Counted(), _perturbed(_network())

    def again():
        _Counted.seen = 0
        return reconstruct(
            student, teacher=teacher, calibration=calibration, steps=steps, batch_size=8,
            augment=True,
        )  # fmt: skip

    once = again()
    # The last batch of a pass is smaller.
    assert asked - 40 < _Counted.seen <= asked
    monkeypatch.setattr(reconstruction, "_answered", lambda *_: None)
    each = again()
    for one, other in zip(once.model.parameters(), each.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("most", "kept"), [(0, True), (-1, False)])
def test_answers_are_kept_where_they_fit_with_their_inputs(most, kept, monkeypatch):
    teacher, images, kept_answers = _network(), _images(40), []
    each = images[0].numel() + 5  # with the outputs
    monkeypatch.setattr(reconstruction, "ANSWERED_VALUES", 35 * each + most)
    monkeypatch.setattr(reconstruction, "_answered", lambda *_: kept_answers.append(1))
    reconstruct(teacher, teacher=teacher, calibration=images, steps=30, batch_size=8)
    assert bool(kept_answers) == kept


def test_only_layers_of_few_inputs_and_outputs_have_a_basis():
    sizes = {(639, 8): True, (640, 8): False, (8, 2048): True, (8, 2049): False}
    assert {size: has_basis(nn.Linear(*size)) for size in sizes} == sizes


def test_nothing_that_was_passed_in_changes():
    teacher = _network()
    student = _perturbed(teacher).train()
    student[0].weight.requires_grad_(False)
    images = _images()
    before = copy.deepcopy(student), copy.deepcopy(teacher), images.clone()
    state = torch.get_rng_state()
    found = reconstruct(student, teacher=teacher, calibration=images, steps=8)
    assert _states_equal(student, before[0])
    assert _states_equal(teacher, before[1])
    assert torch.equal(images, before[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert student.training
    assert not teacher.training
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))
    assert found.model.training


def test_frozen_parameters_and_the_statistics_of_batch_norms_stay():
    teacher = _network()
    student = _perturbed(teacher, 0.2).train()
    student[3].weight.requires_grad_(False)
    found = reconstruct(student, teacher=teacher, calibration=_images(), steps=16)
    assert found.log.kept_step > 0
    assert torch.equal(found.model[3].weight, student[3].weight)
    assert not found.model[3].weight.requires_grad
    assert torch.equal(found.model[1].running_mean, student[1].running_mean)
    assert torch.equal(found.model[1].running_var, student[1].running_var)
    assert not torch.equal(found.model[5].weight, student[5].weight)


def test_the_same_seed_gives_the_same_weights():
    teacher = _network()
    student = _perturbed(teacher, 0.2)
    pixels = (_images(96) * 40 + 128).clamp(0, 255).to(torch.uint8)
    data = TensorSplit(pixels, mean=[0.5] * 3, std=[0.16] * 3, augmentation=Augmentation(flip=True))
    runs = [
        reconstruct(student, teacher=teacher, calibration=data, steps=24, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert _states_equal(runs[0].model, runs[1].model)
    assert all(run.log.kept_step > 0 for run in runs)
    assert runs[0].log.judged == runs[1].log.judged
    assert not _states_equal(runs[0].model, runs[2].model)


def test_features_are_brought_nearer_as_well():
    teacher = _network()
    student = _perturbed(teacher, 0.2)
    found = reconstruct(
        student, teacher=teacher, calibration=_images(), steps=40, features=["4"],
        task="classification", learning_rate=1e-3,
    )  # fmt: skip
    inputs = _images(seed=7)
    with torch.no_grad():
        wanted, start, end = (net[:5](inputs) for net in (teacher, student, found.model))
    assert float((end - wanted).square().mean()) < float((start - wanted).square().mean())
    assert found.log.features == ("4",)


def test_seconds_end_it():
    teacher = _network()
    found = reconstruct(
        _perturbed(teacher), teacher=teacher, calibration=_images(), steps=10**6, seconds=3
    )
    assert found.log.stopped == "seconds"
    assert 0 < found.log.steps < 10**6


def test_of_many_inputs_steps_take_more_and_a_thousand_are_held_out():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    log = reconstruct(teacher, teacher=teacher, calibration=_images(9000, size=2), steps=2).log
    assert (log.examples, log.held_out, log.batch_size) == (9000 - 1024, 1024, 64)


def test_of_outputs_that_are_maps_a_step_takes_few():
    teacher = _Denoiser().eval()
    inputs = _images(400, channels=1, size=3)
    assert reconstruct(teacher, teacher=teacher, calibration=inputs, steps=1).log.batch_size == 8


@pytest.mark.parametrize(("inputs", "found"), [(500, 500), (5000, 2 * 64 + 1024)])
def test_steps_are_given_as_many_inputs_as_they_can_use(inputs, found):
    split = TensorSplit(torch.arange(float(inputs))[:, None])
    part = inputs_for(split, steps=2, seed=3)
    assert len(part) == found
    drawn, again = (
        torch.cat([x for x, _ in each.batches(100)]) for each in (part, inputs_for(split, 2, 3))
    )
    assert torch.equal(drawn, again)
    assert len(drawn.unique()) == found


def test_a_rewritten_network_is_reconstructed(tmp_path):
    teacher = _network()
    images = _images(96)
    plan = obo.plan(teacher, images, budget="macs=60%", head="keep")
    small = obo.apply(teacher, plan, images)
    found = reconstruct(small, teacher=teacher, calibration=images, steps=20, learning_rate=1e-3)
    assert found.log.after <= found.log.before
    fresh = restructure(teacher, plan)
    fresh.load_state_dict(found.model.state_dict())
    inputs = _images(seed=7)
    torch.testing.assert_close(fresh.eval()(inputs), found.model.eval()(inputs))
    found.log.save(tmp_path / "log.json")
    assert Reconstruction.load(tmp_path / "log.json") == found.log
    assert "held-out" in str(found.log)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_networks_of_timm_are_reconstructed(name):
    import timm

    torch.manual_seed(0)
    teacher = timm.create_model(name, num_classes=10).eval()
    images = _images(64, size=64)
    found = reconstruct(_perturbed(teacher, 0.1), teacher=teacher, calibration=images, steps=24)
    assert found.log.after < found.log.before
    assert _apart(teacher, found.model, images) < _apart(teacher, _perturbed(teacher, 0.1), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"seconds": 0}, "`seconds` must be above 0"),
        ({"batch_size": 0}, "`batch_size` must be 1 or more, got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"features": ["nowhere"]}, "no module named 'nowhere'"),
        ({"precision": "int8"}, "No `precision` named 'int8'. Available: auto, bf16, float32"),
    ],
)
def test_options_outside_what_they_may_be_are_refused(options, message):
    teacher = _network()
    with pytest.raises(UsageError, match=message):
        reconstruct(teacher, teacher=teacher, calibration=_images(), **options)


def test_one_input_cannot_be_divided():
    teacher = _network()
    with pytest.raises(DataError, match="cannot be divided"):
        reconstruct(teacher, teacher=teacher, calibration=_images(1))


def test_outputs_of_other_shapes_are_refused():
    with pytest.raises(ModelError, match="shape of the reference's"):
        reconstruct(_network(5), teacher=_network(4), calibration=_images(), steps=1)


def test_a_network_without_anything_to_train_is_refused():
    teacher = _network().requires_grad_(False)
    with pytest.raises(OptionError, match="a parameter that needs a gradient"):
        reconstruct(teacher, teacher=teacher, calibration=_images(), steps=1)


class _Transformed(torch.utils.data.Dataset):
    """Images under a random transform, drawn from torch's generator or from one of its own."""

    def __init__(self, own):
        self.images = _images()
        self.generator = torch.Generator().manual_seed(3) if own else None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = torch.randn(self.images[index].shape, generator=self.generator)
        return self.images[index] + noise, index % 5


@pytest.mark.parametrize("own", [False, True])
def test_a_network_is_its_own_reconstruction_on_data_with_random_transforms(own):
    network = _network()
    data = _Transformed(own)
    done = reconstruct(network, teacher=network, calibration=data, steps=8, batch_size=16)
    assert done.log.before == done.log.after == pytest.approx(0, abs=1e-9)
