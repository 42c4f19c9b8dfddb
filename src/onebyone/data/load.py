"""From a short text to a data set: a name, a folder of pictures, or a function in a file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from onebyone.data.convert import as_data
from onebyone.data.folders import load_folder
from onebyone.data.named import NAMED, load_named
from onebyone.data.splits import Data
from onebyone.errors import DataError, OneByOneError, OptionError, UnknownNameError


def load_data(
    spec: str, *, seed: int = 0, limit: int | None = None, image_size: int | None = None
) -> Data:
    """Load a data set.

    Args:
        spec: ``digits``, ``mnist``, ``fashion-mnist`` or ``cifar10``; ``imagefolder:DIR``, with
            a folder a class, or with pictures, which then have no labels; or ``file.py:function``,
            a function without arguments that returns what :func:`onebyone.data.as_data` takes.
        seed: Of the division into parts.
        limit: At most so many examples in each part, drawn by the seed.
        image_size: Height and width in pixels to resize pictures to; not for ``file.py``.

    Raises:
        UnknownNameError: If there is no data set, or no function, of that name.
        DataError: If the data is missing, empty, unreadable, or does not fit together.
        OptionError: If ``limit`` or ``image_size`` is not above 0 or cannot be obeyed.
    """
    for name, value in (("limit", limit), ("image_size", image_size)):
        if value is not None and value < 1:
            raise OptionError(f"`{name}` must be at least 1, got {value}.")
    kind, _, rest = spec.partition(":")
    if kind == "imagefolder" and rest:
        folder = Path(rest).expanduser()
        return load_folder(folder, seed=seed, limit=limit, image_size=image_size)
    path, _, function = spec.rpartition(":")
    if path.endswith(".py"):
        if image_size is not None:
            raise OptionError(
                f"`image_size` must be left out for {spec}: its function sets the size."
            )
        return _from_file(Path(path).expanduser(), function, seed=seed, limit=limit)
    if spec not in NAMED:
        raise UnknownNameError("data set", spec, [*NAMED, "imagefolder:DIR", "file.py:function"])
    return load_named(spec, seed=seed, limit=limit, image_size=image_size)


def _from_file(path: Path, function: str, *, seed: int, limit: int | None) -> Data:
    module = _import(path)
    factory = getattr(module, function, None)
    if not callable(factory):
        own = [
            name
            for name, value in vars(module).items()
            if callable(value)
            and not name.startswith("_")
            and getattr(value, "__module__", None) == module.__name__
        ]
        raise UnknownNameError(f"function in {path}", function, own)
    try:
        made = factory()
    except OneByOneError:
        raise
    except Exception as error:
        raise DataError(
            f"`{function}()` of {path} must return a data set, and failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    data = as_data(made, name=f"{path.name}:{function}", seed=seed)
    if limit is None:
        return data
    return Data(
        name=data.name,
        train=data.train.take(limit, seed),
        validation=data.validation.take(limit, seed),
        test=data.test.take(limit, seed),
        classes=data.classes,
        seed=data.seed,
    )


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise DataError(f"The Python file {path} must exist, and does not. Check the path.")
    found = importlib.util.spec_from_file_location(f"onebyone_user_{path.stem}", path)
    if found is None or found.loader is None:
        raise DataError(f"{path} cannot be imported as a Python file.")
    module = importlib.util.module_from_spec(found)
    # Workers of a loader find the module of a data set by its name.
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module.__name__]
        raise DataError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module
