"""Tensors in nested tuples, lists and mappings, as networks take and give them."""

from __future__ import annotations

import dataclasses
import itertools
import keyword
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from onebyone.core.errors import NetworkInputError, RecordError
from onebyone.core.records.inputs import ONLY, PLAIN, InputSpec, TensorSpec

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a network is called with: a tensor, a tuple of arguments, or keyword arguments."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None))


def fresh(inputs: Any) -> Any:
    """Return inputs with copies of their tensors, also in nested tuples, lists and mappings.

    A network may write into its input, such as one that begins with an in-place activation.
    """
    # This also works for tensors with gradients and for those made in inference mode.
    return map_tensors(lambda tensor: tensor.detach().clone(), inputs)


def device_of(inputs: Inputs) -> torch.device:
    """Return the device of the first tensor among a network's inputs."""
    return next((tensor.device for tensor in tensors_in(inputs)), torch.device("cpu"))


def batch_size(inputs: Inputs) -> int:
    """Return the batch size: the first dimension, or the number of pictures in a list."""
    pictures = _pictures(inputs)
    if pictures is not None:
        return max(1, len(pictures))
    return max(1, next((t.shape[0] for t in tensors_in(inputs) if t.ndim), 1))


def lists_pictures(inputs: Inputs) -> bool:
    """Whether the first argument is a list of single pictures, which no batch divides."""
    return _pictures(inputs) is not None


def _pictures(inputs: Inputs) -> list[Tensor] | tuple[Tensor, ...] | None:
    """Return the first argument if it is a list of single pictures, as detectors take."""
    first: Any = inputs
    if isinstance(first, Mapping):
        first = next(iter(first.values()), None)
    elif isinstance(first, (tuple, list)):
        first = next(iter(first), None)
    pictures = isinstance(first, (tuple, list)) and all(
        isinstance(picture, Tensor) and picture.ndim == 3 for picture in first
    )
    return first if pictures else None


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return nested tuples, lists and mappings with each tensor changed; all else is kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return value


def only_tensor(inputs: Inputs, stage: str) -> Tensor:
    """Return inputs that are one tensor, for a stage that takes no others.

    Args:
        inputs: Not modified.
        stage: What takes them, for the message.

    Raises:
        NetworkInputError: If they are several tensors, or values beside a tensor.
    """
    if isinstance(inputs, Tensor):
        return inputs
    spec_of(inputs).single(stage)
    only: Tensor = next(tensors_in(inputs))
    return only


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}


def in_floats(inputs: Any, dtype: torch.dtype) -> Any:
    """Return inputs with their floating-point tensors in a type; all else is kept."""
    return map_tensors(lambda each: each.to(dtype) if each.is_floating_point() else each, inputs)


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """Return inputs on a device."""
    moved: Inputs = map_tensors(lambda tensor: tensor.to(device), inputs)
    return moved


def first_examples(inputs: Any, count: int) -> Any:
    """Return inputs with the first ``count`` examples of the batch.

    Tensors without the batch are kept whole, and so is a list of single pictures.
    """
    return sliced(inputs, 0, count)


def sliced(inputs: Any, start: int, stop: int) -> Any:
    """Return inputs with the examples of the batch from ``start`` to before ``stop``.

    Tensors without the batch are kept whole, and so is a list of single pictures.
    """
    if isinstance(inputs, Tensor):
        return inputs[start:stop]
    if _pictures(inputs) is not None:
        return inputs
    batch = batch_size(inputs)
    return map_tensors(
        lambda tensor: tensor[start:stop] if has_batch(tensor, batch) else tensor, inputs
    )


def has_batch(tensor: Tensor, batch: int) -> bool:
    """Whether a tensor among inputs has the batch in front."""
    return tensor.ndim > 0 and tensor.shape[0] == batch


def concatenated(parts: Sequence[Any]) -> Any:
    """Return batches of inputs of the same form as one; what has no batch is the first's."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    flat = [list(tensors_in(part)) for part in parts]
    counts = [batch_size(part) for part in parts]
    joined = iter(
        [
            torch.cat(each) if all(map(has_batch, each, counts)) else each[0]
            for each in (list(column) for column in zip(*flat, strict=True))
        ]
    )
    return map_tensors(lambda _: next(joined), parts[0])


def repeated(inputs: Any, batch: int) -> Any:
    """Return inputs of one example, repeated to a batch."""
    if _pictures(inputs) is not None:
        return inputs

    def repeat(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != 1:
            return tensor
        return tensor.expand(batch, *tensor.shape[1:]).contiguous()

    return map_tensors(repeat, inputs)


def spec_of(inputs: Inputs, *, names: Sequence[str] = ()) -> InputSpec:
    """Return the record of what a network is called with.

    A tensor has the batch in front if its first dimension is the batch size.

    Args:
        inputs: A tensor, a tuple of arguments, or keyword arguments. Not modified.
        names: Names of the positional arguments, as far as they are known.

    Raises:
        NetworkInputError: If there is no tensor, or a value that the record cannot hold.
    """
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    write = _Writer(batch_size(inputs), lists_pictures=_pictures(inputs) is not None)
    if isinstance(inputs, Mapping):
        parts = [f"{name}={write.text(value, str(name))}" for name, value in inputs.items()]
    elif len(inputs) == 1:
        parts = [write.text(inputs[0], ONLY)]
    else:
        named = [*names, *(f"{ONLY}_{place}" for place in range(len(names), len(inputs)))]
        parts = [write.text(value, name) for name, value in zip(named, inputs, strict=False)]
    if not write.tensors:
        raise NetworkInputError(
            "A network's inputs must have at least one tensor, got none. Give an example that it "
            "can be called with."
        )
    return InputSpec(tensors=tuple(write.tensors), call=f"({', '.join(parts)})")


@dataclasses.dataclass
class _Writer:
    """Writes values as in a call, and collects the tensors among them."""

    batch: int
    lists_pictures: bool
    tensors: list[TensorSpec] = dataclasses.field(default_factory=list)

    def text(self, value: Any, name: str) -> str:
        if isinstance(value, Tensor):
            return self._tensor(value, name)
        if isinstance(value, Mapping):
            items = [f"{key!r}: {self.text(item, f'{name}_{key}')}" for key, item in value.items()]
            return f"{{{', '.join(items)}}}"
        if type(value) in (list, tuple):
            items = [self.text(item, f"{name}_{place}") for place, item in enumerate(value)]
            inside = ", ".join(items)
            if isinstance(value, list):
                return f"[{inside}]"
            return f"({inside},)" if len(items) == 1 else f"({inside})"
        if type(value) in PLAIN and (not isinstance(value, float) or math.isfinite(value)):
            return repr(value)
        raise NetworkInputError(
            "A network's inputs must be tensors, numbers, text, True, False or None, in tuples, "
            f"lists or dictionaries, got a {type(value).__name__} as {name!r}. Wrap the network in "
            "a module that makes it."
        )

    def _tensor(self, tensor: Tensor, name: str) -> str:
        name = self._free(name)
        whole = not (tensor.is_floating_point() or tensor.is_complex())
        whole = whole and tensor.dtype != torch.bool and tensor.numel() > 0
        try:
            self.tensors.append(
                TensorSpec(
                    name=name,
                    shape=tuple(tensor.shape),
                    dtype=cast("Any", str(tensor.dtype).removeprefix("torch.")),
                    batched=self._has_batch(tensor),
                    values=(int(tensor.min()), int(tensor.max())) if whole else None,
                )
            )
        except RecordError as error:
            raise NetworkInputError(f"The input {name!r} cannot be recorded: {error}") from error
        return name

    def _has_batch(self, tensor: Tensor) -> bool:
        return not self.lists_pictures and has_batch(tensor, self.batch)

    def _free(self, name: str) -> str:
        """Return a name of Python's that no other tensor has."""
        name = re.sub(r"\W", "_", name, flags=re.ASCII)
        if not name.isidentifier() or keyword.iskeyword(name):
            name = f"{ONLY}_{name}"
        taken = {tensor.name for tensor in self.tensors}
        places = (f"{name}_{place}" for place in itertools.count(2))
        return name if name not in taken else next(each for each in places if each not in taken)
