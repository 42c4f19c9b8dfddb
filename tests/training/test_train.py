import copy
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import Dataset, TensorDataset

from onebyone.calibration.meaning import Meaning
from onebyone.core.errors import (
    DataError,
    ModelError,
    OptionError,
    OutputError,
    RecordError,
    UsageError,
)
from onebyone.core.records import TrainLog
from onebyone.data import (
    Augmentation,
    Data,
    TensorSplit,
    as_data,
    as_split,
    load_data,
)
from onebyone.evaluation.scores import evaluate
from onebyone.training import distill as distillation
from onebyone.training import job, loop, rate_search
from onebyone.training.distill import distill
from onebyone.training.train import train


@pytest.fixture(autouse=True)
def one_thread():
    # Networks this small are slower on more threads, and much slower on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(*, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(72, 3),
    )


def toy(n: int = 66, *, labels: bool = True) -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (n, 1, 6, 6), dtype=torch.uint8, generator=generator)
    targets = torch.arange(n) % 3
    for label in range(3):  # a bright row for each class
        images[targets == label, :, 2 * label] = 220
    split = TensorSplit(
        images,
        targets if labels else None,
        mean=(0.3,),
        std=(0.3,),
        augmentation=Augmentation(flip=True),
    )
    return Data(name="toy", train=split, validation=split, test=split, classes=("a", "b", "c"))


def snapshot(model: nn.Module) -> dict:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "strides": {name: tensor.stride() for name, tensor in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "needs": [parameter.requires_grad for parameter in model.parameters()],
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert after == before


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------- learning


def test_training_learns_and_says_what_it_did():
    trained, log = train(network(), toy(), epochs=8, batch_size=16, learning_rate=0.02)
    assert evaluate(trained, toy().test).value > 0.95
    assert log.epochs[-1].loss < log.epochs[0].loss / 2
    assert (log.metric, log.chosen_epoch, log.examples, log.batch_size) == ("accuracy", 8, 66, 16)
    assert log.augmentation == "flip, none in the last epoch"
    assert not any(module.training for module in trained.modules())
    assert TrainLog.from_json(log.to_json()) == log
    assert "labels" in str(log)


def test_a_trained_network_has_plain_tensors_and_no_gradients():
    trained, _ = train(network(), toy(), epochs=1)
    assert all(tensor.is_contiguous() for tensor in trained.state_dict().values())
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_distillation_needs_no_labels_and_approaches_the_teacher():
    teacher, _ = train(network(), toy(), epochs=8, batch_size=16, learning_rate=0.02)
    data = toy(labels=False)
    student, log = distill(
        network(seed=1), data, teacher=teacher, epochs=8, batch_size=16, learning_rate=0.02
    )
    assert log.metric == "agreement"
    assert log.epochs[-1].validation > 0.95
    assert evaluate(student, toy().test).value > 0.95


@pytest.mark.parametrize("mix", [None, 1.0])
def test_the_teacher_sees_the_mixtures_that_the_student_sees(mix, monkeypatch):
    """A network that is its teacher already has no loss on any input that both are given."""
    teacher = network().eval()
    seen = []
    plain = loop.cut_mixed

    def watched(images, share, generator):
        made = plain(images, share, generator)
        seen.append(bool((made != images).any()))
        return made

    monkeypatch.setattr(loop, "cut_mixed", watched)
    log = distill(
        teacher,
        toy(),
        teacher=teacher,
        epochs=2,
        mix=mix,
        learning_rate=1e-9,
        keep_statistics=True,
        precision="float32",
    ).log
    assert any(seen)
    assert log.epochs[0].loss < 1e-6
    share = "100%" if mix else "50%"
    assert log.augmentation == f"flip + {share} with a rectangle of another"


def test_images_are_mixed_where_no_label_is_used_and_they_are_augmented_anyway():
    teacher = network(seed=1)
    common = {"teacher": teacher, "epochs": 1, "learning_rate": 1e-3}

    def augmentation(data, **settings):
        return distill(network(), data, **common, **settings).log.augmentation

    assert "rectangle" in augmentation(toy(labels=False))
    assert augmentation(toy(), label_weight=0.5) == "flip"
    assert augmentation(toy(), augment=False) == "none"
    assert augmentation(toy(), mix=0.0) == "flip"
    assert augmentation(torch.randn(40, 1, 6, 6)) == "none"
    assert augmentation(torch.randn(40, 1, 6, 6), mix=0.25) == "25% with a rectangle of another"
    maps = nn.Conv2d(1, 2, 3, padding=1)
    regression = distill(maps, toy(), teacher=copy.deepcopy(maps), epochs=1, learning_rate=1e-3)
    assert regression.log.augmentation == "flip"


@pytest.mark.parametrize(
    ("epochs", "settings", "plain"),
    [
        (4, {}, 0),  # a fifth of fewer is less than one
        (5, {}, 1),
        (11, {}, 2),
        (40, {}, 5),
        (5, {"augment": False}, 5),
        (5, {"label_weight": 1.0, "mix": 0.0}, 1),
        # A teacher's answer to an augmented image is right: nothing is to be put right at the end.
        (5, {"label_weight": 0.5, "mix": 0.0}, 0),
        (5, {"label_weight": 0.0, "mix": 0.0}, 0),
    ],
)
def test_a_training_on_labels_ends_with_images_as_they_are(epochs, settings, plain, monkeypatch):
    augmented = []
    batches = TensorSplit.batches

    def watched(split, size, *, seed=None, augment=False, **others):
        if seed is not None:
            augmented.append(augment)
        return batches(split, size, seed=seed, augment=augment, **others)

    monkeypatch.setattr(TensorSplit, "batches", watched)
    how = {"epochs": epochs, "learning_rate": 1e-3, **settings}
    if "label_weight" in settings:
        log = distill(network(), toy(), teacher=network(seed=1), **how).log
    else:
        log = train(network(), toy(), **how).log
    assert augmented == [True] * (epochs - plain) + [False] * plain
    said = {0: "flip", 1: "flip, none in the last epoch", epochs: "none"}
    assert log.augmentation == said.get(plain, f"flip, none in the last {plain} epochs")


def test_a_distillation_that_leads_away_returns_the_network_that_it_was_given():
    teacher, data = train(network(), toy(), epochs=4).model, toy(labels=False)
    near = copy.deepcopy(teacher)
    with torch.no_grad():
        near[6].bias.add_(0.01)
    common = {"teacher": teacher, "epochs": 1, "precision": "float32"}
    kept = distill(near, data, learning_rate=0.5, **common)
    assert_same_weights(kept.model, near)
    assert kept.model is not near
    assert not kept.model.training
    assert kept.log.chosen_epoch == 0
    assert "weights of the start, nearer to the original on validation data, were" in " ".join(
        str(kept.log).split()
    )
    # One that comes nearer is taken, and nothing is judged where labels count or none is held out.
    far = distill(network(seed=3), data, learning_rate=4e-3, **common)
    assert far.log.chosen_epoch == 1
    assert distill(near, toy(), learning_rate=0.5, label_weight=0.5, **common).log.chosen_epoch == 1
    assert distill(near, data.train, learning_rate=0.5, **common).log.chosen_epoch == 1


def test_distilling_a_network_from_itself_starts_at_no_loss():
    model = network().eval()
    model[1].requires_grad_(False)  # its statistics then stay the teacher's
    _, log = distill(model, toy(), teacher=model, epochs=1, precision="float32")
    assert log.epochs[0].loss < 1e-4


def test_other_outputs_are_learned_by_squared_error():
    torch.manual_seed(0)
    inputs = torch.randn(64, 1, 6, 6)
    teacher = nn.Conv2d(1, 2, 3)
    with torch.no_grad():
        pairs = as_data((inputs, teacher(inputs)))
    for trained, log in (
        train(nn.Conv2d(1, 2, 3), pairs, epochs=30, batch_size=16, learning_rate=0.05),
        distill(
            nn.Conv2d(1, 2, 3),
            inputs,
            teacher=teacher,
            epochs=30,
            batch_size=16,
            learning_rate=0.05,
        ),
    ):
        assert log.epochs[-1].loss < 0.02 * log.epochs[0].loss
        labelled = log.metric == "negative squared error"
        assert labelled == (log.epochs[-1].validation is not None)
        assert trained(inputs).shape == (64, 2, 4, 4)


def test_an_own_loss_and_metric_are_used():
    def absolute(outputs, targets):
        return (outputs - targets).abs().mean()

    def closeness(outputs, targets):
        return -(outputs - targets).square().mean(1)

    data = as_data((torch.randn(60, 4), torch.randn(60, 2)))
    _, log = train(nn.Linear(4, 2), data, epochs=1, loss=absolute, metric=closeness)
    assert (log.objective, log.metric) == ("own loss", "closeness")
    assert log.epochs[0].validation < 0


def test_features_pull_the_inner_outputs_together():
    teacher, model = network(seed=5), network(seed=6)
    options = {"teacher": teacher, "epochs": 6, "learning_rate": 0.02, "augment": False}
    inputs = next(iter(toy().test.batches(66)))[0]
    wanted = teacher.eval()[:2](inputs)
    plain, _ = distill(model, toy(), **options)
    pulled, _ = distill(model, toy(), features=["1"], feature_weight=10.0, **options)
    with torch.no_grad():
        errors = [(net[:2](inputs) - wanted).square().mean() for net in (plain, pulled)]
    assert errors[1] < 0.5 * errors[0]
    assert not any(module._forward_hooks for module in pulled.modules())


def test_any_usual_data_is_taken():
    inputs, labels = torch.randn(40, 5), torch.arange(40) % 2
    for data in ((inputs, labels), torch.utils.data.TensorDataset(inputs, labels)):
        assert train(nn.Linear(5, 2), data, epochs=1).log.epochs[0].validation is None


def test_a_last_batch_of_one_is_left_out_for_the_batch_norm():
    data = (torch.randn(17, 4), torch.arange(17) % 2)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    steps = []
    train(model, data, epochs=2, batch_size=8, progress=lambda *args: steps.append(args))
    assert [(done, total) for done, total, _ in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[-1][2].startswith("epoch 2 of 2, loss ")


# ---------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("mode", [True, False])
def test_the_network_and_the_teacher_are_untouched(mode):
    model, teacher = network(dropout=0.2).train(mode), network(seed=1).train(mode)
    model[0].bias.requires_grad_(False)
    before = snapshot(model), snapshot(teacher)
    train(model, toy(), epochs=1)
    distill(model, toy(), teacher=teacher, epochs=1, features=["0"])
    assert_unchanged(model, before[0])
    assert_unchanged(teacher, before[1])


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("keep", [None, True, False])
def test_statistics_of_a_network_in_evaluation_mode_are_kept_if_asked(mode, keep):
    model, teacher = network().train(mode), network(seed=1).eval()
    made, log = distill(
        model, toy().train, teacher=teacher, epochs=2, learning_rate=1e-2, keep_statistics=keep
    )
    for name in ("running_mean", "running_var"):
        same = torch.equal(getattr(made[1], name), getattr(model[1], name))
        assert same == (bool(keep) and not mode)
    assert not torch.equal(made[1].weight, model[1].weight)
    assert ("statistics of batch norms kept" in log.objective) == (bool(keep) and not mode)


def test_a_network_that_is_nearly_there_keeps_its_statistics_and_ends_nearer():
    """Steps with a batch's own statistics would lead it away."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(800, 1, 6, 6, generator=generator)
    inputs *= torch.randn(800, 1, 1, 1, generator=generator).exp()  # a batch is unlike another
    teacher = network(seed=1)
    with torch.no_grad():
        for _ in range(60):
            teacher.train()(inputs[:600])
    student = copy.deepcopy(teacher.eval())
    with torch.no_grad():
        student[6].weight += 0.005 * torch.randn(3, 72, generator=generator)
    unseen = TensorSplit(inputs[600:])
    data = Data(
        name="uneven",
        train=TensorSplit(inputs[:600]),
        validation=unseen,
        test=unseen,
        classes=("a", "b", "c"),
    )
    log = distill(student, data, teacher=teacher, epochs=20).log
    assert "best of 5 tried, statistics of batch norms kept" in log.objective
    assert log.chosen_epoch == 20
    labelled = replace(data, train=TensorSplit(inputs[:600], torch.arange(600) % 3))
    log_of_labels = distill(student, labelled, teacher=teacher, epochs=20, label_weight=0.5).log
    assert "best of 3 tried" in log_of_labels.objective
    given = {"epochs": 20, "learning_rate": log.learning_rate, "keep_statistics": False}
    assert distill(student, data, teacher=teacher, **given).log.chosen_epoch == 0


def test_frozen_parameters_and_statistics_stay_as_they_are():
    model = network().eval()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    trained, _ = train(model, toy(), epochs=1)
    assert_same_weights(trained[:2], model[:2])
    assert not torch.equal(trained[6].weight, model[6].weight)


def test_a_norm_in_evaluation_mode_keeps_its_statistics_and_learns_its_scale():
    model = network().train()
    model[1].eval()
    trained, _ = train(model, toy(), epochs=1)
    assert_close(trained[1].running_mean, model[1].running_mean, rtol=0, atol=0)
    assert not torch.equal(trained[1].weight, model[1].weight)


def test_the_global_random_state_is_left_alone():
    random.seed(0)
    model = network(dropout=0.5)
    before = torch.get_rng_state(), random.getstate()
    train(model, toy(), epochs=1)
    distill(model, toy(), teacher=model, epochs=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


# ---------------------------------------------------------------- again, and on from there


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    model = network(dropout=0.3)
    first = train(model, toy(), epochs=2, seed=4).model
    torch.rand(7)  # whatever happens in between
    assert_same_weights(first, train(model, toy(), epochs=2, seed=4).model)
    other = train(model, toy(), epochs=2, seed=5).model
    assert not torch.equal(first[6].weight, other[6].weight)


class Stop:
    """Presses Ctrl-C at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, done: int, total: int, message: str) -> None:
        if done == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("teach", [False, True])
def test_interrupted_and_resumed_is_the_same_as_uninterrupted_bit_for_bit(tmp_path, teach):
    model, path = network(dropout=0.3), tmp_path / "last.ckpt"
    options = {"epochs": 3, "batch_size": 16, "seed": 2}
    run = train
    if teach:
        run, options["teacher"] = distill, network(seed=1)
    whole = run(model, toy(), **options)
    with pytest.raises(KeyboardInterrupt):
        run(model, toy(), checkpoint=path, progress=Stop(12), **options)  # in the third epoch
    resumed = run(model, toy(), checkpoint=path, **options)
    assert_same_weights(resumed.model, whole.model)
    assert [epoch.loss for epoch in resumed.log.epochs] == [e.loss for e in whole.log.epochs]
    assert [e.validation for e in resumed.log.epochs] == [e.validation for e in whole.log.epochs]
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_finished_training_is_returned_without_a_step(tmp_path):
    path = tmp_path / "last.ckpt"
    first = train(network(), toy(), epochs=2, checkpoint=path)
    second = train(network(), toy(), epochs=2, checkpoint=path, progress=Stop(1))
    assert_same_weights(first.model, second.model)
    assert first.log == second.log


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    train(network(), toy(), epochs=1, checkpoint=path)
    with pytest.raises(OptionError, match="epochs 1 instead of 2, seed 0 instead of 3"):
        train(network(), toy(), epochs=2, seed=3, checkpoint=path)
    with pytest.raises(OptionError, match=r"network [0-9a-f]{64} instead of"):
        train(network(seed=9), toy(), epochs=1, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_broken_checkpoint_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"last.ckpt cannot be read as a checkpoint.*Delete it"):
        train(network(), toy(), epochs=1, checkpoint=path)
    assert path.read_bytes() == content


def test_a_checkpoint_holds_no_code(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"format": 1, "model": network()}, path)
    with pytest.raises(RecordError, match="cannot be read as a checkpoint"):
        train(network(), toy(), epochs=1, checkpoint=path)


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(OutputError, match=r"Cannot write .*last\.ckpt: No such file"):
        train(network(), toy(), epochs=1, checkpoint=tmp_path / "nowhere" / "last.ckpt")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs` must be 1 or more, got 0"),
        ({"batch_size": -1}, "`batch_size` must be 1 or more, got -1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0, got 0.0"),
        ({"weight_decay": -1.0}, "`weight_decay` must be 0 or more"),
        ({"precision": "fp16"}, "No `precision` named 'fp16'. Did you mean 'bf16'"),
        ({"label_smoothing": 1.0}, "`label_smoothing` must be from 0 up to 1, got 1.0"),
    ],
)
def test_unfit_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        train(network(), toy(), **{"epochs": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"label_weight": 1.5}, "`label_weight` must be at most 1, got 1.5"),
        ({"features": ["conv9"]}, "no module named 'conv9'"),
        ({"mix": 1.5}, "`mix` must be at most 1, got 1.5"),
        ({"mix": 0.5, "label_weight": 0.2}, "`mix` must be 0 where labels have a weight"),
    ],
)
def test_unfit_options_of_distillation_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        distill(network(), toy(), teacher=network(), epochs=1, **options)


def test_a_loss_that_is_not_finite_stops_at_once_and_says_where():
    def odd(outputs, targets):
        return outputs.sum() * float("nan")

    with pytest.raises(ModelError, match=r"became nan in epoch 1, step 1 of \d.*`learning_rate`"):
        train(network(), toy(), epochs=1, loss=odd)
    model = network()
    with torch.no_grad():
        model[6].weight.fill_(3e38)  # finite itself: refused for what it gives
    with pytest.raises(ModelError, match=r"first layer that gives such values is '6' \(Linear\)"):
        train(model, toy(), epochs=1)


def test_networks_that_cannot_be_trained_are_refused():
    with pytest.raises(OptionError, match="must have parameters that need a gradient"):
        train(network().requires_grad_(False), toy(), epochs=1)
    with pytest.raises(OptionError, match=r"must be float32 .* got torch.float64 in 0.weight"):
        train(network().double(), toy(), epochs=1)
    with pytest.raises(ModelError, match="must run on an input of shape 64×1×6×6"):
        train(nn.Conv2d(3, 3, 1), toy(), epochs=1)
    with pytest.raises(ModelError, match="labels needs one tensor of outputs, got tuple"):
        train(nn.LSTM(6, 3), (torch.rand(4, 5, 6), torch.zeros(4)), epochs=1)


class Pairs(Dataset):
    """A data set whose labels are known from its items alone."""

    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, place):
        return tuple(column[place] for column in self.columns)


@pytest.mark.parametrize("known", [True, False])
def test_labels_that_the_network_has_no_score_for_are_refused(known):
    (images, labels), *_ = toy().train.batches(66)
    kind = TensorDataset if known else Pairs
    split = as_split(kind(images, labels + 2))
    assert (split.targets is not None) == known
    for learn in (train, partial(distill, teacher=network(), label_weight=0.5, learning_rate=1e-3)):
        with pytest.raises(DataError, match=r"Labels must be from 0 to 2.*3 classes.*[34]"):
            learn(network(), split, epochs=1)
    distill(network(), split, teacher=network(), epochs=1, learning_rate=1e-3)


def test_targets_and_teachers_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="needs targets, but the data has none"):
        train(network(), toy(labels=False), epochs=1)
    with pytest.raises(DataError, match=r"shape of the outputs, \(\d+, 2\).* got \(\d+, 3\)"):
        train(nn.Linear(4, 2), (torch.rand(9, 4), torch.rand(9, 3)), epochs=1)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    with pytest.raises(ModelError, match=r"shape of the reference's, \(\d+, 5\), got \(\d+, 3\)"):
        distill(network(), toy(), teacher=wide, epochs=1)
    settled = {"learning_rate": 1e-3, "norms": False}
    with pytest.raises(ModelError, match=r"shape of the reference's, \(\d+, 5\), got \(\d+, 3\)"):
        distill(network(), toy(), teacher=wide, epochs=1, **settled)
    with pytest.raises(ModelError, match=r"must run on an input of shape \d+×1×"):
        distill(nn.Sequential(nn.Conv2d(2, 3, 3)), toy(), teacher=network(), epochs=1)


# ---------------------------------------------------------------- settings


def test_small_data_gets_small_batches():
    assert [job.default_batch(n) for n in (10, 1200, 3000, 60_000)] == [16, 32, 64, 128]


def test_the_rate_warms_up_and_falls_to_nothing():
    rates = []
    job_log = train(network(), toy(), epochs=4, batch_size=16, learning_rate=0.1).log
    rates = [epoch.learning_rate for epoch in job_log.epochs]
    assert rates[0] < 0.1
    assert rates[1] > rates[2] > rates[3] > 0


def test_biases_and_norms_do_not_decay():
    optimizer = job._optimizer(network(), 0.1, 0.5)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert {parameter.ndim for parameter in decayed["params"]} == {2, 4}
    assert {parameter.ndim for parameter in others["params"]} == {1}


def test_both_precisions_learn():
    for precision, said in (("float32", "float32"), ("bf16", "bf16 autocast")):
        _, log = train(network(), toy(), epochs=3, precision=precision, learning_rate=0.02)
        assert log.precision == said
        assert log.epochs[-1].loss < log.epochs[0].loss


def test_a_copy_with_a_hook_still_runs():
    model, seen = network(), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    train(copy.deepcopy(model), toy(), epochs=1)
    assert len(model[0]._forward_hooks) == 1


@pytest.mark.slow
def test_fashion_mnist_is_learned(fashion_mnist):
    data = load_data(fashion_mnist, limit=3000)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 10),
    )
    trained, log = train(model, data, epochs=3)
    assert log.epochs[-1].validation > 0.7
    assert evaluate(trained, data.test.take(2000)).value > 0.7


@pytest.mark.gpu
def test_training_runs_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    trained, log = train(network(), toy(), epochs=8, learning_rate=0.02, device="cuda")
    assert log.device.startswith("cuda")
    assert next(trained.parameters()).device.type == "cpu"
    assert log.epochs[-1].validation > 0.9


def test_the_rate_of_distilling_is_the_best_tried_and_the_same_each_time(monkeypatch):
    """A student far from its teacher gets there at a higher rate than the lowest."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 1, 6, 7, generator=generator)
    split = TensorSplit(inputs)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(42, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    for parameter in teacher.parameters():
        parameter.data *= 3
    student = nn.Sequential(nn.Flatten(), nn.Linear(42, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    found = []
    distances = distillation.distances
    monkeypatch.setattr(
        distillation,
        "distances",
        lambda *args, **how: found.append(distances(*args, **how)) or found[-1],
    )
    first = distill(student, split, teacher=teacher, epochs=20)
    ((start,), tried) = found
    assert len(tried) == len(rate_search.TRIED)
    assert min(tried) < start
    rates = [
        rate_search.DISTILL_RATE * (first.log.batch_size / 128) ** 0.5 * m
        for m in rate_search.TRIED
    ]
    assert first.log.learning_rate == pytest.approx(rates[tried.index(min(tried))])
    assert first.log.learning_rate > rates[0]
    assert "best of 3 tried" in first.log.objective
    again = distill(student, split, teacher=teacher, epochs=20)
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("start", "apart", "multiple"),
    [
        (1.0, (1.1, 1.3, 1.6), 16),  # far, and led away by all: the highest stable rate
        (1.0, (1.1, 1.3, 1.7), 4),
        (1.0, (0.99, 1.3, 1.4), 1),  # far, and led nearer by one
        (1.0, (0.92, 0.91, 0.9), 1),  # as near, but for noise: the lowest
        (1.0, (0.96, 0.92, 0.9), 4),
        (0.05, (0.042, 0.0415, 0.041), 16),  # near: the nearest
        (0.05, (0.06, 0.04, 0.06), 4),  # near, and not led away by all
        (0.05, (0.06, 0.06, 0.06), 1 / 4),  # near: a lower one, tried after the others
    ],
)
def test_what_is_taken_of_the_rates_depends_on_how_far_the_teacher_is(
    start, apart, multiple, monkeypatch
):
    torch.manual_seed(0)
    split = TensorSplit(torch.randn(600, 1, 6, 7))
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(42, 5)).eval() for _ in range(2))
    asked = []

    def distances(teacher, students, *_, **__):
        asked.append(len(students))
        if students == [student]:
            return [start]
        return list(apart) if len(students) > 1 else [0.9 * start]

    monkeypatch.setattr(distillation, "distances", distances)
    log = distill(student, split, teacher=teacher, epochs=20).log
    base = rate_search.DISTILL_RATE * (log.batch_size / 128) ** 0.5
    assert log.learning_rate == pytest.approx(base * multiple)
    assert asked == ([1, 3, 1] if multiple < 1 else [1, 3])


def without_norms(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 3),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "far", "expected"),
    [
        ({"label_weight": 1.0}, False, True), ({"label_weight": 0.9}, False, False),
        ({"label_weight": 0.9}, True, True), ({}, False, False), ({}, True, True),
        ({"label_weight": 1.0, "norms": False}, True, False), ({"norms": False}, True, False),
        ({"norms": True}, False, True),
    ],
)  # fmt: skip
def test_a_network_that_follows_labels_or_is_far_has_norms_while_it_is_trained(
    settings, far, expected, monkeypatch
):
    seen = set()
    teacher = without_norms(seed=1)
    teacher[-1].weight.data *= 30 if far else 1
    step = loop._step

    def watched(job, *rest):
        seen.update(name for name, m in job.student.named_modules() if type(m) is nn.BatchNorm2d)
        return step(job, *rest)

    monkeypatch.setattr(loop, "_step", watched)
    student = without_norms()
    before = snapshot(student)
    trained, log = distill(
        student, toy(), teacher=teacher, epochs=2, learning_rate=0.01, **settings
    )
    assert_unchanged(student, before)
    assert seen == ({"0.added_norm", "2.added_norm"} if expected else set())
    assert ("batch norms before 2 activations" in log.objective) == expected
    assert str(trained) == str(student)
    assert trained.state_dict().keys() == student.state_dict().keys()
    assert not any(module._forward_hooks for module in trained.modules())
    if settings.get("label_weight"):  # else the network may be returned as it was
        assert log.epochs[-1].validation == evaluate(trained, toy().validation).value


def test_a_training_with_added_norms_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    learn = partial(
        distill, without_norms(), toy(), teacher=without_norms(seed=1), epochs=4,
        label_weight=1.0, learning_rate=0.01,
    )  # fmt: skip
    whole = learn()
    save = loop.save

    def stopping(job):
        save(job)
        if len(job.log) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            learn(checkpoint=tmp_path / "half.pt")
    assert_same_weights(learn(checkpoint=tmp_path / "half.pt").model, whole.model)
    with pytest.raises(OptionError, match=r"norms \['0', '2'\] instead of \[\]"):
        learn(checkpoint=tmp_path / "half.pt", norms=False)


def test_where_labels_are_all_of_the_loss_the_teacher_is_not_followed(monkeypatch):
    split, teacher, asked = toy(600).train, network(seed=1), []
    monkeypatch.setattr(Meaning, "imitation_loss", lambda *_: asked.append(1))
    trained, log = distill(network(), split, teacher=teacher, epochs=20, label_weight=1.0)
    assert not asked
    assert log.objective == "labels; rate the highest stable one of 3 tried"
    assert evaluate(trained, split, metric="accuracy").value > 0.9


@pytest.mark.parametrize(
    ("start", "apart", "multiple"),
    [
        (1.0, (0.9, 0.9, 1.3), 16),  # behind, as high rates are in a short trial
        (1.0, (0.9, 0.9, 1.4), 4),  # too high
        (1.0, (0.9, 1.4, 1.4), 1),
        (0.04, (0.09, 0.1, 0.14), 4),  # near: no other rule, where a hair would decide
    ],
)
def test_where_labels_are_all_of_the_loss_a_network_takes_the_highest_rate_it_stands(
    start, apart, multiple
):
    ways = dict(zip([(1, False), (4, False), (16, False)], apart, strict=True))
    chosen, which = rate_search._chosen(ways, at_start=start, guided=False)
    assert (chosen, which) == ((multiple, False), "highest stable one")


def test_a_network_of_three_dimensions_is_distilled():
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()
    volumes = torch.randn(8, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    student, log = distill(net, volumes, teacher=net, epochs=1, learning_rate=1e-3)
    assert student(volumes).shape == (8, 3)
    assert len(log.epochs) == 1


def test_labels_that_are_all_left_out_are_refused():
    labels = torch.full((12,), 255)
    with pytest.raises(DataError, match="all have the label 255, which is left out"):
        train(network(), (torch.randn(12, 1, 6, 6), labels), epochs=1, ignore_index=255)
    with pytest.raises(OptionError, match=r"`ignore_index` must be a whole number, got 1\.5"):
        train(network(), (torch.randn(12, 1, 6, 6), labels), epochs=1, ignore_index=1.5)
