"""Lines of E5 files, for commands that pass through rows they cannot parse: only `pack` judges rows."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from anchor.data.row_files import open_input
from anchor.errors import DataError
from anchor.progress import tracked

SIDES = ("query", "positive")


class Line(NamedTuple):
    """Non-blank line of a file.

    Attributes:
        number: line number from 1.
        data: bytes of the line, with the line end.
        row: parsed row, or None if it is not an object or one of its sides is not text.
    """

    number: int
    data: bytes
    row: dict[str, Any] | None


def read_lines(file: Path, description: str) -> Iterator[Line]:
    """Yield the non-blank lines of a JSON-lines file.

    Raises:
        DataError: if the file cannot be read or decompressed.
    """
    try:
        with open_input(file) as stream:
            for number, data in enumerate(tracked(stream, description, None), start=1):
                if not data.isspace():
                    yield Line(number, data if data.endswith(b"\n") else data + b"\n", _row(data))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _row(data: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if isinstance(row, dict) and all(isinstance(row.get(side), str) for side in SIDES):
        return row
    return None


def negatives_of(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row's `negative`, which is a text or a list of texts."""
    value = row.get("negative")
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
