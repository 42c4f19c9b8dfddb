"""Weights on disk: read without running code, fitted strictly, written whole or not at all."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onebyone.errors import OutputError, WeightsError

_PICKLED = (".pt", ".pth", ".bin")
_WRAPPERS = ("state_dict", "model")
_LISTED = 3  # names of a kind that a message gives before it counts the rest

# Kept by batch norms since PyTorch 1.0 and used by none with a fixed momentum; older files and
# converted ones lack it.
_OPTIONAL = ".num_batches_tracked"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors from a file, onto the CPU.

    A pickled file may hold the tensors under ``state_dict`` or ``model``, and all names may start
    with the ``module.`` of ``nn.DataParallel``; both are taken off. Such a file is read with
    ``weights_only=True``: it cannot run code.

    Args:
        path: A ``.safetensors`` file, or a ``.pt``, ``.pth`` or ``.bin`` file of a state dict.

    Raises:
        WeightsError: If the file is missing, unreadable, empty, of another kind, or holds more than
            tensors; or if one is not finite: names the first such.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise WeightsError(f"Cannot read weights: {file} {what}. Give a file of weights.")
    if file.suffix == ".safetensors":
        state = _read_safetensors(file)
    elif file.suffix in _PICKLED:
        state = _without_module_prefix(_read_pickled(file))
    else:
        raise WeightsError(
            f"Weights must be a file that ends in .safetensors, .pt, .pth or .bin, got {file.name}."
        )
    if not state:
        raise WeightsError(f"{file} holds no tensors.")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(
                f"All weights must be finite: in {file}, {bad:,} of the {tensor.numel():,} values "
                f"of {name!r} are not. The training diverged or the file is damaged."
            )
    return state


def load_weights(model: nn.Module, path: str | Path, *, network: str = "the network") -> None:
    """Read a file of weights into a network, all of them or none.

    Tensors that the network shares under several names need to be in the file once. Numbers are
    converted to the precision of the network.

    Args:
        model: Its parameters and buffers are overwritten; nothing else of it changes.
        path: As for :func:`read_weights`.
        network: What messages call the network.

    Raises:
        WeightsError: As :func:`read_weights`; or if the names, shapes or kinds of the tensors are
            not those of the network: says which are missing, unexpected or different.
    """
    state = read_weights(path)
    own = model.state_dict()
    aliases = _aliases(own)
    absent = [name for name in own if name not in state]
    missing = []
    for name in absent:
        twin = next((other for other in aliases[name] if other in state), None)
        if twin is not None:
            state[name] = state[twin]
        elif name.endswith(_OPTIONAL):
            state[name] = own[name]
        else:
            missing.append(name)
    unexpected = [name for name in state if name not in own]
    different = [
        f"{name} is {_form(state[name])} in the file and {_form(own[name])} in the network"
        for name in own
        if name in state and not _fits(state[name], own[name])
    ]
    if missing or unexpected or different:
        parts = [
            _listed("missing", missing),
            _listed("unexpected", unexpected),
            _listed("different", different),
        ]
        raise WeightsError(
            f"The {len(state) - (len(absent) - len(missing)):,} weights in {path} are not those of "
            f"{network}, which has {len(own):,}: {'; '.join(part for part in parts if part)}. "
            f"Build the network as it was when they were saved, with the same options."
        )
    _check_shared(state, aliases, path=path)
    model.load_state_dict(state)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a network's weights to a ``.safetensors`` file, whole or not at all.

    A tensor that the network shares under several names is written once; the other names go to
    the file's metadata, as ``safetensors.torch.save_model`` does it. Tensors that overlap in part
    are written as copies.

    Args:
        model: Not modified.
        path: Ends in ``.safetensors``. An older file there is replaced.

    Raises:
        OutputError: If the file cannot be written, or has another ending.
        WeightsError: If the network's state holds something that is no tensor.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise OutputError(f"Weights are saved to a file that ends in .safetensors, got {target}.")
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise WeightsError(
                f"Only tensors can be saved: {name!r} of the network's state is a "
                f"{type(value).__name__}. Make it a buffer, or leave it out of the state."
            )
    metadata = {"format": "pt"}
    tensors: dict[str, Tensor] = {}
    for name, names in _aliases(state).items():
        if names[0] == name:
            tensors[name] = _own_copy_if_needed(state, name)
        else:
            metadata[name] = names[0]
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            aside = Path(folder) / target.name
            save_file(tensors, aside, metadata=metadata)
            aside.chmod(0o644)
            aside.replace(target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"Cannot write {target}: {_first_line(error)}.") from error


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{file} cannot be read as safetensors: {_first_line(error)}. "
            f"Was it copied or downloaded to the end?"
        ) from error
    return tensors


def _read_pickled(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file} is not a plain file of tensors, and reading anything else could run code, so "
            f"it is refused. Save the weights alone where the network is: "
            f"torch.save(network.state_dict(), ...)."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(
            f"{file} cannot be read: {_first_line(error)}. Was it copied or downloaded to the end?"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{file} must hold tensors by their names, but holds a {type(content).__name__}. "
            f"Save network.state_dict()."
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{file} must hold tensors by their names, but {name!r} is a "
                f"{type(value).__name__}. Save network.state_dict() alone."
            )
    return dict(content)


def _without_module_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not all(name.startswith("module.") for name in state):
        return state
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two names of the same numbers have in common."""
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
    )


def _aliases(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return for each name all the names of the same tensor, itself included, in order."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        # Empty tensors have no memory to share.
        groups.setdefault(_view(tensor) if tensor.numel() else (name,), []).append(name)
    return {name: names for names in groups.values() for name in names}


def _own_copy_if_needed(state: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = state[name]
    shares = any(
        other.numel()
        and other.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        and _view(other) != _view(tensor)
        for other in state.values()
    )
    plain = tensor.detach().contiguous()
    return plain.clone() if shares and plain.data_ptr() == tensor.data_ptr() else plain


def _check_shared(
    state: Mapping[str, Tensor], aliases: Mapping[str, list[str]], *, path: str | Path
) -> None:
    # Loading would silently keep the last of them.
    for name, (first, *_) in aliases.items():
        if name != first and not torch.equal(state[name], state[first]):
            raise WeightsError(
                f"{first!r} and {name!r} are one tensor in the network but differ in {path}: "
                f"these are weights of a network that does not share them."
            )


def _fits(given: Tensor, own: Tensor) -> bool:
    # Float16 into float32 is a conversion; int8 codes read as weights are not.
    return given.shape == own.shape and given.is_floating_point() == own.is_floating_point()


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _listed(kind: str, items: Iterable[str]) -> str:
    items = list(items)
    if not items:
        return ""
    more = f", … {len(items) - _LISTED:,} more" if len(items) > _LISTED else ""
    return f"{len(items):,} {kind} ({', '.join(items[:_LISTED])}{more})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
