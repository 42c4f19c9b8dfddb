"""Parses values of command-line arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onebyone.core.arguments import check
from onebyone.core.errors import OptionError


def whole(name: str, *, least: int | None = None) -> Callable[[str], int]:
    """Return a parser of whole numbers with the bounds of an argument.

    Args:
        name: The argument's name in Python.
        least: The least allowed value, if it is higher for the command than in Python.
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"must be a whole number, got {_short(text)}"
            ) from None
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {value}")
        return int(_known(name, value))

    return read


def number(name: str) -> Callable[[str], float]:
    """Return a parser of numbers with the bounds of an argument."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {_short(text)}") from None
        return float(_known(name, value))

    return read


def _known(name: str, value: Any) -> Any:
    try:
        return check(name, value)
    except OptionError as error:
        words = str(error).removeprefix(f"`{name}` ").rstrip(".")
        raise argparse.ArgumentTypeError(words) from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")


@dataclass(frozen=True)
class Sizes:
    """Sizes as given on the command line.

    Attributes:
        by_x: Whether ``x`` separates them, as in ``28x28``. Two sizes are then height and width.
    """

    sizes: tuple[int, ...]
    by_x: bool


def shape(text: str) -> Sizes:
    """Read a shape such as ``1,3,224,224``, or the sides of a picture such as ``224x224``."""
    plain = text.lower().replace("×", "x")
    try:
        sizes = tuple(int(size) for size in plain.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            "must be sizes separated by commas: batch, channels, height, width, such as "
            f"1,3,224,224; got {_short(text)}"
        )
    _known("input_shape", sizes)
    return Sizes(sizes, by_x="x" in plain)


def model_options(texts: list[str]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` pairs; values are ints, floats, ``true``, ``false``, or texts.

    Raises:
        OptionError: If a text is not such a pair.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise OptionError(f"--model-option must be KEY=VALUE, got {text!r}.")
        if key in ("weights", "original"):
            raise OptionError(
                f"--model-option {key} would be taken for --{key}. Give --{key} instead; or, if "
                f"your own factory has an argument of that name, rename the argument."
            )
        if key in options and options[key] != _value(value):
            raise OptionError(f"--model-option {key} is given twice, with different values.")
        options[key] = _value(value)
    return options


def _value(text: str) -> int | float | str | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
