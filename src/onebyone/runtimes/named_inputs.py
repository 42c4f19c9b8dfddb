"""The inputs of a network's file, by the names that they have in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from onebyone.core.errors import ModelError
from onebyone.core.records import InputSpec
from onebyone.core.tensor_trees import Inputs, spec_of, tensors_in


def names_in(spec: InputSpec, known: InputSpec | None, names: Sequence[str]) -> list[str]:
    """Return the names in a file of the tensors of a call.

    Tensors of keyword arguments have the same names everywhere. Those of positional arguments are
    found by their place.

    Args:
        spec: The call.
        known: The call that the file was written for, if it says so.
        names: Of the file's inputs, in order.

    Raises:
        ModelError: If the call has another number of tensors.
    """
    given = [tensor.name for tensor in spec.tensors]
    if isinstance(spec.arguments(dict.fromkeys(given)), Mapping):
        return given
    own = list(names) if known is None else [tensor.name for tensor in known.tensors]
    if len(own) != len(given):
        raise ModelError(
            f"The network's file takes {len(own)} tensors, {', '.join(own)}, but is called with "
            f"({spec}). Call it with as many, in this order or by these names."
        )
    return own


def named_tensors(
    inputs: Inputs, names: Sequence[str], known: InputSpec | None = None
) -> dict[str, Tensor]:
    """Return a tensor for each of a file's inputs.

    A network that does not read a tensor has no input for it in its file.

    Args:
        inputs: What the network is called with.
        names: Of the file's inputs, in order.
        known: The call that the file was written for, if it says so.

    Raises:
        ModelError: If one has no tensor, or a number beside the tensors is not the one that was
            written into the file.
    """
    if isinstance(inputs, Tensor):
        if len(names) != 1:
            raise _lacking(names[1:])
        return {names[0]: inputs}
    spec = spec_of(inputs)
    own = dict(zip(names_in(spec, known, names), tensors_in(inputs), strict=True))
    missing = [name for name in names if name not in own]
    if missing:
        raise _lacking(missing)
    if known is not None and not _alike(_plain(spec), _plain(known)):
        raise ModelError(
            f"The network's file was written for ({known.example_text()}), but is called with "
            f"({spec.example_text()}): what stands beside the tensors is fixed in the file. Export "
            "it for this call."
        )
    return {name: own[name] for name in names}


def _lacking(names: Sequence[str]) -> ModelError:
    return ModelError(
        f"The network's file needs a tensor for each of its inputs, but got none for "
        f"{', '.join(names)}. Call it with all of them, by these names."
    )


def _alike(one: Any, other: Any) -> bool:
    """Whether two calls are the same beside their tensors, as far as their forms tell."""
    return isinstance(one, Mapping) != isinstance(other, Mapping) or bool(one == other)


def _plain(spec: InputSpec) -> Any:
    """Return a call with its tensors left out, and without keywords that are ``None``."""
    found = spec.arguments({tensor.name: ... for tensor in spec.tensors})
    if isinstance(found, Mapping):
        return {name: value for name, value in found.items() if value is not None}
    return found
