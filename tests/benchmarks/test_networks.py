"""The factories of the pretrained networks: their weights fit strictly, and they do what is said."""

import os
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DATA = Path(os.environ.get("ONEBYONE_DATA", "../shared/data"))

pytestmark = pytest.mark.skipif(
    not (DATA / "weights").is_dir(), reason="needs the pretrained weights: set ONEBYONE_DATA"
)


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_in_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_the_nin_classifies_as_published_with_its_weights():
    import cifar10_data
    import networks

    network, data = networks.cifar10_nin(), cifar10_data.cifar10_nin_statistics()
    right = 0
    with torch.no_grad():
        for inputs, labels in data.test.batches(250):
            right += int((network(inputs).argmax(1) == labels).sum())
    assert right == 855


def test_the_denoiser_denoises_as_published_with_its_weights():
    import dncnn
    import networks

    # The smallest of the twelve pictures are enough to see that weights and noise are right.
    test = dncnn.Pictures(dncnn.pictures("Set12"), seed=0).take(3)
    network = networks.dncnn_sigma25()
    with torch.no_grad():
        gains = [
            float(dncnn.psnr(network(noisy), clean) - dncnn.psnr(noisy, clean))
            for noisy, clean in test.batches(1)
        ]
    assert len(gains) == 3
    assert min(gains) > 8  # dB


def test_the_imagenet_networks_run_on_their_own_sizes():
    import networks

    for make in (networks.imagenet_squeezenet1_0, networks.imagenet_tiny_darknet):
        network = make()
        with torch.no_grad():
            scores = network(torch.randn(1, *network.input_shape))
        assert scores.shape == (1, 1000)
        assert scores.std() > 0.01


def test_calibration_patches_and_test_pictures_do_not_mix():
    import dncnn

    data = dncnn.denoising()
    assert len(data.test) == 12
    assert {tuple(x.shape[2:]) for x, _ in data.test.batches(1)} == {(256, 256), (512, 512)}
    noisy, clean = next(data.train.batches(64))
    assert noisy.shape == clean.shape == (64, 1, 64, 64)
    assert abs(float((noisy - clean).std()) - dncnn.SIGMA) < 1e-3
