"""Hugging Face data sets of pictures: files of pictures and labels in columns of Arrow tables."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from onebyone.core.errors import DataError, MissingExtraError
from onebyone.core.read_files import printable, reason_of, why_no_folder
from onebyone.data.listed import Listed, completed, part_named
from onebyone.data.picture_data import picture_data
from onebyone.data.pictures import decode_picture, open_picture
from onebyone.data.splits import Data

_LABELS = ("label", "labels")
_OPTIONS = ("image", "label")


class TablePictures:
    """The pictures in a column.

    Args:
        table: A ``datasets.Dataset``. Not modified.
        column: Name of the column.
    """

    def __init__(self, table: Any, column: str) -> None:
        library = _library()
        files = table.with_format(None).select_columns([column])
        self._files = files.cast_column(column, library.Image(decode=False))
        self._column = column

    def __len__(self) -> int:
        return len(self._files)

    def open(self, row: int, size: int | None) -> Image.Image:
        """Return a picture in RGB."""
        file = self._files[row][self._column]
        if file is None:
            raise DataError(
                f"The picture in row {row:,} of {self._column!r} is missing. Remove the row."
            )
        if file["bytes"] is None:
            return open_picture(Path(file["path"]), size)
        return decode_picture(file["bytes"], lambda: f"in row {row:,} of {self._column!r}", size)


def load_table(
    spec: str,
    *,
    seed: int = 0,
    limit: int | None = None,
    image_size: int | None = None,
    workers: int | None = None,
) -> Data:
    """Load a data set that ``save_to_disk`` of Hugging Face's ``datasets`` has written.

    Pictures are scaled and normalized as those of :func:`load_folder`, and missing parts are held
    out as there.

    Args:
        spec: Its folder; after it, where there are several, the columns to use:
            ``FOLDER,image=COLUMN,label=COLUMN``.
        seed: Random seed of the division.
        limit: Most pictures in each part; others are not decoded.
        image_size: Height and width in pixels; default 224.
        workers: As for :func:`load_folder`.

    Raises:
        MissingExtraError: If ``datasets`` is not installed.
        DataError: If there is no such data set, or it has no such columns.
        OptionError: If the size is below 1.
    """
    place, columns = _read_spec(spec)
    library = _library()
    folder = Path(place).expanduser()
    why = why_no_folder(folder)
    if why is not None:
        raise DataError(
            f"A data set of Hugging Face must be a folder on this machine that `save_to_disk` has "
            f"written, but {printable(folder)} {why}. Save it there first."
        )
    try:
        found = library.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder may raise anything
        raise DataError(
            f"The folder {printable(folder)} must have been written by `save_to_disk` of Hugging "
            f"Face's datasets, but cannot be read: {reason_of(error)}. Save the data set again."
        ) from error
    how: dict[str, Any] = {"limit": limit, "image_size": image_size, "workers": workers}
    name = printable(folder.resolve().name)
    return data_of_tables(tables_of(found), columns, name=name, seed=seed, **how)


def _read_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Return the folder and the columns that are named."""
    place, *options = spec.split(",")
    columns = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in _OPTIONS or not value:
            raise DataError(
                f"After the folder of a data set of Hugging Face there may be `,image=COLUMN` and "
                f"`,label=COLUMN`, got {printable(option)!r}."
            )
        columns[key] = value
    return place, columns


def _library() -> Any:
    try:
        found = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets", "A data set of Hugging Face") from error
    if not hasattr(found, "load_from_disk"):  # a file of that name comes first
        raise DataError(
            f"The module `datasets` must be that of Hugging Face, but Python finds "
            f"{printable(getattr(found, '__file__', 'another one'))}. Rename that file."
        )
    return found


# ---------------------------------------------------------------- what Python gives


def is_table(value: object) -> bool:
    """Whether this is a data set of Hugging Face's ``datasets``, or a dictionary of parts."""
    return _kind(value) in {"Dataset", "DatasetDict"}


def is_stream(value: object) -> bool:
    """Whether this is a streamed data set of Hugging Face, which has no random access."""
    return _kind(value) in {"IterableDataset", "IterableDatasetDict"}


def _kind(value: object) -> str | None:
    """Return the name of the class; without importing the library, which is large."""
    kinds = (kind for kind in type(value).__mro__ if kind.__module__.startswith("datasets."))
    return next((kind.__name__ for kind in kinds), None)


def tables_of(value: Any) -> dict[str, Any]:
    """Return the parts of a data set; a single one is ``train``.

    Raises:
        DataError: If a part has another name, or several have one.
    """
    if _kind(value) == "Dataset":
        return {"train": value}
    if len(value) == 1:
        return {"train": next(iter(value.values()))}
    parts = {part_named(name): table for name, table in value.items()}
    if None in parts or len(parts) < len(value) or "train" not in parts:
        raise DataError(
            "The parts of a data set of Hugging Face must be `train` and one or both of "
            f"`validation` and `test`, got {', '.join(map(printable, value))}. Remove or rename "
            "the others."
        )
    return {str(part): table for part, table in parts.items()}


def holds_pictures(table: Any) -> bool:
    """Whether a table has pictures that no transform of the user's makes into tensors."""
    return table.format["type"] != "custom" and bool(_columns_of(table, "Image"))


def data_of_tables(
    tables: Mapping[str, Any], columns: Mapping[str, str], *, name: str, seed: int, **how: Any
) -> Data:
    """Return tables of pictures as data.

    Args:
        tables: The training part, and others.
        columns: Names of the columns ``image`` and ``label``, where there are several.
        name: Name of the data set.
        seed: Random seed of the division.
        how: As for :func:`picture_data`.

    Raises:
        DataError: If the columns are missing, not certain, or of another type.
    """
    names = {part: _class_names(table, columns.get("label")) for part, table in tables.items()}
    known = next((given for given in names.values() if given), ())
    odd = next((part for part, given in names.items() if given not in {known, ()}), None)
    if odd is not None:
        raise DataError(
            f"All parts must have the same classes, but {odd} has {_few(names[odd])} and train "
            f"{_few(names['train'])}. Number the labels alike."
        )
    found, labelled = {}, {}
    for part, table in tables.items():
        found[part], labelled[part] = listed_table(table, columns)
    if len(set(labelled.values())) > 1:
        lacking = next(part for part, has in labelled.items() if not has)
        raise DataError(
            f"Either all parts must have labels or none, but {lacking} has none. Remove the part."
        )
    classes: tuple[str, ...] = ()
    if labelled["train"]:
        highest = max(int(listed.labels.max()) for listed in found.values())
        classes = known or tuple(map(str, range(highest + 1)))
    parts = completed(found, place=name, classes=classes, seed=seed)
    usual = {"limit": None, "image_size": None, "workers": None}
    return picture_data(parts, name=name, classes=classes, seed=seed, **{**usual, **how})


def listed_table(table: Any, columns: Mapping[str, str] | None = None) -> tuple[Listed, bool]:
    """Return the pictures of a table, and whether they have labels."""
    named = columns or {}
    pictures = TablePictures(table, _image_column(table, named.get("image")))
    column = _label_column(table, named.get("label"))
    if column is None:
        return Listed.all_of(pictures, torch.zeros(len(pictures))), False
    return Listed.all_of(pictures, _labels(table, column)), True


def known_labels(table: Any) -> Tensor | None:
    """Return the labels of a table, if one column has them; ``None`` else."""
    try:
        column = _label_column(table, None)
        return None if column is None else _labels(table, column)
    except DataError:
        return None


# ---------------------------------------------------------------- columns


def _columns_of(table: Any, kind: str) -> list[str]:
    return [name for name, feature in table.features.items() if type(feature).__name__ == kind]


def _image_column(table: Any, named: str | None) -> str:
    found = _columns_of(table, "Image")
    if named is not None:
        _check_named(table, "image", named)
        if named not in found:
            raise DataError(
                f"The column {named!r} must hold pictures, and has the type "
                f"{table.features[named]}. Cast it to `datasets.Image()`."
            )
        return named
    if len(found) != 1:
        raise DataError(_not_one("pictures", "image", found, table))
    return found[0]


def _label_column(table: Any, named: str | None) -> str | None:
    """Return the column of the labels; ``None`` if there are none."""
    if named is not None:
        _check_named(table, "label", named)
        return named
    found = _columns_of(table, "ClassLabel")
    if not found:
        found = [name for name in table.features if name in _LABELS]
    if len(found) > 1:
        raise DataError(_not_one("labels", "label", found, table))
    return found[0] if found else None


def _check_named(table: Any, what: str, named: str) -> None:
    if named not in table.features:
        raise DataError(
            f"The data set has no column {printable(named)!r} for `{what}`. Columns: "
            f"{_few(list(table.features))}."
        )


def _not_one(what: str, option: str, found: Sequence[str], table: Any) -> str:
    got = f"several: {_few(found)}" if found else f"none of {_few(list(table.features))}"
    return (
        f"A data set of Hugging Face must have one column with {what}, got {got}. Name it by "
        f"`hf:FOLDER,{option}=COLUMN`, or in Python keep only the columns to use by "
        "`select_columns`."
    )


def _class_names(table: Any, named: str | None) -> tuple[str, ...]:
    column = _label_column(table, named)
    names = getattr(table.features[column], "names", None) if column is not None else None
    return tuple(map(printable, names or ()))


def _labels(table: Any, column: str) -> Tensor:
    values = table.select_columns([column]).with_format("numpy")[:][column]
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DataError(
            f"The labels in {column!r} must be class numbers, got {table.features[column]}. "
            "Convert them by `class_encode_column`."
        )
    if len(array) and int(array.min()) < 0:
        raise DataError(
            f"The labels in {column!r} must be from 0 up, got {int(array.min())}, which stands for "
            "unknown. Remove these rows, or the part."
        )
    return torch.from_numpy(array.astype(np.int64))


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:6])) + (", …" if len(names) > 6 else "")
