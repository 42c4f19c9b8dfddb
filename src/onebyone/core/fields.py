"""Checks of a record's fields against their annotations.

msgspec checks the annotations when a record is read from JSON. :func:`check_fields` checks them
when code creates a record.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from onebyone.core.errors import RecordError

Count = Annotated[int, msgspec.Meta(ge=0)]
Whole = Annotated[int, msgspec.Meta(ge=1)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Sizes = tuple[Whole, ...]
Shape = Annotated[tuple[Whole, ...], msgspec.Meta(min_length=1)]
Text = Annotated[str, msgspec.Meta(min_length=1)]

_Check = Callable[[str, Any], None]  # takes the field's name and its value; raises RecordError

_LEAST, _MOST = -(2**63), 2**64 - 1  # what JSON readers of other languages hold


def check_fields(record: Any) -> None:
    """Check that each field of a record matches its annotation, and that numbers are finite.

    Raises:
        RecordError: If a field does not; names the first one.
    """
    kind: Any = type(record)
    for name, check in _checks(kind):
        check(name, getattr(record, name))


def version_of(kind: type[Any]) -> int | None:
    """Return the format number of a kind of record; ``None`` if it has none."""
    # A field `format` without a default is a file's format, such as "onnx".
    ours = getattr(kind, "format", None)
    return ours if isinstance(ours, int) else None


def check_version(kind: type[Any], given: object) -> None:
    """Check that a record has the format that this version of onebyone reads.

    Raises:
        RecordError: If it has another format.
    """
    ours = version_of(kind)
    if ours is None or given == ours or not isinstance(given, int):
        return
    name, reads = kind.__name__, f"has format {_short(given)} and this version reads format {ours}"
    if given > ours:
        raise RecordError(
            f"This {name} was written by a later version of onebyone: it {reads}. Update onebyone."
        )
    again = "Plan anew" if name == "Plan" else "Make it again with this version"
    raise RecordError(
        f"This {name} was written by an earlier version of onebyone: it {reads}. {again}."
    )


def check_known(raw: object, known: object, path: str = "$") -> None:
    """Check that JSON content has no unknown keys.

    Args:
        raw: The content as it was read.
        known: The record made from it, written as JSON again: it has the known keys.
        path: Path of the content within the whole.

    Raises:
        RecordError: If a key is unknown; names the first one and the closest known key.
    """
    if isinstance(raw, dict) and isinstance(known, dict):
        for key, value in raw.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise RecordError(f"There is no field {_short(key)} at `{path}`.{hint}")
            check_known(value, known[key], f"{path}.{key}")
    elif isinstance(raw, list) and isinstance(known, list):
        for place, (value, same) in enumerate(zip(raw, known, strict=True)):
            check_known(value, same, f"{path}[{place}]")


@functools.cache
def _checks(kind: type[Any]) -> tuple[tuple[str, _Check], ...]:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    return tuple((field.name, _check(hints[field.name])) for field in fields)


def _check(hint: Any) -> _Check:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _bounded(_check(parts[0]), parts[1:])
    if origin is Literal:
        return functools.partial(_one_of, parts)
    if origin in (typing.Union, types.UnionType):
        return _union(parts)
    if origin is not None:
        return _many(origin, parts)
    simple: dict[Any, _Check] = {int: _integer, float: _number, str: _text}
    return simple.get(hint) or functools.partial(_instance, hint)


def _many(origin: Any, parts: tuple[Any, ...]) -> _Check:
    if origin is tuple and parts[-1] is not Ellipsis:
        return functools.partial(_fixed, tuple(map(_check, parts)))
    if issubclass(origin, Mapping):
        return functools.partial(_mapping, _check(parts[0]), _check(parts[1]))
    return functools.partial(_sequence, origin, _check(parts[0]))


def _refuse(name: str, expected: str, value: object) -> RecordError:
    return RecordError(f"`{name}` must be {expected}, got {_short(value)}.")


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}…"


def _integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _refuse(name, "a whole number", value)
    if not _LEAST <= int(value) <= _MOST:
        raise _refuse(name, "a whole number of 64 bits", value)


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _refuse(name, "a number", value)
    if isinstance(value, numbers.Integral):
        _integer(name, value)
    elif not math.isfinite(value):
        raise _refuse(name, "a finite number", value)


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _refuse(name, "text", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _refuse(name, "text that UTF-8 can hold", value) from None


def _instance(kind: Any, name: str, value: Any) -> None:
    if isinstance(kind, type) and not isinstance(value, kind):
        raise _refuse(name, f"of type {kind.__name__}", value)


def _one_of(allowed: tuple[Any, ...], name: str, value: Any) -> None:
    if not any(value is each or value == each for each in allowed):
        raise _refuse(name, f"one of {', '.join(map(repr, allowed))}", value)


def _union(arms: tuple[Any, ...]) -> _Check:
    optional = type(None) in arms
    checks = [_check(arm) for arm in arms if arm is not type(None)]

    def check(name: str, value: Any) -> None:
        if optional and value is None:
            return
        failures = []
        for each in checks:
            try:
                each(name, value)
            except RecordError as error:
                failures.append(error)
            else:
                return
        raise failures[-1]

    return check


def _sequence(kind: type[Sequence[Any]], item: _Check, name: str, value: Any) -> None:
    if not isinstance(value, kind):
        raise _refuse(name, f"of type {kind.__name__}", value)
    for place, each in enumerate(value):
        item(f"{name}[{place}]", each)


def _fixed(items: tuple[_Check, ...], name: str, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) != len(items):
        raise _refuse(name, f"a tuple of {len(items)}", value)
    for place, (check, each) in enumerate(zip(items, value, strict=True)):
        check(f"{name}[{place}]", each)


def _mapping(key: _Check, item: _Check, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise _refuse(name, "a mapping", value)
    for word, each in value.items():
        key(f"{name}'s key", word)
        item(f"{name}[{_short(word)}]", each)


_BOUNDS: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
    ("ge", lambda value, limit: value >= limit, "at least {}"),
    ("gt", lambda value, limit: value > limit, "above {}"),
    ("le", lambda value, limit: value <= limit, "at most {}"),
    ("min_length", lambda value, limit: len(value) >= limit, "of length {} or more"),
)


def _bounded(inner: _Check, metas: Iterable[Any]) -> _Check:
    bounds = [
        (test, getattr(meta, name), words)
        for meta in metas
        for name, test, words in _BOUNDS
        if getattr(meta, name, None) is not None
    ]

    def check(name: str, value: Any) -> None:
        inner(name, value)
        for test, limit, words in bounds:
            if not test(value, limit):
                raise _refuse(name, words.format(limit), value)

    return check
