"""Strict JSON parser: unique keys, finite numbers, bounded size and nesting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from onebyone.core.errors import RecordError
from onebyone.core.read_files import why_no_file

MAX_BYTES = 256 * 2**20  # far above the pictures of any report
MAX_DEPTH = 64  # nesting levels; our records have about ten
_DIGITS = 400  # of a whole number; a float has at most 309 before its decimal point


def read_file(path: str | Path) -> bytes:
    """Return the content of a file of at most ``MAX_BYTES``.

    Raises:
        RecordError: If it cannot be read, is no file, or is larger.
    """
    try:
        why = why_no_file(Path(path))
        if why is not None:
            raise RecordError(f"it {why}")
        with Path(path).open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecordError(error.strerror or str(error)) from error
    except ValueError as error:  # a NUL in the path
        raise RecordError(str(error)) from error
    if len(content) > MAX_BYTES:
        raise RecordError(f"it is larger than {MAX_BYTES // 2**20} MiB")
    return content


def parse(content: str | bytes) -> Any:
    """Return what JSON text holds.

    Raises:
        RecordError: If it is not JSON in UTF-8, has a key twice, has a number that is not finite or
            too long, or nests too deeply. Names the position if it is known.
    """
    text = content if isinstance(content, str) else _decode(content)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise RecordError(f"it nests deeper than {MAX_DEPTH} levels") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RecordError(f"it is not JSON text: {error.msg} at {where}") from error
    _check_depth(value, MAX_DEPTH)
    return value


def _decode(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        raise RecordError(
            "it must be UTF-8 text without a byte order mark. Save it again as plain UTF-8"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"it must be UTF-8 text, but byte {error.start} is not") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RecordError(f"the key {twice[:60]!r} comes twice in one object")
    return found


def _refuse_constant(word: str) -> NoReturn:
    raise RecordError(f"numbers must be finite, but it has {word}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RecordError(f"numbers must be finite, but it has {text[:40]}")
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise RecordError(f"numbers must have at most {_DIGITS} digits, but it has {text[:20]}…")
    return int(text)


def _check_depth(value: Any, left: int) -> None:
    if left == 0:
        raise RecordError(f"it nests deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _check_depth(each, left - 1)
