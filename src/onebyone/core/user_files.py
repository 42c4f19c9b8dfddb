"""Runs Python files of the user as modules: networks, data sets and metrics.

A module's name encodes the file's path, and this module is the parent package of all of them. So
two files called ``data.py`` do not collide, and a data loader's worker process can import the
module of a data set by its name.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from onebyone.core.errors import OneByOneError, UnknownNameError
from onebyone.core.read_files import printable, why_no_file

# Makes this module a package, so that it can have submodules.
__path__: list[str] = []

_digests: dict[str, str] = {}  # module name -> hash of the file when it was run
_neighbours: dict[str, dict[str, ModuleType]] = {}  # folder -> modules imported from it
_importing = threading.RLock()
_INSTALLED = tuple(
    f"{path}{os.sep}" for name, path in sysconfig.get_paths().items() if name.endswith("lib")
)


def run_user_file(path: Path, *, raises: type[OneByOneError]) -> ModuleType:
    """Run a Python file as a module; an unchanged file is not run again.

    Its folder comes first in the import path while it runs, as for a script.

    Args:
        path: The file.
        raises: The error for what the file raises.

    Raises:
        UnknownNameError: If there is no such file; lists those in the folder.
    """
    why = why_no_file(path)
    if why is not None:
        raise UnknownNameError("Python file", printable(path), _python_files(path.parent), why=why)
    file = path.resolve()
    name = _module_name(file)
    with user_errors(path, raises=raises):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if _digests.get(name) == digest and name in sys.modules:
            return sys.modules[name]
        before = sys.modules.get(name)
        spec = _spec(name, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            assert spec.loader is not None
            spec.loader.exec_module(module)
        except BaseException:
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
            raise
        _digests[name] = digest
    return module


def user_function(path: Path, name: str, *, raises: type[OneByOneError]) -> Callable[..., Any]:
    """Return a function or a class of a Python file.

    Args:
        path: The file, which is run.
        name: Name of the function.
        raises: The error for what the file raises.

    Raises:
        UnknownNameError: If there is no such file or function; lists what there is.
    """
    module = run_user_file(path, raises=raises)
    found = getattr(module, name, None) if name else None
    if callable(found):
        return found  # type: ignore[no-any-return]
    why = "" if found is None else f"is a {type(found).__name__}, not a function"
    names = user_functions(module) or [f"{path.name} defines no function and no class"]
    raise UnknownNameError(f"function in {printable(path)}", name, names, why=why)


def user_value(path: Path, name: str, *, raises: type[OneByOneError]) -> Any:
    """Return a value of any type from a Python file.

    Args:
        path: The file, which is run.
        name: Name of the value.
        raises: The error for what the file raises.

    Raises:
        UnknownNameError: If there is no such file or name.
    """
    module = run_user_file(path, raises=raises)
    if not name or not hasattr(module, name):
        names = [each for each in vars(module) if not each.startswith("_")]
        raise UnknownNameError(f"name in {printable(path)}", name, names)
    return getattr(module, name)


def user_functions(module: ModuleType) -> list[str]:
    """Return the public functions and classes that a file defines itself."""
    return sorted(
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    )


def call_user_function(
    function: Callable[..., Any],
    path: Path,
    options: Mapping[str, Any] | None = None,
    *,
    raises: type[OneByOneError],
) -> Any:
    """Call a function of a user's file, which may import modules of its folder.

    Args:
        function: From :func:`user_function`.
        path: The file.
        options: The function's keyword arguments.
        raises: The error for what the function raises.
    """
    with user_errors(path, raises=raises), _importing_from(path.resolve().parent):
        return function(**(options or {}))


@contextmanager
def user_errors(path: Path, *, raises: type[OneByOneError]) -> Iterator[None]:
    """Turn any exception of a user's file into an error that names the file and line.

    Errors of onebyone pass unchanged: the file may call it.
    """
    try:
        yield
    except OneByOneError:
        raise
    # It may raise anything, and a script may call sys.exit() when it is run.
    except (Exception, SystemExit) as error:
        raise raises(f"{_place(path, error)}: {type(error).__name__}: {_message(error)}") from error


def _place(path: Path, error: BaseException) -> str:
    """Return the file and line of an error."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{printable(error.filename or path)}, line {error.lineno}"
    own = path.resolve()
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == own
    ]
    return f"{printable(path)}, line {lines[-1]}" if lines else printable(path)


def _message(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines) or "(no message)"


def _python_files(folder: Path) -> list[str]:
    try:
        found = [str(file) for file in sorted(folder.glob("*.py"))]
    except (OSError, ValueError):
        found = []
    return found or [f"no .py file in {printable(folder)}"]


# ---------------------------------------------------------------- modules by path


def _module_name(file: Path) -> str:
    written = "".join(
        chr(byte) if chr(byte).isalnum() and byte < 128 else f"_{byte:02x}"
        for byte in os.fsencode(file)
    )
    return f"{__name__}.{written}"


def _path_of(name: str) -> Path:
    written = name.removeprefix(f"{__name__}.").encode()
    return Path(os.fsdecode(re.sub(rb"_([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), written)))


def _spec(name: str, file: Path) -> importlib.machinery.ModuleSpec:
    loader = _Loader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Reads the source each time, and writes no compiled file to the user's folder."""

    def path_stats(self, path: str) -> Mapping[str, Any]:
        # Python matches compiled files by time in seconds and size, so it would miss a quick edit.
        # Without these figures it neither reads nor writes compiled files.
        raise OSError(path)

    def exec_module(self, module: ModuleType) -> None:
        with _importing_from(Path(self.path).parent):
            super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of users' files in a process that has not run them yet."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if not fullname.startswith(f"{__name__}."):
            return None
        file = _path_of(fullname)
        return _spec(fullname, file) if why_no_file(file) is None else None


sys.meta_path.append(_Finder())


# ---------------------------------------------------------------- neighbours


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let a file import modules of its own folder, not those of the same name elsewhere.

    Modules of the same name from other folders are removed from ``sys.modules`` inside the block,
    and restored afterwards.
    """
    entry = str(folder)
    with _importing:
        own = _neighbours.setdefault(entry, {})
        aside = _namesakes(entry)
        before = sys.modules.keys() - aside.keys()
        for name in aside:
            del sys.modules[name]
        sys.modules.update(own)
        sys.path.insert(0, entry)
        importlib.invalidate_caches()  # finds files written within this second
        try:
            yield
        finally:
            with suppress(ValueError):  # the file may have changed the path itself
                sys.path.remove(entry)
            for name in sys.modules.keys() - before:
                if not name.startswith(f"{__name__}.") and _lies_in(sys.modules[name], entry):
                    own[name] = sys.modules[name]
            for name in own.keys() & aside.keys():
                sys.modules.pop(name, None)
            sys.modules.update(aside)


def _namesakes(entry: str) -> dict[str, ModuleType]:
    """Return modules of other folders with the same names; installed ones are not among them."""
    elsewhere = {
        id(module)
        for folder, found in _neighbours.items()
        if folder != entry
        for module in found.values()
    }
    names: set[str] = set()
    with suppress(OSError):
        names = {file.name.partition(".")[0] for file in Path(entry).iterdir()}
    names -= {"__main__", "onebyone"}
    return {
        name: module
        for name, module in list(sys.modules.items())
        if (id(module) in elsewhere or name.partition(".")[0] in names)
        and _is_users(module)
        and not _lies_in(module, entry)
    }


def _is_users(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and not file.startswith(_INSTALLED)


def _lies_in(module: ModuleType, entry: str) -> bool:
    file = getattr(module, "__file__", None)
    return _is_users(module) and os.path.realpath(str(file)).startswith(f"{entry}{os.sep}")
