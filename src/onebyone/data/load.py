"""Loads a data set from a short text: a name, a folder of pictures, or a function in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from onebyone.core.arguments import checked
from onebyone.core.errors import DataError, OptionError, UnknownNameError
from onebyone.core.read_files import printable
from onebyone.core.torch_state import ordinary_torch
from onebyone.core.user_files import call_user_function, user_function
from onebyone.data.convert import as_data
from onebyone.data.folders import load_folder
from onebyone.data.named import NAMED, load_named
from onebyone.data.shards import load_shards
from onebyone.data.splits import Data
from onebyone.data.tables import load_table

# What is read from files of pictures.
_IN_FILES: dict[str, Callable[..., Data]] = {
    "imagefolder": load_folder,
    "shards": load_shards,
    "hf": load_table,
}
_FORMS = ("imagefolder:DIR", "shards:PATTERN", "hf:DIR", "file.py:function")


@checked
@ordinary_torch()
def load_data(
    spec: str,
    *,
    seed: int = 0,
    limit: int | None = None,
    image_size: int | None = None,
    ignore_index: int | None = None,
    workers: int | None = None,
) -> Data:
    """Load a data set.

    Args:
        spec: ``digits``, ``mnist``, ``fashion-mnist`` or ``cifar10``; ``imagefolder:DIR``, with one
            folder per class, or with pictures directly, which then have no labels;
            ``shards:PATTERN``, WebDataset shards on this machine; ``hf:DIR``, what ``save_to_disk``
            of Hugging Face's ``datasets`` has written; or ``file.py:function``, a function without
            arguments that returns data in a form that :func:`onebyone.data.as_data` accepts.
        seed: Random seed of the division into parts.
        limit: Most examples in each part, drawn with the seed.
        image_size: Height and width in pixels to resize pictures to; not for ``file.py``.
        ignore_index: A label that every count and loss ignores; only for ``file.py``.
        workers: Number of threads that decode pictures as they are used. By default pictures that
            fit into memory are decoded once, and others by a thread for each free processor. Only
            for pictures in files.

    Raises:
        UnknownNameError: If there is no data set, or no function, of that name.
        DataError: If the data is missing, empty, unreadable, or its parts do not fit together.
        OptionError: If ``limit`` or ``image_size`` is not above 0 or not possible here.
    """
    for name, value in (("limit", limit), ("image_size", image_size)):
        if value is not None and value < 1:
            raise OptionError(f"`{name}` must be at least 1, got {value}.")
    kind, _, rest = spec.partition(":")
    if kind in _IN_FILES and rest:
        load = _IN_FILES[kind]
        return load(rest, seed=seed, limit=limit, image_size=image_size, workers=workers)
    if workers is not None:
        raise OptionError(
            f"`workers` must be left out for {printable(spec)}: it is for pictures in files, which "
            "are decoded as they are used. A function of yours gives a DataLoader with "
            "`num_workers`."
        )
    path, _, function = spec.rpartition(":")
    if path.endswith(".py"):
        if image_size is not None:
            raise OptionError(
                f"`image_size` must be left out for {spec}: its function sets the size."
            )
        file = Path(path).expanduser()
        return _from_file(file, function, seed=seed, limit=limit, ignore_index=ignore_index)
    if spec not in NAMED:
        raise UnknownNameError("data set", spec, [*NAMED, *_FORMS])
    return load_named(spec, seed=seed, limit=limit, image_size=image_size)


def _from_file(
    path: Path, function: str, *, seed: int, limit: int | None, ignore_index: int | None
) -> Data:
    factory = user_function(path, function, raises=DataError)
    made = call_user_function(factory, path, raises=DataError)
    try:
        name = f"{path.name}:{function}"
        data = as_data(made, name=name, seed=seed, ignore_index=ignore_index)
    except DataError as error:
        raise DataError(
            f"`{function}()` of {printable(path)} returned unfit data. {error}"
        ) from error
    if limit is None:
        return data
    return replace(
        data,
        train=data.train.take(limit, seed),
        validation=data.validation.take(limit, seed),
        test=data.test.take(limit, seed),
    )
