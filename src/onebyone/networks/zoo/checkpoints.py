"""Reads files of weights safely: runs no code, limits the memory, and explains what is wrong."""

from __future__ import annotations

import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from onebyone.core.errors import WeightsError
from onebyone.core.read_files import printable, reason_of, why_no_file
from onebyone.core.shared_state import warnings_ignored
from onebyone.core.units import format_bytes

PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".tar")
ENDINGS = ".safetensors, .pt, .pth, .bin, .ckpt or .tar"
# PyTorch does not compress tensors; a compressed archive unpacks to a few times its size.
MOST_TIMES = 20
# A shared tensor counts once for each name, and a view may repeat a few values.
SPARE_BYTES = 1 << 20
MOST_HEADER = 100_000_000  # bytes, the limit of safetensors itself
DEEPEST = 3  # levels of dictionaries around the tensors
LISTED = 6

_ENTRY = "['state_dict']"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_TO_THE_END = "Was it copied or downloaded to the end?"
_REFUSED = re.compile(r"Unsupported (?:global: GLOBAL|class) (\S+)")
_BEGINNINGS = {
    b"version https://git-lfs": (
        "is a Git LFS pointer, not the file itself. Get the file with: git lfs pull"
    ),
    b"<": "is a web page, not weights. Download the file itself.",
    b"\x89HDF": "is an HDF5 file, as Keras writes. Convert it to a state dict of PyTorch.",
    b"GGUF": "is a GGUF file. Convert it to a state dict of PyTorch.",
}
_CHECKED = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Read a file's named tensors onto the CPU; see :func:`onebyone.networks.zoo.read_weights`."""
    why = why_no_file(file)
    if why is not None:
        raise WeightsError(f"Cannot read weights: {printable(file)} {why}. Give a file of weights.")
    if file.suffix == ".safetensors":
        state = _read_safetensors(file)
    elif file.suffix in PICKLED:
        state = _unwrapped(_read_pickled(file), file)
    else:
        raise WeightsError(
            f"Weights must be a file that ends in {ENDINGS}, got {printable(file.name)}."
        )
    if not state:
        raise WeightsError(f"{printable(file)} holds no tensors.")
    _check_bytes(state, file)
    for name, tensor in state.items():
        _check_tensor(name, tensor, file)
    return state


# ---------------------------------------------------------------- safetensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    _check_beginning(file)
    try:
        _check_header(file)
        tensors: dict[str, Tensor] = load_file(file)
    except Exception as error:  # it may raise anything for a damaged header
        raise WeightsError(
            f"{printable(file)} cannot be read as safetensors: {_reason(error)}. {_TO_THE_END}"
        ) from error
    return tensors


def _check_header(file: Path) -> None:
    """Check what safetensors does not: that each name occurs once and the header is UTF-8."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = struct.unpack("<Q", content.read(8).ljust(8, b"\xff"))[0]
        if length > min(size - 8, MOST_HEADER):
            raise ValueError(
                f"its header must lie in its {size:,} bytes, and ends after {length:,}"
            )
        json.loads(content.read(length).decode("utf-8"), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header has {twice!r} twice")
    return found


# ---------------------------------------------------------------- pickled


def _read_pickled(file: Path) -> Any:
    _check_beginning(file)
    try:
        _check_archive(file)
        with warnings_ignored():
            # It warns of old formats but reads them.
            return torch.load(file, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # it may raise anything for a damaged file
        raise WeightsError(_why_unread(file, error)) from error


def _check_archive(file: Path) -> None:
    """Refuse an archive that unpacks to far more than its size; PyTorch does not compress."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = file.stat().st_size
    if unpacked > MOST_TIMES * size:
        raise WeightsError(
            f"{printable(file)} must not unpack to more than {MOST_TIMES} times its "
            f"{format_bytes(size)}, but unpacks to {format_bytes(unpacked)}: PyTorch does not "
            "compress weights. Save it again with torch.save()."
        )


def _why_unread(file: Path, error: Exception) -> str:
    shown, text = printable(file), str(error)
    refused = _REFUSED.search(text)
    if refused is not None:
        return _why_refused(file, refused.group(1))
    if "TorchScript" in text:
        return (
            f"{shown} is a TorchScript program, which could run code. Save only its weights: "
            f"{_line(file, f'torch.jit.load({str(file)!r}).state_dict()')}"
        )
    if isinstance(error, PermissionError):
        return f"{shown} cannot be read: {reason_of(error)}. Change its permissions."
    return f"{shown} cannot be read: {_reason(error)}. {_TO_THE_END}"


def _why_refused(file: Path, kind: str) -> str:
    whole = f"torch.load({str(file)!r}, weights_only=False)"
    if _is_dictionary(file):
        # Without running it, nobody knows which of its entries are the weights.
        return (
            f"{printable(file)} holds a {kind} beside its tensors, and reading that could run "
            "code, so it is refused. If you trust the file, save only the weights: "
            f"{_line(file, whole + _ENTRY)} (or by the name that it has them under)."
        )
    return (
        f"{printable(file)} is a whole pickled object with a {kind}, not a plain file of tensors, "
        "and reading that could run code, so it is refused. If you trust the file, save the "
        f"weights alone where the network's code is: {_line(file, f'{whole}.state_dict()')}"
    )


def _line(file: Path, weights: str) -> str:
    return f"torch.save({weights}, {f'{file.stem}-weights.pt'!r})"


def _is_dictionary(file: Path) -> bool:
    """Whether the pickled object is a dictionary, without unpickling it."""
    try:
        if not zipfile.is_zipfile(file):
            with file.open("rb") as content:
                for _ in range(3):  # the older format first has a number, its version, the system
                    for _operation in pickletools.genops(content):
                        pass
                return _starts_dictionary(content)
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as content:
                return _starts_dictionary(content)
    except Exception:  # noqa: BLE001  # it only chooses the text of an error
        return False


def _starts_dictionary(content: IO[bytes]) -> bool:
    for operation, argument, _ in pickletools.genops(content):
        if operation.name not in {"PROTO", "FRAME", "MARK", "PUT", "BINPUT", "LONG_BINPUT"}:
            return operation.name in {"EMPTY_DICT", "DICT"} or argument == "collections OrderedDict"
    return False


def _unwrapped(content: Any, file: Path, depth: int = 0) -> dict[str, Tensor]:
    """Return the one dictionary of tensors in a checkpoint, under whatever name it is."""
    shown = printable(file)
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{shown} must hold tensors by their names, but holds a {type(content).__name__}. Save "
            f"{'its' if isinstance(content, nn.Module) else 'network'}.state_dict()."
        )
    if _is_state(content):
        return dict(content)
    inside = {str(name): value for name, value in content.items() if _holds_state(value)}
    if len(inside) > 1 and depth < DEEPEST:
        found = {name: _unwrapped(value, file, depth + 1) for name, value in inside.items()}
        _check_one(found, file)
        return next(iter(found.values()))
    if inside and depth < DEEPEST:
        return _unwrapped(next(iter(inside.values())), file, depth + 1)
    if any(_is_empty(content.get(name)) for name in _WRAPPERS):
        return {}
    name, value = _no_tensor(content)
    raise WeightsError(
        f"{shown} must hold tensors by their names, but {printable(repr(name)[:80])} is a "
        f"{type(value).__name__}. Save only network.state_dict()."
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value


def _holds_state(value: Any, depth: int = 0) -> bool:
    if not isinstance(value, Mapping) or not value or depth >= DEEPEST:
        return False
    if _is_state(value):
        return True
    # An optimizer's state has numbers as names.
    return all(isinstance(name, str) for name in value) and any(
        _holds_state(inner, depth + 1) for inner in value.values()
    )


def _check_one(found: Mapping[str, Mapping[str, Tensor]], file: Path) -> None:
    first, *others = found.values()
    for other in others:
        if first.keys() != other.keys() or not all(
            torch.equal(first[name], other[name]) for name in first
        ):
            names = list(found)
            save = f"torch.load({str(file)!r}, weights_only=True)[{names[-1]!r}]"
            raise WeightsError(
                f"{printable(file)} holds weights more than once: under "
                f"{_named(map(repr, names))}. Save the ones that you mean to a file of their own, "
                f"such as: {_line(file, save)}"
            )


def _no_tensor(content: Mapping[Any, Any]) -> tuple[Any, Any]:
    """Return the first entry that is not a named tensor, inside a known wrapper if there is one."""
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return _no_tensor(content[wrapper])
    return next(
        (name, value)
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    )


# ---------------------------------------------------------------- what a file holds


def _check_beginning(file: Path) -> None:
    try:
        with file.open("rb") as content:
            beginning = content.read(32)
    except OSError:
        return  # the reader reports it
    if not beginning:
        raise WeightsError(f"{printable(file)} cannot be read: it is empty. {_TO_THE_END}")
    for start, words in _BEGINNINGS.items():
        if beginning.startswith(start):
            raise WeightsError(f"{printable(file)} {words}")
    archived = beginning.startswith(b"PK\x03\x04")
    if archived == (file.suffix == ".safetensors") and (archived or b'{"' in beginning[8:12]):
        kind, ending = ("of PyTorch", ".pt") if archived else ("of safetensors", ".safetensors")
        raise WeightsError(
            f"{printable(file)} is a file {kind}. Rename it so that it ends in {ending}."
        )


def _check_bytes(state: Mapping[str, Tensor], file: Path) -> None:
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    size = file.stat().st_size
    if claimed > MOST_TIMES * size + SPARE_BYTES:
        raise WeightsError(
            f"The tensors in {printable(file)} must not take more than {MOST_TIMES} times its "
            f"{format_bytes(size)}, but claim {format_bytes(claimed)}: they repeat values. "
            "Save copies of them."
        )


def _check_tensor(name: str, tensor: Tensor, file: Path) -> None:
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_nested:
        kind = "without values (on 'meta')" if tensor.device.type == "meta" else str(tensor.layout)
        raise WeightsError(
            f"All weights must be dense tensors with values: in {printable(file)}, {name!r} is "
            f"{kind}. Save a dense copy of it."
        )
    if tensor.dtype in _CHECKED and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise WeightsError(
            f"All weights must be finite: in {printable(file)}, {bad:,} of the "
            f"{tensor.numel():,} values of {name!r} are not. The training diverged or the file is "
            "damaged."
        )


def _reason(error: BaseException) -> str:
    """Return the line of an error that says what is wrong, without advice to run code."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))
    if "WeightsUnpickler error:" in text:
        text = text.partition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return printable(line.partition(" This is an internal miniz error")[0].rstrip("."))


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    more = f", … {len(listed) - LISTED:,} more" if len(listed) > LISTED else ""
    return ", ".join(listed[:LISTED]) + more
