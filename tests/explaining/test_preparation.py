"""Picture files become the inputs that the network's data made of them."""

import numpy as np
import pytest
import timm.data
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.testing import assert_close

from onebyone.core.errors import DataError, OptionError
from onebyone.core.records import InputSpec, ModelSource, RunRecord, Status
from onebyone.data import Data, TensorSplit, load_data
from onebyone.explaining.preparation import find_preparation, prepare
from onebyone.runtimes import describe_machine

MEMORY = ModelSource(name="Net", spec=None)


def color_data(height=24, width=40):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 3, height, width)).astype(np.uint8)
    split = TensorSplit(
        torch.from_numpy(pixels), torch.arange(9) % 3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)
    )
    return Data(name="colors", train=split, validation=split, test=split, classes=("a", "b", "c"))


def first_input(split):
    return next(iter(split.batches(1)))[0][0]


@pytest.mark.parametrize("make", [color_data, lambda: load_data("digits", limit=20)])
def test_an_example_saved_as_a_file_is_the_example_again(make, tmp_path):
    data = make()
    Image.fromarray(data.test.image(0)).save(tmp_path / "x.png")
    known = find_preparation(nn.Identity(), MEMORY, data=data)
    prepared = prepare(tmp_path / "x.png", known.preparation)
    assert_close(prepared.tensor, first_input(data.test))
    assert known.classes == data.classes
    np.testing.assert_array_equal(prepared.seen, data.test.image(0))


def test_a_photograph_is_cut_and_scaled_as_the_image_folder_does(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            smooth = rng.integers(0, 256, (6, 9, 3)).astype(np.uint8)
            picture = Image.fromarray(smooth).resize((300, 190), Image.Resampling.BICUBIC)
            picture.save(tmp_path / "data" / name / f"{number}.jpg")
    data = load_data(f"imagefolder:{tmp_path / 'data'}", image_size=48)
    known = find_preparation(nn.Identity(), MEMORY, data=data)
    assert known.preparation.crop == 7 / 8
    inputs = {round(float(x.sum()), 2) for x, _ in data.train.batches(1)}
    inputs |= {round(float(x.sum()), 2) for x, _ in data.test.batches(1)}
    inputs |= {round(float(x.sum()), 2) for x, _ in data.validation.batches(1)}
    made = prepare(tmp_path / "data" / "cat" / "1.jpg", known.preparation).tensor
    assert any(abs(float(made.sum()) - each) < 0.05 for each in inputs)


def test_a_runs_record_says_how(tmp_path):
    data = color_data()
    record = RunRecord(
        onebyone="0", created="now", status=Status(state="finished", stage="compare"),
        source=MEMORY, machine=describe_machine(), data=data.info(),
    )  # fmt: skip
    record.save(tmp_path / "run.json")
    again = find_preparation(nn.Identity(), MEMORY, folder=tmp_path)
    assert again == find_preparation(nn.Identity(), MEMORY, data=data)
    # A run of before the record had it says nothing of the normalization.
    import dataclasses

    old = record.with_(data=dataclasses.replace(data.info(), mean=None, std=None))
    old.save(tmp_path / "run.json")
    with pytest.raises(OptionError, match="How pictures become inputs of Net is not known"):
        find_preparation(nn.Identity(), MEMORY, folder=tmp_path)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_torchvisions_networks_get_torchvisions_own_inputs(name):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
    picture = smooth.resize((300, 300), Image.Resampling.BICUBIC)
    source = ModelSource(name=name, spec=f"torchvision:{name}")
    known = find_preparation(nn.Identity(), source)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    assert_close(
        prepare(picture, known.preparation).tensor, weights.transforms()(picture), atol=0.02, rtol=0
    )
    assert known.classes[0] == "tench"


def test_timms_networks_get_timms_own_inputs():
    network = timm.create_model("resnet18")
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    ).resize((300, 300), Image.Resampling.BICUBIC)
    source = ModelSource(name="resnet18", spec="timm:resnet18")
    known = find_preparation(network, source)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(network.pretrained_cfg))
    assert_close(prepare(picture, known.preparation).tensor, transform(picture), atol=0.02, rtol=0)
    assert "tench" in known.classes[0]


def test_what_is_given_counts_before_what_is_known():
    data = color_data()
    how = find_preparation(
        nn.Identity(), MEMORY, data=data, mean=[0.5], std=[0.5], size=(8, 9)
    ).preparation
    assert (how.mean, how.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (how.height, how.width, how.channels) == (8, 9, 3)


def test_a_network_of_one_channel_sees_gray():
    how = find_preparation(
        nn.Identity(), MEMORY, mean=[0.0], std=[1.0], inputs=InputSpec.of_shape((1, 1, 6, 10))
    ).preparation
    picture = Image.new("RGB", (50, 30), (255, 0, 0))
    prepared = prepare(picture, how)
    assert prepared.tensor.shape == (1, 6, 10)
    assert_close(prepared.tensor, torch.full((1, 6, 10), 76 / 255))  # ITU-R 601 luma of red
    assert prepared.shown.shape[2] == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "not known.*0 and 1 leave pixels unchanged"),
        ({"mean": [0.0]}, "go together"),
        (
            {"mean": [0, 0], "std": [1, 1], "inputs": InputSpec.of_shape((1, 3, 8, 8))},
            "one finite number or 3",
        ),
        (
            {"mean": [0.0], "std": [0.0], "inputs": InputSpec.of_shape((1, 3, 8, 8))},
            "`std` must be above 0",
        ),
        ({"mean": [0.0], "std": [1.0]}, "size of an input"),
        (
            {"mean": [0.0], "std": [1.0], "inputs": InputSpec.of_shape((1, 5, 8, 8))},
            "1 or 3 channels",
        ),
        ({"mean": [0.0], "std": [1.0], "inputs": InputSpec.of_shape((1, 16))}, "Only pictures"),
        ({"mean": [0.0], "std": [1.0], "size": (0, 8)}, "of at least 1 pixel"),
        ({"mean": [0.0], "std": [1.0], "size": (10**6, 10**6)}, "178,956,970 pixels in all"),
        ({"mean": [0.0], "std": [1.0], "size": (9.5, 9)}, "height and a width of at least 1 pixel"),
        ({"mean": [float("nan")], "std": [1.0], "size": (9, 9)}, "finite number"),
        ({"mean": "abc", "std": "abc", "size": (9, 9)}, "finite number"),
    ],
)
def test_what_is_missing_or_wrong_is_said(given, message):
    with pytest.raises(OptionError, match=message):
        find_preparation(nn.Identity(), MEMORY, **given)


def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    how = find_preparation(nn.Identity(), MEMORY, mean=[0], std=[1], size=(8, 8)).preparation
    with pytest.raises(DataError, match=r"x\.png is not a picture in a supported format"):
        prepare(tmp_path / "x.png", how)
    with pytest.raises(DataError, match=r"nowhere\.png does not exist"):
        prepare(tmp_path / "nowhere.png", how)
