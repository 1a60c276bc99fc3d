"""Read JSON files that may be damaged, and check their shape."""

import json
from pathlib import Path
from typing import Any

from anchor.errors import ModelError, shortened

Shape = type | tuple[type, ...] | dict[Any, Any] | list[Any]
"""A type, a list with the shape of its items, or a dict from keys to shapes (``{str: shape}`` for any keys)."""


def load_json(file: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: the file is not readable, not UTF-8, malformed, nested too deep, or has a number with thousands of
            digits. The message does not name the file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error


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


def refuse_other_shape(value: Any, shape: Shape, name: str = "it") -> None:
    """Refuse a parsed value that does not have the expected shape; extra keys are allowed.

    Args:
        value: result of :func:`load_json`.
        shape: expected shape.
        name: name of the value in the message.

    Raises:
        ValueError: a part is missing or has another type. The message names the first one.
    """
    if isinstance(shape, dict):
        _refuse_type(value, (dict,), name)
        for key, part in shape.items():
            if key is str:
                for found, one in value.items():
                    refuse_other_shape(one, part, _joined(name, found))
            elif key not in value:
                raise ValueError(f"{_joined(name, key)} is missing")
            else:
                refuse_other_shape(value[key], part, _joined(name, key))
    elif isinstance(shape, list):
        _refuse_type(value, (list,), name)
        for number, one in enumerate(value):
            refuse_other_shape(one, shape[0], _joined(name, str(number)))
    else:
        _refuse_type(value, shape if isinstance(shape, tuple) else (shape,), name)


def _joined(name: str, key: str) -> str:
    return key if name == "it" else f"{name}.{key}"


def _refuse_type(value: Any, types: tuple[type, ...], name: str) -> None:
    # In Python, a bool is an int too.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        expected = " or ".join(_WORDS[one] for one in types)
        raise ValueError(f"{name} is {shortened(value)}, expected {expected}")


_WORDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def read_model_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a model folder.

    Raises:
        ModelError: the file is missing or malformed, or does not hold an object.
    """
    try:
        content = load_json(file)
    except OSError as error:
        raise ModelError(f"{file}: not readable: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{file}: malformed JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected an object")
    return content
