"""What only runs a network runs a held one itself, leaves it as it was, and copies any other."""

import pytest
import torch
from torch import nn

from onebyone.calibration.collect import collect
from onebyone.calibration.curvature import output_curvature
from onebyone.calibration.infer_task import meaning_of
from onebyone.calibration.inputs import as_calibration
from onebyone.data import as_split
from onebyone.evaluation.scores import score
from onebyone.networks.channel_groups import channel_groups
from onebyone.networks.dataflow import find_neighbours
from onebyone.networks.hashing import hash_weights
from onebyone.networks.held import any_to_run, forget_made, held, made_once, to_run
from onebyone.networks.subnormals import subnormal_activations
from onebyone.profiling.activation_memory import peak_activation_bytes
from onebyone.profiling.trace import time_layers, trace_layers
from onebyone.rewrites.equivalence import version_of
from onebyone.rewrites.plain import why_not_plain
from onebyone.training.rate_search import distances


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()


def images(count=4):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_held_network_runs_itself_until_it_is_let_go():
    model = network()
    with held(model, images()):
        assert to_run(model) is model
        assert any_to_run(model, device="cpu") is model
        with held(model, images()):
            assert to_run(model) is model
        assert to_run(model) is model
        assert to_run(network()) is not model
    assert to_run(model) is not model


def test_it_is_let_go_after_an_error():
    model = network()
    with pytest.raises(ZeroDivisionError), held(model, images()):
        raise ZeroDivisionError
    assert to_run(model) is not model


class Keeps(nn.Module):
    """Keeps something of each run, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.inside = network()
        self.way = way
        self.last = None
        self.all = []
        self.by_name = {"runs": 0}
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        y = self.inside(x)
        match self.way:
            case "attribute":
                self.last = y
            case "list":
                self.all.append(0)
            case "dictionary":
                self.by_name["runs"] += 1
            case "buffer":
                self.runs += 1
            case "weights":
                self.inside[0].weight.data = self.inside[0].weight.data * 1
            case "weights in place":
                self.inside[0].weight.data.mul_(1.5)
            case "layer":
                self.inside[2] = nn.ReLU()
        return y


@pytest.mark.parametrize(
    "way",
    ["attribute", "list", "dictionary", "buffer", "weights", "weights in place", "layer"],
)
def test_a_network_that_changes_as_it_runs_is_copied(way):
    model = Keeps(way).eval()
    with torch.no_grad(), held(model, images()):
        assert to_run(model) is not model


def test_one_that_keeps_nothing_is_not():
    model = Keeps("nothing").eval()
    with held(model, images()):
        assert to_run(model) is model


def test_a_network_in_training_mode_or_for_another_device_is_copied():
    model = network()
    with held(model, images()):
        assert to_run(model, device="meta") is not model
        model.train()
        assert to_run(model) is not model
    with held(model, images()):
        assert to_run(model.eval()) is not model  # it trained when it was to be held


def looks(model):
    """Run everything that may run a held network itself; return what it gave."""
    data = as_calibration(images(8))
    names = ["0", "3", "6"]
    meaning = meaning_of(model, data, "classification")
    split = as_split((images(8), torch.arange(8) % 3))
    traced = trace_layers(model, images(1))
    times = time_layers(model, images(1), traced.layers, seconds=0)
    curvature = output_curvature(model, names, data.batches, meaning=meaning)
    sums = collect(model, names, data.batches)
    return {
        "macs": traced.macs,
        "timed": sorted(times),
        "curvature": {name: matrix.tolist() for name, matrix in curvature.items()},
        "moments": {name: sums[name][0].xx.tolist() for name in names},
        "subnormal": subnormal_activations(model, images()),
        "bytes": peak_activation_bytes(model, images(1)),
        "readers": len(find_neighbours(model, images(1)).operations),
        "groups": [group.members for group in channel_groups(to_run(model), images(1)).groups],
        "scores": score([model], split, task=meaning).each[0].scores.tolist(),
        "apart": distances(model, [model], split, meaning=meaning, mine=meaning, device=None),
    }


def test_it_is_left_as_it_was_and_gives_what_copies_give():
    model = network()
    model[3].weight.requires_grad = False
    wanted = looks(model)
    before, outputs = hash_weights(model), model(images())
    with held(model, images()):
        assert looks(model) == wanted
    assert hash_weights(model) == before
    assert torch.equal(model(images()), outputs)
    assert [p.requires_grad for p in model.parameters()] == [
        name != "3.weight" for name, _ in model.named_parameters()
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m.training for m in model.modules())


def test_what_is_made_of_a_held_network_is_made_once():
    model, made = network(), []

    def make():
        made.append(0)
        return object()

    assert made_once(model, "a", make) is not made_once(model, "a", make)
    with held(model, images()):
        first = made_once(model, "a", make)
        assert made_once(model, "a", make) is first
        assert made_once(model, "b", make) is not first
        assert made_once(network(), "a", make) is not first
        forget_made(model)
        assert made_once(model, "a", make) is not first
    assert len(made) == 6


class Doubled(nn.Conv2d):
    """Gives twice what a plain layer of its weights gives."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_the_proof_of_plain_layers_is_made_once_and_says_the_same():
    model, example, names = network(), images(1), ["0", "3", "6"]
    model[3] = Doubled(6, 4, 1).eval()
    alone = [why_not_plain(model, example, [name]) for name in names]
    assert [bool(found) for found in alone] == [False, True, False]
    seen = []
    with held(model, example):
        version = version_of(model, example)
        assert version_of(model, example) is version
        version.network[0].register_forward_hook(lambda *_: seen.append(0))
        assert why_not_plain(model, example, names) == alone[1]
        runs = len(seen)
        assert [why_not_plain(model, example, [name]) for name in names] == alone
        assert 0 < runs == len(seen)
    assert version_of(model, example) is not version
