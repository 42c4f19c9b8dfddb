"""Reads arrays from idx, npy and CIFAR batch files without running code.

Before unpacking, it checks the memory against the file's size and the sizes in its header.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from onebyone.core.errors import DataError
from onebyone.core.memory import free_bytes
from onebyone.core.read_files import printable, reason_of, why_no_file
from onebyone.core.units import format_bytes

# The most bytes that one byte of a gzip file can unpack to (https://zlib.net/zlib_tech.html).
DEFLATE_RATIO = 1032
MOST_VALUES = 1 << 30  # 20 times those of MNIST
CHUNK = 1 << 20
CIFAR_BYTES = 100_000_000  # a batch has 31 MB; the whole of CIFAR-10 has 186


def read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes, as MNIST's; if its name ends in ``.gz``, it is unpacked.

    Args:
        path: The file.
        dimensions: Number of dimensions that it must have.

    Raises:
        DataError: If it is missing, not an idx file, cut short, or does not have the size that
            its header says; a packed file is not unpacked beyond that size.
    """
    with _errors_named(path):
        size = path.stat().st_size
        with _unpacked(path) as content:
            shape = _idx_shape(content, dimensions)
            count = math.prod(shape)
            if count > MOST_VALUES:
                raise ValueError(
                    f"it may have at most {MOST_VALUES:,} values, and its header promises "
                    f"{_sizes(shape)}"
                )
            if count > size * (DEFLATE_RATIO if path.suffix == ".gz" else 1):
                raise ValueError(
                    f"its header promises {_sizes(shape)} values, and {size:,} bytes cannot hold "
                    "so many"
                )
            _check_memory(count)
            values = np.empty(count, np.uint8)
            filled = _fill(content, values)
            if filled < count:
                raise ValueError(f"it ends after {filled:,} of {count:,} values")
            if content.read(1):
                raise ValueError(f"it goes on after the {count:,} values that its header promises")
            found = values.reshape(shape)  # fails for 0 × 2³² × 2³²: no values, but too large
    return found


def read_npy(path: Path) -> NDArray[Any]:
    """Read an ``.npy`` file of numbers; objects are refused because they could run code.

    Raises:
        DataError: If it is missing, not an npy file, cut short, or does not hold numbers.
    """
    with _errors_named(path), path.open("rb") as content:
        version = np.lib.format.read_magic(content)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"its version must be 1.0 or 2.0, got {version[0]}.{version[1]}")
        shape, _, dtype = read(content)
        if dtype.kind not in "biuf":
            raise ValueError(f"it must hold numbers, got {dtype}")
        needed, held = math.prod(shape) * dtype.itemsize, path.stat().st_size - content.tell()
        if needed != held or min(shape, default=0) < 0:
            raise ValueError(
                f"its header promises {_sizes(shape)} values of {dtype}, {needed:,} bytes, and it "
                f"holds {held:,}"
            )
        _check_memory(needed)
        content.seek(0)
        values: NDArray[Any] = np.lib.format.read_array(content, allow_pickle=False)
    return values


def read_cifar_batch(path: Path, *, md5: str | None = None) -> tuple[NDArray[np.uint8], list[int]]:
    """Read images ``(n, 3, 32, 32)`` and labels from one of CIFAR's pickled batches.

    A pickled file could run code; this reader only creates strings, numbers, lists and arrays.

    Args:
        path: The file.
        md5: Checksum of the published file.

    Raises:
        DataError: If it is missing, damaged or not a batch.
    """
    with _errors_named(path):
        size = path.stat().st_size
        if size > CIFAR_BYTES:
            raise ValueError(f"a batch has at most {CIFAR_BYTES:,} bytes, got {size:,}")
        written = path.read_bytes()
        if md5 is not None and hashlib.md5(written, usedforsecurity=False).hexdigest() != md5:
            raise ValueError("it is not the published file")
        content = _InertUnpickler(io.BytesIO(written), encoding="latin1").load()
        if not isinstance(content, dict) or not {"data", "labels"} <= content.keys():
            raise ValueError("it must hold `data` and `labels`")
        data, labels = content["data"], content["labels"]
        if not isinstance(data, _Array) or not isinstance(labels, list):
            raise TypeError("it must hold an array and a list of labels")
        images = data.values().reshape(-1, 3, 32, 32)
        if len(labels) != len(images) or not all(type(label) is int for label in labels):
            raise ValueError(f"it must hold a label for each of {len(images):,} images")
    return images, labels


# ---------------------------------------------------------------- parts


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Convert any error in this context into one that names the file and says what to do."""
    why = why_no_file(path)
    if why is not None:
        raise DataError(f"The file {printable(path)} {why}. Put it there, or download it.")
    try:
        yield
    except PermissionError as error:
        raise DataError(
            f"Cannot read {printable(path)}: {reason_of(error)}. Change its permissions."
        ) from error
    except Exception as error:  # a damaged file may raise anything in gzip, numpy and pickle
        raise DataError(
            f"Cannot read {printable(path)}: {reason_of(error)}. Download it again."
        ) from error


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as written:
        if path.suffix != ".gz":
            yield written
            return
        with gzip.GzipFile(fileobj=written) as content:
            yield cast("IO[bytes]", content)


def _idx_shape(content: IO[bytes], dimensions: int) -> tuple[int, ...]:
    # Two zero bytes, the type (8: uint8), the number of dimensions; then each as big-endian.
    magic = content.read(4)
    if magic[:3] != b"\x00\x00\x08":
        raise ValueError("it is not an idx file of bytes")
    if magic[3:] != bytes([dimensions]):
        raise ValueError(f"it must have {dimensions} dimensions, got {list(magic[3:])}")
    sizes = content.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise ValueError("it ends within its header")
    return tuple(int(size) for size in np.frombuffer(sizes, ">u4"))


def _fill(content: IO[bytes], values: NDArray[np.uint8]) -> int:
    """Read into an array; its unfilled part takes no memory."""
    view, filled = values.data, 0
    while filled < len(values):
        part = content.read(min(CHUNK, len(values) - filled))
        if not part:
            break
        view[filled : filled + len(part)] = part
        filled += len(part)
    return filled


def _check_memory(needed: int) -> None:
    free = free_bytes()
    if free is not None and needed > free:
        raise ValueError(
            f"it needs {format_bytes(needed)} of memory, and {format_bytes(free)} are free"
        )


def _sizes(shape: tuple[int, ...]) -> str:
    return "×".join(f"{size:,}" for size in shape) or "1"


class _Array:
    """The raw state of a pickled numpy array."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def values(self) -> NDArray[np.uint8]:
        """Return the array if it consists of bytes in C order, else raise."""
        _, shape, dtype, fortran, content = self.state
        if not isinstance(dtype, _Type) or dtype.name != "u1" or fortran:
            raise ValueError("its images must be bytes")
        if isinstance(content, str):  # written by Python 2
            content = content.encode("latin1")
        values = np.frombuffer(content, np.uint8)
        if len(shape) != 2 or shape[1] != 3072 or values.size != math.prod(shape):
            raise ValueError(f"its images must have 3,072 values each, got {_sizes(shape)}")
        return values.reshape(shape).copy()


class _Type:
    """The name of a pickled numpy type."""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise ValueError(f"it must be written in latin1, got {encoding!r}")
    return codecs.encode(text, "latin1")


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
}


class _InertUnpickler(pickle.Unpickler):
    """Creates builtin values, and our own inert classes instead of numpy's."""

    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, which no CIFAR batch has and which could run code"
            )
        return found
