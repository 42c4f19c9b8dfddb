"""A task is inferred only where it is certain, and what is given counts first."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from small_networks import mapped, net
from torch import nn

import onebyone as obo
from onebyone.calibration.infer_task import Known, meaning_of
from onebyone.core.errors import ModelError
from onebyone.data import Data, TensorSplit

X = torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


def integers(high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def found(network, targets, **known):
    meaning = meaning_of(network, TensorSplit(X, targets), known=Known(**known))
    return meaning.task.name, meaning.how


# ---------------------------------------------------------------- what is certain


@pytest.mark.parametrize(
    ("network", "targets", "name"),
    [
        (net(), integers(4, 48), "classification"),
        (mapped(), integers(4, 48, 12, 12), "segmentation"),
        (net(), numbers(48, 4), "regression"),
        (net(1), numbers(48, 1), "regression"),
        (mapped(3), numbers(48, 3, 12, 12), "restoration"),
        (mapped(2), numbers(48, 2, 12, 12), "regression"),
        (net(), integers(2, 48, 4).float(), "multilabel"),
        (net(), integers(2, 48, 4) > 0, "multilabel"),
        (net(), None, "unknown"),
        (net(1), None, "unknown"),
        (mapped(3), None, "unknown"),
        (net(), torch.eye(4)[integers(4, 48)], "unknown"),
        (net(), numbers(48, 4).softmax(1), "unknown"),
        (net(1), numbers(48), "unknown"),
        (net(), numbers(48), "unknown"),
        (net(), integers(4, 48) > 0, "unknown"),
        (net(128), integers(10, 48), "unknown"),  # an embedding beside other labels
        (net(4, 0, nn.Softmax(1)), None, "classification"),
        (net(4, 0, nn.LogSoftmax(1)), None, "classification"),
        (nn.Sequential(mapped(), nn.Softmax(1)), None, "segmentation"),
        (net(4, 0, nn.Sigmoid()), None, "unknown"),
    ],
)
def test_a_task_is_taken_only_where_it_is_certain(network, targets, name):
    assert found(network, targets)[0] == name


def test_what_is_known_besides_makes_a_task_certain():
    assert found(net(), None, classes=4) == ("classification", "the data has 4 classes")
    assert found(net(128), integers(10, 48), learns=True)[0] == "classification"
    assert found(net(), None, asks_accuracy=True) == ("classification", "accuracy is asked for")
    small = torchvision.models.squeezenet1_1(num_classes=7)
    images = TensorSplit(torch.randn(4, 3, 48, 48))
    assert meaning_of(small, images).task.name == "unknown"
    named = meaning_of(small, images, known=Known(spec="torchvision:squeezenet1_1"))
    assert (named.task.name, named.how) == ("classification", "a classifier of torchvision")


def test_the_record_of_a_run_tells_its_task_where_the_data_does_not():
    assert found(net(), None, task="regression") == ("regression", "as the network's run says")
    assert found(net(), numbers(48, 4), task="classification")[0] == "regression"
    assert found(net(1), None, task="classification")[0] == "unknown"
    assert found(net(), None, task="a task of the user's own")[0] == "unknown"


def test_a_classifier_of_few_of_many_classes_shows_by_its_hits():
    network = nn.Sequential(nn.Flatten(), nn.Linear(432, 100)).eval()
    with torch.no_grad():
        network[1].bias[20:] -= 100
        labels = network(X).argmax(1)
    assert found(network, labels)[0] == "classification"
    assert found(network, labels.flip(0))[0] == "unknown"


def test_a_given_task_counts_before_all_else():
    data = TensorSplit(X, integers(4, 48))
    assert meaning_of(net(), data, "embedding").how == "given"
    parts = Data(name="d", train=data, validation=data, test=data, task="embedding")
    assert meaning_of(net(), parts).task.name == "embedding"
    assert meaning_of(net(), parts, "classification").task.name == "classification"
    with pytest.raises(ModelError, match=r"'classification' needs outputs .*got \(48, 1\)"):
        meaning_of(net(1), data, "classification")


def test_why_it_is_not_known_is_said():
    info = meaning_of(net(), TensorSplit(X)).info()
    assert "the data has no labels" in str(info)
    assert "--task" in str(info)
    assert "one-hot" in found(net(), torch.eye(4)[integers(4, 48)])[1]


@pytest.mark.parametrize(
    ("name", "problem", "outputs", "task"),
    [
        ("ResNetForImageClassification", None, net(4), "classification"),
        ("ViTForImageClassification", "multi_label_classification", net(4), "multilabel"),
        ("ViTForImageClassification", "regression", net(4), "unknown"),
        ("ViTForImageClassification", None, net(5), "unknown"),
        ("SegformerForSemanticSegmentation", None, mapped(4), "segmentation"),
        ("ViTModel", None, net(4), "unknown"),
    ],
)
def test_the_configuration_of_transformers_is_evidence(name, problem, outputs, task):
    # With classes of the same names, since the package is no dependency.
    kind = type(name, (type(outputs),), {"__module__": "transformers.models.any.modeling_any"})
    network = kind(*outputs)
    network.config = SimpleNamespace(num_labels=4, problem_type=problem)
    assert found(network.eval(), None)[0] == task


def test_logarithms_of_probabilities_at_each_position_are_a_sequence():
    network = nn.Sequential(mapped(), nn.Flatten(2), Transposed(), nn.LogSoftmax(2)).eval()
    meaning = meaning_of(network, TensorSplit(X))
    assert (meaning.task.name, meaning.parts[0].form) == ("sequence", "scores")


def test_probabilities_at_each_position_are_a_sequence():
    # As text recognizers give them: (n, positions, classes).
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1),
        nn.AdaptiveAvgPool2d((1, 12)), nn.Flatten(2), Transposed(), nn.Softmax(2),
    )  # fmt: skip
    network.eval()
    meaning = meaning_of(network, TensorSplit(X))
    assert (meaning.task.name, meaning.parts[0].form) == ("sequence", "probabilities")
    assert "at each position" in str(meaning.info())
    small, record = obo.shrink(
        network, (X, X, X), budget="macs=70%", epochs=1, learning_rate=1e-3, reconstruct=2
    )
    assert record.task.name == record.plan.task.name == "sequence"
    assert small(X).shape == (len(X), 12, 5)
    same = (small(X).argmax(2) == network(X).argmax(2)).double().mean()
    assert record.comparison.agreement.value == pytest.approx(float(same), abs=1e-6)
    with pytest.raises(ModelError, match=r"'sequence' needs outputs of shape \(n, …, classes\)"):
        meaning_of(net(), TensorSplit(X), "sequence")


def test_a_network_of_transformers_is_planned():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1] * 4}
    config = transformers.ResNetConfig(**sizes, num_labels=5)
    network = transformers.ResNetForImageClassification(config).eval()
    images = torch.randn(8, 3, 32, 32)
    plan = obo.plan(network, images, budget="macs=80%")
    assert plan.task.name == "classification"
    assert obo.apply(network, plan, images)(images).logits.shape == (8, 5)
