"""Plugins: what other installed packages add by entry points."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from onebyone.core.errors import PluginError


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package.

    Attributes:
        name: Its name in settings.
        package: The distribution that provides it.
        entry: The entry point. The package is imported only by :meth:`load`.
    """

    name: str
    package: str
    entry: importlib.metadata.EntryPoint

    def load(self, kind: type | None = None) -> Any:
        """Import the entry point and return its object.

        Args:
            kind: The class that it must be an instance of, if any.

        Raises:
            PluginError: If the import fails, or the object has another class; names the package.
        """
        try:
            found = self.entry.load()
        except Exception as error:
            raise PluginError(
                f"{self.name!r} of the package {self.package!r} could not be imported: "
                f"{type(error).__name__}: {error}. Fix or uninstall that package."
            ) from error
        if kind is not None and not isinstance(found, kind):
            raise PluginError(
                f"{self.name!r} of the package {self.package!r} must be a {kind.__name__}, but "
                f"{self.entry.value} is a {type(found).__name__}. Update or uninstall that package."
            )
        return found


@cache
def _entries(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=group))


def plugins(group: str, taken: Collection[str]) -> dict[str, Plugin]:
    """Return the plugins of a group by name, without importing them.

    Args:
        group: A group of entry points, such as ``onebyone.runtimes``.
        taken: Names that onebyone uses itself.

    Raises:
        PluginError: If a package uses one of our names, or two packages use the same.
    """
    found: dict[str, Plugin] = {}
    for entry in _entries(group):
        package = entry.dist.name if entry.dist is not None else "unknown"
        other = found.get(entry.name)
        if other is not None and (other.package, other.entry.value) == (package, entry.value):
            continue  # an editable install may be listed twice
        if entry.name in taken or other is not None:
            owner = f"the package {other.package!r}" if other is not None else "onebyone itself"
            raise PluginError(
                f"The package {package!r} adds {entry.name!r} to {group}, a name that {owner} has. "
                "Uninstall one of them."
            )
        found[entry.name] = Plugin(entry.name, package, entry)
    return found
