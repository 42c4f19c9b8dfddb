"""Whatever a file holds, a reader returns what it says, or names the file in an error of ours."""

from pathlib import Path

import numpy as np
import pytest
from cases import some
from hypothesis import given
from hypothesis import strategies as st
from strangers_files import (
    BYTES,
    PICKLES,
    damaged,
    idx_files,
    npy_files,
    onnx_files,
    packed,
    pictures,
    safetensors,
    state_dicts,
)

from onebyone import import_onnx
from onebyone.core.errors import OneByOneError
from onebyone.data.arrays import read_cifar_batch, read_idx, read_npy
from onebyone.data.pictures import fit_picture, open_picture
from onebyone.networks.zoo import read_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("strangers")


def read(reader, path: Path, content: bytes, **options):
    """Return what a reader gives, or ``None`` if it refuses the file and names it."""
    path.write_bytes(content)
    try:
        return reader(path, **options)
    except OneByOneError as error:
        assert path.name in str(error)
        assert len(str(error).splitlines()) == 1
        return None


@some(dearer=3)
@given(damaged(idx_files() | idx_files(dimensions=3)), st.integers(1, 3))
def test_idx(folder, content, dimensions):
    found = read(read_idx, folder / "x", content, dimensions=dimensions)
    if found is not None:
        assert content[4 + 4 * dimensions :] == found.tobytes()


@some(dearer=3)
@given(damaged(packed(idx_files(dimensions=1))))
def test_packed_idx(folder, content):
    found = read(read_idx, folder / "x.gz", content, dimensions=1)
    assert found is None or found.ndim == 1


@some(dearer=3)
@given(damaged(npy_files()) | BYTES)
def test_npy(folder, content):
    found = read(read_npy, folder / "x.npy", content)
    assert found is None or found.dtype.kind in "biuf"


@some(dearer=3)
@given(damaged(PICKLES) | BYTES)
def test_cifar_batches(folder, content):
    assert read(read_cifar_batch, folder / "data_batch_1", content) is None


@some(dearer=3)
@given(damaged(pictures()) | BYTES)
def test_pictures(folder, content):
    picture = read(open_picture, folder / "x.png", content, size=9)
    if picture is not None:
        assert picture.mode == "RGB"
        assert np.asarray(fit_picture(picture, (9, 7), crop=0.8).picture).shape == (9, 7, 3)


@some(dearer=3)
@given(damaged(safetensors()) | BYTES)
def test_safetensors(folder, content):
    found = read(read_weights, folder / "x.safetensors", content)
    assert found is None or sum(tensor.nbytes for tensor in found.values()) <= len(content)


@some(dearer=3)
@given(damaged(PICKLES | state_dicts()) | BYTES)
def test_pickled_weights(folder, content):
    found = read(read_weights, folder / "x.pt", content)
    assert found is None or all(tensor.isfinite().all() for tensor in found.values())


@some(dearer=10)
@given(damaged(onnx_files()))
def test_onnx(folder, content):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    network = read(import_onnx, folder / "net.onnx", content)
    assert network is None or all(p.isfinite().all() for p in network.parameters())
