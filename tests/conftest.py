"""What tests of several parts need."""

import pytest

from onebyone.data.named import data_directory


@pytest.fixture
def fashion_mnist():
    """Return the data set's name where its files are; elsewhere skip, and download nothing."""
    root = data_directory()[0]
    places = [root / place for place in ("fashion_mnist", "FashionMNIST/raw")]
    if not any(any(place.glob("train-images*")) for place in places):  # an empty folder is no data
        pytest.skip("Fashion-MNIST is not in the data directory")
    return "fashion-mnist"
