"""Batches that do not fit into memory are run in halves, to the same outputs."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import onebyone as obo
from onebyone.core.errors import ModelError
from onebyone.networks.halving import Halving


class Hungry(nn.Module):
    """A network that more examples than `most` do not fit into."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.most, self.error, self.sizes = most, error, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error
        return {"scores": self.layer(x), "parts": (x.sum(1), "text")}


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", ERRORS)
def test_outputs_in_halves_are_those_of_the_whole(error):
    network, inputs = Hungry(3, error).eval(), torch.rand(10, 3)
    runs = Halving()
    with pytest.warns(UserWarning, match=r"does not fit .* are run at a time"):
        given = runs(network, inputs)
    assert_close(given["scores"], network.layer(inputs).detach())
    assert given["parts"][0].shape == (10,)
    assert given["parts"][1] == "text"
    assert network.sizes[:3] == [10, 5, 2]
    network.sizes.clear()
    runs(network, inputs)  # it is known by now
    assert max(network.sizes) == 2


def test_one_example_that_does_not_fit_is_said():
    with (
        pytest.warns(UserWarning, match="1 are run at a time"),
        pytest.raises(ModelError, match="Hungry must fit into memory with one example of 3, but"),
    ):
        Halving()(Hungry(0, ERRORS[0]).eval(), torch.rand(2, 3))


def test_other_faults_are_not_tried_again():
    network = Hungry(3, ValueError("no such thing")).eval()
    with pytest.raises(ModelError, match="no such thing"):
        Halving()(network, torch.rand(10, 3))
    assert network.sizes == [10]


def test_what_the_user_did_not_choose_is_halved_without_a_word():
    network, inputs = Hungry(3, ERRORS[0]).eval(), torch.rand(10, 3)
    given = Halving(warns=False)(network, inputs)
    assert_close(given["scores"], network.layer(inputs).detach())


def test_evaluation_goes_on_in_halves():
    class Scores(Hungry):
        def forward(self, x):
            return super().forward(x)["scores"]

    data = torch.rand(20, 3), torch.arange(20) % 4
    with pytest.warns(UserWarning, match="5 are run at a time"):
        metric = obo.evaluate(Scores(5, ERRORS[1]).eval(), data, batch_size=10)
    assert metric.n == 20
