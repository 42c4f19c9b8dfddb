import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import Dataset, TensorDataset

from onebyone.core.errors import DataError
from onebyone.core.records import InputSpec
from onebyone.data import Augmentation, Data, DatasetSplit, Split, TensorSplit
from onebyone.data.splits import held_out

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def pixels(n: int = 10, channels: int = 3, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def split(n: int = 10, **options) -> TensorSplit:
    return TensorSplit(pixels(n), torch.arange(n) % 3, mean=MEAN, std=STD, **options)


def collected(part: Split, **options) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*part.batches(4, **options), strict=True)
    return torch.cat(inputs), torch.cat(targets)


class Items(Dataset):
    def __init__(self, n: int = 10, item=None) -> None:
        self.n, self.item = n, item

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        if self.item is not None:
            return self.item
        return torch.full((1, 4, 4), float(index)), index


def test_both_kinds_are_splits():
    assert isinstance(split(), Split)
    assert isinstance(DatasetSplit(Items()), Split)


def test_batches_are_standardized_by_channel():
    inputs, targets = collected(split())
    wanted = (
        pixels().double() / 255 - torch.tensor(MEAN).double().view(1, 3, 1, 1)
    ) / torch.tensor(STD).double().view(1, 3, 1, 1)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert_close(inputs.double(), wanted, rtol=0, atol=1e-5)


def test_standardizing_by_its_own_statistics_gives_mean_zero_and_deviation_one():
    scaled = pixels(50).double() / 255
    part = TensorSplit(
        pixels(50), mean=scaled.mean((0, 2, 3)).tolist(), std=scaled.std((0, 2, 3)).tolist()
    )
    inputs, _ = collected(part)
    assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert_close(inputs.std((0, 2, 3)), torch.ones(3), rtol=1e-4, atol=0)


def test_floating_point_inputs_pass_unchanged_and_are_not_shared_with_the_network():
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    kept = values.clone()
    part = TensorSplit(values)
    for inputs, _ in part.batches(2):
        inputs.zero_()
    assert_close(values, kept, rtol=0, atol=0)
    assert_close(collected(part)[0], kept, rtol=0, atol=0)


def test_float_images_are_standardized_without_changing_them():
    values = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    kept = values.clone()
    inputs, _ = collected(TensorSplit(values, mean=MEAN, std=STD))
    wanted = (kept - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert_close(inputs, wanted)
    assert_close(values, kept, rtol=0, atol=0)


def test_without_a_seed_examples_come_in_order():
    assert collected(split())[1].tolist() == [index % 3 for index in range(10)]


def test_the_same_seed_is_the_same_order_and_augmentation_and_another_is_not():
    part = TensorSplit(pixels(40), torch.arange(40), augmentation=Augmentation.named("crop-flip"))
    first, second = (collected(part, seed=1, augment=True) for _ in range(2))
    other = collected(part, seed=2, augment=True)
    assert_close(first, second, rtol=0, atol=0)
    assert first[1].tolist() != other[1].tolist()
    assert sorted(first[1].tolist()) == list(range(40))


def test_inputs_keep_their_targets_when_shuffled():
    values = torch.arange(20.0)[:, None]
    inputs, targets = collected(TensorSplit(values, torch.arange(20)), seed=3)
    assert_close(inputs[:, 0], targets.float())


def test_shuffling_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    for part in (split(augmentation=Augmentation(flip=True)), DatasetSplit(Items())):
        collected(part, seed=1, augment=True)
        part.take(3, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_channels_last_is_the_same_batch_in_another_layout():
    plain, _ = collected(split(), seed=1)
    batches = [inputs for inputs, _ in split().batches(4, seed=1, channels_last=True)]
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    assert_close(torch.cat(batches), plain, rtol=0, atol=0)


def test_take_is_reproducible_without_repeats_and_at_most_all():
    part = TensorSplit(torch.arange(30.0)[:, None], torch.arange(30))
    first, second = part.take(8, 4), part.take(8, 4)
    assert first.targets.tolist() == second.targets.tolist()
    assert len(set(first.targets.tolist())) == 8
    assert part.take(8, 5).targets.tolist() != first.targets.tolist()
    assert len(part.take(1000, 1)) == 30
    assert_close(collected(first)[0][:, 0], first.targets.float())
    inner = first.take(3, 0)
    assert set(inner.targets.tolist()) < set(first.targets.tolist())


def test_parts_share_memory():
    whole = split()
    assert whole.take(5)._inputs.data_ptr() == whole._inputs.data_ptr()


def test_pictures_are_the_stored_pixels():
    assert np.array_equal(split().image(2), pixels()[2].permute(1, 2, 0).numpy())
    grey = TensorSplit(pixels(channels=1)).image(-1)
    assert grey.shape == (6, 6, 3)
    assert np.array_equal(grey[..., 0], pixels(channels=1)[-1, 0].numpy())
    part = split().take(4, 1)
    row = int(part._rows[3])
    assert np.array_equal(part.image(3), split().image(row))


def test_floats_are_stretched_into_pictures_and_vectors_are_none():
    image = TensorSplit(torch.rand(2, 1, 4, 4) * 7 - 3).image(0)
    assert (image.min(), image.max()) == (0, 255)
    assert TensorSplit(torch.rand(2, 5)).image(0) is None
    assert DatasetSplit(Items()).image(1).shape == (4, 4, 3)


def test_without_targets_batches_have_empty_ones():
    (_, targets), *_ = TensorSplit(torch.rand(3, 2)).batches(3)
    assert targets.shape == (3, 0)


def test_a_dataset_comes_in_batches_with_its_targets():
    part = DatasetSplit(Items())
    assert part.inputs == InputSpec.of_shape((1, 1, 4, 4))
    inputs, targets = collected(part, seed=7)
    assert sorted(targets.tolist()) == list(range(10))
    assert_close(inputs[:, 0, 0, 0], targets.float())
    assert collected(part, seed=7)[1].tolist() == targets.tolist()
    assert sorted(collected(part.take(4, 2))[1].tolist()) == sorted(
        collected(part.take(4, 2), seed=1)[1].tolist()
    )


def test_a_datasets_targets_are_known_where_it_has_them():
    class Labelled(Items):
        targets = tuple(range(10))

    class Transformed(Labelled):
        target_transform = staticmethod(lambda label: label + 1)

    assert DatasetSplit(Labelled()).targets.tolist() == list(range(10))
    assert DatasetSplit(Transformed()).targets is None
    assert DatasetSplit(Items()).targets is None


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Items(0), "at least one example"),
        (Items(item=("text", 1)), "floating-point input, got"),
        (Items(item=(torch.ones(2, dtype=torch.uint8), 1)), "a tensor of torch.uint8"),
        (Items(item=(torch.ones(2), 1, 2)), "got 3 parts"),
        (iter([1]), "must be map-style"),
    ],
)
def test_unfit_datasets_are_refused(dataset, message):
    with pytest.raises(DataError, match=message):
        DatasetSplit(dataset)


class Failing(Items):
    def __getitem__(self, index):
        if index == 7:
            raise OSError("the disk is on fire")
        return super().__getitem__(index)


class OfManySizes(Items):
    def __getitem__(self, index):
        return torch.zeros(1, 5 + index, 4), 0


class Pictures(Items):
    def __getitem__(self, index):
        return Image.new("RGB", (5, 4)), 0


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Failing(),
            r"data set Failing .* failed at index 7: the disk is on fire .*OSError.*Fix the data set",
        ),
        (OfManySizes(), r"stack expects each tensor to be equal size.*Resize all inputs"),
        (Pictures(), r"found <class 'PIL.Image.Image'> .*Add a transform such as .*ToTensor"),
    ],
)
def test_what_a_data_set_raises_is_said_to_be_its_own(dataset, message):
    with pytest.raises(DataError, match=message):
        list(DatasetSplit(dataset).take(9).batches(4))


def test_held_out_parts_are_disjoint_and_complete_and_proportional():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    rest, held = held_out(100, 20, seed=1, targets=labels)
    assert sorted(rest.tolist() + held.tolist()) == list(range(100))
    assert torch.bincount(labels[held]).tolist() == [12, 6, 2]
    assert held_out(100, 20, seed=1, targets=labels)[1].tolist() == held.tolist()
    assert held_out(100, 20, seed=2, targets=labels)[1].tolist() != held.tolist()
    with pytest.raises(DataError, match="both must have at least one"):
        held_out(1, 1, seed=0)


def test_data_prints_and_describes_itself():
    data = Data(name="toy", train=split(), validation=split(4), test=split(3), classes=tuple("abc"))
    assert str(data) == "toy: 10 to train, 4 to choose, 3 to test, 3×6×6, 3 classes"
    info = data.info()
    assert (info.train, info.validation, info.test) == (10, 4, 3)
    assert info.inputs == InputSpec.of_shape((1, 3, 6, 6)) == data.inputs


def test_a_tensor_dataset_serves_as_a_dataset_too():
    inputs, _ = collected(DatasetSplit(TensorDataset(torch.ones(3, 2))))
    assert inputs.shape == (3, 2)
