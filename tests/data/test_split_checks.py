"""What does not fit a split is refused by name, with what to do."""

import pytest
import torch

from onebyone.core.errors import DataError, OptionError
from onebyone.data import Augmentation, Data, TensorSplit

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def pixels(n: int = 10, channels: int = 3, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def split(n: int = 10, **options) -> TensorSplit:
    return TensorSplit(pixels(n), torch.arange(n) % 3, mean=MEAN, std=STD, **options)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.rand(0, 3), None, "at least one example, got 0"),
        (torch.rand(3), None, r"must be of shape \(n, …\)"),
        (torch.rand(3, 2), torch.zeros(2), "2 targets for 3 inputs"),
        (torch.rand(3, 2), torch.tensor(1), "1 targets for 3 inputs"),
        (torch.ones(3, 2, dtype=torch.int64), None, r"uint8 or floating point .*, got torch.int64"),
        (torch.ones(3, 8, 8, 3, dtype=torch.uint8), None, "whose channels come last"),
        (torch.ones(3, 8, 8, dtype=torch.uint8), None, r"give `inputs\[:, None\]`"),
        (torch.tensor([[1.0], [float("nan")]]), None, "NaN or infinity in example 1"),
    ],
)
def test_unfit_tensors_are_refused(inputs, targets, message):
    with pytest.raises(DataError, match=message):
        TensorSplit(inputs, targets)


def test_unfit_statistics_and_options_are_refused():
    with pytest.raises(OptionError, match="a value for each of the 3 channels"):
        TensorSplit(pixels(), mean=(0.5,), std=(0.5,))
    with pytest.raises(OptionError, match="`std` above 0 in every channel"):
        TensorSplit(pixels(), mean=MEAN, std=(1, 0, 1))
    with pytest.raises(OptionError, match="Only images with a label each"):
        TensorSplit(pixels(), pixels(), augmentation=Augmentation(flip=True))
    with pytest.raises(OptionError, match="`batch_size` must be at least 1, got 0"):
        split().batches(0)
    with pytest.raises(OptionError, match="needs a `seed`"):
        split().batches(2, augment=True)
    with pytest.raises(OptionError, match="`n` must be at least 1"):
        split().take(0)


def test_data_of_different_shapes_or_with_labels_beyond_the_classes_is_refused():
    small = TensorSplit(pixels(size=4), torch.zeros(10, dtype=torch.int64))
    with pytest.raises(DataError, match="`test` has 3×4×4"):
        Data(name="toy", train=split(), validation=split(), test=small)
    with pytest.raises(DataError, match=r"labels of `train` must lie in 0…1.*got 0…2"):
        Data(name="toy", train=split(), validation=split(), test=split(), classes=("a", "b"))
