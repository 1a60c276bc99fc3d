"""Limit on text length from the position embeddings in a model's ``config.json``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchor.errors import DataError

_SHIFTING = ("dynamic", "longrope", "su")
"""Kinds of scaled rotary embeddings whose frequencies depend on a pack's longest text once it is long enough."""


def check_positions(config: Mapping[str, Any], model: str, max_tokens: int, where: str) -> None:
    """Refuse texts that exceed a model's positions, or that are long enough to change other texts of their pack.

    Args:
        config: parsed ``config.json`` of the model.
        model: path or name of the model, for the message.
        max_tokens: longest text, template included.
        where: beginning of the message; ends in the name of the setting.

    Raises:
        DataError: ``max_tokens`` is above the limit.
    """
    positions = _whole(config.get("max_position_embeddings"))
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, Mapping) else {}
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    original = _whole(rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings")))
    limit, reason = positions, "max_position_embeddings"
    if kind in _SHIFTING:
        limit = min(filter(None, (positions, original)), default=None)
        reason = f"rope_type {kind}: beyond them the longest text of a pack changes the others"
    elif kind in ("yarn", "linear") and positions is not None and isinstance(factor := rope.get("factor"), int | float):
        # Some models state the number of positions before scaling, others after.
        limit, reason = max(positions, int(factor * (original or positions))), f"rope_type {kind}, factor {factor:g}"
    if limit is not None and max_tokens > limit:
        raise DataError(
            f"{where} is {max_tokens}, but {model} has {limit} positions ({reason}); give texts at most {limit} tokens"
        )


def check_positions_of_folder(path: str, max_tokens: int, where: str) -> None:
    """Run :func:`check_positions` if the path is a folder with a ``config.json``; otherwise do nothing.

    Raises:
        DataError: ``max_tokens`` is above the limit, or the file is unreadable.
    """
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not readable as JSON: {error}") from error
    if isinstance(config, dict):
        check_positions(config, path, max_tokens, where)


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
