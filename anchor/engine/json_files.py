"""Readers of JSON that a run wrote and that a disk, an editor or an interrupted copy may have damaged."""

import json
from pathlib import Path
from typing import Any


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: the text is not a JSON object: cut off, altered, nested too deep, or another kind of value.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("cannot be read") from error
    if not isinstance(found, dict):
        raise ValueError(f"cannot be read: it holds {str(found)[:20]}, not an object")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: the file is missing or holds no object; the message says why, without the path.
    """
    if not path.is_file():
        raise ValueError("cannot be read: it is no file")
    return parse_object(path.read_bytes())
