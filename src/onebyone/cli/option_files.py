"""Options from TOML files: the file of a sweep, and the recipe of a training."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onebyone.core.errors import OptionError, UnknownNameError
from onebyone.core.read_files import reason_of, why_no_file

RECIPE = "--recipe"
_RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def read_options(path: Path, purpose: str) -> dict[str, Any]:
    """Return the content of a TOML file.

    Args:
        path: The file.
        purpose: What the file is of, for the message: ``a sweep``.

    Raises:
        OptionError: If it cannot be read.
    """
    why = why_no_file(path)
    if why is not None:
        raise OptionError(f"The file of {purpose} must be a TOML file, but {path} {why}.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} must be a TOML file: {reason_of(error)}.") from error


def option(flag: str, value: str) -> list[str]:
    """Return an option with its value as arguments of a command line."""
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def words(value: object, name: str) -> list[str]:
    """Return the text, the number, or the list of such, of an entry as texts.

    Raises:
        OptionError: If it is something else.
    """
    values = value if isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | float) or not str(each):
            raise OptionError(f"{name} must be texts or numbers, got {each!r}.")
    return [str(each) for each in values]


def tokens(name: str, value: object, file: str) -> list[str]:
    """Return an entry of a file as arguments of a command line; a list gives an option each."""
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    texts = words(value, f"`{name}` of {file}")
    return [token for each in texts for token in option(f"--{name}", each)]


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of ``onebyone train`` with a recipe's options in place of its name.

    Options on the command line come later, so they replace those of the recipe.

    Raises:
        UnknownNameError: If there is no recipe of that name.
        OptionError: If the recipe cannot be read.
    """
    given = list(arguments)
    places = [place for place, each in enumerate(given) if each.partition("=")[0] == RECIPE]
    if given[:1] != ["train"] or len(places) != 1:
        return given
    place = places[0]
    _, equals, name = given[place].partition("=")
    rest = [*given[1:place], *given[place + (1 if equals else 2) :]]
    if not equals:
        if place + 1 == len(given):
            return given  # the parser says that a value is missing
        name = given[place + 1]
    file = _recipe(name)
    content = read_options(file, "a recipe")
    content.pop("figure", None)  # what it gave
    models = words(content.pop("model", []), f"`model` of {file}")
    if len(models) != 1:
        raise OptionError(f"The recipe {file} must have one `model`, got {len(models)}.")
    known = [token for key, value in content.items() for token in tokens(key, value, str(file))]
    return ["train", *models, *known, *rest]


def _recipe(name: str) -> Path:
    if name.lower().endswith(".toml"):
        return Path(name)
    found = {file.stem: file for file in _RECIPES.glob("*.toml")}
    if name not in found:
        raise UnknownNameError("recipe", name, found)
    return found[name]
