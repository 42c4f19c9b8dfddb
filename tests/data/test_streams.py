"""Pictures that stay in their files give the batches of the same pictures in memory."""

import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from onebyone.core.errors import DataError, OptionError
from onebyone.data import PictureSplit, TensorSplit, decoding, hashing, load_data, pictures
from onebyone.data import repeatable as in_memory
from onebyone.data.hashing import hash_data, hash_split
from onebyone.training.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index in range(40):
        path = place / ["cat", "dog", "emu"][index % 3] / f"{index}.{'png' if index % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        size = (20 + index, 33)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return place


@pytest.fixture(scope="module")
def both(folder):
    """The same folder in memory and streamed."""
    spec = f"imagefolder:{folder}"
    return load_data(spec, image_size=16), load_data(spec, image_size=16, workers=2)


def same_batches(one, other, size=5, **how):
    pairs = zip(one.batches(size, **how), other.batches(size, **how), strict=True)
    return all(
        torch.equal(a, b) and torch.equal(x, y) and a.stride() == b.stride()
        for (a, x), (b, y) in pairs
    )


def test_streamed_batches_are_those_of_memory(both):
    held, streamed = both
    assert isinstance(streamed.train, PictureSplit)
    assert isinstance(held.train, TensorSplit)
    for one, other in zip(
        (held.train, held.validation, held.test, held.train.take(9, 1)),
        (streamed.train, streamed.validation, streamed.test, streamed.train.take(9, 1)),
        strict=True,
    ):
        assert torch.equal(one.targets, other.targets)
        assert np.array_equal(one.image(-1), other.image(-1))
        assert same_batches(one, other)
        assert same_batches(one, other, seed=4)
        assert same_batches(one, other, seed=4, augment=True, channels_last=True)
    assert held.info() == streamed.info()


def test_a_folder_is_the_same_data_in_memory_and_streamed(both, monkeypatch):
    held, streamed = both
    part = held.train.take(9, 1), streamed.train.take(9, 1)
    assert hash_data(held) == hash_data(streamed)
    assert hash_split(part[0]) == hash_split(part[1]) != hash_split(held.train)
    whole = hash_data(held)
    monkeypatch.setattr(hashing, "WHOLE_BYTES", 1)
    monkeypatch.setattr(hashing, "SAMPLED", 8)
    assert hash_data(held) == hash_data(streamed) != whole


def test_one_changed_picture_is_other_data(both, folder, tmp_path):
    for path in folder.rglob("*.*"):
        copied = tmp_path / path.relative_to(folder)
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(path.read_bytes())
    spec = f"imagefolder:{tmp_path}"
    assert hash_data(load_data(spec, image_size=16, workers=1)) == hash_data(both[1])
    Image.new("RGB", (20, 20)).save(tmp_path / "cat" / "0.jpg")
    assert hash_data(load_data(spec, image_size=16, workers=1)) != hash_data(both[1])


def test_pictures_that_do_not_fit_are_streamed_and_it_is_said(folder, monkeypatch, caplog):
    monkeypatch.setattr(pictures, "free_bytes", lambda: 1_000_000)
    with caplog.at_level(logging.INFO, "onebyone.run"):
        data = load_data(f"imagefolder:{folder}")
    assert isinstance(data.train, PictureSplit)
    said = "40 pictures of 224×224 need 6.02 MB of memory, more than 60% of the 1.00 MB that are"
    assert said in caplog.text
    assert "decoded as they are used, by " in str(data)
    assert isinstance(load_data(f"imagefolder:{folder}", image_size=8).train, TensorSplit)
    # Of several processes each would hold them.
    monkeypatch.setattr(pictures, "processes_here", lambda: 100)
    assert isinstance(load_data(f"imagefolder:{folder}", image_size=8).train, PictureSplit)


def test_calibration_data_is_read_once_if_it_fits(both, monkeypatch):
    held, streamed = both
    few = in_memory(streamed.train.take(6, 0))
    assert isinstance(few, TensorSplit)
    assert same_batches(few, held.train.take(6, 0), seed=1, augment=True)
    monkeypatch.setattr(pictures, "free_bytes", lambda: 1000)
    assert in_memory(streamed.train) is streamed.train


def test_only_some_batches_are_decoded_ahead(both, monkeypatch):
    split, read = both[1].train, []
    original = decoding.read_picture
    monkeypatch.setattr(
        decoding, "read_picture", lambda *args, **how: read.append(1) or original(*args, **how)
    )
    monkeypatch.setattr(decoding, "AHEAD", 1)
    batches = split.batches(6)
    next(batches)
    batches.close()
    assert 6 <= len(read) <= 12
    assert not any(thread.name.startswith("onebyone-decode") for thread in threading.enumerate())


def test_a_broken_picture_is_named_when_it_is_reached(folder, tmp_path):
    for index in range(9):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{index}.png")
    data = load_data(f"imagefolder:{tmp_path}", image_size=8, workers=2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"\d\.png is not a picture in a supported format"):
        list(data.train.batches(2))
    assert not any(thread.name.startswith("onebyone-decode") for thread in threading.enumerate())


def test_a_share_of_the_batches_is_that_share(both):
    split = both[1].train
    how = {"seed": 3, "augment": True}
    shares = split.batches(5, **how, mine=lambda n: range(n // 2, n))
    for (inputs, targets), (some, their) in zip(split.batches(5, **how), shares, strict=True):
        half = len(inputs) // 2
        assert torch.equal(inputs[half:], some)
        assert torch.equal(targets[half:], their)


def test_training_gives_the_same_weights_bit_for_bit(both):
    def weights(data):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )
        return train(network, data, epochs=2, batch_size=8)

    held, streamed = map(weights, both)
    states = held.model.state_dict(), streamed.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert "(decoded as they are used, by 2 workers)" in streamed.log.waiting


def test_workers_are_for_pictures_in_files():
    with pytest.raises(OptionError, match="`workers` must be left out for digits: it is for"):
        load_data("digits", workers=2)
    with pytest.raises(OptionError, match="`workers`"):
        load_data("digits", workers=0)
