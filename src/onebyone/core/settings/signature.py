"""Signatures from settings: a function takes a record's fields as keyword arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from inspect import Parameter
from typing import Any, ParamSpec, Protocol, TypeVar

from onebyone.core.arguments import bind

_P = ParamSpec("_P")
_S = TypeVar("_S")
_R = TypeVar("_R")
_R_co = TypeVar("_R_co", covariant=True)
_M = TypeVar("_M")
_M_contra = TypeVar("_M_contra", contravariant=True)

_ENTRY = re.compile(r"    (\w+): ")  # an entry of a list in a Google-style docstring
_WIDTH = 96


class OnData(Protocol[_M_contra, _P, _R_co]):
    """A function of a model and data, and of settings by keyword."""

    def __call__(
        self, model: _M_contra, data: Any, *settings: _P.args, **named: _P.kwargs
    ) -> _R_co:
        """Settings are the fields of the record that is named after the function."""


class OnCalibration(Protocol[_M_contra, _P, _R_co]):
    """A function of a model and calibration inputs, and of settings by keyword."""

    def __call__(
        self, model: _M_contra, calibration: Any, *settings: _P.args, **named: _P.kwargs
    ) -> _R_co:
        """Settings are the fields of the record that is named after the function."""


def takes(
    record: Callable[_P, _S],
) -> Callable[[Callable[[_M, Any, _S], _R]], OnData[_M, _P, _R]]:
    """Make a function ``(model, data, settings)`` take the fields of ``record`` by keyword.

    Its signature, docstring and type then show each setting with its default. The entries of the
    record's fields replace the entry ``settings`` of its docstring.

    Args:
        record: A frozen dataclass that checks its fields.
    """
    return functools.partial(_taking, record)


def takes_calibration(
    record: Callable[_P, _S],
) -> Callable[[Callable[[_M, Any, _S], _R]], OnCalibration[_M, _P, _R]]:
    """Do the same as :func:`takes` for a function ``(model, calibration, settings)``."""
    return functools.partial(_taking, record)


def _taking(record: Any, function: Callable[[Any, Any, Any], _R]) -> Any:
    signature = signature_of(function, record)
    settings = {field.name for field in dataclasses.fields(record)}

    @functools.wraps(function)
    def taking(*given: Any, **named: Any) -> _R:
        arguments = bind(function.__name__, signature, given, named).arguments
        asked = {name: value for name, value in arguments.items() if name in settings}
        first, second = (value for name, value in arguments.items() if name not in settings)
        return function(first, second, record(**asked))

    taking.__signature__ = signature  # type: ignore[attr-defined]
    docs = docs_of(record)
    shown = {name: docs[name] for name in signature.parameters if name in settings}
    taking.__doc__ = _documented(function.__doc__, shown)
    return taking


def signature_of(function: Callable[..., Any], record: Any) -> inspect.Signature:
    """Return the signature of a function with a record's fields in place of ``settings``."""
    own = inspect.signature(function)
    parameters = [each for each in own.parameters.values() if each.name != "settings"]
    settings = [_parameter(field) for field in dataclasses.fields(record)]
    settings.sort(key=lambda each: each.default is not Parameter.empty)  # required ones first
    return own.replace(parameters=[*parameters, *settings])


def _parameter(field: dataclasses.Field[Any]) -> Parameter:
    default = Parameter.empty if field.default is dataclasses.MISSING else field.default
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=field.type)


def docs_of(record: type[Any]) -> dict[str, str]:
    """Return the documentation of each field, from the docstrings of a record and its bases."""
    said: dict[str, str] = {}
    for kind in reversed(record.__mro__):
        _, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
        said |= _entries(attributes)
    return {field.name: said.get(field.name, "") for field in dataclasses.fields(record)}


def _entries(text: str) -> dict[str, str]:
    """Return the entries of a list in a docstring, each on one line."""
    entries: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        start = _ENTRY.match(line)
        if start is not None:
            name = start[1]
            entries[name] = line[start.end() :].strip()
        elif line.startswith("        ") and name:
            entries[name] += f" {line.strip()}"
        else:
            break
    return entries


def _documented(text: str | None, docs: dict[str, str]) -> str | None:
    """Return a docstring with the entries of a record's fields in place of ``settings``."""
    if text is None:  # Python was started without docstrings
        return None
    entries = "\n".join(
        textwrap.fill(
            f"{name}: {said}",
            _WIDTH,
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, said in docs.items()
    )
    before, entry, after = inspect.cleandoc(text).partition("    settings: ")
    assert entry, "the docstring has no entry `settings`"
    rest = after.splitlines()[1:]
    while rest and rest[0].startswith("        "):
        rest.pop(0)
    return "\n".join([before + entries, *rest])
