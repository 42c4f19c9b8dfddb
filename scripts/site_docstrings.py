"""For mkdocstrings: shows functions that take settings with each setting as a keyword.

Griffe reads the source, in which such a function has one parameter `settings`
(`onebyone.core.settings.signature`). At run time it has the keywords, and their documentation.
"""

import importlib
import inspect
import re

import griffe

_ROLE = re.compile(r":\w+:`~?([^`]+)`")
_TAKERS = ("takes", "takes_calibration")


class Settings(griffe.Extension):
    """Replaces signatures and docstrings; shows Sphinx roles as code."""

    def on_function(self, *, func, **_):
        """Expand a function's settings."""
        names = {str(decorator.value).partition("(")[0] for decorator in func.decorators}
        if names & set(_TAKERS):
            made = getattr(importlib.import_module(func.module.path), func.name)
            func.parameters = griffe.Parameters(*_parameters(inspect.signature(made)))
            func.docstring.value = _ROLE.sub(_code, inspect.cleandoc(made.__doc__))

    def on_object(self, *, obj, **_):
        """Show roles as code."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_code, obj.docstring.value)


def _parameters(signature):
    for each in signature.parameters.values():
        kind = griffe.ParameterKind(each.kind.description)
        plain = each.annotation is each.empty or not isinstance(each.annotation, str)
        default = None if each.default is each.empty else repr(each.default)
        yield griffe.Parameter(
            each.name,
            kind=kind,
            annotation=None if plain else each.annotation,
            default=default,
        )


def _code(role):
    return f"`{role[1].removeprefix('onebyone.').rpartition('.')[2]}`"
