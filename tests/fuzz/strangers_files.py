"""Files as strangers send them: right ones, damaged ones, and ones that lie in their headers.

Each strategy gives the bytes of one file. A law for all of them: the reader either returns what
the bytes say or raises an error of ours that names the file.
"""

import gzip
import io
import json
import pickle
import struct
import zlib

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

BYTES = st.binary(max_size=200)
SIZES = st.one_of(st.integers(0, 40), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1, 60_000]))


@st.composite
def damaged(draw, contents):
    """Change, cut or lengthen some bytes of a file, or leave it as it is."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 3))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    kind = draw(st.sampled_from(["whole", "whole", "cut", "longer"]))
    if kind == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    if kind == "longer":
        content += draw(BYTES)
    return bytes(content)


@st.composite
def idx_files(draw, *, dimensions=None):
    """Return an idx file of bytes whose header mostly says what follows."""
    count = draw(st.integers(0, 5)) if dimensions is None else dimensions
    shape = draw(st.lists(SIZES, min_size=count, max_size=count))
    total = int(np.prod([min(size, 50) for size in shape], dtype=object)) if shape else 1
    head = b"\0\0\x08" + bytes([count]) + b"".join(struct.pack(">I", size) for size in shape)
    return head + draw(st.binary(min_size=0, max_size=8)) + bytes(min(total, 3000))


@st.composite
def packed(draw, contents):
    """Return a gzip file, perhaps of several members, or with zeros without end behind it."""
    content = draw(contents) + bytes(draw(st.sampled_from([0, 0, 1, 5_000_000])))
    level = draw(st.sampled_from([0, 9]))
    return gzip.compress(content, level) + draw(st.sampled_from([b"", gzip.compress(b"x"), b"?"]))


@st.composite
def npy_files(draw):
    """Return an npy file whose header mostly says what follows."""
    dtype = draw(st.sampled_from(["<i8", "|u1", "<f4", ">f8", "|O", "<U3", "|b1", "<M8[s]"]))
    shape = tuple(draw(st.lists(SIZES, max_size=3)))
    described = draw(
        st.sampled_from(
            [
                repr({"descr": dtype, "fortran_order": False, "shape": shape}),
                repr({"descr": dtype, "fortran_order": True, "shape": shape}),
                repr({"descr": dtype, "shape": shape}),
                repr({"descr": dtype, "fortran_order": False, "shape": (-1, 2)}),
                "(" * 200,
                "{" + "[" * 3000,
                "[]",
                "",
            ]
        )
    ).encode()
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(described) + 1) + described + b"\n"
    return head + draw(BYTES)


def _png(width, height, content):
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width % 2**32, height % 2**32, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(content)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


@st.composite
def pictures(draw):
    """Return a picture of any kind that is read, or one that lies about its size."""
    if draw(st.integers(0, 4)) == 0:
        return _png(draw(SIZES), draw(SIZES), draw(BYTES))
    size = draw(st.sampled_from([(1, 1), (1, 40), (40, 1), (13, 17), (3, 200)]))
    kind, mode = draw(
        st.sampled_from(
            [
                ("PNG", "RGB"),
                ("PNG", "P"),
                ("PNG", "LA"),
                ("PNG", "RGBA"),
                ("PNG", "I;16"),
                ("PNG", "1"),
                ("JPEG", "RGB"),
                ("JPEG", "L"),
                ("JPEG", "CMYK"),
                ("GIF", "P"),
                ("BMP", "RGB"),
                ("PPM", "RGB"),
                ("TIFF", "F"),
                ("TIFF", "RGB"),
                ("WEBP", "RGBA"),
            ]
        )
    )
    picture = Image.new(mode, size, draw(st.integers(0, 255)) if len(mode) == 1 else 0)
    options = {}
    if kind == "JPEG" and draw(st.booleans()):
        options["exif"] = b"Exif\0\0" + draw(BYTES)
    picture.save(content := io.BytesIO(), kind, **options)
    return content.getvalue()


@st.composite
def safetensors(draw):
    """Return a safetensors file whose header mostly says what follows."""
    dtypes = st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "BOOL", "C64", "F4", "X"])
    entries = {}
    for name in draw(
        st.lists(st.sampled_from(["weight", "bias", "a.b", "", "\u2028"]), max_size=3)
    ):
        start = draw(st.integers(-1, 40))
        entries[name] = {
            "dtype": draw(dtypes),
            "shape": draw(st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**40, 1.5]), max_size=3)),
            "data_offsets": [start, start + draw(st.integers(-4, 16))],
        }
    head = draw(
        st.sampled_from(
            [
                json.dumps(entries),
                json.dumps(entries)[:-1] + (", " if entries else "") + '"weight": {}}',
                json.dumps({**entries, "__metadata__": {"a": 1}}),
                '{"weight": ' * 300,
                "[]",
                "",
            ]
        )
    ).encode()
    length = draw(st.sampled_from([len(head)] * 4 + [0, 2**63, len(head) + 9]))
    return struct.pack("<Q", length) + head + draw(BYTES)


def _pickled():
    values = st.recursive(
        st.none() | st.integers() | st.text(max_size=4) | st.binary(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=6,
    )
    return st.builds(pickle.dumps, values, protocol=st.integers(0, 5))


PICKLES = _pickled()
"""Pickles of builtin values, of any protocol."""


@st.composite
def state_dicts(draw):
    """Return what ``torch.save`` writes of a checkpoint, in either format."""
    state = {
        name: torch.ones(draw(st.lists(st.integers(0, 3), max_size=2)), dtype=dtype)
        for name, dtype in draw(
            st.dictionaries(st.text(max_size=3), st.sampled_from([torch.float32, torch.int64]))
        ).items()
    }
    content = draw(st.sampled_from([state, {"state_dict": state}, {"ema": state, "epoch": 1}, []]))
    torch.save(content, saved := io.BytesIO(), _use_new_zipfile_serialization=draw(st.booleans()))
    return saved.getvalue()


@st.composite
def onnx_files(draw):
    """Return an ONNX file of a few nodes whose attributes and sizes mostly fit each other."""
    from onnx import TensorProto, helper, numpy_helper

    def pair(low=0, high=3):
        return [draw(st.integers(low, high)) for _ in range(2)]

    def constant(name, array):
        return numpy_helper.from_array(np.asarray(array), name)

    kernel = draw(st.sampled_from([(4, 3, 1, 1), (4, 3, 3, 3), (4, 1, 3, 3)]))
    convolution = helper.make_node(
        "Conv", ["x", "w"], ["a"], "first",
        pads=2 * pair(), strides=pair(1), dilations=pair(1, 2), group=draw(st.sampled_from([1, 1, 3])),
    )  # fmt: skip
    second = draw(
        st.sampled_from(
            [
                helper.make_node("Relu", ["a"], ["b"], "second"),
                helper.make_node("Clip", ["a", "low", "high"], ["b"], "second"),
                helper.make_node("MaxPool", ["a"], ["b"], "second", kernel_shape=pair(1)),
                helper.make_node("Add", ["a", "bias"], ["b"], "second"),
                helper.make_node("Transpose", ["a"], ["b"], "second", perm=[0, 2, 3, 1]),
            ]
        )
    )
    third = draw(
        st.sampled_from(
            [
                helper.make_node("Reshape", ["b", "s"], ["y"], "third"),
                helper.make_node("ReduceMean", ["b"], ["y"], "third", keepdims=0),
                helper.make_node("Slice", ["b", "zero", "s"], ["y"], "third"),
            ]
        )
    )
    weights = [
        constant("w", np.ones(kernel, np.float32)),
        constant("low", np.float32(0)),
        constant("high", np.float32(6)),
        constant("bias", np.ones((4, 1, 1), np.float32)),
        constant("zero", np.zeros(2, np.int64)),
        constant("s", np.array(draw(st.sampled_from([[1, -1], [0, -1], [4, 4], [-1, 2]])))),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [convolution, second, third],
        "net",
        [value("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [value("y", TensorProto.FLOAT, None)],
        weights,
    )
    opsets = [helper.make_opsetid("", draw(st.sampled_from([11, 13, 17])))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
