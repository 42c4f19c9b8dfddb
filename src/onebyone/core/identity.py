"""Identity of a run: hashes that tell whether a resumed run has the same inputs and settings.

Content is hashed, not names: a file of the same name may have changed, and a folder that was moved
has not.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from onebyone.core.errors import OptionError
from onebyone.core.records import Identity, Record


class Digest:
    """A SHA-256 of texts, tensors and code; each part is delimited from the next."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def text(self, text: str) -> None:
        """Add a text."""
        content = text.encode(errors="surrogateescape")
        self._hash.update(f"{len(content)}:".encode())
        self._hash.update(content)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Add a tensor: its name, type, shape and values."""
        self.blocks(name, tensor.dtype, tuple(tensor.shape), [tensor])

    def blocks(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterable[Tensor]
    ) -> None:
        """Add a tensor that is given in blocks of rows, as :meth:`tensor` does the whole."""
        self.text(f"{name} {dtype} {shape}")
        for block in blocks:
            plain = block.detach().cpu().contiguous()
            if plain.numel():
                self._hash.update(plain.reshape(-1).view(torch.uint8).numpy().data)

    def code(self, function: Callable[..., Any] | None) -> None:
        """Add a function's compiled code, which comments do not change."""
        found: Any = None if function is None else inspect.unwrap(function)
        if not hasattr(found, "__code__"):  # a callable object
            found = getattr(type(found), "__call__", None)  # noqa: B004 - its code is wanted
        self.text(str(getattr(found, "__qualname__", type(found).__qualname__)))
        code = getattr(found, "__code__", None)
        if isinstance(code, CodeType):
            self._compiled(code)

    def _compiled(self, code: CodeType) -> None:
        self._hash.update(code.co_code)
        self.text(repr((code.co_names, code.co_varnames)))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._compiled(constant)
            elif isinstance(constant, frozenset):  # its order differs between processes
                self.text(repr(sorted(map(repr, constant))))
            else:
                self.text(repr(constant))

    def hexadecimal(self) -> str:
        """Return the SHA-256 of everything added."""
        return self._hash.hexdigest()


def hash_record(record: Record) -> str:
    """Return the SHA-256 of a record's content."""
    return hashlib.sha256(record.to_json().encode()).hexdigest()


def words_of(value: object) -> str:
    """Return a setting as text; settings with the same meaning give the same text."""
    if value is None:
        return "not given"
    if isinstance(value, Record):
        return f"SHA-256 {hash_record(value)}"
    if isinstance(value, list | tuple):
        return ", ".join(map(words_of, value)) or "none"
    if callable(value):
        digest = Digest()
        digest.code(value)
        name = getattr(value, "__name__", type(value).__name__)
        return f"{name}, {digest.hexadecimal()[:16]}"
    return str(value)


def check_same(kept: Identity, asked: Identity, *, where: str | Path, advice: str) -> None:
    """Check that a resumed run has the same identity as when it was started.

    Args:
        kept: Identity of the run when it was started.
        asked: Identity of the run now.
        where: Folder of the run, for the message.
        advice: What to do if they differ, a sentence.

    Raises:
        OptionError: If they differ; names each difference.
    """
    different = differences(kept.settings, asked.settings)
    different += differences(kept.versions, asked.versions)
    if kept.network != asked.network:
        different.append("another network or other weights")
    if kept.data != asked.data:
        different.append("other data")
    refuse_different(different, where=where, advice=advice)


def differences(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return a text for each value that differs."""
    return [
        f"{name} {kept.get(name, 'not given')} instead of {asked.get(name, 'not given')}"
        for name in sorted({*kept, *asked})
        if kept.get(name) != asked.get(name)
    ]


def refuse_different(different: Iterable[str], *, where: str | Path, advice: str) -> None:
    """Refuse to resume a run that was started with other settings.

    Raises:
        OptionError: If there is a difference.
    """
    listed = ", ".join(different)
    if listed:
        raise OptionError(
            f"{where} can only be resumed with the same settings, network and data, but was "
            f"started with {listed}. {advice}"
        )
