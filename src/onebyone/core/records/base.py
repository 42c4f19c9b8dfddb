"""What every record can do: be checked, become JSON, be saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import msgspec

from onebyone.core.errors import RecordError
from onebyone.core.fields import check_fields, check_known, check_version
from onebyone.core.json_text import parse, read_file
from onebyone.core.write_files import write_text

FORMAT = 3  # raised when a saved record of an older version could no longer be read
_LONGEST = 400  # characters of a message, which may quote a value of any length


class Record:
    """What every record can do: become JSON, be saved, and be loaded again.

    A record is checked whole when it is made, and so when it is read: each field against its
    annotation, then what fields must be to one another (:meth:`check`).
    """

    def __post_init__(self) -> None:
        check_version(type(self), getattr(self, "format", None))
        check_fields(self)
        self.check()

    def check(self) -> None:
        """Check what fields must be to one another.

        Raises:
            RecordError: Names the fields.
        """

    def _repr_html_(self) -> str | None:
        """Return the record's tables as a notebook shows them; ``None`` if it has none."""
        made = getattr(self, "tables", None) or getattr(self, "table", None)
        if made is None:
            return None
        found = made()
        tables = found if isinstance(found, tuple) else (found,)
        return "".join(table.to_html() for table in tables) or None

    def to_json(self) -> str:
        """Return the record as indented JSON text, which has been read back.

        Raises:
            RecordError: If the text would not give this record again.
        """
        kind = type(self).__name__
        try:
            text = msgspec.json.encode(self, enc_hook=_plain)
            same = msgspec.json.decode(text, type=type(self)) == self
        except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
            raise RecordError(f"This {kind} cannot be written as JSON: {error}.") from error
        if not same:
            raise RecordError(f"This {kind} would not be read back from JSON as it is.")
        return msgspec.json.format(text, indent=2).decode() + "\n"

    def save(self, path: str | Path) -> None:
        """Write the record to a JSON file, whole or not at all, and only if it can be read again.

        Raises:
            OutputError: If the file cannot be written, or what was written not be read.
        """
        write_text(path, self.to_json(), check=type(self).load)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a record from JSON text.

        Raises:
            RecordError: If the text is not JSON, or not this record: a field is missing, unknown,
                or not what it must be; says where.
        """
        kind = cls.__name__
        try:
            content = parse(text)
        except RecordError as error:
            raise RecordError(f"This is not a saved {kind}: {error}.") from error
        if isinstance(content, dict):
            check_version(cls, content.get("format"))
        try:
            record = msgspec.json.decode(text, type=cls)
            check_known(content, msgspec.json.decode(msgspec.json.encode(record)))
        except (msgspec.MsgspecError, RecordError) as error:
            why = _abridged(str(error).rstrip("."))
            raise RecordError(f"This is not a saved {kind}: {why}.") from error
        return record

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record from a JSON file.

        Raises:
            RecordError: If the file is missing or is not this record; says where.
        """
        try:
            text = read_file(path)
        except RecordError as error:
            raise RecordError(f"Cannot read the {cls.__name__} at {path}: {error}.") from error
        try:
            return cls.from_json(text)
        except RecordError as error:
            raise RecordError(f"{path}: {error}") from error


def _abridged(message: str) -> str:
    """Return a message of which the middle is left out if it is long: its end says where."""
    if len(message) <= _LONGEST:
        return message
    half = _LONGEST // 2
    return f"{message[:half]} … {message[-half:]}"


def in_order(low_name: str, low: float, high_name: str, high: float) -> None:
    """Check that one number is not above another.

    Raises:
        RecordError: If it is.
    """
    if low > high:
        raise RecordError(f"`{low_name}` must be at most `{high_name}`, got {low:g} and {high:g}.")


def _plain(value: Any) -> Any:
    """Return a number of NumPy's as one of Python's."""
    if hasattr(value, "dtype") and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no part of JSON")
