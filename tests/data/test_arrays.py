"""Arrays from strangers' files: bounded by their headers, and never code."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from onebyone.core.errors import DataError
from onebyone.data import arrays
from onebyone.data.arrays import read_cifar_batch, read_idx, read_npy


def header(*shape: int, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(shape)]) + b"".join(struct.pack(">I", size) for size in shape)


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["x", "x.gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (header(2, 2, kind=13) + bytes(16), "not an idx file"),
        (header(2) + bytes(2), r"must have 2 dimensions, got \[1\]"),
        (header(2, 2)[:7], "ends within its header"),
        (header(2, 2) + bytes(3), "ends after 3 of 4 values"),
        (header(2, 2) + bytes(5), "goes on after the 4 values"),
        (header(2**32 - 1, 2**32 - 1), "may have at most 1,073,741,824 values"),
        (header(30_000, 30_000) + bytes(9), "cannot hold so many"),
    ],
)
def test_an_idx_file_holds_just_what_its_header_says(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"Cannot read .*{name}: .*{message}.*Download it again"):
        read_idx(path, dimensions=2)


def test_sizes_that_no_array_has_are_refused_though_their_product_is_zero(tmp_path):
    path = write(tmp_path / "x", header(0, 2**32 - 1, 2**32 - 1))
    with pytest.raises(DataError, match=r"Cannot read .*x: array is too big"):
        read_idx(path, dimensions=3)


def test_a_packed_file_is_not_unpacked_beyond_its_header(tmp_path, monkeypatch):
    path = write(tmp_path / "bomb.gz", header(2, 2) + bytes(50_000_000))
    assert path.stat().st_size < 100_000
    read = []
    original = gzip.GzipFile.read
    monkeypatch.setattr(
        gzip.GzipFile,
        "read",
        lambda self, size=-1: read.append(part := original(self, size)) or part,
    )
    with pytest.raises(DataError, match="goes on after the 4 values"):
        read_idx(path, dimensions=2)
    assert sum(map(len, read)) == 4 + 8 + 4 + 1


def test_an_idx_file_that_the_memory_does_not_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "free_bytes", lambda: 1000)
    path = write(tmp_path / "x", header(40, 40) + bytes(1600))
    with pytest.raises(DataError, match=r"needs 1\.60 kB of memory, and 1\.00 kB are free"):
        read_idx(path, dimensions=2)


def test_an_npy_file_comes_back(tmp_path):
    for values in (np.arange(6).reshape(2, 3), np.ones(4, np.float16), np.array([], np.uint8)):
        np.save(tmp_path / "x.npy", values)
        np.testing.assert_array_equal(read_npy(tmp_path / "x.npy"), values)


def test_objects_and_archives_and_forged_sizes_are_no_npy_file(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="must hold numbers, got object"):
        read_npy(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", np.ones(3))
    with pytest.raises(DataError, match=r"x\.npz: the magic string is not correct"):
        read_npy(tmp_path / "x.npz")
    np.save(tmp_path / "x.npy", np.ones(3))
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content.replace(b"(3,), }    ", b"(9999999,),}"[:11]))
    with pytest.raises(DataError, match="Cannot read"):
        read_npy(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(content[:-8])
    with pytest.raises(DataError, match="3 values of float64, 24 bytes, and it holds 16"):
        read_npy(tmp_path / "x.npy")


def batch(n: int = 3, **changed):
    images = np.random.default_rng(0).integers(0, 256, (n, 3072)).astype(np.uint8)
    return {"data": images, "labels": list(range(n)), "batch_label": "b", **changed}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_batch_of_cifar_comes_back(tmp_path, protocol):
    (tmp_path / "b").write_bytes(pickle.dumps(batch(), protocol=protocol))
    images, labels = read_cifar_batch(tmp_path / "b")
    assert labels == [0, 1, 2]
    np.testing.assert_array_equal(images.reshape(3, -1), batch()["data"])


class Evil:
    def __reduce__(self):
        return os.system, ("exit",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(batch(labels=Evil())), r"refers to posix\.system"),
        (pickle.dumps(torch.ones(2)), r"refers to torch\._utils"),
        (pickle.dumps([]), "must hold `data` and `labels`"),
        (pickle.dumps(batch(labels=[1])), "a label for each of 3"),
        (pickle.dumps(batch(labels=["a"] * 3)), "a label for each of 3"),
        (pickle.dumps(batch(data=np.ones((3, 3072)))), "must be bytes"),
        (pickle.dumps(batch(data=np.ones((3, 9), np.uint8))), "3,072 values each, got 3×9"),
        (pickle.dumps(batch(data=[1])), "an array and a list"),
        (pickle.dumps(batch())[:-9], "truncated|ran out"),
        (b"garbage", "Cannot read"),
    ],
)
def test_nothing_but_a_batch_is_made_of_a_pickle(tmp_path, content, message):
    (tmp_path / "b").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_cifar_batch(tmp_path / "b")


def test_a_batch_must_be_the_published_one(tmp_path):
    (tmp_path / "b").write_bytes(pickle.dumps(batch()))
    with pytest.raises(DataError, match="not the published file"):
        read_cifar_batch(tmp_path / "b", md5="0" * 32)


def test_a_file_that_is_missing_is_not_called_damaged(tmp_path):
    with pytest.raises(DataError, match=r"x does not exist\. Put it there"):
        read_idx(tmp_path / "x", dimensions=1)
    with pytest.raises(DataError, match="is a folder"):
        read_npy(tmp_path)
