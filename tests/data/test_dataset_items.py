"""Items of a user's data set: the same draws in any order and process, and faults by name."""

import random
import sys

import numpy as np
import pytest
import torch
from made_items import Made, collected, noisy
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import Subset

from onebyone.core.errors import DataError
from onebyone.data import DatasetSplit


def in_order(split, **options):
    inputs, targets = collected(split, **options)
    return inputs[targets.argsort()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_item_is_the_same_example_in_any_order_and_process(workers):
    split = DatasetSplit(Made(noisy), workers=workers)
    first = in_order(split)
    assert_close(in_order(split, seed=1), first, rtol=0, atol=0)
    assert_close(in_order(DatasetSplit(Made(noisy))), first, rtol=0, atol=0)
    assert first[:, :3].unique().numel() == 30  # each item has draws of its own
    part = split.part(torch.tensor([7, 2]))
    assert_close(collected(part)[0], first[[7, 2]], rtol=0, atol=0)
    whole = Subset(Made(noisy), [7, 2])
    assert_close(collected(DatasetSplit(whole))[0], first[[7, 2]], rtol=0, atol=0)


def test_augmented_items_draw_anew_for_each_seed():
    split = DatasetSplit(Made(noisy))
    first = in_order(split, seed=1, augment=True)
    assert_close(in_order(split, seed=1, augment=True), first, rtol=0, atol=0)
    assert not torch.isclose(in_order(split, seed=2, augment=True)[:, :3], first[:, :3]).any()


def test_the_users_generators_are_left_as_they_were():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    collected(DatasetSplit(Made(noisy)), seed=4, augment=True)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


class Late(Made):
    def __init__(self, fault, at: int = 7) -> None:
        super().__init__(lambda i: fault(i) if i == at else (torch.full((2,), float(i)), i))


def divide(_):
    return 1 / 0


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def odd(_):
    raise OddError("odd one", 2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            divide,
            r"Late .*at index 7: division by zero \(ZeroDivisionError, .*test_dataset_items\.py:\d+\)",
        ),
        (lambda i: sys.exit(3), r"at index 7: 3 \(SystemExit, "),
        (odd, r"at index 7: odd one \(OddError, "),
        (lambda i: [][i], r"at index 7: list index out of range .*`__len__` may be too large"),
        (lambda i: (torch.tensor([1.0, float("nan")]), i), r"NaN or infinity at index 7\. Fix"),
        (lambda i: (torch.zeros(3), i), "at index 7: .*Resize all"),
        (lambda i: (Image.new("L", (2, 2)), i), "at index 7: .*ToTensor and Normalize"),
        (lambda i: None, "at index 7: .*Fix the data set or drop"),
    ],
)
def test_a_fault_names_the_item_the_error_and_the_line(fault, message, workers):
    split = DatasetSplit(Late(fault), workers=workers)
    with pytest.raises(DataError, match=message) as info:
        collected(split, seed=3)
    assert len(str(info.value).splitlines()) == 1
    with pytest.raises(DataError, match=message):
        collected(split.part(torch.tensor([3, 7])))
