"""The record of a network's inputs: the tensors that it takes, and how it is called with them."""

from __future__ import annotations

import ast
import keyword
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from msgspec import Meta

from onebyone.core.errors import NetworkInputError, RecordError
from onebyone.core.fields import Sizes, Text
from onebyone.core.records.base import Record

DType = Literal[
    "float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool",
    "complex64", "complex128",
]  # fmt: skip

# The name of a network's only tensor.
ONLY = "input"
# Far above any real call, and low enough for Python's parser.
_LONGEST_CALL = 20_000
_DEEPEST_CALL = 50
# Types of the plain values that a call may have beside tensors.
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, kw_only=True)
class TensorSpec(Record):
    """One tensor among a network's inputs.

    Attributes:
        name: What :attr:`InputSpec.call` and exported files call it.
        shape: Sizes; the batch comes first if it is ``batched``.
        dtype: Torch's name of the element type, such as ``float32``.
        batched: Whether the first dimension counts examples.
        values: For integers, the least and the largest value that the example has: random ones are
            drawn between them. ``None`` for other types.
    """

    name: Text
    shape: Sizes
    dtype: DType = "float32"
    batched: bool = True
    values: tuple[int, int] | None = None

    def check(self) -> None:
        """Check that the name is one of Python's, and that a batch has a dimension."""
        if not self.name.isidentifier() or keyword.iskeyword(self.name):
            raise RecordError(f"`name` must be a name as in Python, got {self.name!r}.")
        if self.batched and not self.shape:
            raise RecordError(f"The tensor {self.name!r} must have a dimension for the batch.")
        if self.values is not None and self.values[0] > self.values[1]:
            raise RecordError(f"`values` must be the least and the largest, got {self.values}.")

    @property
    def sample(self) -> tuple[int, ...]:
        """Shape of one example, without the batch."""
        return self.shape[1:] if self.batched else self.shape

    def example_text(self) -> str:
        """Return the shape of one example and the type, if it is not float32, as text."""
        return _text_of(self.sample, self.dtype)

    def __str__(self) -> str:
        return _text_of(self.shape, self.dtype)


def _text_of(shape: tuple[int, ...], dtype: str) -> str:
    sizes = "×".join(map(str, shape)) or "scalar"
    return sizes if dtype == "float32" else f"{sizes} {dtype}"


@dataclass(frozen=True, kw_only=True)
class InputSpec(Record):
    """A network's inputs: a tree of tensors and plain values.

    One tensor is the simplest case: :meth:`of_shape`.

    Attributes:
        tensors: In the order of the call.
        call: The arguments as they stand in a call in Python, with tensors by their names:
            ``(input)``, or ``(image=image, boxes=[boxes_0, boxes_1], scale=0.5, prior=None)``.
            They are all positional or all by keyword; tuples, lists, dictionaries, numbers, text,
            ``True``, ``False`` and ``None`` may be nested.
    """

    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    call: Text = f"({ONLY})"

    @classmethod
    def of_shape(cls, shape: tuple[int, ...], *, dtype: DType = "float32") -> InputSpec:
        """Return the inputs of a network that takes one tensor.

        Args:
            shape: With the batch in front.
            dtype: Torch's name of the element type.
        """
        return cls(tensors=(TensorSpec(name=ONLY, shape=tuple(shape), dtype=dtype),))

    def check(self) -> None:
        """Check that the call uses each tensor once, and that all have the same batch."""
        named = [tensor.name for tensor in self.tensors]
        used: list[str] = []
        _arguments(self.call, used.append)
        if sorted(used) != sorted(named):
            raise RecordError(
                f"`call` must use each of the tensors {', '.join(named)} once, got {self.call!r}."
            )
        batches = {tensor.name: tensor.shape[0] for tensor in self.tensors if tensor.batched}
        if len(set(batches.values())) > 1:
            raise RecordError(f"All tensors with a batch must have the same, got {batches}.")

    @property
    def batch(self) -> int:
        """The number of examples: the size of the batch, or of a list of single pictures."""
        for tensor in self.tensors:
            if tensor.batched:
                return tensor.shape[0]
        first = self.arguments({tensor.name: tensor for tensor in self.tensors})
        if isinstance(first, Mapping):
            first = tuple(first.values())
        listed = first[0] if isinstance(first, tuple) and first else None
        return max(1, len(listed)) if isinstance(listed, list | tuple) else 1

    @property
    def is_image(self) -> bool:
        """Whether one example is an image, of shape ``(channels, height, width)``."""
        return self.is_single and len(self.tensors[0].sample) == 3

    def same_examples(self, other: InputSpec) -> bool:
        """Whether one example is the same but for its tensors' types, and names in a position."""
        return bool(self._samples() == other._samples())

    def _samples(self) -> Any:
        """Return the call's arguments with a text of its shape for each tensor."""
        texts = {each.name: _Text(str(each.sample)) for each in self.tensors}
        return _arguments(self.call, texts.__getitem__)

    @property
    def values(self) -> int:
        """The number of values of one example, over all tensors."""
        return sum(math.prod(tensor.sample) for tensor in self.tensors)

    def with_batch(self, batch: int) -> InputSpec:
        """Return the same inputs with another number of examples.

        Raises:
            NetworkInputError: If no tensor has a batch dimension.
        """
        if batch == self.batch:
            return self
        if not any(tensor.batched for tensor in self.tensors):
            raise NetworkInputError(
                f"A batch of {batch} needs inputs with a batch dimension, but {self} has none. "
                f"Keep the batch of the example, {self.batch}."
            )
        return replace(
            self,
            tensors=tuple(
                replace(each, shape=(batch, *each.shape[1:])) if each.batched else each
                for each in self.tensors
            ),
        )

    @property
    def is_single(self) -> bool:
        """Whether the network takes one tensor with the batch in front, and nothing else."""
        only = self.tensors[0]
        return len(self.tensors) == 1 and only.batched and self.call == f"({only.name})"

    def single(self, stage: str) -> TensorSpec:
        """Return the only tensor, for a stage that takes no other inputs.

        Args:
            stage: What takes it, for the message, such as ``apply``.

        Raises:
            NetworkInputError: If there are several inputs, or plain values beside the tensor.
        """
        if not self.is_single:
            raise NetworkInputError(
                f"{stage} needs a network that takes one tensor with the batch in front, but this "
                f"one is called with ({self}). Wrap it in a module that takes one tensor and makes "
                "the other arguments."
            )
        return self.tensors[0]

    def arguments(self, values: Mapping[str, Any]) -> Any:
        """Return what the network is called with.

        Args:
            values: The tensors by name.

        Returns:
            The only positional argument if it is a tensor of this record; else a tuple of
            positional arguments or a dictionary of keyword arguments.
        """
        if self.is_single:
            return values[self.tensors[0].name]
        return _arguments(self.call, values.__getitem__)

    def example_text(self) -> str:
        """Return the inputs of one example in words, without the batch."""
        return self._text({tensor.name: tensor.example_text() for tensor in self.tensors})

    def __str__(self) -> str:
        return self._text({tensor.name: str(tensor) for tensor in self.tensors})

    def _text(self, texts: Mapping[str, str]) -> str:
        """Return the call's arguments with a text for each tensor."""
        found = _arguments(self.call, lambda name: _Text(texts[name]))
        if isinstance(found, tuple):
            return ", ".join(map(repr, found))
        return ", ".join(f"{name}={value!r}" for name, value in found.items())


@dataclass(frozen=True, repr=False)
class _Text:
    """Stands for a tensor in a text."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _arguments(call: str, tensor: Callable[[str], Any]) -> tuple[Any, ...] | dict[str, Any]:
    """Return the positional or the keyword arguments of a call's text.

    Only names and literals are read: nothing is run.
    """
    if len(call) > _LONGEST_CALL:
        raise RecordError(
            f"`call` must have at most {_LONGEST_CALL:,} characters, got {len(call):,}."
        )
    try:
        tree = ast.parse(f"_{call}", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _unreadable(call) from None
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or not call[0] == "(":
        raise _unreadable(call)
    if bool(tree.args) == bool(tree.keywords):
        raise RecordError(
            f"`call` must have positional or keyword arguments, not both or none, got {call!r}."
        )
    read = _Reader(call, tensor)
    if tree.args:
        return tuple(read.value(each, 0) for each in tree.args)
    named = {}
    for each in tree.keywords:
        if each.arg is None or each.arg in named:
            raise _unreadable(call)
        named[each.arg] = read.value(each.value, 0)
    return named


@dataclass(frozen=True)
class _Reader:
    """Reads the values of a call's text."""

    call: str
    tensor: Callable[[str], Any]

    def value(self, node: ast.expr, depth: int) -> Any:
        if depth > _DEEPEST_CALL:
            raise _unreadable(self.call)
        if isinstance(node, ast.Name):
            return self.tensor(node.id)
        if isinstance(node, ast.Tuple):
            return tuple(self.value(each, depth + 1) for each in node.elts)
        if isinstance(node, ast.List):
            return [self.value(each, depth + 1) for each in node.elts]
        if isinstance(node, ast.Dict):
            return {
                self._plain(key): self.value(each, depth + 1)
                for key, each in zip(node.keys, node.values, strict=True)
            }
        return self._plain(node)

    def _plain(self, node: ast.expr | None) -> Any:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            node, sign = node.operand, -1
        if not isinstance(node, ast.Constant) or not isinstance(node.value, PLAIN):
            raise _unreadable(self.call)
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise _unreadable(self.call)
        if sign == 1:
            return node.value
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise _unreadable(self.call)
        return -node.value


def _unreadable(call: str) -> RecordError:
    shown = call if len(call) <= 80 else f"{call[:77]}…"
    return RecordError(
        "`call` must be the arguments of a call in brackets, of names, numbers, text, True, False, "
        f"None, tuples, lists and dictionaries, got {shown!r}."
    )
