"""Example inputs: given by the caller, or drawn as a record describes them."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from onebyone.core.errors import NetworkInputError, OptionError
from onebyone.core.records import InputSpec
from onebyone.core.tensor_trees import spec_of, tensors_in
from onebyone.networks.examples import (
    Example,
    example_input,
    example_of,
    given_example,
    inputs_of,
)

IDS = torch.tensor([[3, 5], [4, 9]])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(10, 4), nn.Conv2d(3, 4, 1)

    def forward(self, image, ids, scale=1.0):
        return self.conv(image).mean((2, 3)) * scale + self.words(ids).sum(1)


def test_one_tensor_is_drawn_as_by_its_shape():
    made = example_of(nn.Linear(3, 2).double(), InputSpec.of_shape((2, 3)))
    assert_close(made, example_input((2, 3), dtype=torch.float64), atol=0, rtol=0)


def test_integers_are_drawn_within_those_of_the_example():
    net = Two()
    spec = inputs_of(net, (torch.randn(2, 3, 8, 8), IDS, 0.5)).with_batch(64)
    assert spec.call == "(image, ids, 0.5)"
    image, ids, scale = example_of(net, spec)
    assert image.shape == (64, 3, 8, 8)
    assert (int(ids.min()), int(ids.max())) == (3, 9)
    assert scale == 0.5
    assert net(image, ids, scale).shape == (64, 4)


def test_a_blank_example_is_zero_and_its_mask_true():
    spec = spec_of({"x": torch.randn(2, 3), "mask": torch.zeros(2, 3, dtype=torch.bool)})
    made = example_of(nn.Linear(3, 2), spec, blank=True)
    assert not made["x"].any()
    assert made["mask"].all()


def test_given_values_are_kept_and_take_the_networks_type():
    x, net = torch.randn(2, 3), nn.Linear(3, 2).double()
    example = given_example(net, example=(x,))
    assert example.spec == InputSpec.of_shape((2, 3))
    assert_close(example.on(net), x.double(), atol=0, rtol=0)
    assert_close(example.first().on(net), x[:1].double(), atol=0, rtol=0)
    assert example.first().spec.batch == 1


def test_random_examples_have_a_first_one_too():
    assert Example(InputSpec.of_shape((8, 3))).first().spec == InputSpec.of_shape((1, 3))


def test_the_first_of_given_examples_keeps_the_names():
    example = given_example(Two(), example=(torch.randn(2, 3, 8, 8), IDS, None))
    first = example.first()
    assert first.spec.call == example.spec.call == "(image, ids, None)"
    assert [len(tensor) for tensor in tensors_in(first.on(Two()))] == [1, 1]


def test_either_a_shape_or_an_example_is_given():
    net = nn.Linear(3, 2)
    for given, came in (({}, "neither"), ({"input_shape": (1, 3), "example": IDS}, "both")):
        with pytest.raises(OptionError, match=f"`input_shape` or `example` .* got {came}"):
            given_example(net, **given)
    with pytest.raises(OptionError, match=r"got a list\. Put a list into a tuple"):
        given_example(net, example=[IDS])
    with pytest.raises(NetworkInputError, match="at least one tensor"):
        given_example(net, example=(1, 2))
