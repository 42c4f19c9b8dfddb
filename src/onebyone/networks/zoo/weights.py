"""Loads and saves weights: loading never runs code, and every name and shape must match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onebyone.core.errors import OptionError, OutputError, WeightsError
from onebyone.core.read_files import printable, reason_of
from onebyone.core.write_files import write_file
from onebyone.networks.zoo.checkpoints import read_checkpoint

_WRAPPERS = ("module", "_orig_mod")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int16, torch.int32, torch.int64)
_LISTED = 3  # names of each kind in a message; the rest are counted

# Batch norms have it since PyTorch 1.0, but those with a fixed momentum do not use it. Older and
# converted files lack it.
_OPTIONAL = ".num_batches_tracked"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors from a file, onto the CPU.

    A pickled file may be a checkpoint: a dictionary in which one entry, such as ``state_dict``,
    ``model`` or ``ema``, holds the tensors. It is read with ``weights_only=True``: it cannot run
    code.

    Args:
        path: A ``.safetensors`` file, or a ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` or ``.tar`` file
            of a state dict or a checkpoint.

    Raises:
        WeightsError: If the file is missing, unreadable, empty or of another kind; if it holds more
            than tensors, holds weights more than once, or claims more memory than it has; or if a
            tensor is not finite (names the first).
        OptionError: If ``path`` is not a path.
    """
    if not isinstance(path, str | Path):
        raise OptionError(
            f"Weights must be given as the path of a file, got a {type(path).__name__}. Call "
            "`network.load_state_dict(...)` and pass the network, or save the state dict to a file."
        )
    return read_checkpoint(Path(path))


def load_weights(model: nn.Module, path: str | Path, *, network: str = "the network") -> None:
    """Load a file of weights into a network, all of them or none.

    A tensor that the network shares under several names needs to be in the file only once. Values
    are converted to the network's precision. Prefixes that wrappers add to names (``module.`` of
    ``nn.DataParallel``, ``_orig_mod.`` of ``torch.compile``, ``model.`` and ``net.`` of Lightning)
    are removed if the names then match the network's.

    Args:
        model: Its parameters and buffers are overwritten; nothing else changes.
        path: As for :func:`read_weights`.
        network: Name of the network in error messages.

    Raises:
        WeightsError: As :func:`read_weights`; or if the names, shapes or types of the tensors do
            not match the network's: says which are missing, unexpected or different.
        OptionError: As :func:`read_weights`.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    _check_built(own, network)
    aliases = _aliases(own)
    state = fitting_names(read_weights(path), own, aliases)
    count = len(state)
    missing = []
    for name, value in own.items():
        if name in state:
            continue
        twin = next((other for other in aliases[name] if other in state), None)
        if twin is not None:
            state[name] = state[twin]
        elif name.endswith(_OPTIONAL):
            state[name] = value
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
            _listed("missing", missing, _meant(missing, unexpected, own, state)),
            _listed("unexpected", unexpected),
            _listed("different", different),
        ]
        raise WeightsError(
            f"The {count:,} weights in {printable(path)} are not those of "
            f"{network}, which has {len(own):,}: {'; '.join(part for part in parts if part)}. "
            f"Build the network as it was when they were saved, with the same options."
        )
    _check_converted(state, own, path)
    _check_shared(state, aliases, path=path)
    # Entries that are not tensors, as from `get_extra_state`, keep the network's values.
    others = {n: v for n, v in model.state_dict().items() if not isinstance(v, Tensor)}
    model.load_state_dict({**state, **others})


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
        WeightsError: If the network's state holds something that is not a tensor.
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

    def write(aside: Path) -> None:
        try:
            save_file(tensors, aside, metadata=metadata)
        except SafetensorError as error:
            raise OutputError(f"Cannot write {target}: {reason_of(error)}.") from error

    write_file(target, write, check=partial(_check_readable, names=set(tensors)))


def _check_readable(file: Path, *, names: set[str]) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            found = set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file} cannot be read: {reason_of(error)}.") from error
    if found != names:
        raise WeightsError(f"{file} holds {len(found):,} tensors instead of {len(names):,}.")


def fitting_names(
    state: dict[str, Tensor], own: Mapping[str, Tensor], aliases: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """Rename a file's tensors to the network's names by removing prefixes.

    Args:
        state: The file's tensors.
        own: The network's tensors.
        aliases: For each of the network's names, all names of the same tensor.

    Returns:
        The tensors under the names that match best; the first of equals.
    """

    def apart(names: Mapping[str, Tensor]) -> int:
        missing = sum(
            not any(alias in names for alias in aliases[name]) and not name.endswith(_OPTIONAL)
            for name in own
        )
        return missing + sum(name not in own for name in names)

    best = state
    for candidate in _without_prefixes(state):
        if apart(candidate) < apart(best):
            best = candidate
    return best


def _without_prefixes(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors with one prefix fewer at a time, and without wrappers inside names."""
    # Wrapped parts of a network have a wrapper inside the name: `features.module.0.weight`.
    inner = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): tensor
        for name, tensor in state.items()
    }
    starts = (
        [state, inner] if len(inner) == len(state) and inner.keys() != state.keys() else [state]
    )
    for start in starts:
        names = start
        if start is not state:
            yield names
        while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in names)), None):
            names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
            yield names


def _check_built(own: Mapping[str, Tensor], network: str) -> None:
    lazy = next((name for name, tensor in own.items() if is_lazy(tensor)), None)
    if lazy is not None:
        raise WeightsError(
            f"The shapes of all weights of {network} must be known, but that of {lazy!r} is not "
            "yet. Run the network once on an input first."
        )


def _check_converted(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path
) -> None:
    """Refuse a conversion that would change values beyond rounding."""
    for name, mine in own.items():
        given = state[name]
        if given.dtype == mine.dtype:
            continue
        converted = given.to(mine.dtype)
        kept = (
            torch.isfinite(converted).all()
            if mine.is_floating_point()
            else torch.equal(converted.to(given.dtype), given)
        )
        if not kept:
            raise WeightsError(
                f"All weights must fit into the network's types: values of {name!r} in "
                f"{printable(path)} are too large for {_type(mine)}. Build the network in "
                f"{_type(given)}."
            )


def _meant(
    missing: Sequence[str],
    unexpected: Sequence[str],
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> str:
    """Return a question that suggests the intended name, or an empty text."""
    for name in missing[:_LISTED]:
        alike = [other for other in unexpected if state[other].shape == own[name].shape]
        close = difflib.get_close_matches(name, alike, n=1, cutoff=0.6)
        if close:
            return f" (is {name!r} the file's {close[0]!r}?)"
    return ""


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for two tensors over the same values in memory."""
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
    )


def _aliases(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return for each name all names of the same tensor, itself included, in order."""
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
    # Loading would silently keep only the last of them.
    for name, (first, *_) in aliases.items():
        if name != first and not torch.equal(state[name], state[first]):
            raise WeightsError(
                f"{first!r} and {name!r} are one tensor in the network but differ in {path}: "
                f"these are weights of a network that does not share them."
            )


def _fits(given: Tensor, own: Tensor) -> bool:
    # float16 converts to float32; int8 and float8 codes do not, since they need a scale.
    same_kind = given.dtype == own.dtype or any(
        given.dtype in kind and own.dtype in kind for kind in (_FLOATS, _INTEGERS)
    )
    return given.shape == own.shape and same_kind


def _form(tensor: Tensor) -> str:
    return f"{_type(tensor)} {tuple(tensor.shape)}"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(kind: str, items: Iterable[str], question: str = "") -> str:
    items = list(items)
    if not items:
        return ""
    more = f", … {len(items) - _LISTED:,} more" if len(items) > _LISTED else ""
    return f"{len(items):,} {kind} ({', '.join(items[:_LISTED])}{more}){question}"
