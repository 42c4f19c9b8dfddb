"""On several inputs a network is trained as it is on one tensor that holds them all."""

import pytest
import torch
from torch.testing import assert_close

import branches
import onebyone as obo
from onebyone.core.errors import OptionError
from onebyone.training.reconstruct import reconstruct


def same_weights(separate, joined):
    one, other = (decided(network) for network in (separate, joined.inside))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_close(value, other[name], atol=1e-5, rtol=1e-4)


def decided(network):
    """Return the weights but a bias before a norm, which has no gradient but rounding, and its mean."""
    unsure = ("rgb.0.bias", "rgb.1.running_mean")
    return {name: value for name, value in network.state_dict().items() if name not in unsure}


def both():
    """Return the same network and examples in two forms."""
    yield branches.rgb_depth(), branches.positional()
    yield branches.OneTensor(branches.rgb_depth()), branches.one_tensor()


HOW = {"epochs": 2, "batch_size": 32, "learning_rate": 1e-3}


@pytest.mark.parametrize("more", [{}, {"accumulate": 3}], ids=["whole", "in parts"])
def test_labels_are_learned_the_same(more):
    separate, joined = (
        obo.train(net, data, **HOW, **more, task="classification").model for net, data in both()
    )
    same_weights(separate, joined)


def distilled(*, norms):
    students = [branches.rgb_depth(1), branches.OneTensor(branches.rgb_depth(1))]
    how = {**HOW, "norms": norms, "task": "classification"}
    for student, (net, data) in zip(students, both(), strict=True):
        yield obo.distill(student, data, teacher=net, **how)


def test_a_teacher_is_learned_the_same():
    separate, joined = distilled(norms=False)
    same_weights(separate.model, joined.model)
    assert separate.log.augmentation == "none"


def test_added_norms_learn_the_same():
    separate, joined = distilled(norms=True)
    assert "batch norms before 3 activations" in separate.log.objective
    assert separate.model.state_dict().keys() == branches.rgb_depth().state_dict().keys()
    # Not the weights: a bias before a norm has no gradient but rounding.
    for one, other in zip(separate.log.epochs, joined.log.epochs, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)


@pytest.mark.parametrize("features", [(), ("head",)], ids=["answered once", "features"])
def test_a_network_is_reconstructed_the_same(features):
    made = []
    for net, (inputs, _) in both():
        student = branches.rgb_depth(1)
        one = isinstance(inputs, torch.Tensor)
        kept = tuple(f"inside.{name}" for name in features) if one else features
        how = {"teacher": net, "steps": 20, "batch_size": 16, "features": kept}
        student = branches.OneTensor(student) if one else student
        data = inputs if one else branches.positional()
        made.append(reconstruct(student, calibration=data, task="classification", **how))
    separate, joined = made
    same_weights(separate.model, joined.model)
    assert separate.log.after < separate.log.before
    assert separate.log.examples == joined.log.examples


@pytest.mark.parametrize("data", [branches.keywords(), branches.Named()], ids=["dict", "items"])
def test_inputs_by_keyword_train_every_way(data):
    net = branches.masked()
    trained = obo.train(net, data, epochs=8, batch_size=16, learning_rate=1e-2)
    losses = [epoch.loss for epoch in trained.log.epochs]
    assert losses[-1] < losses[0]
    near = obo.distill(branches.masked(1), data, teacher=trained.model, epochs=2, label_weight=0.5)
    assert near.log.epochs[-1].loss < near.log.epochs[0].loss
    record = reconstruct(branches.masked(1), teacher=net, calibration=data, steps=20).log
    assert record.after < record.before


def test_rectangles_are_mixed_into_images_alone():
    net = branches.rgb_depth()
    with pytest.raises(OptionError, match=r"`mix` must be 0 unless inputs are images .*, 1×8×8"):
        obo.distill(net, branches.positional(), teacher=net, epochs=1, mix=0.5)


def test_a_training_on_several_inputs_is_resumed(tmp_path):
    def interrupt(done, total, message):
        if message.startswith("epoch 2"):
            raise KeyboardInterrupt

    net, how = branches.rgb_depth(), {"epochs": 3, "batch_size": 32, "task": "classification"}
    whole = obo.train(net, branches.positional(), **how)
    kept = {**how, "checkpoint": tmp_path / "checkpoint.pt"}
    with pytest.raises(KeyboardInterrupt):
        obo.train(net, branches.positional(), **kept, progress=interrupt)
    inputs, labels = branches.positional()
    changed = (inputs[0], inputs[1].clone())
    changed[1][-1] += 1
    with pytest.raises(OptionError, match="data"):
        obo.train(net, (changed, labels), **kept)
    resumed = obo.train(net, branches.positional(), **kept)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
