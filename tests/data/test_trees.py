"""Examples of several inputs: from data sets, loaders and tensors, batch by batch."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from onebyone.core.errors import DataError, NetworkInputError, OptionError
from onebyone.core.tensor_trees import tensors_in
from onebyone.data import as_data, as_split
from onebyone.data.datasets import DatasetSplit, repeatable
from onebyone.data.hashing import hash_split
from onebyone.data.splits import Split, tensor_batches
from onebyone.data.trees import TreeSplit

N = 10
IMAGES = torch.randn(N, 3, 6, 5, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(2 * N).reshape(N, 2)
LABELS = torch.arange(N) % 3
TABLE = torch.arange(4.0)


class Items(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.item(index)


def named(index):
    return {"image": IMAGES[index], "ids": IDS[index]}


def whole():
    return TreeSplit({"image": IMAGES, "ids": IDS, "scale": 0.5, "table": TABLE}, LABELS)


def gathered(split, **how):
    batches = list(split.batches(4, **how))
    columns = zip(*(list(tensors_in(inputs)) for inputs, _ in batches), strict=True)
    return [torch.cat(column) for column in columns], torch.cat([labels for _, labels in batches])


SPLITS = {
    "mapping and label": lambda: as_split(Items(lambda i: (named(i), int(LABELS[i])))),
    "one mapping": lambda: as_split(Items(lambda i: {**named(i), "labels": int(LABELS[i])})),
    "loader": lambda: as_split(
        DataLoader(Items(lambda i: (named(i), int(LABELS[i]))), batch_size=3)
    ),
    "tensors": lambda: as_split(({"image": IMAGES, "ids": IDS}, LABELS)),
    "arrays": lambda: as_split(({"image": IMAGES.numpy(), "ids": IDS.numpy()}, LABELS.numpy())),
}


@pytest.mark.parametrize("make", SPLITS.values(), ids=SPLITS)
def test_every_form_gives_keyword_arguments(make):
    split = make()
    assert isinstance(split, Split)
    assert split.inputs.call == "(image=image, ids=ids)"
    assert split.inputs.batch == 1
    (images, ids), labels = gathered(split)
    assert torch.equal(images, IMAGES)
    assert torch.equal(ids, IDS)
    assert torch.equal(labels, LABELS)
    assert split.image(3).shape == (6, 5, 3)
    assert len(split.take(4)) == 4


def test_a_tuple_of_inputs_gives_positional_arguments():
    split = as_split(Items(lambda i: ((IMAGES[i], IDS[i]), int(LABELS[i]))))
    assert split.inputs.call == "(input_0, input_1)"
    inputs, labels = next(split.batches(4))
    assert isinstance(inputs, tuple)
    assert torch.equal(inputs[1], IDS[:4])
    assert torch.equal(labels, LABELS[:4])


def test_a_tuple_of_one_tensor_is_that_tensor():
    inputs, _ = next(as_split(Items(lambda i: ((IMAGES[i],), 1))).batches(4))
    assert torch.equal(inputs, IMAGES[:4])


def test_what_has_no_batch_is_given_to_each_call():
    inputs, _ = next(whole().batches(3))
    assert inputs["scale"] == 0.5
    assert torch.equal(inputs["table"], TABLE)
    inputs["image"].zero_()  # a network may write into its inputs
    inputs["table"].zero_()
    again, _ = next(whole().batches(3))
    assert torch.equal(again["image"], IMAGES[:3])
    assert torch.equal(again["table"], torch.arange(4.0))


def test_examples_are_shuffled_together():
    _, labels = gathered(whole(), seed=1)
    batches = [inputs for inputs, _ in whole().batches(4, seed=1)]
    images = torch.cat([inputs["image"] for inputs in batches])
    order = torch.cat([inputs["ids"] for inputs in batches])[:, 0] // 2
    assert not torch.equal(order, torch.arange(N))
    assert torch.equal(images, IMAGES[order])
    assert torch.equal(labels, LABELS[order])


def test_data_of_several_inputs_is_divided():
    data = as_data(Items(lambda i: (named(i), int(LABELS[i]))))
    assert len(data.train) + len(data.validation) + len(data.test) == N
    assert data.info().inputs == data.test.inputs
    assert hash_split(data.train) != hash_split(data.test)
    part = whole().part(torch.tensor([7, 2])).part(torch.tensor([1]))
    assert torch.equal(next(part.batches(2))[0]["image"], IMAGES[2:3])
    assert part.targets.tolist() == [LABELS[2]]


def test_items_that_change_are_kept():
    draws = iter(range(10**6))
    changing = DatasetSplit(
        Items(lambda i: {"x": IMAGES[i], "y": torch.tensor([next(draws) * 1.0])})
    )
    kept = repeatable(changing)
    assert isinstance(kept, TreeSplit)
    first, again = gathered(kept)[0], gathered(kept)[0]
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: as_split(
                Items(lambda i: {"x": IMAGES[i], "y": torch.tensor([float("nan") if i else 0.0])})
            ).take(3),
            "must be finite, got NaN or infinity at index",
        ),
        (
            lambda: as_split(Items(lambda i: {"x": IMAGES[i], "y": torch.zeros(1 + i // 4)})),
            r"of one shape, got x=3×6×5, y=2 at index 4 and x=3×6×5, y=1 before",
        ),
        (lambda: TreeSplit({"x": IMAGES}, LABELS[:3]), "3 targets for 10 inputs"),
        (lambda: TreeSplit({"x": IMAGES / 0}), "NaN or infinity in 'x'"),
    ],
)
def test_bad_examples_are_named(make, message):
    with pytest.raises(DataError, match=message):
        gathered(make(), seed=None)


def test_a_stage_for_one_tensor_says_so():
    with pytest.raises(NetworkInputError, match="train needs a network that takes one tensor"):
        tensor_batches(whole(), 4, stage="train")


def test_an_impossible_batch_is_refused_before_the_first_one_is_asked_for():
    split = TreeSplit({"x": torch.rand(4, 3)})
    with pytest.raises(OptionError, match="batch"):
        split.batches(0)


def test_inputs_with_their_targets_are_one_part_of_data():
    data = as_data(({"x": IMAGES, "ids": IDS}, LABELS))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8, 1, 1]
    assert data.classes == ("0", "1", "2")
    two = as_data(((torch.rand(N, 3), torch.rand(N, 2)), LABELS))
    assert two.inputs.call == "(input_0, input_1)"
    assert two.train.targets.shape == (8,)


def test_a_labelled_part_and_inputs_to_test_on_stay_two_parts():
    inputs = torch.rand(N, 3)
    data = as_data(((inputs, LABELS), torch.rand(4, 3)))
    assert (len(data.test), data.test.targets) == (4, None)
    assert data.inputs.is_single


def test_the_hash_of_tensors_in_memory_sees_each_value():
    many = torch.zeros(1000, 2)
    before = hash_split(TreeSplit({"x": torch.zeros(1000, 3), "y": many}))
    many[777, 1] = 1
    assert hash_split(TreeSplit({"x": torch.zeros(1000, 3), "y": many})) != before


def test_whole_numbers_are_pictures_too():
    depth = torch.arange(N * 12).reshape(N, 1, 3, 4)
    picture = TreeSplit({"depth": depth, "x": IMAGES}).image(2)
    assert picture.shape == (3, 4, 3)
    assert (picture.min(), picture.max()) == (0, 255)


def test_a_list_of_pictures_is_not_divided():
    pictures = TreeSplit({"images": [torch.rand(3, 4, 5) for _ in range(6)]}, torch.arange(6) % 3)
    ((whole, targets),) = pictures.batches(8)
    assert (len(whole["images"]), len(targets)) == (6, 6)
    for batches in (
        lambda: pictures.batches(4),
        lambda: pictures.batches(8, seed=0),
        lambda: pictures.take(3).batches(8),
    ):
        with pytest.raises(DataError, match=r"got a list of 6 pictures\. Stack them, or give"):
            batches()
