import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from onebyone.core.errors import DataError
from onebyone.core.records import InputSpec
from onebyone.data import Data, DatasetSplit, TensorSplit, as_data, as_split

INPUTS, LABELS = torch.rand(20, 3), torch.arange(20) % 4


@pytest.mark.parametrize(
    "examples",
    [
        (INPUTS, LABELS),
        [INPUTS.numpy(), LABELS.numpy()],
        (INPUTS.double().numpy(), LABELS.numpy().astype(np.uint16)),
        (INPUTS, LABELS.to(torch.int32)),
        TensorDataset(INPUTS, LABELS),
        DataLoader(TensorDataset(INPUTS, LABELS), batch_size=5, shuffle=True),
        TensorSplit(INPUTS, LABELS),
    ],
)
def test_every_usual_kind_becomes_the_same_split(examples):
    (inputs, targets), *_ = as_split(examples).batches(20)
    torch.testing.assert_close(inputs, INPUTS)
    assert targets.tolist() == LABELS.tolist()
    assert targets.dtype == torch.int64


def test_inputs_alone_have_no_targets():
    for inputs in (INPUTS, INPUTS.numpy()):
        split = as_split(inputs)
        assert split.targets is None
        assert len(split) == 20


def test_a_read_only_array_is_copied_without_a_warning():
    array = INPUTS.numpy().copy()
    array.flags.writeable = False
    assert len(as_split(array)) == 20


def test_a_loader_over_a_subset_keeps_to_it():
    loader = DataLoader(TensorDataset(INPUTS, LABELS), sampler=SubsetRandomSampler([1, 3]))
    (_, targets), *_ = as_split(loader).batches(20)
    assert targets.tolist() == [1, 3]


def test_data_gives_its_training_part():
    data = as_data((INPUTS, LABELS))
    assert as_split(data) is data.train
    assert as_data(data) is data


def test_one_set_is_divided_into_three_disjoint_parts():
    data = as_data((torch.arange(100.0)[:, None], torch.arange(100) % 2), seed=3)
    seen = [
        int(x)
        for part in (data.train, data.validation, data.test)
        for b, _ in part.batches(9)
        for x in b
    ]
    assert sorted(seen) == list(range(100))
    assert (len(data.train), len(data.validation), len(data.test)) == (80, 10, 10)
    assert data.classes == ("0", "1")


def test_a_pair_keeps_its_test_part_and_divides_its_training_part():
    data = as_data(((INPUTS, LABELS), (INPUTS[:6], LABELS[:6])))
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 6)


def test_a_triple_is_taken_as_it_is():
    part = DatasetSplit(TensorDataset(INPUTS, LABELS))
    data = as_data((part, (INPUTS[:4], LABELS[:4]), (INPUTS[:3], LABELS[:3])))
    assert data.train is part
    assert (len(data.validation), len(data.test)) == (4, 3)
    assert data.classes == ("0", "1", "2", "3")


def test_other_targets_have_no_classes():
    assert as_data((INPUTS, INPUTS)).classes == ()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ("cifar10", "Examples must be a tensor of inputs.* got a str"),
        ((INPUTS, LABELS, LABELS), r"got a tuple of 3 \(Tensor, Tensor, Tensor\)"),
        (np.array(["a", "b"]), "must hold numbers"),
        (DataLoader(Stream()), "must draw from a map-style|must be map-style"),
        (
            DataLoader(TensorDataset(INPUTS), sampler=WeightedRandomSampler([1.0] * 20, 20)),
            "got the sampler WeightedRandomSampler",
        ),
    ],
)
def test_other_things_are_refused(examples, message):
    with pytest.raises(DataError, match=message):
        as_split(examples)


def test_data_of_too_many_parts_is_refused():
    with pytest.raises(DataError, match="got 4 parts"):
        as_data(((INPUTS, LABELS),) * 4)


def test_a_split_that_cannot_be_divided_is_refused():
    class Own:
        inputs, targets, augmentation = InputSpec.of_shape((1, 3)), None, "none"

        def __len__(self):
            return 20

        def batches(self, batch_size, **options):
            yield INPUTS, LABELS

        def take(self, n, seed=0):
            return self

        def image(self, index):
            return None

    with pytest.raises(DataError, match="A Own cannot be divided"):
        as_data(Own())
    assert isinstance(as_data((Own(), Own(), Own())), Data)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TensorDataset, "got the class TensorDataset: give an instance of it"),
        ((torch.rand(2, 3), torch.arange(2)), "at least 3 examples to be divided.*got 2"),
        (torch.rand(9, 0, 4, 4), "at least one value, got inputs of shape"),
        ((torch.rand(9, 3), torch.arange(9) + 10**12), "numbered from 0, at most 1,000,000"),
        (list(zip(torch.rand(9, 3), range(9), strict=True)), "got 9 parts"),
        (iter(torch.rand(9, 3)), "got a tuple_iterator"),
    ],
)
def test_what_a_factory_may_return_by_mistake_is_named(source, message):
    with pytest.raises(DataError, match=message):
        as_data(source)


def test_a_loader_keeps_the_labels_of_its_tensors():
    data = as_data(DataLoader(TensorDataset(torch.rand(30, 3), torch.arange(30) % 3)))
    assert data.classes == ("0", "1", "2")
    part = Subset(TensorDataset(torch.rand(30, 3), torch.arange(30)), [4, 2])
    assert as_split(part).targets.tolist() == [4, 2]
