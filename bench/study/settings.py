"""Settings that a folder is made with, kept in it as ``settings.json`` before the work begins."""

import json
from pathlib import Path
from typing import Any

from anchor.errors import ConfigError
from eval.embedding.vectors import write_json

_NAME = "settings.json"
_NO_WORK = {".study.lock", _NAME + ".tmp"}


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a folder without work; refuse a folder whose settings differ.

    Args:
        folder: an existing folder.
        settings: everything that decides the folder's content, as JSON values.

    Raises:
        ConfigError: the folder was made with other settings, each of which is named, or with unknown ones.
    """
    file = folder / _NAME
    remedy = f"delete {folder} or choose another work_dir"
    if file.is_file():
        before, now = _flat(json.loads(file.read_text(encoding="utf-8"))), _flat(json.loads(json.dumps(settings)))
        differing = [
            f"{key} was {json.dumps(before.get(key))}, is {json.dumps(now.get(key))}"
            for key in dict.fromkeys((*before, *now))
            if before.get(key) != now.get(key)
        ]
        if differing:
            raise ConfigError(f"{folder}: made with other settings: {'; '.join(differing)}; {remedy}")
    elif any(path.name not in _NO_WORK for path in folder.iterdir()):
        raise ConfigError(f"{folder}: made with settings that are not known, it has no {_NAME}; {remedy}")
    else:
        write_json(file, settings)


def _flat(node: Any, name: str = "") -> dict[str, Any]:
    """Return the values by dotted name; a list is one value."""
    if not isinstance(node, dict):
        return {name: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}
