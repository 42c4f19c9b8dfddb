"""The same command loads the same network, also with random weights."""

import pytest

from onebyone.cli.loading import load
from onebyone.networks.hashing import hash_weights


@pytest.mark.parametrize("spec", ["onebyone:classic", "torchvision:squeezenet1_1"])
def test_random_weights_are_those_of_the_seed(spec):
    def loaded(**named):
        return hash_weights(load(spec, "random", [], needs_weights=True, **named).model)

    assert loaded() == loaded(seed=0)
    assert loaded(seed=1) == loaded(seed=1) != loaded()
