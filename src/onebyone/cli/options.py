"""Makes command-line options from the fields of settings, with their defaults, help and bounds."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from onebyone.cli.values import number, whole
from onebyone.core.arguments import Number, OneOf, OrNone, Whole, flag, kind_of
from onebyone.core.settings.signature import docs_of

OTHERS = "other settings"


@dataclass(frozen=True)
class Look:
    """The appearance of a setting on the command line.

    Attributes:
        group: Title of its group of options in the help.
        flag: The flag. By default the setting's name with dashes.
        metavar: Placeholder of its value in the help. The default depends on the type of value.
        note: A sentence added to the help.
    """

    group: str = OTHERS
    flag: str = ""
    metavar: str = ""
    note: str = ""


# In the order of the help. A setting that is not named here is shown last, under its own name.
LOOKS: Mapping[str, Look] = {
    "budget": Look("plan", metavar="QUANTITY=AMOUNT"),
    "fastest": Look("plan"),
    "max_drop": Look("plan", metavar="POINTS"),
    "closest": Look("plan"),
    "plan": Look("plan", metavar="FILE"),
    "head": Look("plan"),
    "leave": Look("plan", metavar="NAME"),
    "precision": Look("plan"),
    "effort": Look("plan"),
    "only_faster": Look("plan"),
    "measure_front": Look(
        "plan", "--front", note="The command `plan` prints the results of other budgets"
    ),
    "calibration_examples": Look("plan", "--calibration"),
    "reconstruct": Look("training", metavar="STEPS"),
    "epochs": Look("training"),
    "int8_epochs": Look("training", metavar="EPOCHS"),
    "batch_size": Look("training"),
    "learning_rate": Look("training", "--rate", "R"),
    "schedule": Look("training"),
    "weight_decay": Look("training", metavar="W"),
    "label_smoothing": Look("training", metavar="SHARE"),
    "augment": Look("training"),
    "ema": Look("training", metavar="DECAY"),
    "accumulate": Look("training", metavar="PARTS"),
    "patience": Look("training", metavar="EPOCHS"),
    "label_weight": Look("training", metavar="SHARE"),
    "mix": Look("training", metavar="SHARE"),
    "capture": Look("training"),
    "metric": Look("measurement", metavar="METRIC", note="Give a function as file.py:function"),
    "task": Look(
        "measurement",
        metavar="TASK",
        note="Give one of your own as file.py:name of a onebyone.Task or a divergence function",
    ),
    "ignore_index": Look("measurement", metavar="LABEL"),
    "runtime": Look("measurement", metavar="NAME"),
    "runtimes": Look("measurement", "--runtime", "NAME"),
    "num_threads": Look("measurement", "--threads"),
    "batch": Look("measurement"),
    "device": Look("measurement", metavar="DEVICE"),
    "log": Look("run", metavar="SERVICE"),
    "resume": Look("run"),
    "overwrite": Look("run"),
    "seed": Look("run"),
}
# Settings without an option: commands set them, or have another argument for them.
NOT_OPTIONS = frozenset(
    {
        "cache", "command", "example", "input_shape", "model_options", "name", "on_epoch",
        "original", "out", "progress", "uses", "weights",
    }
)  # fmt: skip

_REFERENCE = re.compile(r":\w+:`([^`]*)`")
_LITERAL = re.compile(r"``([^`]*)``")


def offered(record: Any) -> tuple[str, ...]:
    """Return the settings of a record that are options, in the order of the help."""
    names = [field.name for field in fields(record) if field.name not in NOT_OPTIONS]
    order = list(LOOKS)
    known = sorted((name for name in names if name in LOOKS), key=order.index)
    return (*known, *(name for name in names if name not in LOOKS))


def flag_of(record: Any, name: str) -> str:
    """Return the flag of a setting; for one that is on by default, the flag that turns it off."""
    flag_name = LOOKS.get(name, Look()).flag or f"--{name.replace('_', '-')}"
    return f"--no-{flag_name[2:]}" if _field(record, name).default is True else flag_name


def add_settings(
    parser: argparse.ArgumentParser,
    record: Any,
    *names: str,
    defaults: Mapping[str, str] | None = None,
) -> None:
    """Add the options of settings.

    Args:
        parser: The parser of a command.
        record: The settings, a dataclass.
        names: The settings to add, in any order; by default all that are options.
        defaults: Texts for defaults that differ in this command.
    """
    for name in (each for each in offered(record) if not names or each in names):
        place = group(parser, LOOKS.get(name, Look()).group)
        said = (defaults or {}).get(name) or _default_words(_field(record, name))
        place.add_argument(
            flag_of(record, name),
            dest=name,
            help=_help(record, name, said),
            **_action(record, name),
        )


def group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Return the group of options with a title; add it if it does not exist."""
    for known in parser._action_groups:  # noqa: SLF001
        if known.title == title:
            return known
    return parser.add_argument_group(title)


def given(args: argparse.Namespace, record: Any) -> dict[str, Any]:
    """Return the settings that were given or have a default, as parsed from the command line."""
    named = {name: getattr(args, name, None) for name in offered(record)}
    return {name: value for name, value in named.items() if value is not None}


def _field(record: Any, name: str) -> Field[Any]:
    return next(field for field in fields(record) if field.name == name)


def _action(record: Any, name: str) -> dict[str, Any]:
    """Return argparse's arguments for an option, from the check of the same name in Python."""
    field = _field(record, name)
    metavar = LOOKS.get(name, Look()).metavar
    kind = kind_of(field)
    kind = kind.kind if isinstance(kind, OrNone) else kind
    if kind is flag:
        return {"action": "store_false" if field.default is True else "store_true"}
    if _is_repeated(field):
        return {"action": "append", "metavar": metavar or "VALUE"}
    default = {} if field.default is MISSING else {"default": field.default}
    required = {"required": True} if field.default is MISSING else {}
    how: dict[str, Any] = {**default, **required}
    if isinstance(kind, OneOf):
        return {"choices": kind.allowed, **how}
    if isinstance(kind, Whole):
        return {"type": whole(name), "metavar": metavar or "N", **how}
    if isinstance(kind, Number):
        return {"type": number(name), "metavar": metavar or "NUMBER", **how}
    return {"metavar": metavar or "VALUE", **how}


def _is_repeated(field: Field[Any]) -> bool:
    return any(word in str(field.type) for word in ("Sequence[", "Iterable["))


def _help(record: Any, name: str, default: str) -> str:
    """Return the help of an option, from the documentation of its setting."""
    text = plain(docs_of(record)[name], record)
    if _field(record, name).default is True:
        text = f"do not {_lower(text.partition('. ')[0])}"
    text = _lower(text).removesuffix(".")
    note = LOOKS.get(name, Look()).note
    more = "May be repeated" if _is_repeated(_field(record, name)) else ""
    text = ". ".join(filter(None, (text, note, more)))
    return (text + (f" (default: {default})" if default else "")).replace("%", "%%")


def _default_words(field: Field[Any]) -> str:
    """Return a default as text; empty if the documentation states it."""
    value = field.default
    if value is MISSING or value is None or isinstance(value, bool) or value == ():
        return ""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def plain(text: str, record: Any) -> str:
    """Return documentation without markup, with settings' names replaced by their flags."""
    flags = {name: flag_of(record, name) for name in offered(record)} | {"out": "--out"}

    def shown(match: re.Match[str]) -> str:
        word = match[1]
        if word in flags:
            return flags[word]
        return f"'{word}'" if re.fullmatch(r"\w+( \w+)+", word) else word

    return _LITERAL.sub(shown, _REFERENCE.sub(r"\1", text))


def _lower(text: str) -> str:
    first = text.split(" ", 1)[0]
    return text if first[1:] != first[1:].lower() else text[:1].lower() + text[1:]
