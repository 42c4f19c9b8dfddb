"""Data sets of the user's own: the same item is the same example, and a fault names its item."""

import numpy as np
import pytest
import torch
from made_items import Made, collected, noisy
from torch.testing import assert_close
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from onebyone.core.errors import DataError, OptionError
from onebyone.data import DatasetSplit, TensorSplit, as_split, datasets, repeatable


def test_items_that_draw_by_means_of_their_own_are_read_once_and_kept(monkeypatch):
    own = np.random.default_rng(0)
    split = DatasetSplit(Made(lambda i: (torch.tensor([own.random(), i]).float(), i)))
    assert DatasetSplit(Made(noisy)).repeats()
    assert repeatable(DatasetSplit(Made(noisy))).__class__ is DatasetSplit
    assert not split.repeats()
    kept = repeatable(split)
    assert isinstance(kept, TensorSplit)
    assert torch.equal(collected(kept)[0], collected(kept)[0])
    assert kept.targets.tolist() == list(range(10))
    monkeypatch.setattr(datasets, "free_bytes", lambda: 100)
    with pytest.raises(DataError, match=r"those of Made are not\. To keep them all takes 80 B"):
        repeatable(split)


def divide(_):
    return 1 / 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: {"name": "a", "label": 1}, "a dictionary with 'name'. Wr"),
        (lambda i: (torch.ones(2), "cat"), "the second is (list|tuple). Number the classes from 0"),
        (lambda i: (torch.ones(2), {"a": 1}), "the second is dict. Wrap the data set"),
        (lambda i: (torch.ones(2).long(), 1), "a tensor of torch.int64"),
        (lambda i: (3.5, 1), "a floating-point input, got numbers"),
        (lambda i: (), "floating-point input"),
        (divide, "at index 0: division by zero"),
    ],
)
def test_unfit_items_are_named_at_once(make, message):
    with pytest.raises(DataError, match=message):
        DatasetSplit(Made(make))


def test_sizes_that_differ_between_batches_are_named():
    split = DatasetSplit(Made(lambda i: (torch.zeros(2 + (i == 5)), i)))
    with pytest.raises(DataError, match=r"of one shape, got \(3,\) at index 5 and \(2,\) before"):
        list(split.batches(1))


def test_a_collate_that_leaves_examples_out_is_refused():
    def some(items):
        return torch.utils.data.default_collate(items[: max(1, len(items) - 1)])

    with pytest.raises(DataError, match=r"each of 3 items, got 2 inputs and 2 targets.*collate_fn"):
        collected(DatasetSplit(Made(noisy), collate=some))


class Sized(Made):
    def __init__(self, length):
        super().__init__(noisy)
        self.length = length

    def __len__(self):
        return self.length()


def test_a_length_that_fails_or_is_none_is_said():
    with pytest.raises(DataError, match=r"`__len__` failed: division by zero"):
        DatasetSplit(Sized(lambda: divide(0)))
    with pytest.raises(DataError, match=r"`__len__` failed: .*negative|should return >= 0"):
        DatasetSplit(Sized(lambda: -1))
    with pytest.raises(DataError, match="at least one example"):
        DatasetSplit(Sized(lambda: 0))


class Labelled(Made):
    targets = tuple(range(10))


class Relabelled(Labelled):
    targets = tuple(range(1, 11))


def test_targets_are_known_through_subsets_and_only_where_items_have_them():
    subset = Subset(Labelled(noisy), [4, 2, 9])
    assert DatasetSplit(subset).targets.tolist() == [4, 2, 9]
    assert DatasetSplit(subset).part(torch.tensor([2, 0])).targets.tolist() == [9, 4]
    assert DatasetSplit(Relabelled(noisy)).targets is None


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.ones(2), 1

    def __len__(self):
        return 1


PAIRS = TensorDataset(torch.rand(6, 2), torch.arange(6))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Endless(), batch_size=1), "map-style.*got Endless. Collect"),
        (DataLoader(PAIRS, batch_size=None), "with `batch_size=None`"),
        (DataLoader(PAIRS, sampler=RandomSampler(PAIRS, replacement=True)), "RandomSampler"),
        (DataLoader(PAIRS, sampler=RandomSampler(PAIRS, num_samples=3)), "RandomSampler"),
        (DataLoader(PAIRS, batch_sampler=[[0, 1]]), "sampler list"),
        (Endless(), "map-style"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_loaders_that_do_not_give_each_example_once_are_refused(loader, message):
    with pytest.raises(DataError, match=message):
        as_split(loader)


def test_loaders_that_give_each_example_once_are_taken():
    batches = BatchSampler(SequentialSampler(PAIRS), 4, drop_last=False)
    for loader in (DataLoader(PAIRS, batch_sampler=batches), DataLoader(PAIRS, shuffle=True)):
        assert_close(collected(as_split(loader))[0], PAIRS.tensors[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.array([["a", "b"]]), "must hold numbers, got an array of <U1"),
        (np.array([{}, {}], dtype=object), "must hold numbers, got an array of object"),
        (np.ones((2, 3), np.complex64), "must hold numbers, got an array of complex64"),
        (np.ma.masked_array(np.ones((2, 3)), mask=True), "a masked array"),
        (torch.ones(2, 3).to_sparse(), "dense tensor with values"),
        (torch.ones(2, 3, device="meta"), "dense tensor with values, got .* on meta"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
        (torch.ones(2, 3, dtype=torch.complex64), "got torch.complex64"),
    ],
)
def test_odd_tensors_and_arrays_are_refused_by_name(inputs, message):
    with pytest.raises(DataError, match=message):
        as_split(inputs)


def test_numbers_of_any_order_of_bytes_and_length_are_taken():
    for dtype in (">f4", "<f8", np.longdouble, np.float16):
        values = np.arange(6, dtype=dtype).reshape(2, 3)
        assert_close(collected(as_split(values))[0], torch.arange(6.0).view(2, 3))


def test_a_seed_that_torch_does_not_take_is_refused():
    for seed in (10**23, -(10**23)):
        with pytest.raises(OptionError, match="`seed` must be a whole number from"):
            as_split(PAIRS).batches(2, seed=seed)


def test_finite_values_whose_sum_is_not_are_taken():
    split = as_split(Made(lambda index: (torch.full((4,), 3e38), index)))
    assert len([*split.batches(5)]) == 2
