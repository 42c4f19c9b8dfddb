"""Checks of the arguments of public functions, looked up by argument name.

An argument name means the same in every function, but for a setting whose field has a check of its
own in its metadata: ``precision`` of a plan. A check returns the value in its plain form (a
NumPy number becomes a Python number), or raises an error that says what must hold.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from onebyone.core.errors import OptionError, UnknownNameError

Check = Callable[[str, Any], Any]  # takes the argument's name and its value

_P = ParamSpec("_P")
_R = TypeVar("_R")

MOST_SEED = 2**32 - 1  # what NumPy and scikit-learn take as well as torch
MOST_BATCH = 65_536
MOST_SIDE = 1_000_000  # of a shape
MOST_THREADS = 1_024


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Check the arguments of a public function by their names before it runs.

    An unknown keyword raises an error that suggests the closest known one.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checking(*given: _P.args, **named: _P.kwargs) -> _R:
        bound = bind(function.__name__, signature, given, named)
        for name, value in bound.arguments.items():
            if (function.__name__, name) not in _OTHERS:
                default = signature.parameters[name].default
                bound.arguments[name] = check(name, value, default=default)
        return function(*bound.args, **bound.kwargs)

    return checking


def check(name: str, value: Any, *, default: Any = inspect.Parameter.empty) -> Any:
    """Return the value of an argument in its plain form.

    Args:
        name: Name of the argument. The value of an unknown name is returned unchecked.
        value: The given value.
        default: The argument's default, which is not checked.

    Raises:
        OptionError: If the value is not valid for this argument.
    """
    known = KINDS.get(name)
    return value if known is None or value is default else known(name, value)


def check_settings(settings: object) -> None:
    """Check the fields of a frozen dataclass of settings, and replace them by their plain forms.

    Raises:
        OptionError: If a field has an invalid value.
    """
    fields = getattr(settings, "__dataclass_fields__", {})
    for name, field in fields.items():
        value, kind = getattr(settings, name), kind_of(field)
        if kind is not None and value is not field.default:
            object.__setattr__(settings, name, kind(name, value))


def kind_of(field: dataclasses.Field[Any]) -> Check | None:
    """Return the check of a setting: the one in its metadata, or that of its name."""
    own: Check | None = field.metadata.get("check")
    return KINDS.get(field.name) if own is None else own


@dataclass(frozen=True)
class Whole:
    """A whole number.

    Attributes:
        low: The least allowed value.
        high: The greatest allowed value.
    """

    low: int
    high: int

    def __call__(self, name: str, value: Any) -> int:
        """Return the number as one of Python's."""
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise _refuse(name, "a whole number", value)
        return int(_within(name, value, self.low, self.high))


@dataclass(frozen=True)
class Number:
    """A finite number.

    Attributes:
        low: The least allowed value.
        high: The greatest allowed value.
        above: Whether the number must be above ``low``, not equal to it.
    """

    low: float
    high: float = math.inf
    above: bool = False

    def __call__(self, name: str, value: Any) -> float:
        """Return the number as one of Python's."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _refuse(name, "a number", value)
        try:
            finite = math.isfinite(float(value))
        except OverflowError:
            finite = False
        if not finite:
            raise _refuse(name, "a finite number", value)
        if self.above and value == self.low:
            raise _refuse(name, f"above {self.low:g}", value)
        return float(_within(name, value, self.low, self.high))


def _within(name: str, value: Any, low: float, high: float) -> Any:
    if value < low:
        raise _refuse(name, f"{low:,} or more", value)
    if value > high:
        raise _refuse(name, f"at most {high:,}", value)
    return value


def flag(name: str, value: Any) -> bool:
    """Check true or false."""
    if type(value).__name__ not in ("bool", "bool_") or not hasattr(value, "__bool__"):
        raise _refuse(name, "True or False", value)
    return bool(value)


def text(name: str, value: Any) -> str:
    """Check a text."""
    if not isinstance(value, str):
        raise _refuse(name, "a text", value)
    return value


def path(name: str, value: Any) -> Any:
    """Check a path; return one given as bytes as text."""
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    if not isinstance(value, str | os.PathLike):
        cure = ""
        if isinstance(value, Mapping):
            cure = (
                " Load a state dict by the network's own `load_state_dict`, or save it to a file."
            )
        raise _refuse(name, "the path of a file or a folder", value, cure)
    if "\0" in os.fspath(value) or os.fspath(value) == "":
        raise _refuse(name, "the path of a file or a folder", value)
    return value


def names(name: str, value: Any) -> tuple[str, ...]:
    """Check a list of texts; one text is a list of one."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
        raise _refuse(name, "a list of names", value)
    listed = tuple(value)
    for each in listed:
        if not isinstance(each, str):
            raise _refuse(name, "a list of names", value)
    return listed


def values(name: str, value: Any) -> tuple[float, ...]:
    """Check a list of finite numbers."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise _refuse(name, "a list of numbers", value)
    one = Number(-math.inf)
    return tuple(one(name, each) for each in value)


def shape(name: str, value: Any) -> tuple[int, ...]:
    """Check the shape of an input, with the batch first."""
    expected = "positive sizes with the batch in front, such as (1, 3, 224, 224)"
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise _refuse(name, expected, value)
    sizes = tuple(value)
    for each in sizes:
        is_whole = isinstance(each, numbers.Integral) and not isinstance(each, bool)
        if not is_whole or each < 1:
            raise _refuse(name, expected, value)
        if each > MOST_SIDE:
            raise _refuse(name, f"sizes of at most {MOST_SIDE:,}", value)
    if not sizes:
        raise _refuse(name, expected, value)
    return tuple(map(int, sizes))


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    allowed: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> str:
        """Return the word."""
        if not isinstance(value, str):
            raise _refuse(name, f"one of {', '.join(map(repr, self.allowed))}", value)
        if value not in self.allowed:
            raise UnknownNameError(f"`{name}`", value, self.allowed)
        return value


def task(name: str, value: Any) -> Any:
    """Check a task: a built-in task's name, a ``Task``, or a divergence function."""
    from onebyone.core.task import Task, find_task  # noqa: PLC0415  (torch takes seconds to import)

    del name
    if not isinstance(getattr(value, "task", None), Task):  # else it is looked up
        find_task(value)
    return value


def function(name: str, value: Any) -> Any:
    """Check that a value is callable."""
    if not callable(value):
        raise _refuse(name, "a function", value)
    return value


@dataclass(frozen=True)
class OrNone:
    """A value that another check accepts, or ``None``."""

    kind: Check

    def __call__(self, name: str, value: Any) -> Any:
        """Return the value in its plain form."""
        return None if value is None else self.kind(name, value)


SHARE = Number(0, 1)
_TIMES = Whole(1, 1_000_000)
_RATE = Number(0, 1_000, above=True)

KINDS: Mapping[str, Check] = {
    # how much
    "batch": Whole(1, MOST_BATCH),
    "batch_size": OrNone(Whole(1, 2**31 - 1)),
    "calibration_examples": OrNone(Whole(1, 2**31 - 1)),
    "accumulate": Whole(1, 1_000_000),
    "epochs": Whole(0, 1_000_000),
    "int8_epochs": Whole(0, 1_000_000),
    "patience": OrNone(Whole(1, 1_000_000)),
    "ignore_index": OrNone(Whole(-(2**63), 2**63 - 1)),  # what a label can be
    "image_size": OrNone(Whole(1, 16_384)),
    "limit": OrNone(Whole(1, 2**63 - 1)),
    "workers": OrNone(Whole(1, 1024)),
    "num_threads": OrNone(Whole(1, MOST_THREADS)),
    "rounds": _TIMES,
    "seeds": Whole(1, 10_000),
    "reconstruct": Whole(0, 100_000_000),
    "steps": Whole(0, 100_000_000),
    "top": _TIMES,
    "seed": Whole(0, MOST_SEED),
    "seconds": OrNone(Number(0, above=True)),
    # shares, rates and weights
    "ema": OrNone(SHARE),
    "feature_weight": Number(0),
    "label_smoothing": SHARE,
    "label_weight": SHARE,
    "learning_rate": OrNone(_RATE),
    "max_drop": OrNone(Number(0)),
    "mix": OrNone(SHARE),
    "ranks": Number(0, 1, above=True),
    "temperature": Number(0, above=True),
    "weight_decay": Number(0),
    "mean": OrNone(values),
    "std": OrNone(values),
    # yes or no
    **dict.fromkeys(
        (
            "augment",
            "capture",
            "closest",
            "fastest",
            "keep_freed_memory",
            "measure_front",
            "only_faster",
            "overwrite",
            "resume",
            "timed",
        ),
        flag,
    ),
    "keep_statistics": OrNone(flag),
    "norms": OrNone(flag),
    # words and names
    "form": text,
    "head": OneOf(("auto", "keep", "exact", "gap")),
    "effort": OneOf(("quick", "normal", "thorough")),
    "precision": OneOf(("auto", "float32", "bf16")),
    "runtime": OrNone(text),
    "schedule": OneOf(("cosine", "constant")),
    "task": OrNone(task),
    "layer": OrNone(text),
    "name": OrNone(text),
    "classes": OrNone(names),
    "command": names,
    "features": names,
    "leave": names,
    "log": names,
    "names": OrNone(names),
    "runtimes": OrNone(names),
    "sites": OrNone(names),
    # files
    "checkpoint": OrNone(path),
    "folder": path,
    "path": path,
    "original_weights": OrNone(path),
    "out": OrNone(path),
    "weights": OrNone(path),
    # the rest
    "input_shape": OrNone(shape),
    "loss": OrNone(function),
    "on_epoch": OrNone(function),
    "progress": OrNone(function),
}

PLAN_PRECISION = OneOf(("float32", "int8", "auto"))

# Arguments whose name means something else in this one function: they are not checked.
_OTHERS = {("check_runtime", "runtime"), ("export", "precision")}


def bind(
    called: str, signature: inspect.Signature, given: Sequence[Any], named: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Bind the arguments of a call to a function's parameters.

    Raises:
        UnknownNameError: If a keyword is unknown.
        OptionError: If the arguments do not fit for another reason.
    """
    parameters = signature.parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for keyword in named:
        if keyword not in parameters and not takes_any:
            known = [
                each.name for each in parameters.values() if each.kind is not each.VAR_POSITIONAL
            ]
            raise UnknownNameError(f"argument of {called}()", keyword, known, listed=len(known))
    try:
        return signature.bind(*given, **named)
    except TypeError as error:
        raise OptionError(f"The arguments of {called}() do not fit: {error}.") from error


def _refuse(name: str, expected: str, value: object, cure: str = "") -> OptionError:
    return OptionError(f"`{name}` must be {expected}, got {_shown(value)}.{cure}")


def _shown(value: object) -> str:
    """Return a short text for a value; for a large value its type."""
    if isinstance(value, str | bytes | int | float | bool | tuple | list) or value is None:
        try:
            words = repr(value)
        except ValueError:  # an int of more digits than Python writes
            return "a number of thousands of digits"
        if len(words) <= 60:
            return words
        if isinstance(value, int):
            return f"a number of {len(words)} digits"
        return f"{words[:57]}…"
    sizes = getattr(value, "shape", None)
    if sizes is not None:
        return f"a {type(value).__name__.lower()} of shape {tuple(sizes)}"
    return f"a {type(value).__name__}"
